"""The noise schedule of Stable Diffusion as the hosts' ``predictor`` offers it (scaled-linear betas, 1000 steps)."""

from __future__ import annotations

import torch
from torch import nn


def _column(sigma: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return sigma.view(sigma.shape[:1] + (1,) * (like.ndim - 1))


class Predictor(nn.Module):
    """Sigmas and timesteps, and how a network's output becomes a denoised latent.

    ``prediction_type`` is ``epsilon`` or ``v_prediction``. The random networks are read as v-predictors: their output
    then only bends the trajectory, and a latent of ordinary size comes out (an epsilon-predictor that predicts no noise
    would leave nothing but noise).
    """

    sigmas: torch.Tensor
    log_sigmas: torch.Tensor
    alphas_cumprod: torch.Tensor

    def __init__(
        self,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        steps: int = 1000,
        prediction_type: str = "v_prediction",
    ) -> None:
        super().__init__()
        self.prediction_type = prediction_type
        self.sigma_data = 1.0
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        self.set_sigmas(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)

    def set_sigmas(self, sigmas: torch.Tensor) -> None:
        """Use another ascending table (as hosts do for zero-terminal-SNR schedules)."""
        self.register_buffer("sigmas", sigmas.float())
        self.register_buffer("log_sigmas", sigmas.log().float())

    @property
    def sigma_min(self) -> torch.Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> torch.Tensor:
        return self.sigmas[-1]

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Index (int64) of the table entry nearest to each sigma, by logarithm."""
        distance = (sigma.log().to(self.log_sigmas.device) - self.log_sigmas[:, None]).abs()
        return distance.argmin(dim=0).view(sigma.shape).to(sigma.device)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Sigma at a timestep, log-linear between table entries, clamped to the table."""
        t = timestep.float().to(self.log_sigmas.device).clamp(0, len(self.sigmas) - 1)
        low, high, w = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - w) * self.log_sigmas[low] + w * self.log_sigmas[high]).exp().to(timestep.device)

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma at a share of the noise schedule: 0 and less give a huge number, 1 and more give 0."""
        if percent <= 0.0:
            return 999999999.9
        if percent >= 1.0:
            return 0.0
        return float(self.sigma(torch.tensor((1.0 - percent) * 999.0)))

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return noise / (_column(sigma, noise) ** 2 + self.sigma_data**2) ** 0.5

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        s = _column(sigma, model_output)
        if self.prediction_type == "epsilon":
            return model_input - model_output * s
        total = s**2 + self.sigma_data**2
        return model_input * self.sigma_data**2 / total - model_output * s * self.sigma_data / total**0.5

    def noise_scaling(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise: bool = False
    ) -> torch.Tensor:
        scale = torch.sqrt(1.0 + sigma**2.0) if max_denoise else sigma
        return noise * scale + latent_image

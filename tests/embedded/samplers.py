"""Sampling loops in k-diffusion's form: a model that denoises, a list of sigmas, one callback per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

Model = Callable[..., torch.Tensor]
Callback = Callable[[int], None]
Noise = Callable[[], torch.Tensor]


def euler(
    model: Model, x: torch.Tensor, sigmas: torch.Tensor, extra: dict[str, Any], callback: Callback, noise: Noise
) -> torch.Tensor:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 2 without churn)."""
    ones = x.new_ones(x.shape[0])
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma * ones, **extra)
        callback(i)
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
    return x


def euler_ancestral(
    model: Model, x: torch.Tensor, sigmas: torch.Tensor, extra: dict[str, Any], callback: Callback, noise: Noise
) -> torch.Tensor:
    """Euler steps a little too far down, then fresh noise up to the next level."""
    ones = x.new_ones(x.shape[0])
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma * ones, **extra)
        callback(i)
        up = torch.minimum(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
        down = (sigma_next**2 - up**2) ** 0.5
        x = x + (x - denoised) / sigma * (down - sigma)
        if sigma_next > 0:
            x = x + noise() * up
    return x


def heun(
    model: Model, x: torch.Tensor, sigmas: torch.Tensor, extra: dict[str, Any], callback: Callback, noise: Noise
) -> torch.Tensor:
    """Heun's second-order method: two calls per step, one in the step that ends at sigma 0."""
    ones = x.new_ones(x.shape[0])
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        slope = (x - model(x, sigma * ones, **extra)) / sigma
        callback(i)
        step = sigma_next - sigma
        if sigma_next == 0:
            x = x + slope * step
        else:
            ahead = x + slope * step
            slope_ahead = (ahead - model(ahead, sigma_next * ones, **extra)) / sigma_next
            x = x + (slope + slope_ahead) / 2 * step
    return x


def dpmpp_2m(
    model: Model, x: torch.Tensor, sigmas: torch.Tensor, extra: dict[str, Any], callback: Callback, noise: Noise
) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) in terms of sigma, lambda = -log sigma."""
    ones = x.new_ones(x.shape[0])
    before: torch.Tensor | None = None
    width_before = sigmas.new_zeros(())
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma * ones, **extra)
        callback(i)
        if sigma_next == 0:
            x = denoised
            continue
        width = sigma.log() - sigma_next.log()
        target = denoised
        if before is not None:
            slope = width / (2 * width_before)
            target = denoised + slope * (denoised - before)
        x = sigma_next / sigma * x + (1 - sigma_next / sigma) * target
        before, width_before = denoised, width
    return x


def ddim(
    model: Model,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    alphas: torch.Tensor,
    extra: dict[str, Any],
    callback: Callback,
) -> torch.Tensor:
    """DDIM (Song et al. 2021, eq. 12 with sigma 0) over ascending ``timesteps``, as the hosts loop over them.

    ``model`` takes timesteps and gives epsilon; ``x`` is variance-preserving. The hosts' loop leaves out the lowest
    timestep: ``len(timesteps) - 1`` calls.
    """
    ones = x.new_ones(x.shape[0])
    before = torch.cat([timesteps.new_zeros(1), timesteps[:-1]])
    for i in range(len(timesteps) - 1):
        index = len(timesteps) - 1 - i
        epsilon = model(x, timesteps[index] * ones, **extra)
        a, a_next = alphas[timesteps[index]], alphas[before[index]]
        clean = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        x = a_next.sqrt() * clean + (1 - a_next).sqrt() * epsilon
        callback(i)
    return x


@dataclass(frozen=True)
class SamplerData:
    """One sampler of the list; ``options`` as extensions read them."""

    name: str
    function: Callable[..., torch.Tensor]
    aliases: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def timesteps(self) -> bool:
        """Whether it runs over timesteps (DDIM) rather than over sigmas."""
        return self.function is ddim

    def total_steps(self, steps: int) -> int:
        """Expected number of denoiser calls."""
        return steps * 2 if self.options.get("second_order") else steps


SAMPLERS = (
    SamplerData("Euler", euler, ["k_euler"]),
    SamplerData("Euler a", euler_ancestral, ["k_euler_a"]),
    SamplerData("Heun", heun, ["k_heun"], {"second_order": True}),
    SamplerData("DPM++ 2M", dpmpp_2m, ["k_dpmpp_2m"], {"scheduler": "karras"}),
    SamplerData("DDIM", ddim, ["ddim"]),
)
SAMPLERS_BY_NAME = {s.name: s for s in SAMPLERS}

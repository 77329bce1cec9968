"""The classifier-free-guidance denoiser between a sampler and the UNet, with the hosts' callbacks and order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .callbacks import AfterCFGCallbackParams, CFGDenoiserParams
from .cond_batch import Chunk, cond_chunks, denoise_a1111, denoise_forge, uncond_chunk
from .prompts import Composition, reconstruct_cond_batch, reconstruct_multicond_batch

if TYPE_CHECKING:
    from .host import Host


class InterruptedException(BaseException):
    """Ends sampling; the latent so far becomes the picture."""


class ModelLink:
    """What extensions reach through ``denoiser.inner_model``."""

    def __init__(self, sd_model: Any) -> None:
        self.inner_model = sd_model
        self.predictor = sd_model.kmodel.predictor
        self.sigmas = self.predictor.sigmas


class CFGDenoiser(torch.nn.Module):
    """``forward(x, sigma, ...)``: callbacks, then one or more UNet calls, then guidance.

    ``step`` counts calls of this denoiser and ``total_steps`` how many are expected (Heun: two a step).
    """

    def __init__(self, host: Host, sampler: Any, timesteps: bool) -> None:
        super().__init__()
        self.host = host
        self.sampler = sampler
        self.timesteps = timesteps
        self.step = 0
        self.steps = 0
        self.total_steps = 0
        self.p: Any = None
        self.init_latent: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.nmask: torch.Tensor | None = None
        self.padded_cond_uncond = False

    @property
    def inner_model(self) -> ModelLink:
        return ModelLink(self.host.sd_model)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        uncond: Any,
        cond: Any,
        cond_scale: float,
        s_min_uncond: float,
        image_cond: torch.Tensor | None,
    ) -> torch.Tensor:
        """Denoised latents at the sigmas ``[B]``; for a sampler over timesteps: epsilon at the timesteps ``[B]``."""
        state = self.host.state
        if state.interrupted or state.skipped:
            raise InterruptedException
        if self.timesteps:
            # the sampler speaks of timesteps and variance-preserving latents, the model of sigmas
            alphas = self.host.sd_model.alphas_cumprod
            sigma = (((1 - alphas) / alphas) ** 0.5)[sigma.round().long()]
            x = x * ((sigma**2 + 1) ** 0.5)[:, None, None, None]
        composition, cond_rows = reconstruct_multicond_batch(cond, self.step)
        uncond_rows = None if uncond is None else reconstruct_cond_batch(uncond, self.step)
        if self.host.row_order == "a1111":
            denoised = self._a1111(x, sigma, cond_rows, uncond_rows, composition, cond_scale, image_cond)
        else:
            if self.p.is_hr_pass:
                cond_scale = self.p.hr_cfg
            denoised = self._forge(x, sigma, cond_rows, uncond_rows, composition, cond_scale, s_min_uncond, image_cond)
        self.sampler.last_latent = denoised
        state.current_latent = denoised
        after = AfterCFGCallbackParams(denoised, state.sampling_step, state.sampling_steps)
        self.host.callbacks.run("cfg_after_cfg", after)
        denoised = after.x
        self.step += 1
        if self.timesteps:
            epsilon: torch.Tensor = (x - denoised) / sigma[:, None, None, None]
            return epsilon
        return denoised

    def _announce(
        self, x: torch.Tensor, image_cond: Any, sigma: torch.Tensor, cond: Any, uncond: Any
    ) -> CFGDenoiserParams:
        state = self.host.state
        params = CFGDenoiserParams(x, image_cond, sigma, state.sampling_step, state.sampling_steps, cond, uncond, self)
        self.host.callbacks.run("cfg_denoiser", params)
        return params

    def _without_uncond(self, cond_scale: float, s_min_uncond: float, sigma: torch.Tensor) -> float:
        """Guidance scale after the settings that leave the negative prompt out of some steps."""
        opts = self.host.opts
        if opts.skip_early_cond > 0 and self.step / self.total_steps <= opts.skip_early_cond:
            self.p.extra_generation_params["Skip Early CFG"] = opts.skip_early_cond
            return 1.0
        if (self.step % 2 or opts.s_min_uncond_all) and s_min_uncond > 0 and sigma[0] < s_min_uncond:
            self.p.extra_generation_params["NGMS"] = s_min_uncond
            return 1.0
        return cond_scale

    def _forge(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: Any,
        uncond: Any,
        composition: Composition,
        cond_scale: float,
        s_min_uncond: float,
        image_cond: Any,
    ) -> torch.Tensor:
        params = self._announce(x, image_cond, sigma, cond, uncond)
        cond_scale = self._without_uncond(cond_scale, s_min_uncond, sigma)
        # read here and not before: callbacks may exchange the unet until the last moment
        unet = self.host.sd_model.forge_objects.unet
        chunks: list[Chunk] = cond_chunks(params.text_cond, composition)
        strength = sum(c.strength for c in chunks)
        if params.text_uncond is not None and not math.isclose(cond_scale, 1.0):
            chunks.append(uncond_chunk(params.text_uncond))
        by_cond, by_uncond = denoise_forge(
            unet.model, params.x, params.sigma, chunks, unet.model_options, self.host.split_calls
        )
        if not math.isclose(strength, 1.0):
            cond_scale = cond_scale * strength
        return by_uncond + (by_cond - by_uncond) * cond_scale

    def _a1111(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: Any,
        uncond: Any,
        composition: Composition,
        cond_scale: float,
        image_cond: Any,
    ) -> torch.Tensor:
        repeats = torch.tensor([len(parts) for parts in composition], device=x.device)
        rows_x = torch.cat([x.repeat_interleave(repeats, 0), x])
        rows_sigma = torch.cat([sigma.repeat_interleave(repeats, 0), sigma])
        params = self._announce(rows_x, image_cond, rows_sigma, cond, uncond)
        unet = self.host.sd_model.forge_objects.unet
        out = denoise_a1111(
            unet.model,
            params.x,
            params.sigma,
            params.text_cond,
            params.text_uncond,
            unet.model_options,
            self.host.split_calls,
        )
        by_uncond = out[-x.shape[0] :]
        denoised = by_uncond.clone()
        for picture, parts in enumerate(composition):
            for row, weight in parts:
                denoised[picture] += (out[row] - by_uncond[picture]) * (weight * cond_scale)
        return denoised

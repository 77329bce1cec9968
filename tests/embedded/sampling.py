"""The sampler object of one pass (``p.sampler``): schedule, start latent, launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .denoiser import CFGDenoiser, InterruptedException, ModelLink
from .samplers import SAMPLERS, SAMPLERS_BY_NAME, SamplerData
from .schedules import SCHEDULES, SCHEDULES_BY_NAME, ddim_timesteps, discrete

if TYPE_CHECKING:
    from .host import Host


def img2img_steps(requested: int | None, p: Any) -> tuple[int, int]:
    """Steps of the whole schedule, and ``t_enc``: how many of them, less one, are executed.

    Plain img2img executes a share of ``p.steps``; with ``requested`` steps (hires) the schedule is made longer so
    that as many are executed.
    """
    strength = min(p.denoising_strength, 0.999)
    if requested is not None:
        return (int(requested / strength) if p.denoising_strength > 0 else 0), requested - 1
    return p.steps, int(strength * p.steps)


def resolve(sampler: str | None, scheduler: str | None) -> tuple[str, str]:
    """Names of a sampler and a schedule that exist, from what a job asks for.

    Old names such as ``"DPM++ 2M Karras"`` name both; an unknown sampler becomes the first of the list, an unknown
    schedule becomes Automatic.
    """
    name = sampler or SAMPLERS[0].name
    schedule = SCHEDULES_BY_NAME.get(scheduler or "", SCHEDULES[0])
    for candidate in SCHEDULES:
        for suffix in (f" {candidate.label}", f" {candidate.name}"):
            if name.endswith(suffix):
                name, schedule = name[: -len(suffix)], candidate
    return SAMPLERS_BY_NAME.get(name, SAMPLERS[0]).name, schedule.label


class Sampler:
    """One pass of one sampler. Extensions may replace ``sample`` and ``sample_img2img`` on the instance."""

    def __init__(self, host: Host, config: SamplerData) -> None:
        self.host = host
        self.config = config
        self.func = config.function
        self.funcname = config.function.__name__
        self.model_wrap_cfg = CFGDenoiser(host, self, config.timesteps)
        self.model_wrap = ModelLink(host.sd_model)
        self.sampler_extra_args: dict[str, Any] = {}
        self.last_latent: torch.Tensor | None = None
        self.p: Any = None

    def get_sigmas(self, p: Any, steps: int) -> torch.Tensor:
        """Sigmas of the whole schedule, ``[steps + 1]``, the last one 0."""
        label = (p.hr_scheduler if p.is_hr_pass else p.scheduler) or "Automatic"
        schedule = SCHEDULES_BY_NAME.get(label, SCHEDULES[0])
        if schedule.function is None:
            schedule = SCHEDULES_BY_NAME[self.config.options.get("scheduler", "automatic")]
        if schedule.function is None:
            return discrete(steps, self.model_wrap.predictor).cpu()
        key = "Hires schedule type" if p.is_hr_pass else "Schedule type"
        if not p.is_hr_pass or schedule.label != p.extra_generation_params.get("Schedule type"):
            p.extra_generation_params[key] = schedule.label
        return schedule.sigmas(steps, self.model_wrap.predictor)

    def sample(
        self,
        p: Any,
        x: torch.Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """txt2img: from pure noise ``x [B, 4, H, W]``."""
        steps = steps or p.steps
        self._prepare(p, x, conditioning, unconditional_conditioning, image_conditioning)
        if self.config.timesteps:
            return self._launch(steps, x, ddim_timesteps(steps).to(x.device))
        sigmas = self.get_sigmas(p, steps).to(x.device)
        start = self.model_wrap.predictor.noise_scaling(sigmas[0], x, torch.zeros_like(x))
        return self._launch(steps, start, sigmas)

    def sample_img2img(
        self,
        p: Any,
        x: torch.Tensor,
        noise: torch.Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """img2img and hires: from the latent ``x`` with noise of the level where the executed steps begin."""
        steps, t_enc = img2img_steps(steps, p)
        self._prepare(p, x, conditioning, unconditional_conditioning, image_conditioning)
        self.model_wrap_cfg.init_latent = x
        if self.config.timesteps:
            timesteps = ddim_timesteps(steps).to(x.device)
            a = self.host.sd_model.alphas_cumprod[timesteps[t_enc]]
            return self._launch(t_enc + 1, x * a.sqrt() + noise * (1 - a).sqrt(), timesteps[:t_enc])
        sigmas = self.get_sigmas(p, steps).to(x.device)[steps - t_enc - 1 :]
        return self._launch(t_enc + 1, self.model_wrap.predictor.noise_scaling(sigmas[0], noise, x), sigmas)

    def _prepare(self, p: Any, x: torch.Tensor, c: Any, uc: Any, image_cond: Any) -> None:
        self.p = self.model_wrap_cfg.p = p
        self.model_wrap_cfg.step = 0
        self.last_latent = x
        self.sampler_extra_args = {
            "cond": c,
            "image_cond": image_cond,
            "uncond": uc,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": p.s_min_uncond or self.host.opts.s_min_uncond,
        }

    def _launch(self, steps: int, x: torch.Tensor, schedule: torch.Tensor) -> torch.Tensor:
        state = self.host.state
        self.model_wrap_cfg.steps = steps
        self.model_wrap_cfg.total_steps = self.config.total_steps(steps)
        state.sampling_steps = steps
        state.sampling_step = 0
        extra = self.sampler_extra_args
        try:
            if self.config.timesteps:
                alphas = self.host.sd_model.alphas_cumprod
                return self.func(self.model_wrap_cfg, x, schedule, alphas, extra, self._step_done)
            return self.func(self.model_wrap_cfg, x, schedule, extra, self._step_done, self.p.rng.next)
        except InterruptedException:
            assert self.last_latent is not None
            return self.last_latent

    def _step_done(self, step: int) -> None:
        self.host.state.sampling_step = step
        self.host.report_step()


def create_sampler(host: Host, name: str) -> Sampler:
    """A fresh sampler for one pass."""
    return Sampler(host, SAMPLERS_BY_NAME[name])

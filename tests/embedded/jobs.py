"""The two kinds of job: txt2img with its hires pass, and img2img."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from . import images
from .extra_networks import parse_prompts
from .processing import OPT_F, ImageRNG, Processing
from .sampling import create_sampler

LATENT_UPSCALERS: dict[str, dict[str, Any]] = {
    "Latent": {"mode": "bilinear", "antialias": False},
    "Latent (antialiased)": {"mode": "bilinear", "antialias": True},
    "Latent (bicubic)": {"mode": "bicubic", "antialias": False},
    "Latent (bicubic antialiased)": {"mode": "bicubic", "antialias": True},
    "Latent (nearest)": {"mode": "nearest", "antialias": False},
    "Latent (nearest-exact)": {"mode": "nearest-exact", "antialias": False},
}


@dataclass(repr=False, eq=False)
class Txt2Img(Processing):
    """txt2img; with ``enable_hr`` a second pass over the upscaled latent."""

    enable_hr: bool = False
    denoising_strength: float | None = 0.75
    hr_scale: float = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int = 0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    hr_cfg: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hr_upscale_to_x = self.hr_upscale_to_y = 0
        self.hr_c: Any = None
        self.hr_uc: Any = None

    def setup_prompts(self) -> None:
        super().setup_prompts()
        count = len(self.all_prompts)
        self.all_hr_prompts = [self.hr_prompt] * count if self.hr_prompt else self.all_prompts
        self.all_hr_negative_prompts = (
            [self.hr_negative_prompt] * count if self.hr_negative_prompt else self.all_negative_prompts
        )

    def init(self, all_prompts: list[str], all_seeds: list[int], all_subseeds: list[int]) -> None:
        if not self.enable_hr:
            return
        name = self.hr_upscaler or "Latent"
        if name not in LATENT_UPSCALERS:
            raise ValueError(f"could not find upscaler named {name}")
        self.latent_scale_mode = LATENT_UPSCALERS[name]
        self.hr_scheduler = self.hr_scheduler or self.scheduler
        params = self.extra_generation_params
        params["Denoising strength"] = self.denoising_strength
        params["Hires CFG Scale"] = self.hr_cfg
        if self.hr_resize_x or self.hr_resize_y:
            self.hr_upscale_to_x = self.hr_resize_x or self.hr_resize_y * self.width // self.height
            self.hr_upscale_to_y = self.hr_resize_y or self.hr_resize_x * self.height // self.width
            params["Hires resize"] = f"{self.hr_resize_x}x{self.hr_resize_y}"
        else:
            self.hr_upscale_to_x = int(self.width * self.hr_scale)
            self.hr_upscale_to_y = int(self.height * self.hr_scale)
            params["Hires upscale"] = self.hr_scale
        if self.hr_second_pass_steps:
            params["Hires steps"] = self.hr_second_pass_steps
        params["Hires upscaler"] = name
        state = self.host.state
        if not state.processing_has_refined_job_count:
            state.job_count = (self.n_iter if state.job_count == -1 else state.job_count) * 2
            state.processing_has_refined_job_count = True

    def sample(self, conditioning: Any, unconditional_conditioning: Any, **kwargs: Any) -> torch.Tensor:
        self.is_hr_pass = False
        self.sampler = create_sampler(self.host, str(self.sampler_name))
        x = self.rng.next()
        self.reset_forge_objects()
        self.before_sampling(x, x, conditioning, unconditional_conditioning)
        if self.modified_noise is not None:
            x, self.modified_noise = self.modified_noise, None
        samples: torch.Tensor = self.sampler.sample(self, x, conditioning, unconditional_conditioning)
        if not self.enable_hr or self.host.state.interrupted:
            return samples
        return self._hires(samples)

    def _hires(self, samples: torch.Tensor) -> torch.Tensor:
        self.is_hr_pass = True
        self.sampler = create_sampler(self.host, self.hr_sampler_name or str(self.sampler_name))
        size = (self.hr_upscale_to_y // OPT_F, self.hr_upscale_to_x // OPT_F)
        samples = F.interpolate(samples, size=size, **self.latent_scale_mode)
        self.host.state.nextjob()
        self.rng = ImageRNG(tuple(samples.shape[1:]), self.seeds, samples.device, self.subseeds, self.subseed_strength)
        noise = self.rng.next()
        span = slice(self.iteration * self.batch_size, (self.iteration + 1) * self.batch_size)
        prompts, networks = parse_prompts(self.all_hr_prompts[span])
        if self.scripts is not None and not self.disable_extra_networks:
            batch = {"batch_number": self.iteration, "seeds": self.seeds, "subseeds": self.subseeds}
            self.scripts.call(
                "after_extra_networks_activate",
                self,
                **batch,
                prompts=prompts,
                extra_network_data=networks,
            )
        self.hr_c, self.hr_uc = self.encode_prompts(
            prompts,
            self.all_hr_negative_prompts[span],
            self.hr_upscale_to_x,
            self.hr_upscale_to_y,
            self.hr_cfg,
        )
        if self.scripts is not None:
            self.scripts.call("before_hr", self)
        # Forge calls the hook twice: on the unet of the first pass, which is then thrown away, and on a clean one
        self.before_sampling(samples, noise, self.hr_c, self.hr_uc)
        self.reset_forge_objects()
        self.before_sampling(samples, noise, self.hr_c, self.hr_uc)
        if self.modified_noise is not None:
            noise, self.modified_noise = self.modified_noise, None
        samples = self.sampler.sample_img2img(
            self, samples, noise, self.hr_c, self.hr_uc, steps=self.hr_second_pass_steps or self.steps
        )
        self.sampler = None
        self.is_hr_pass = False
        return samples


@dataclass(repr=False, eq=False)
class Img2Img(Processing):
    """img2img without masks."""

    init_images: list[Image.Image] = field(default_factory=list)
    resize_mode: int = 0
    denoising_strength: float | None = 0.75
    initial_noise_multiplier: float | None = None
    image_cfg_scale: float | None = None

    def init(self, all_prompts: list[str], all_seeds: list[int], all_subseeds: list[int]) -> None:
        if not self.init_images:
            raise ValueError("img2img needs a picture in init_images")
        self.extra_generation_params["Denoising strength"] = self.denoising_strength
        self.sampler = create_sampler(self.host, str(self.sampler_name))
        resized = [images.resize(image, self.resize_mode, self.width, self.height) for image in self.init_images]
        pixels = torch.stack([images.to_pixels(image) for image in resized]).to(self.sd_model.device)
        if len(pixels) == 1:
            pixels = pixels.expand(self.batch_size, -1, -1, -1)
        self.init_latent = self.sd_model.encode_first_stage(pixels)
        self.image_conditioning = None

    def sample(self, conditioning: Any, unconditional_conditioning: Any, **kwargs: Any) -> torch.Tensor:
        x = self.rng.next()
        if self.initial_noise_multiplier is not None:
            x = x * self.initial_noise_multiplier
        self.reset_forge_objects()
        self.before_sampling(self.init_latent, x, conditioning, unconditional_conditioning)
        if self.modified_noise is not None:
            x, self.modified_noise = self.modified_noise, None
        samples: torch.Tensor = self.sampler.sample_img2img(
            self, self.init_latent, x, conditioning, unconditional_conditioning
        )
        return samples

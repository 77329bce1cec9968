"""Jobs: what is asked for, and the hosts' order of doing it (``process_images``)."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image

from . import images, infotext
from .extra_networks import parse_prompts
from .prompts import SdConditioning, get_learned_conditioning, get_multicond_learned_conditioning
from .sampling import resolve
from .scripts_api import PostprocessBatchListArgs, PostprocessImageArgs, PostProcessMaskOverlayArgs, PostSampleArgs

OPT_F = 8
"""Pixels per latent entry."""


class ImageRNG:
    """Noise of a batch: one generator per picture, so a picture doesn't depend on its neighbours.

    ``subseed_strength`` turns the first noise that far towards the noise of the subseed, along the sphere.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        seeds: list[int],
        device: torch.device,
        subseeds: list[int] | None = None,
        subseed_strength: float = 0.0,
    ) -> None:
        self.shape = tuple(shape)
        self.seeds = seeds
        self.device = device
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._subseeds = subseeds if subseed_strength else None
        self._strength = subseed_strength

    def next(self) -> torch.Tensor:
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        if self._subseeds is not None:
            others = [torch.randn(self.shape, generator=torch.Generator("cpu").manual_seed(s)) for s in self._subseeds]
            noise = torch.stack([_slerp(a, b, self._strength) for a, b in zip(noise, others, strict=True)])
            self._subseeds = None
        return noise.to(self.device)


def _slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@dataclass(repr=False, eq=False)
class Processing:
    """Fields common to txt2img and img2img, under the hosts' names; the defaults are the API's."""

    host: ClassVar[Any]
    """The ``Host``. Set on the subclass that each host makes for itself."""

    sd_model: Any = None
    outpath_samples: str | None = None
    outpath_grids: str | None = None
    prompt: Any = ""
    negative_prompt: Any = ""
    styles: list[str] | None = None
    seed: int = -1
    subseed: int = -1
    subseed_strength: float = 0
    sampler_name: str | None = None
    scheduler: str | None = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    denoising_strength: float | None = None
    eta: float | None = None
    s_min_uncond: float | None = None
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    disable_extra_networks: bool = False
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool = True

    # not annotated, so not fields
    is_hr_pass = False
    is_api = False
    enable_hr = False
    iteration = 0
    batch_index = 0

    def __post_init__(self) -> None:
        self.scripts: Any = None
        self.script_args: Any = ()
        self.sampler: Any = None
        self.rng: Any = None
        self.modified_noise: torch.Tensor | None = None
        self.extra_generation_params: dict[str, Any] = {}
        self.override_settings = dict(self.override_settings or {})
        self.comments: dict[str, int] = {}
        self.latents_after_sampling: list[torch.Tensor] = []
        self.extra_result_images: list[Image.Image] = []
        self.cached_c = self.cached_uc = None
        self.all_prompts: list[str] = []
        self.all_negative_prompts: list[str] = []
        self.all_seeds: list[int] = []
        self.all_subseeds: list[int] = []
        self.c: Any = None
        self.uc: Any = None

    @property  # type: ignore[no-redef]
    def sd_model(self) -> Any:  # noqa: F811
        """Always the live model, whatever the constructor was given; as on the hosts."""
        return self.host.sd_model

    @sd_model.setter
    def sd_model(self, value: Any) -> None: ...

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def setup_prompts(self) -> None:
        count = self.batch_size * self.n_iter
        self.all_prompts = list(self.prompt) if isinstance(self.prompt, list) else [self.prompt] * count
        negative = self.negative_prompt
        self.all_negative_prompts = list(negative) if isinstance(negative, list) else [negative] * len(self.all_prompts)

    def take_batch(self, n: int) -> None:
        """Prompts and seeds of one batch out of the job's lists."""
        span = slice(n * self.batch_size, (n + 1) * self.batch_size)
        self.prompts, self.negative_prompts = self.all_prompts[span], self.all_negative_prompts[span]
        self.seeds, self.subseeds = self.all_seeds[span], self.all_subseeds[span]

    def encode_prompts(
        self, prompts: list[str], negative: list[str], width: int, height: int, cfg: float
    ) -> tuple[Any, Any]:
        """Conditioning and unconditional conditioning; the latter None at guidance scale 1 on Forge, never on A1111."""
        c = get_multicond_learned_conditioning(
            self.sd_model, SdConditioning(prompts, width=width, height=height), self.steps
        )
        if cfg == 1 and self.host.row_order != "a1111":
            return c, None
        texts = SdConditioning(negative, is_negative_prompt=True, width=width, height=height)
        return c, get_learned_conditioning(self.sd_model, texts, self.steps)

    def setup_conds(self) -> None:
        self.c, self.uc = self.encode_prompts(
            self.prompts, self.negative_prompts, self.width, self.height, self.cfg_scale
        )

    def get_conds(self) -> tuple[Any, Any]:
        return self.c, self.uc

    def init(self, all_prompts: list[str], all_seeds: list[int], all_subseeds: list[int]) -> None: ...

    def sample(self, conditioning: Any, unconditional_conditioning: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def reset_forge_objects(self) -> None:
        """Throw away what extensions set on the model for the pass before."""
        model = self.sd_model
        model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()

    def before_sampling(self, x: torch.Tensor, noise: torch.Tensor, c: Any, uc: Any) -> None:
        if self.scripts is not None:
            self.scripts.call("process_before_every_sampling", self, x=x, noise=noise, c=c, uc=uc)

    def close(self) -> None:
        self.sampler = self.c = self.uc = None


class Processed:
    """Result of a job."""

    def __init__(
        self,
        p: Processing,
        images_list: list[Any],
        seed: int = -1,
        info: str = "",
        infotexts: list[str] | None = None,
        index_of_first_image: int = 0,
        extra_images_list: list[Any] | None = None,
        comments: str = "",
    ) -> None:
        self.images = images_list
        self.extra_images = extra_images_list or []
        self.prompt, self.negative_prompt = p.all_prompts[0], p.all_negative_prompts[0]
        self.all_prompts, self.all_negative_prompts = p.all_prompts, p.all_negative_prompts
        self.seed, self.all_seeds = p.all_seeds[0], p.all_seeds
        self.subseed, self.all_subseeds = p.all_subseeds[0], p.all_subseeds
        self.width, self.height, self.steps = p.width, p.height, p.steps
        self.sampler_name, self.cfg_scale = p.sampler_name, p.cfg_scale
        self.batch_size, self.denoising_strength = p.batch_size, p.denoising_strength
        self.extra_generation_params = p.extra_generation_params
        self.index_of_first_image = index_of_first_image
        self.info = info
        self.infotexts = infotexts or [info]
        self.comments = comments or "".join(f"{text}\n" for text in p.comments)
        self.sd_model_name = p.sd_model.sd_checkpoint_info.name
        self.sd_model_hash = p.sd_model.sd_model_hash

    def js(self) -> str:
        """The API's ``info``."""
        keys = [
            "prompt",
            "all_prompts",
            "negative_prompt",
            "all_negative_prompts",
            "seed",
            "all_seeds",
            "subseed",
            "all_subseeds",
            "width",
            "height",
            "sampler_name",
            "cfg_scale",
            "steps",
            "batch_size",
            "denoising_strength",
            "extra_generation_params",
            "index_of_first_image",
            "infotexts",
            "sd_model_name",
            "sd_model_hash",
        ]
        return json.dumps({key: getattr(self, key) for key in keys}, default=lambda value: None, ensure_ascii=False)


def process_images(p: Processing) -> Processed:
    """Run a job: ``before_process``, settings of the request, the job itself, settings back."""
    host = p.host
    if p.scripts is not None:
        p.scripts.call("before_process", p)
    overrides = p.override_settings or {}
    stored = {key: host.opts.data[key] for key in overrides if key in host.opts.data}
    try:
        for key, value in overrides.items():
            host.opts.set(key, value, is_api=True, run_callbacks=False)
        p.sampler_name, p.scheduler = resolve(p.sampler_name, p.scheduler)
        with host.running(p):
            return process_images_inner(p)
    finally:
        if p.override_settings_restore_afterwards:
            for key, value in stored.items():
                host.opts.set(key, value, run_callbacks=False)


def _fixed_seed(seed: Any) -> int:
    return random.randrange(4294967294) if seed in (None, "", -1) else int(seed)


def process_images_inner(p: Processing) -> Processed:
    """The job itself; what it is called in real hosts, where jobs are found by it on the stack."""
    host, state = p.host, p.host.state
    seed, subseed = _fixed_seed(p.seed), _fixed_seed(p.subseed)
    p.setup_prompts()
    p.all_seeds = [seed + (0 if p.subseed_strength else i) for i in range(len(p.all_prompts))]
    p.all_subseeds = [subseed + i for i in range(len(p.all_prompts))]
    if p.scripts is not None:
        p.scripts.call("process", p)
    texts: list[str] = []
    output: list[Image.Image] = []

    def text_of(index: int) -> str:
        return infotext.create_infotext(p, index, host.reports.report)

    with torch.inference_mode():
        # not wrapped: what an extension puts in place of init may raise and ends the job
        p.init(p.all_prompts, p.all_seeds, p.all_subseeds)
        if state.job_count == -1:
            state.job_count = p.n_iter
        for n in range(p.n_iter):
            p.iteration = n
            state.skipped = False
            if state.interrupted or state.stopping_generation:
                break
            pixels = _one_batch(p, n)
            if pixels is None:
                break
            for i, picture in enumerate(pixels):
                image = _finish(p, picture, i)
                text = text_of(n * p.batch_size + i)
                texts.append(text)
                if host.opts.enable_pnginfo:
                    image.info["parameters"] = text
                output.append(image)
        if not texts:
            texts.append(text_of(0))
        first = 0
        single = len(output) < 2 and host.opts.grid_only_if_multiple
        if (host.opts.return_grid or host.opts.grid_save) and not p.do_not_save_grid and not single:
            grid = images.image_grid(output, p.batch_size)
            if host.opts.return_grid:
                grid.info["parameters"] = texts[0]
                texts.insert(0, texts[0])
                output.insert(0, grid)
                first = 1
    result = Processed(
        p,
        output,
        info=texts[0],
        infotexts=texts,
        index_of_first_image=first,
        extra_images_list=p.extra_result_images,
    )
    if p.scripts is not None:
        p.scripts.call("postprocess", p, result)
    return result


def _one_batch(p: Processing, n: int) -> Any:
    """Latents and pictures of batch ``n``: ``[B, 3, H, W]`` in 0..1, or a list; None if it is empty."""
    state, model, scripts = p.host.state, p.sd_model, p.scripts
    model.forge_objects = model.forge_objects_original.shallow_copy()
    p.take_batch(n)
    shape = (model.forge_objects.vae.latent_channels, p.height // OPT_F, p.width // OPT_F)
    p.rng = ImageRNG(shape, p.seeds, model.device, p.subseeds, p.subseed_strength)
    batch = {"batch_number": n, "prompts": p.prompts, "seeds": p.seeds, "subseeds": p.subseeds}
    if scripts is not None:
        scripts.call("before_process_batch", p, **batch)
    if not p.prompts:
        return None
    p.prompts, networks = parse_prompts(p.prompts)
    if not p.disable_extra_networks:
        p.host.extra_networks.activate(p, networks)
    if scripts is not None and not p.disable_extra_networks:
        batch["prompts"] = p.prompts
        scripts.call("after_extra_networks_activate", p, **batch, extra_network_data=networks)
    p.reset_forge_objects()
    if scripts is not None:
        scripts.call("process_batch", p, **batch)
    p.setup_conds()
    if p.n_iter > 1:
        state.job = f"Batch {n + 1} out of {p.n_iter}"
    samples = p.sample(conditioning=p.c, unconditional_conditioning=p.uc, seeds=p.seeds, prompts=p.prompts)
    p.latents_after_sampling += list(samples)
    if scripts is not None:
        post = PostSampleArgs(samples)
        scripts.call("post_sample", p, post)
        samples = post.samples
    pixels = ((model.decode_first_stage(samples).float() + 1) / 2).clamp(0, 1)
    state.nextjob()
    if scripts is None:
        return pixels
    scripts.call("postprocess_batch", p, images=pixels, batch_number=n)
    p.take_batch(n)
    listed = PostprocessBatchListArgs(list(pixels))
    scripts.call("postprocess_batch_list", p, listed, batch_number=n)
    return listed.images


def _finish(p: Processing, pixels: torch.Tensor, i: int) -> Image.Image:
    """One picture through the hooks that see it as a PIL picture."""
    p.batch_index = i
    image = images.to_image(pixels)
    if p.scripts is None:
        return image
    shown = PostprocessImageArgs(image, i + p.iteration * p.batch_size)
    p.scripts.call("postprocess_image", p, shown)
    p.scripts.call("postprocess_maskoverlay", p, PostProcessMaskOverlayArgs(i, None, None))
    shown = PostprocessImageArgs(shown.image, i + p.iteration * p.batch_size)
    p.scripts.call("postprocess_image_after_composite", p, shown)
    result: Image.Image = shown.image
    return result

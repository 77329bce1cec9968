"""A loaded checkpoint as extensions see it (``shared.sd_model``), built of the small networks."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .ldm import DiffusionModel
from .patcher import ForgeObjects, KModel, UnetPatcher
from .predictor import Predictor
from .prompts import DictWithShape, SdConditioning
from .shapes import SHAPES, Shape, make_unet
from .text import TextEncoder, make_text_model
from .trained import TrainedNetworks, load_trained
from .vae import VAE, make_vae


@dataclass(frozen=True)
class CheckpointInfo:
    """Name and hash of a checkpoint; the random ones exist in memory only."""

    name: str
    shorthash: str

    @property
    def title(self) -> str:
        return f"{self.name} [{self.shorthash}]"

    @property
    def short_title(self) -> str:
        return self.title

    @property
    def filename(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def name_for_extra(self) -> str:
        return self.name


@lru_cache(maxsize=4)
def _networks(shape: Shape, seed: int) -> tuple[Any, Any, Any]:
    return make_unet(shape, seed), make_vae(seed), make_text_model(shape, seed)


@lru_cache(maxsize=2)
def _trained(checkpoint: Path) -> TrainedNetworks:
    return load_trained(checkpoint)


class SDModel:
    """The checkpoint: forge objects, what is known about it, and its text and picture encoders."""

    def __init__(
        self, shape_name: str, seed: int, device: torch.device, dtype: torch.dtype, checkpoint: Path | None = None
    ) -> None:
        """With ``checkpoint`` the trained networks of that file, else random ones of that shape and seed."""
        if shape_name not in SHAPES:
            raise ValueError(f"shape is one of {sorted(SHAPES)}, not {shape_name!r}")
        self.device = device
        # a copy each: hooks that an extension leaves on the modules stay with this model
        if checkpoint is None:
            self.shape = SHAPES[shape_name]
            unet, vae, text = copy.deepcopy(_networks(self.shape, seed))
            tokenizer, scale, predictor = None, 1.0, Predictor()
            name, digest = f"small-random-{shape_name}", f"{seed:010x}"
        else:
            trained = _trained(checkpoint)
            self.shape, tokenizer, scale = trained.shape, trained.tokenizer, trained.scale
            unet, vae, text = copy.deepcopy((trained.unet, trained.vae, trained.text))
            predictor = Predictor(prediction_type="epsilon")
            name, digest = checkpoint.stem, hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:10]
        self.text_encoder = TextEncoder(text.to(device), self.shape, tokenizer)
        if dtype != torch.float32:
            unet.to(dtype=dtype)
        kmodel = KModel(DiffusionModel(unet.to(device)), predictor).to(device)
        cpu = torch.device("cpu")
        self.forge_objects = ForgeObjects(
            unet=UnetPatcher(kmodel, load_device=device, offload_device=cpu, current_device=device),
            clip=self.text_encoder,
            vae=VAE(vae.to(device), scale),
            clipvision=None,
        )
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()
        self.is_sdxl = self.shape.is_sdxl
        self.is_sd1 = not self.is_sdxl
        self.is_sd2 = self.is_sd3 = False
        self.use_distilled_cfg_scale = False
        self.sd_checkpoint_info = CheckpointInfo(name, digest)
        self.sd_model_hash = self.sd_checkpoint_info.shorthash
        self.filename = self.sd_checkpoint_info.filename
        self.alphas_cumprod = kmodel.predictor.alphas_cumprod
        self.comments: list[str] = []
        self.extra_generation_params: dict[str, Any] = {}

    @property
    def kmodel(self) -> KModel:
        """The denoiser of the unpatched model."""
        model: KModel = self.forge_objects_original.unet.model
        return model

    def get_learned_conditioning(self, prompts: SdConditioning) -> torch.Tensor | DictWithShape:
        """Context of prompts of equal length: ``[B, tokens, width]``, for SDXL with the vector beside it.

        SDXL's empty negative prompt is all zeros, as on the hosts.
        """
        encoded = [self.text_encoder.encode(text) for text in prompts]
        context = torch.stack([c for c, _ in encoded])
        if not self.is_sdxl:
            return context
        pooled = torch.stack([p for _, p in encoded])
        if prompts.is_negative_prompt and all(text == "" for text in prompts):
            context, pooled = torch.zeros_like(context), torch.zeros_like(pooled)
        width, height = prompts.width or 1024, prompts.height or 1024
        vector = torch.stack([self.text_encoder.vector(p, width, height) for p in pooled])
        return DictWithShape({"crossattn": context, "vector": vector})

    def encode_first_stage(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels ``[B, 3, H, W]`` in -1..1 -> latents."""
        latents: torch.Tensor = self.forge_objects.vae.encode(pixels)
        return latents

    def decode_first_stage(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents -> pixels, about -1..1."""
        pixels: torch.Tensor = self.forge_objects.vae.decode(latents)
        return pixels

"""UNets of true size with random weights, called as a sampler of the ComfyUI line calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.embedded.ldm import DiffusionModel
from tests.embedded.patcher import KModel, UnetPatcher
from tests.embedded.predictor import Predictor

TEXT_TOKENS = 77


@dataclass(frozen=True)
class Family:
    """A layout of UNet, and what the benchmark does with it."""

    config: Mapping[str, Any]
    latent: int
    """Side of the latent."""
    tokens: int
    """Image tokens of a picture: 16 as a plus adapter makes, 4 as a base one."""
    vector: int = 0
    """Width of the vector beside the text; 0: none."""


_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2816,
}
_SMALL = {"norm_num_groups": 16}

FAMILIES: Mapping[str, Family] = {
    "sd15": Family({"cross_attention_dim": 768, "attention_head_dim": 8}, latent=64, tokens=4),
    "sdxl": Family(_SDXL, latent=128, tokens=16, vector=2816),
    "small-sd15": Family(
        {"cross_attention_dim": 64, "attention_head_dim": 4, "block_out_channels": (32, 64, 128, 128), **_SMALL},
        latent=8,
        tokens=4,
    ),
    "small-sdxl": Family(
        {
            **_SDXL,
            "block_out_channels": (32, 64, 128),
            "attention_head_dim": (1, 2, 4),
            "cross_attention_dim": 128,
            "projection_class_embeddings_input_dim": 96,
            **_SMALL,
        },
        latent=8,
        tokens=16,
        vector=96,
    ),
}
"""The public layouts; the small ones only show that the benchmark runs."""
FAMILIES = {**FAMILIES, "sd15-256": replace(FAMILIES["sd15"], latent=32)}


def make_unet(
    family: Family, device: torch.device, dtype: torch.dtype, weights: torch.device | None = None
) -> UnetPatcher:
    """The UNet in a host's patcher; ``weights`` on the meta device: it takes no room and can't run."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(weights or device):
            unet = UNet2DConditionModel(**family.config)
    finally:
        torch.set_default_dtype(before)
    unet.eval().requires_grad_(False)
    model = KModel(DiffusionModel(unet), Predictor().to(device))
    return UnetPatcher(model, device, device, size=1)


@dataclass(frozen=True)
class Text:
    """The prompts as a sampler announces them, ``[B, M, context width]``, and what the host makes of them."""

    cond: Tensor
    uncond: Tensor
    context: Tensor
    """``[2 B, longest M, context width]``, uncond rows first; the shorter prompt is repeated."""


class Sampling:
    """A place in the middle of sampling: latents, text and noise levels for ``batch`` pictures with both roles.

    Args:
        unet: the plain UNet.
        family: its layout.
        batch: pictures drawn at once.
    """

    CALLS = 32
    """Noise levels, used in turn."""

    def __init__(self, unet: UnetPatcher, family: Family, batch: int) -> None:
        self.unet, self.family, self.batch = unet, family, batch
        parameter = next(unet.model.diffusion_model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._generator = torch.Generator().manual_seed(1)
        self.x = self.random(2 * batch, 4, family.latent, family.latent)
        self.y = self.random(2 * batch, family.vector) if family.vector else None
        self._sigmas = unet.model.predictor.sigma(torch.linspace(900, 400, self.CALLS + 1)).to(self.device)
        self._next = 0

    def random(self, *shape: int) -> Tensor:
        """Normal values where the UNet computes."""
        return torch.randn(*shape, generator=self._generator).to(self.device, self.dtype)

    def text(self, cond_tokens: int = TEXT_TOKENS, uncond_tokens: int = TEXT_TOKENS) -> Text:
        """Two prompts, equalised as hosts of this line do."""
        width = self.family.config["cross_attention_dim"]
        cond, uncond = (self.random(1, m, width).repeat(self.batch, 1, 1) for m in (cond_tokens, uncond_tokens))
        longest = max(cond_tokens, uncond_tokens)
        rows = [t.repeat(1, longest // t.shape[1], 1) for t in (uncond, cond)]
        return Text(cond, uncond, torch.cat(rows))

    def step(self, unet: UnetPatcher, text: Text, before: Callable[[Tensor], None] | None = None) -> Tensor:
        """One step with ``unet``, and before its UNet call what a host lets extensions do."""

        def call(sigma: Tensor) -> Tensor:
            if before is not None:
                before(sigma)
            options = {**unet.model_options["transformer_options"], "cond_or_uncond": [1, 0], "sigmas": sigma}
            return unet.model.apply_model(
                self.x, torch.cat((sigma, sigma)), text.context, y=self.y, transformer_options=options
            )

        return self.euler(call)

    @torch.inference_mode()
    def euler(self, call: Callable[[Tensor], Tensor]) -> Tensor:
        """A step of Euler's method, around a UNet call that gives the denoised latents of both roles.

        Like the samplers that hosts have from k-diffusion it asks the device in every step whether the noise level is
        the last one, and so waits for it.
        """
        now, then = self._sigmas[self._next], self._sigmas[self._next + 1]
        self._next = (self._next + 1) % self.CALLS
        if then == 0:
            raise AssertionError("The benchmark stays in the middle of sampling.")
        uncond, cond = call(now.expand(self.batch).contiguous()).chunk(2)
        x = self.x[: self.batch]
        return x + (x - (uncond + 7.0 * (cond - uncond))) / now * (then - now)

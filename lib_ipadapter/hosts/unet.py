"""The cross-attention layers of a live ldm or sgm UNet, which every host of the family has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import IPAdapterError
from ..layers import LAYOUTS, LayerKey
from .base import UNetInfo


def cross_attention(diffusion_model: Any) -> Iterator[tuple[LayerKey, nn.Module]]:
    """Every ``attn2`` with the key that addresses it. Found by name: optimisers and flags change its class."""
    places = [
        *(("input", i, block) for i, block in enumerate(getattr(diffusion_model, "input_blocks", ()))),
        *(("output", i, block) for i, block in enumerate(getattr(diffusion_model, "output_blocks", ()))),
        ("middle", 0, getattr(diffusion_model, "middle_block", ())),
    ]
    for name, number, block in places:
        for child in block:
            for depth, transformer_block in enumerate(getattr(child, "transformer_blocks", ())):
                if getattr(transformer_block, "attn2", None) is not None:
                    yield LayerKey(name, number, depth), transformer_block.attn2


def describe(diffusion_model: Any, device: torch.device, dtype: torch.dtype) -> UNetInfo:
    """What the engine needs to know of a UNet.

    Raises:
        IPAdapterError: if it hasn't the cross-attention layers of SD1.x, SD2.x or SDXL.
    """
    found = dict(cross_attention(diffusion_model))
    keys = LAYOUTS.get(len(found), ())
    if not keys or set(keys) != set(found):
        raise IPAdapterError(
            f"The loaded checkpoint has {len(found)} cross-attention layers; IP-Adapter works with those of Stable "
            "Diffusion 1.x and 2.x (16) and SDXL (70): choose such a checkpoint."
        )
    for key, attn2 in found.items():
        if not hasattr(attn2, "to_k"):
            raise IPAdapterError(
                f"Another extension has put a {type(attn2).__name__} in place of the cross-attention layer "
                f"{' '.join(map(str, key))}: switch it off, or IP-Adapter."
            )
    projections: list[Any] = [found[key].to_k for key in keys]
    return UNetInfo(
        identity=diffusion_model,
        keys=keys,
        widths=tuple(int(to_k.out_features) for to_k in projections),
        context_width=int(projections[0].in_features),
        device=device,
        dtype=dtype,
    )

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
    sizes = [_sizes(found[key].to_k) for key in keys]
    return UNetInfo(
        identity=diffusion_model,
        keys=keys,
        widths=tuple(rows for rows, _ in sizes),
        context_width=sizes[0][1],
        device=device,
        # What weights are only stored in (8 bits, 4 bits) holds no K and V; their first query tells what does.
        dtype=dtype if dtype in COMPUTES_IN else torch.float32,
    )


COMPUTES_IN = (torch.float32, torch.float16, torch.bfloat16)


def _sizes(projection: Any) -> tuple[int, int]:
    """Rows and columns of a linear layer's matrix, also of one whose weights are packed and whose layer has no sizes.

    Forge's layers of NF4 and GGUF checkpoints are such; their weights know what they are unpacked.
    """
    if hasattr(projection, "out_features"):
        return int(projection.out_features), int(projection.in_features)
    weight = projection.weight
    state = getattr(weight, "quant_state", None)
    rows, columns = weight.shape if state is None else state.shape
    return int(rows), int(columns)

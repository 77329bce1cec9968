"""Which cross-attention layer of the UNet each entry of an adapter file belongs to.

An adapter file numbers its layers ``1, 3, 5, …`` in the order in which diffusers lists attention processors: input
blocks, then output blocks, then the middle block (the tables below). The UNet itself runs them in another order:
input, middle, output (:func:`first_in_forward_order`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class LayerKey(NamedTuple):
    """One cross-attention layer, as WebUIs of the ComfyUI line address it in ``patches_replace["attn2"]``."""

    block: str
    """``input``, ``output`` or ``middle``."""
    number: int
    """Index of the block among its kind; 0 for the middle block."""
    depth: int
    """Index of the transformer block inside that UNet block."""


def _layout(*runs: tuple[str, Sequence[int], int]) -> tuple[LayerKey, ...]:
    return tuple(
        LayerKey(block, number, depth)
        for block, numbers, depths in runs
        for number in numbers
        for depth in range(depths)
    )


SD15 = _layout(("input", (1, 2, 4, 5, 7, 8), 1), ("output", range(3, 12), 1), ("middle", (0,), 1))
"""SD1.x and SD2.x: 16 layers."""

SDXL = _layout(
    ("input", (4, 5), 2),
    ("input", (7, 8), 10),
    ("output", (0, 1, 2), 10),
    ("output", (3, 4, 5), 2),
    ("middle", (0,), 10),
)
"""SDXL: 70 layers."""

LAYOUTS: dict[int, tuple[LayerKey, ...]] = {len(SD15): SD15, len(SDXL): SDXL}
"""Layer layout by the number of cross-attention layers."""

# Widths of the K and V projections of the public models, two entries a layer, in the file's order.
SD_V12_CHANNELS = [320] * 4 + [640] * 4 + [1280] * 4 + [1280] * 6 + [640] * 6 + [320] * 6 + [1280] * 2
SD_XL_CHANNELS = [640] * 8 + [1280] * 40 + [1280] * 60 + [640] * 12 + [1280] * 20

WIDEST_LAYER = 1280
"""Width of the widest cross-attention layer of SD1.x, SD2.x and SDXL."""

_FORWARD = {"input": 0, "middle": 1, "output": 2}


def forward_order(keys: Sequence[LayerKey]) -> list[int]:
    """Indices into ``keys`` in the order in which the UNet runs the layers."""
    return sorted(range(len(keys)), key=lambda i: (_FORWARD[keys[i].block], keys[i].number, keys[i].depth))


def first_in_forward_order(keys: Sequence[LayerKey]) -> int:
    """Index into ``keys`` of the layer that the UNet runs first."""
    return forward_order(keys)[0]

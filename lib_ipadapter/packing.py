"""Tensors that lie evenly spaced in one piece of memory, seen as one.

K/V of a picture are 140 small tensors on SDXL. Kept together they move, are weighed and are laid out for the rows of a
batch as a few large ones, and nothing but their places in memory need be known for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def evenly(tensors: Sequence[Tensor]) -> Tensor | None:
    """Several of one shape as one view with a dimension more; None unless their places are evenly spaced.

    The distance may be zero: one tensor several times.
    """
    first, places = tensors[0], [int(t.storage_offset()) for t in tensors]
    step = places[1] - places[0] if len(places) > 1 else 0
    if step < 0 or any(place != places[0] + n * step for n, place in enumerate(places)):
        return None
    if not all(
        t.shape == first.shape
        and t.stride() == first.stride()
        # The storage itself, since tensors made in inference mode don't know what they are views of.
        and t.untyped_storage()._cdata == first.untyped_storage()._cdata
        for t in tensors[1:]
    ):
        return None
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))


def as_one(tensors: Sequence[Tensor]) -> Tensor:
    """Several of one shape with a dimension more: a view where they are evenly spaced, else a copy."""
    view = evenly(tensors)
    return torch.stack(tuple(tensors)) if view is None else view


def row(tensors: Sequence[Tensor]) -> Tensor:
    """Several ``[1, T, C]`` as one ``[1, sum of T, C]``: a view where they lie side by side, else a copy."""
    if len({t.shape for t in tensors}) > 1:
        return torch.cat(tuple(tensors), dim=1)
    return as_one(tensors).flatten(0, 2).unsqueeze(0)


def by_width(tensors: Sequence[Tensor]) -> dict[int, list[int]]:
    """Which of them, ``[1, T, C]`` each, have the same C."""
    found: dict[int, list[int]] = {}
    for number, t in enumerate(tensors):
        found.setdefault(int(t.shape[2]), []).append(number)
    return found


def in_host_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, ``[1, T, C]`` each, those of one width side by side."""
    copies = list(tensors)
    for numbers in by_width(tensors).values():
        together = torch.cat([tensors[n] for n in numbers]).cpu()
        for n, tensor in zip(numbers, together.unsqueeze(1).unbind(), strict=True):
            copies[n] = tensor
    return copies

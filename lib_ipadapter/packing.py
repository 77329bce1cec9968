"""Tensors that lie side by side in memory, seen as one.

K/V of a picture are 140 small tensors on SDXL. Kept side by side they move, are weighed and are concatenated as a few
large ones, and nothing but their places in memory need be known for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether both lie in one piece of memory."""
    # The storage itself, since tensors made in inference mode don't know what they are views of.
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def merged(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Several ``[1, T, C]`` as few ``[T', C]``, in their order: what lies side by side is one view."""
    found: list[tuple[Tensor, int]] = []
    end = -1
    for t in tensors:
        tokens, width = t.shape[1:]
        place = t.storage_offset()
        if place == end and share_memory(found[-1][0], t):
            found[-1] = (found[-1][0], found[-1][1] + tokens)
        else:
            found.append((t, tokens))
        end = int(place) + tokens * width if t.is_contiguous() else -1
    return tuple(
        t[0] if tokens == t.shape[1] else t.as_strided((tokens, t.shape[2]), (t.shape[2], 1)) for t, tokens in found
    )


def row(tensors: Sequence[Tensor]) -> Tensor:
    """Several ``[1, T, C]`` as one ``[1, sum of T, C]``: a view where they lie side by side, else a copy."""
    views = merged(tensors)
    return (views[0] if len(views) == 1 else torch.cat(views)).unsqueeze(0)


def pair(first: Tensor, second: Tensor) -> Tensor | None:
    """Two ``[1, T, C]`` as one view ``[2, T, C]``, if they lie in this order in one piece of memory."""
    distance = int(second.storage_offset()) - int(first.storage_offset())
    same = first.shape == second.shape and first.stride()[1:] == second.stride()[1:]
    if not same or distance < 0 or not share_memory(first, second):
        return None
    return first.as_strided((2, *first.shape[1:]), (distance, *first.stride()[1:]))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Several ``[1, T, C]`` as ``[number, T, C]``: a view where they lie side by side, else a copy."""
    return row(tensors).view(len(tensors), *tensors[0].shape[1:])


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

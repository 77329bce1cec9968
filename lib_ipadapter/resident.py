"""Modules too large to be moved as a whole: they stay in host memory, and are brought where they compute one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class Resident(nn.ModuleList):
    """Modules of one shape, of which one at a time lies where the computing is done.

    Moving or casting what they are part of leaves them as the file has them. So nowhere is a second copy of all: not
    on the device, and not in another precision, which would take twice the memory and as long to make as to use.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Resident:
        return self

    def brought(self, count: int, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
        """The first ``count`` of them, there, each to be used before the next is asked for."""
        place: nn.Module | None = None
        for module in list(self)[:count]:
            if all(parameter.device == device and parameter.dtype == dtype for parameter in module.parameters()):
                yield module
                continue
            if place is None:
                place = deepcopy(module).to(device=device, dtype=dtype)
            for target, source in zip(place.parameters(), module.parameters(), strict=True):
                target.copy_(source)
            yield place


def bytes_there(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that a module takes where it computes in ``dtype``."""

    def count(tensors: Iterator[Tensor]) -> int:
        return sum(tensor.numel() for tensor in tensors)

    parts = [part for part in module.modules() if isinstance(part, Resident) and len(part)]
    staying = sum(count(part.parameters()) - count(part[0].parameters()) for part in parts)
    return (count(module.parameters()) - staying) * dtype.itemsize

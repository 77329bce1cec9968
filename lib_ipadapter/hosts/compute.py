"""Running a module where a host computes, and leaving nothing of it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


def on_device(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    function: Callable[[torch.device, torch.dtype], T],
    release: Callable[[], object],
) -> T:
    """``function(device, dtype)`` with ``module`` there; afterwards, also out of memory, it is in host memory again.

    ``release`` gives the device's freed memory back. The host may be in inference mode, whose tensors couldn't be kept
    for later generations, or in autocast, which would change the precision: neither holds here.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            module.to(device=device, dtype=dtype)
            return function(device, dtype)
        finally:
            if device.type != "cpu":
                module.to("cpu")
                release()

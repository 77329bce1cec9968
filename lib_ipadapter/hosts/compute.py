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
        module.to(dtype=dtype)
        kept = module.state_dict()
        try:
            module.to(device)
            return function(device, dtype)
        finally:
            if device.type != "cpu":
                module.load_state_dict(kept, assign=True)  # host memory still has them: nothing is copied back
                module.to("cpu")
                release()

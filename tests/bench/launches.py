"""What a UNet call asks of a GPU: kernels, their time, and waits of the host for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def launches(step: Callable[[], object]) -> dict[str, float]:
    """Of one call of ``step``: kernels and copies, milliseconds that they take, waits; and the longest of them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    averages = profiler.key_averages()  # the calls of CUDA's library are among them
    on_device = [each for each in averages if each.device_type == DeviceType.CUDA]
    return {
        "kernels": sum(each.count for each in on_device),
        "device ms": sum(each.self_device_time_total for each in on_device) / 1e3,
        "waits": sum(each.count for each in averages if each.key in WAITS),
        "concatenations": sum(each.count for each in on_device if "CatArray" in each.key),
        "concatenations ms": sum(each.self_device_time_total for each in on_device if "CatArray" in each.key) / 1e3,
        "attention ms": sum(
            each.self_device_time_total for each in on_device if "flash" in each.key or "fmha" in each.key
        )
        / 1e3,
    }

"""Counts what the per-layer path may not do: read the device, or bring something there."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

FORBIDDEN = ("to", "copy_", "cpu", "cuda", "item", "numpy", "tolist", "__bool__", "__float__", "__int__")


@pytest.fixture
def forbidden_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of forbidden tensor methods, one entry for each call from now on."""
    calls: list[str] = []
    for name in FORBIDDEN:
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            # Attention on the meta device is Python inside torch, which calls .to as well.
            if f"{os.sep}torch{os.sep}" not in sys._getframe(1).f_code.co_filename:
                calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return calls

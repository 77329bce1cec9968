"""IP-Adapter for the Stable Diffusion WebUI family: a picture as a prompt.

This file does two things only. Every Forge ships a built-in extension whose package has this very name and no
``__init__.py``; extending our path by every folder of that name on ``sys.path`` keeps its modules importable beside
ours. And the public names are offered lazily, so that importing the package loads nothing.
"""

from __future__ import annotations

import pkgutil
from typing import Any

__path__ = pkgutil.extend_path(__path__, __name__)

_PUBLIC = {
    "IPAdapterError": "errors",
    "IPAdapterModel": "adapter",
    "ImageProjModel": "projections",
    "Resampler": "projections",
    "To_KV": "kv",
    "Unit": "units",
    "clip_preprocess": "pictures",
    "load_ip_adapter": "engine",
    "patch_model": "patch",
    "preprocess": "engine",
    "sdp": "patch",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))

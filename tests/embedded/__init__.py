"""The embedded host: a small WebUI in which always-visible extensions run without a real one.

Diffusion, text and pictures are done by diffusers' and transformers' own networks at small width with random weights;
the shell around them looks like Forge to an extension: the same modules, callbacks, call and row order, API and page.

    from tests.embedded import Host
    with Host("sd15", models_path=folder) as host:
        picture = host.txt2img(prompt="a fox", steps=4, width=128, height=128).image
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .host import Host, Result
    from .record import UNetCall

__all__ = ["Host", "Result", "UNetCall"]


def __getattr__(name: str) -> Any:
    # Looked up when asked for: the networks alone (the benchmark's) need none of the packages of a WebUI.
    if name in __all__:
        return getattr(import_module(".record" if name == "UNetCall" else ".host", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The embedded host: a small WebUI in which always-visible extensions run without a real one.

Diffusion, text and pictures are done by diffusers' and transformers' own networks at small width with random weights;
the shell around them looks like Forge to an extension: the same modules, callbacks, call and row order, API and page.

    from tests.embedded import Host
    with Host("sd15", models_path=folder) as host:
        picture = host.txt2img(prompt="a fox", steps=4, width=128, height=128).image
"""

from __future__ import annotations

from .host import Host, Result
from .record import UNetCall

__all__ = ["Host", "Result", "UNetCall"]

"""The WebUIs that the extension runs in. This folder and ``scripts`` alone import one."""

from __future__ import annotations

from importlib import import_module

from ..errors import IPAdapterError
from .base import Host

# A host is told by a module that only it has, most specific first.
_NAMESPACES = ("backend.patcher.base", "ldm_patched.modules.model_patcher", "modules.sd_hijack")


def detect() -> Host:
    """The host of the WebUI that is running.

    Raises:
        IPAdapterError: if it is none that is supported.
    """
    for name in _NAMESPACES:
        try:
            import_module(name)
        except ImportError:
            continue
        if name.startswith("modules."):
            from .a1111 import A1111Host

            return A1111Host()
        from .comfy import ComfyHost

        return ComfyHost(name.partition(".")[0])
    raise IPAdapterError(
        "IP-Adapter doesn't know this WebUI; it runs in AUTOMATIC1111's WebUI, in Forge and its relatives."
    )

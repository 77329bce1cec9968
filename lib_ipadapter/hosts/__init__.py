"""The WebUIs that the extension runs in. This folder and ``scripts`` alone import one."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

from ..errors import IPAdapterError
from .base import Host

# A host is told by a module that only it has, most specific first.
_NAMESPACES = ("backend.patcher.base", "ldm_patched.modules.model_patcher", "modules.sd_hijack")
# It has modules of AUTOMATIC1111's names, among them the one above, and draws through diffusers all the same.
_SDNEXT = "modules.processing_diffusers"


def detect() -> Host:
    """The host of the WebUI that is running.

    Raises:
        IPAdapterError: if it is none that is supported.
    """
    if _is_there(_SDNEXT):
        raise IPAdapterError(
            "IP-Adapter found SD.Next, which draws through diffusers, where this extension can't act: use SD.Next's "
            "own script, IP Adapters, instead."
        )
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


def _is_there(name: str) -> bool:
    """Whether a module could be imported, without running it: it may be in the middle of its own import."""
    if name in sys.modules:
        return True
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False

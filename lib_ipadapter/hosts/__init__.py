"""The WebUIs that the extension runs in. This folder and ``scripts`` alone import one."""

from __future__ import annotations

from importlib import import_module

from ..errors import IPAdapterError
from .base import Host

# A host is told by a module only it has. AUTOMATIC1111 has its row here once its module hooks exist.
_COMFY_STYLE = ("backend.patcher.base", "ldm_patched.modules.model_patcher")


def detect() -> Host:
    """The host of the WebUI that is running.

    Raises:
        IPAdapterError: if it is none that is supported.
    """
    for name in _COMFY_STYLE:
        try:
            import_module(name)
        except ImportError:
            continue
        from .comfy import ComfyHost

        return ComfyHost(name.partition(".")[0])
    raise IPAdapterError(
        "IP-Adapter doesn't know this WebUI; it runs in Stable Diffusion WebUI Forge and its relatives."
    )

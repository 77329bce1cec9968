"""The checkpoint that a WebUI has loaded, asked for outside a generation."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from .base import Host, UNetInfo


def loaded_unet(host: Host) -> UNetInfo | None:
    """The UNet that is loaded now; None if there is none yet, or one that can't be told.

    ``shared.sd_model`` would load a checkpoint to answer, so the place behind it is looked at.
    """
    try:
        models: Any = import_module("modules.sd_models")
        model = models.model_data.sd_model
        return None if model is None else host.unet_info(SimpleNamespace(sd_model=model))
    except Exception:  # a stand-in before the first checkpoint, or a host without that place: then nothing is known
        return None

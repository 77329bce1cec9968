"""Where model files may lie, by the conventions of the WebUIs and of the extensions people come from."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

# Relative to the WebUI's folder ``models``. Where a file system ignores case, both spellings are one folder.
ADAPTERS = ("ipadapter", "IP-Adapter", "ControlNet", "controlnet")
ENCODERS = ("clip_vision", "ControlNetPreprocessor", "ControlNet", "controlnet")

# Command-line flags whose folders are searched first: ours from ``preload.py``, then the ControlNet extensions'.
ADAPTER_FLAGS = ("ip_adapter_models_path", "controlnet_dir")
ENCODER_FLAGS = ("ip_adapter_encoders_path", "controlnet_preprocessor_models_dir", "controlnet_dir")


class ModelFolders:
    """The part of :class:`.base.Host` that is the same everywhere."""

    def adapter_folders(self) -> list[Path]:
        """Folders with adapters and negatives."""
        return _folders(ADAPTER_FLAGS, ADAPTERS)

    def encoder_folders(self) -> list[Path]:
        """Folders with image encoders."""
        return _folders(ENCODER_FLAGS, ENCODERS)


def _folders(flags: tuple[str, ...], names: tuple[str, ...]) -> list[Path]:
    cmd_opts: Any = import_module("modules.shared").cmd_opts
    models = Path(import_module("modules.paths").models_path)
    given = [Path(value) for flag in flags if (value := getattr(cmd_opts, flag, None))]
    folders: dict[Path, Path] = {}
    for folder in [*given, *(models / name for name in names)]:
        folders.setdefault(folder.resolve(), folder)
    existing = [folder for folder in folders.values() if folder.is_dir()]
    return existing or [models / names[0]]

"""Where model files may lie, by the conventions of the WebUIs and of the extensions people come from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class _Places:
    """Where one kind of file may lie."""

    flags: tuple[str, ...]
    """Command-line flags whose folders are searched first: ours from ``preload.py``, then those of ControlNet."""
    own_setting: str
    """Our setting with folders, one a line."""
    settings: tuple[str, ...]
    """Settings of AUTOMATIC1111's ControlNet extension that name a folder."""
    models: tuple[str, ...]
    """Relative to the WebUI's folder ``models``. Where a file system ignores case, both spellings are one folder."""
    extension: str
    """Relative to the folder of AUTOMATIC1111's ControlNet extension."""


ADAPTERS = _Places(
    flags=("ip_adapter_models_path", "controlnet_dir"),
    own_setting="ip_adapter_models_folders",
    settings=("control_net_models_path",),
    models=("ipadapter", "IP-Adapter", "ControlNet", "controlnet"),
    extension="models",
)
ENCODERS = _Places(
    flags=(
        "ip_adapter_encoders_path",
        "controlnet_preprocessor_models_dir",
        "controlnet_annotator_models_path",
        "controlnet_dir",
    ),
    own_setting="ip_adapter_encoders_folders",
    settings=("control_net_modules_path",),
    models=("clip_vision", "ControlNetPreprocessor", "ControlNet", "controlnet"),
    extension="annotator/downloads/clip_vision",
)
CONTROLNET_EXTENSION = "sd-webui-controlnet"


class ModelFolders:
    """The part of :class:`.base.Host` that is the same everywhere."""

    def adapter_folders(self) -> list[Path]:
        """Folders with adapters and negatives."""
        return _folders(ADAPTERS)

    def encoder_folders(self) -> list[Path]:
        """Folders with image encoders."""
        return _folders(ENCODERS)


def _folders(places: _Places) -> list[Path]:
    shared: Any = import_module("modules.shared")
    paths: Any = import_module("modules.paths")
    models = Path(paths.models_path)
    extensions = Path(getattr(paths, "extensions_dir", models.parent / "extensions"))
    own = getattr(shared.opts, places.own_setting, "")
    candidates = [
        *(Path(value) for flag in places.flags if (value := getattr(shared.cmd_opts, flag, None))),
        *(Path(line.strip()) for line in str(own or "").splitlines() if line.strip()),
        *(Path(value) for name in places.settings if (value := getattr(shared.opts, name, None))),
        *(models / name for name in places.models),
        extensions / CONTROLNET_EXTENSION / places.extension,
    ]
    folders: dict[Path, Path] = {}
    for folder in candidates:
        folders.setdefault(folder.resolve(), folder)
    existing = [folder for folder in folders.values() if folder.is_dir()]
    return existing or [models / places.models[0]]

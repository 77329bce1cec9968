"""Where model files are looked for: flags first, then settings, the WebUI's folders, the ControlNet extension's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib_ipadapter.hosts.folders import ModelFolders


@pytest.fixture
def webui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A WebUI without any model folder; ``make`` makes some."""
    shared = SimpleNamespace(cmd_opts=SimpleNamespace(), opts=SimpleNamespace())
    paths = SimpleNamespace(models_path=str(tmp_path / "models"), extensions_dir=str(tmp_path / "extensions"))
    for name, module in (("shared", shared), ("paths", paths)):
        monkeypatch.setitem(sys.modules, f"modules.{name}", module)  # type: ignore[arg-type]

    def make(*names: str) -> list[Path]:
        made = [tmp_path / name for name in names]
        for folder in made:
            folder.mkdir(parents=True)
        return made

    return SimpleNamespace(shared=shared, paths=paths, make=make)


def test_every_convention_in_its_order(webui: SimpleNamespace) -> None:
    ours, flag, setting, one, two, three, extension = webui.make(
        "ours",
        "flag",
        "setting",
        "models/ipadapter",
        "models/IP-Adapter",
        "models/ControlNet",
        "extensions/sd-webui-controlnet/models",
    )
    webui.shared.cmd_opts = SimpleNamespace(ip_adapter_models_path=str(ours), controlnet_dir=str(flag))
    webui.shared.opts = SimpleNamespace(control_net_models_path=str(setting))
    assert ModelFolders().adapter_folders() == [ours, flag, setting, one, two, three, extension]


def test_our_settings_name_folders_one_a_line(webui: SimpleNamespace) -> None:
    one, two, models, encoders = webui.make("one", "zwei, é", "models/ipadapter", "models/clip_vision")
    webui.shared.opts = SimpleNamespace(
        ip_adapter_models_folders=f" {one}\n\n{two}\nnowhere", ip_adapter_encoders_folders=None
    )
    assert ModelFolders().adapter_folders() == [one, two, models]
    assert ModelFolders().encoder_folders() == [encoders]


def test_encoders_too(webui: SimpleNamespace) -> None:
    ours, forge, setting, own, preprocessors, controlnet, extension = webui.make(
        "ours",
        "forge",
        "setting",
        "models/clip_vision",
        "models/ControlNetPreprocessor",
        "models/ControlNet",
        "extensions/sd-webui-controlnet/annotator/downloads/clip_vision",
    )
    webui.shared.cmd_opts = SimpleNamespace(
        ip_adapter_encoders_path=str(ours), controlnet_preprocessor_models_dir=str(forge)
    )
    webui.shared.opts = SimpleNamespace(control_net_modules_path=str(setting))
    assert ModelFolders().encoder_folders() == [ours, forge, setting, own, preprocessors, controlnet, extension]


@pytest.mark.parametrize("value", [None, ""])
def test_unset_flags_and_settings_are_no_folders(webui: SimpleNamespace, value: Any) -> None:
    webui.shared.cmd_opts = SimpleNamespace(ip_adapter_models_path=value, controlnet_dir=value)
    webui.shared.opts = SimpleNamespace(control_net_models_path=value)
    (folder,) = webui.make("models/ControlNet")
    assert ModelFolders().adapter_folders() == [folder]


def test_a_folder_given_twice_is_searched_once(webui: SimpleNamespace) -> None:
    (folder,) = webui.make("models/ControlNet")
    (folder.parent / "ipadapter").symlink_to(folder, target_is_directory=True)
    webui.shared.cmd_opts = SimpleNamespace(controlnet_dir=str(folder / ".." / "ControlNet"))
    assert [each.resolve() for each in ModelFolders().adapter_folders()] == [folder.resolve()]


def test_without_any_the_first_of_the_webui_is_named(webui: SimpleNamespace, tmp_path: Path) -> None:
    assert ModelFolders().adapter_folders() == [tmp_path / "models" / "ipadapter"]
    assert ModelFolders().encoder_folders() == [tmp_path / "models" / "clip_vision"]

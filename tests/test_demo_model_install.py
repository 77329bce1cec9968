"""Putting the trained model into an AUTOMATIC1111."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lib_ipadapter.errors import IPAdapterError
from tests.demo_model.install import NAME, install
from tests.embedded.demo import WEIGHTS, main


@pytest.fixture
def webui(tmp_path: Path) -> Path:
    folder = tmp_path / 'web "ui"'
    (folder / "models").mkdir(parents=True)
    (folder / "webui.py").touch()
    return folder


def test_everything_has_its_place(webui: Path) -> None:
    assert main(["--install", str(webui)]) == 0
    checkpoints = webui / "models" / "Stable-diffusion"
    assert (checkpoints / f"{NAME}.safetensors").read_bytes() == (WEIGHTS / "demo.safetensors").read_bytes()
    assert (webui / "models" / "clip_vision" / "demo-vision.safetensors").exists()
    assert {path.name for path in (webui / "models" / "ipadapter").iterdir()} == {
        "demo-base.safetensors",
        "demo-plus.safetensors",
    }
    model = yaml.safe_load((checkpoints / f"{NAME}.yaml").read_text(encoding="utf-8"))["model"]["params"]
    tokenizer = Path(model["cond_stage_config"]["params"]["version"])
    assert (tokenizer / "vocab.json").read_bytes() == (WEIGHTS / "tokenizer" / "vocab.json").read_bytes()
    assert model["unet_config"]["params"]["channel_mult"] == [1, 1, 1, 1]
    assert install(webui) == []  # there already


def test_a_file_of_the_users_stays(webui: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = webui / "models" / "ipadapter" / "demo-plus.safetensors"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    assert main(["--install", str(webui)]) == 1
    assert str(own) in capsys.readouterr().err
    assert own.read_bytes() == b"mine"
    assert not (webui / "models" / "Stable-diffusion").exists()


def test_forge_and_other_folders_are_refused(webui: Path, tmp_path: Path) -> None:
    with pytest.raises(IPAdapterError, match="no WebUI's folder"):
        install(tmp_path)
    (webui / "modules_forge").mkdir()
    with pytest.raises(IPAdapterError, match="true sizes"):
        install(webui)
    assert list((webui / "models").iterdir()) == []

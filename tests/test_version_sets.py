"""The comparison of library sets: what it takes for a difference, and when it makes a set anew."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import version_sets, version_smoke

FOUND: dict[str, Any] = {
    "versions": {"torch": "2.13.0", "numpy": "1.26.2"},
    "modules": 38,
    "pictures": {"RGB, crop": "2a56757d"},
    "attention": [-0.1368, 0.0608],
    "webui": {"labels": ["IP-Adapter"]},
}


def test_what_is_the_same_is_no_difference() -> None:
    assert version_sets.differences(FOUND, FOUND) == []
    close = {**FOUND, "attention": [-0.1368, 0.060801], "versions": {"torch": "2.1.2"}}
    assert version_sets.differences(close, FOUND) == []


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("modules", 37),
        ("pictures", {"RGB, crop": "0"}),
        ("webui", {"labels": []}),
        ("attention", [-0.1368, 0.061]),
        ("attention", [float("nan"), 0.0608]),
    ],
)
def test_a_difference_is_told(what: str, value: Any) -> None:
    (sentence,) = version_sets.differences({**FOUND, what: value}, FOUND)
    assert sentence.startswith(f"{what} differs")


def test_a_library_that_is_not_the_sets_is_told(tmp_path: Path) -> None:
    (tmp_path / "numpy-1.26.2.dist-info").mkdir()
    metadata = tmp_path / "numpy-1.26.2.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.2\n", encoding="utf-8")
    assert version_sets.not_acting(FOUND, tmp_path) == []
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.25.0\n", encoding="utf-8")
    assert version_sets.not_acting(FOUND, tmp_path) == ["numpy was 1.26.2 and the set has 1.25.0."]


def test_a_set_is_made_once_and_again_when_its_pins_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        folder.mkdir(exist_ok=True)
        return SimpleNamespace(returncode=0)

    folder = tmp_path / "oldest"
    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert version_sets.made("oldest", folder) == folder
    assert len(commands) == 1 and commands[0][-len(version_sets.SETS["oldest"].pins) :][0] == "numpy==1.26.2"
    monkeypatch.setitem(version_sets.SETS, "oldest", version_sets.VersionSet(("numpy==1.26.4",), 1))
    version_sets.made("oldest", folder)
    assert len(commands) == 2


def test_a_set_that_pip_cannot_make_is_no_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="The oldest libraries could not be installed"):
            version_sets.made("oldest", tmp_path / "oldest")


@pytest.mark.parametrize("name", version_sets.SETS)
def test_every_set_pins_every_library_but_torch(name: str) -> None:
    pins = version_sets.SETS[name].pins
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+( ; python_version (<|>=) '3\.\d+')?", pin) for pin in pins)
    assert {pin.partition("==")[0] for pin in pins} >= {*version_smoke.LIBRARIES} - {"torch"}


def test_the_smoke_run_takes_every_module() -> None:
    names = version_smoke.modules()
    assert {"units", "hosts", "hosts.a1111", "ui.accordion"} <= set(names) and "__init__" not in names


@pytest.mark.parametrize(("torch", "expected"), [("2.1.2+cu121", ["oldest"]), ("2.13.0", ["oldest", "newest"])])
def test_libraries_that_a_torch_cannot_go_with_are_passed_over(
    torch: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(version_sets.sys, "prefix", "an environment")
    monkeypatch.setattr(version_sets, "smoke", lambda _: {**FOUND, "versions": {"torch": torch}})
    monkeypatch.setattr(version_sets, "made", lambda name, folder, *_: tried.append(name) or folder)
    assert version_sets.main() == 0
    assert tried == [*expected, "gradio 3"]
    assert ("newest: passed over" in capsys.readouterr().out) == ("newest" not in expected)

"""Which host is found in which WebUI: by stand-ins for the modules that each has."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.hosts import detect

# What each has of the modules that matter, as seen in their sources; SD.Next keeps AUTOMATIC1111's names.
A1111 = ("modules.processing", "modules.sd_hijack")
LDM_PATCHED = (*A1111, "ldm_patched.modules.model_patcher")
FORGE = ("modules.processing", "backend.patcher.base")
SDNEXT = (*A1111, "modules.processing_diffusers")


def enter(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    """Stand-ins under these names and nothing else of a WebUI."""
    roots = {"modules", "backend", "ldm_patched"}
    for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
        monkeypatch.delitem(sys.modules, name)
    for root in roots:  # a package without a place, so that nothing on sys.path passes for its part
        monkeypatch.setitem(sys.modules, root, ModuleType(root))
    for name in names:
        while name:
            module = ModuleType(name)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, name, module)
            name = name.rpartition(".")[0]


@pytest.mark.parametrize(
    ("names", "told"), [(A1111, "AUTOMATIC1111"), (FORGE, "Forge"), (LDM_PATCHED, "Forge (ldm_patched)")]
)
def test_hosts_that_are_supported(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], told: str) -> None:
    enter(monkeypatch, names)
    assert detect().name == told


def test_sdnext_is_declined_with_the_name_of_its_own_script(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, SDNEXT)
    with pytest.raises(IPAdapterError) as refusal:
        detect()
    sentence = str(refusal.value)
    assert "found SD.Next" in sentence and "use SD.Next's own script, IP Adapters" in sentence
    assert sentence.count(". ") == 0 and sentence.endswith(".")


def test_sdnext_is_told_by_a_module_that_was_not_imported_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "processing_diffusers.py").write_text("raise RuntimeError('not to be run')\n", encoding="utf-8")
    enter(monkeypatch, A1111)
    sys.modules["modules"].__path__ = [str(tmp_path)]
    with pytest.raises(IPAdapterError, match="found SD.Next"):
        detect()
    assert "modules.processing_diffusers" not in sys.modules


def test_anything_else_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, ("modules.processing",))
    with pytest.raises(IPAdapterError, match="doesn't know this WebUI"):
        detect()

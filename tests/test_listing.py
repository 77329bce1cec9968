"""A folder of two hundred files of more than a gigabyte: headers are read, once, and nothing else."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib_ipadapter import tensorfile
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.library import Library
from tests.adapter_files import base_adapter, save
from tests.huge_files import huge_legacy, huge_safetensors, huge_zip
from tests.test_recognise import public

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a file with a hole takes its full size there")

SDXL_PLUS = {name: info.shape for name, info in public("ip-adapter-plus_sdxl_vit-h").items()}
SDXL_BASE = {name: info.shape for name, info in public("ip-adapter_sdxl").items()}
KIND = "SDXL · plus · 16 tokens · needs CLIP ViT-H"
SAFETENSORS, ZIPS, LEGACIES = 180, 10, 10
HEADERS = 32 * 1024
"""Bytes of the longest of these headers, rounded up, with a buffer's worth beyond it."""
BETWEEN_STORAGES = 8 * 1024
"""A pickled file has a length or a header before each of its storages, and a buffer is read there."""


class Reading:
    """What is read from files while this is in force: files opened, bytes asked of the system, tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[str, int] = {}
        self.tensors = 0
        reading, safe_open = self, tensorfile.safe_open

        class Raw(io.FileIO):
            def readinto(self, buffer: Any) -> int | None:
                count = super().readinto(buffer)
                reading.bytes[str(self.name)] += count or 0
                return count

            def readall(self) -> bytes:
                data = super().readall()
                reading.bytes[str(self.name)] += len(data)
                return data

            def read(self, count: int | None = -1) -> bytes | None:
                data = super().read(-1 if count is None else count)
                reading.bytes[str(self.name)] += len(data or b"")
                return data

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            assert mode == "rb"
            reading.bytes.setdefault(str(path), 0)
            return io.BufferedReader(Raw(str(path)))

        class Mapped:
            def __init__(self, path: str, **kwargs: Any) -> None:
                reading.bytes.setdefault(path, 0)
                self._file = safe_open(path, **kwargs)

            def __enter__(self) -> Mapped:
                self._file.__enter__()
                return self

            def __exit__(self, *caught: object) -> None:
                self._file.__exit__(*caught)

            def get_tensor(self, name: str) -> Any:
                reading.tensors += 1
                return self._file.get_tensor(name)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(tensorfile, "safe_open", Mapped)

    def forget(self) -> None:
        self.bytes.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("huge")
    for number in range(SAFETENSORS):
        huge_safetensors(made / f"s{number:03}.safetensors", SDXL_PLUS)
    for number in range(ZIPS):
        huge_zip(made / f"z{number:03}.bin", SDXL_PLUS)
    for number in range(LEGACIES):
        huge_legacy(made / f"l{number:03}.bin", SDXL_PLUS)
    yield made
    shutil.rmtree(made)  # pytest keeps folders, and whoever copies or counts them would take the holes for data


@pytest.fixture
def library(folder: Path) -> Library:
    return Library(lambda: [folder], lambda: [folder])


def test_the_files_are_large_and_take_no_room(folder: Path) -> None:
    stats = [path.stat() for path in folder.iterdir()]
    assert len(stats) == 200 and min(each.st_size for each in stats) > 10**9
    assert sum(each.st_blocks * 512 for each in stats) < 2**30


def test_every_file_is_listed_with_its_kind(folder: Path, library: Library) -> None:
    kinds = library.adapters()
    assert sorted(kinds) == sorted(path.name for path in folder.iterdir())
    assert {kind.description for kind in kinds.values()} == {KIND}
    assert library.encoders() == {} and library.negatives() == []
    listed = library.listing()
    assert [(each["name"], each["kind"]) for each in listed["adapters"]] == [(name, KIND) for name in sorted(kinds)]
    assert listed["encoders"] == [] and listed["negatives"] == []


def test_listing_reads_headers_once_and_nothing_else(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch)
    library.listing()
    assert len(reading.bytes) == 200 and reading.tensors == 0
    for name, count in reading.bytes.items():
        between = 0 if name.endswith(".safetensors") else len(SDXL_PLUS) * BETWEEN_STORAGES
        assert 0 < count <= 2 * HEADERS + between, name
    reading.forget()
    assert len(library.listing()["adapters"]) == 200
    assert reading.bytes == {}


def test_a_changed_file_is_read_anew_and_a_deleted_one_goes(
    folder: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = library.listing()
    changed, deleted, added = folder / "s000.safetensors", folder / "z000.bin", folder / "t000.safetensors"
    huge_safetensors(changed, SDXL_BASE)
    kept = deleted.rename(folder.parent / "kept.bin")
    huge_safetensors(added, SDXL_BASE)
    try:
        reading = Reading(monkeypatch)
        now = {each["name"]: each["kind"] for each in library.listing()["adapters"]}
        assert set(reading.bytes) == {str(changed), str(added)}
        monkeypatch.undo()
        assert now[changed.name] == now[added.name] == "SDXL · base · 4 tokens · needs CLIP ViT-bigG"
        assert deleted.name not in now
    finally:
        monkeypatch.undo()
        huge_safetensors(changed, SDXL_PLUS)
        kept.rename(deleted)
        added.unlink()
    assert library.listing() == before


def test_a_file_of_the_same_size_with_another_time_is_read_anew(
    folder: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.adapters()
    touched = folder / "s001.safetensors"
    os.utime(touched, (1, 1))
    reading = Reading(monkeypatch)
    assert len(library.adapters()) == 200
    assert set(reading.bytes) == {str(touched)}


def test_a_file_that_could_not_be_read_is_looked_at_again_when_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions change neither size nor time of writing."""
    path = save(base_adapter([8] * 16, 8), tmp_path / "one.safetensors")
    files = Library(lambda: [tmp_path], list)

    def unreadable(path: Path) -> Any:
        raise IPAdapterError(f"{path.name} can't be read.")

    with monkeypatch.context() as patch:
        patch.setattr("lib_ipadapter.library.open_tensors", unreadable)
        assert files.adapters() == {}
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:  # the clock of a file system ticks coarsely
        path.chmod(0o600)
    assert list(files.adapters()) == ["one.safetensors"]

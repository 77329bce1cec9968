"""Fingerprints of model files: the same for a copy, another for whatever differs in what they read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_ipadapter import fingerprint as module
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.fingerprint import fingerprint


def model(path: Path, seed: int = 0, changed: int | None = None) -> Path:
    """A file of a megabyte of data, of which one byte may be changed."""
    data = torch.randint(0, 256, (2**20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if changed is not None:
        data[changed] = 255 - data[changed]
    save_file({"weights": data}, path)
    return path


def test_a_copy_under_another_name_has_the_same(tmp_path: Path) -> None:
    one = model(tmp_path / "one.safetensors")
    other = tmp_path / "other.bin"
    shutil.copyfile(one, other)
    assert fingerprint(one) == fingerprint(other)
    assert len(fingerprint(one)) == 64


@pytest.mark.parametrize("changed", [0, 2**16 - 1, 2**19, 2**20 - 2**16, 2**20 - 1])
def test_data_at_start_middle_and_end_counts(tmp_path: Path, changed: int) -> None:
    assert fingerprint(model(tmp_path / "a.safetensors")) != fingerprint(model(tmp_path / "b.safetensors", 0, changed))


def test_header_and_size_count(tmp_path: Path) -> None:
    data = torch.zeros(2**20, dtype=torch.uint8)
    save_file({"weights": data}, tmp_path / "a.safetensors")
    save_file({"weighty": data}, tmp_path / "b.safetensors")
    save_file({"weights": data}, tmp_path / "c.safetensors", {"note": "x"})
    (tmp_path / "d.bin").write_bytes(bytes(2**20))
    (tmp_path / "e.bin").write_bytes(bytes(2**20 + 1))
    assert len({fingerprint(path) for path in tmp_path.iterdir()}) == 5


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100, (2**40).to_bytes(8, "little") + b"{}", bytes(8) + b"{"])
def test_any_file_has_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert len(fingerprint(path)) == 64


def test_a_file_is_read_once_for_every_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda *args: reads.append(1) or digest(*args))
    path = model(tmp_path / "a.safetensors")
    first = fingerprint(path)
    assert fingerprint(str(path)) == first and len(reads) == 1
    model(path, seed=1)
    os.utime(path, ns=(1, 1))
    assert fingerprint(path) != first and len(reads) == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IPAdapterError, match="gone.safetensors can't be read"):
        fingerprint(tmp_path / "gone.safetensors")

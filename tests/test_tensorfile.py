"""Model files: safetensors as the library writes them, files of every other nature, and damage."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lib_ipadapter import tensorfile
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.tensorfile import TensorInfo, open_tensors

BASE = torch.arange(48, dtype=torch.float32).reshape(6, 8) / 7
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.bool,
]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def refused(path: Path) -> str:
    """The one sentence with which a file is refused; the file must stay as it was."""
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(IPAdapterError) as error:
        open_tensors(path).read()
    assert not path.is_file() or path.read_bytes() == before
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = BASE.to(dtype)
    path = tmp_path / "m.safetensors"
    save_file({"a.b": tensor, "scalar": tensor[0, 1].clone(), "empty": tensor[:0].clone()}, path)
    file = open_tensors(path)
    assert file.kind == "safetensors"
    assert file.path == path
    assert dict(file.tensors) == {
        "a.b": TensorInfo((6, 8), dtype),
        "scalar": TensorInfo((), dtype),
        "empty": TensorInfo((0, 8), dtype),
    }
    found = file.read()
    assert bits(found["a.b"]) == bits(tensor)
    assert bits(found["scalar"]) == bits(tensor[0, 1])
    assert found["empty"].shape == (0, 8)


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": BASE}, path, metadata={"format": "pt", "note": "ü"})
    assert dict(open_tensors(path).metadata) == {"format": "pt", "note": "ü"}
    save_file({"x": BASE}, path)
    assert dict(open_tensors(path).metadata) == {}


def test_names_say_nothing(tmp_path: Path) -> None:
    odd = tmp_path / "adapter.bin"
    save_file({"x": BASE}, odd)
    assert open_tensors(odd).kind == "safetensors"
    for legacy in (True, False):
        path = tmp_path / "adapter.safetensors"
        torch.save({"x": BASE}, path, _use_new_zipfile_serialization=not legacy)
        file = open_tensors(str(path))
        assert file.kind == "pickle"
        assert torch.equal(file.read()["x"], BASE)


def test_only_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": BASE, "b": BASE + 1}, path)
    file = open_tensors(path)
    assert list(file.read(["b"])) == ["b"]
    assert file.read([]) == {}
    with pytest.raises(IPAdapterError, match=r"m\.safetensors has no tensor 'c'"):
        file.read(["c"])


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_large_file_is_read_by_several_threads(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "LARGE", 100)
    monkeypatch.setattr(tensorfile.os, "cpu_count", lambda: 8)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{n}": torch.randn(n % 7, 3, generator=generator) for n in range(40)}
    tensors["scalar"], tensors["flag"] = torch.tensor(2.0), torch.tensor([True, False])
    path = tmp_path / "m.bin"
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors | {"turned": torch.randn(5, 4).t()}, path, _use_new_zipfile_serialization=kind == "zip")
    threads: set[int] = set()
    read = tensorfile.read_stored
    monkeypatch.setattr(tensorfile, "read_stored", lambda *args: threads.add(threading.get_ident()) or read(*args))
    file = open_tensors(path)
    assert len(file._shares(list(file.tensors))) == 4
    groups = [["t6", "t13", "t20"], ["t1", "t8"]]
    with torch.inference_mode():  # as a job inside a job starts
        found = file.read(together=groups)
    assert threading.get_ident() not in threads
    assert list(found) == list(file.tensors)
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor)
    for group in groups:
        first = found[group[0]]
        step = first.nbytes
        assert [found[key].data_ptr() - first.data_ptr() for key in group] == [n * step for n in range(len(group))]


def test_data_are_independent_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": BASE}, path)
    first = open_tensors(path).read()["a"]
    first.zero_()
    assert torch.equal(open_tensors(path).read()["a"], BASE)
    second = open_tensors(path).read()["a"]
    # Overwritten in place, as a mapped file would feel it.
    with path.open("r+b") as file:
        file.seek(-BASE.nbytes, os.SEEK_END)
        file.write(bytes(BASE.nbytes))
    assert torch.equal(second, BASE)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_file_that_changes_after_opening(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.bin"

    def write(tensor: torch.Tensor) -> None:
        if kind == "safetensors":
            save_file({"a": tensor}, path)
        else:
            torch.save({"a": tensor}, path, _use_new_zipfile_serialization=kind == "zip")

    write(BASE)
    file = open_tensors(path)
    write(BASE[:2].clone())
    with pytest.raises(IPAdapterError, match="was changed after it was opened"):
        file.read()
    path.unlink()
    with pytest.raises(IPAdapterError, match="isn't there"):
        file.read()


def test_the_listing_can_not_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": BASE}, path)
    with pytest.raises(TypeError):
        open_tensors(path).tensors["b"] = TensorInfo((), torch.float32)  # type: ignore[index]


OTHER_FILES = {
    "missing": (None, "isn't there"),
    "empty": (b"", "is empty"),
    "web page": (b"\n<!DOCTYPE html><html>not found</html>", "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 44642768\n", "Git LFS"),
    "json": (b'{"error": "gated"}', "is a JSON text"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), "is a GGUF file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "is a picture"),
    "zeros": (bytes(100), "is neither a safetensors file nor one of PyTorch's"),
    "short": (b"\x01", "is neither"),
    "text": (b"hello world, this is text", "is neither"),
    "plain pickle": (b"\x80\x02K\x01.", "is a pickle, but not a PyTorch model file"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_files_of_another_nature(tmp_path: Path, name: str) -> None:
    data, said = OTHER_FILES[name]
    path = tmp_path / "m.safetensors"
    if data is not None:
        path.write_bytes(data)
    assert said in refused(path)


def test_folders_and_odd_paths(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)
    with pytest.raises(IPAdapterError, match="can't be read"):
        open_tensors("a\0b")
    path = tmp_path / "m.bin"
    path.symlink_to(path)
    with pytest.raises(IPAdapterError, match="can't be read"):
        open_tensors(path)


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: dict[str, tuple[Any, bytes]] = {
    "no json": (b"{nonsense", b""),
    "no utf-8": (b'{"\xff": 1}', b""),
    "a list in braces": (b"{}[]", b""),
    "twice the same name": (b'{"x": 1, "x": 2}', b""),
    "deep": (b'{"x":' * 100_000, b""),
    "long number": (b'{"x":' + b"9" * 10_000 + b"}", b""),
    "no entry": ({"x": 5}, b""),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "negative shape": ({"x": {**X, "shape": [-2]}}, bytes(8)),
    "wrong shape": ({"x": {**X, "shape": [3]}}, bytes(8)),
    "huge shape": ({"x": {**X, "shape": [2**40, 2**40]}}, bytes(8)),
    "true shape": ({"x": {**X, "shape": [True]}}, bytes(8)),
    "beyond": ({"x": {**X, "data_offsets": [4, 12]}}, bytes(8)),
    "backwards": ({"x": {**X, "data_offsets": [8, 0]}}, bytes(8)),
    "negative offset": ({"x": {**X, "data_offsets": [-8, 0]}}, bytes(8)),
    "three offsets": ({"x": {**X, "data_offsets": [0, 8, 8]}}, bytes(8)),
    "no data": ({"x": X}, b""),
    "a gap": ({"x": {**X, "data_offsets": [4, 12]}}, bytes(12)),
    "overlap": ({"x": X, "y": X}, bytes(8)),
    "trailing data": ({"x": X}, bytes(9)),
    "odd metadata": ({"__metadata__": {"a": 1}, "x": X}, bytes(8)),
    "listed metadata": ({"__metadata__": ["a"], "x": X}, bytes(8)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers(tmp_path: Path, name: str) -> None:
    header, data = HEADERS[name]
    assert "m.safetensors is damaged or cut short" in refused(written(tmp_path / "m.safetensors", header, data))


def test_header_lengths(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for length in (3, 2**31, 2**47):
        path.write_bytes(struct.pack("<Q", length) + b'{"x": 1}')
        assert "is damaged or cut short" in refused(path)
    path.write_bytes(struct.pack("<Q", 2**63) + b'{"x": 1}')
    assert "is neither" in refused(path)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    assert "holds the tensor 'x' as F4" in refused(written(tmp_path / "m.safetensors", header, bytes(2)))


def test_cut_short_anywhere(tmp_path: Path) -> None:
    whole_path = tmp_path / "whole.safetensors"
    save_file({"a": BASE, "b": BASE.half()}, whole_path)
    whole = whole_path.read_bytes()
    path = tmp_path / "m.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4))
def test_changed_anywhere(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": BASE, "b": BASE.half()}, path)
    whole = bytearray(path.read_bytes())
    for at, data in changes:
        whole[at : at + len(data)] = data
    path.write_bytes(bytes(whole))
    with contextlib.suppress(IPAdapterError):
        open_tensors(path).read()
    assert path.read_bytes() == bytes(whole)

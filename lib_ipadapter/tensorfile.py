"""Model files as names, shapes and dtypes first, and as data only when asked.

A file's nature is decided by its first bytes, never by its name. Nothing here writes, renames, moves or deletes.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from .errors import IPAdapterError
from .pickles import ZIP_MAGIC, StoredTensor, index_legacy, index_zip, looks_like_pickle, read_stored

MAX_THREADS, LARGE = 4, 64 * 1024**2
"""Threads that read one file, and bytes for which one more is worth its start: new memory takes most of the time."""

MAX_HEADER = 4 * 1024**2
"""Bytes of a safetensors header that are read: a second's work at worst; the largest public ones have some hundred
thousand, and those of LoRAs with all their training data a million or two."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TensorFile:
    """A model file whose header has been read.

    Attributes:
        path: the file.
        kind: ``safetensors``, or ``pickle`` for either of PyTorch's own containers.
        tensors: what it holds, by name; groups inside groups are joined with a dot (``image_proj.proj.weight``).
        metadata: the free text of a safetensors header; empty for the others.
    """

    path: Path
    kind: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    _stamp: tuple[int, int] = field(repr=False)
    _stored: Mapping[str, StoredTensor] = field(repr=False)

    def read(
        self, keys: Iterable[str] | None = None, together: Iterable[Sequence[str]] = ()
    ) -> dict[str, torch.Tensor]:
        """The data of the tensors named (of all, with None), contiguous, in host memory, independent of the file.

        Args:
            keys: names; nothing else is read.
            together: groups of them, of one shape and dtype each, that shall lie side by side in memory.

        Raises:
            IPAdapterError: if a tensor isn't in the file, or the file has changed since it was opened.
        """
        wanted = list(self.tensors) if keys is None else list(keys)
        for key in wanted:
            if key not in self.tensors:
                raise IPAdapterError(f"{self.path.name} has no tensor {key!r}: choose another file.")
        # Read, not mapped: a mapped file can't be replaced while it is in use, and a page at a time is slower.
        places: dict[str, torch.Tensor] = {}
        for group in together:
            info = self.tensors[group[0]]
            with torch.inference_mode(False):  # else other threads couldn't fill it
                block = torch.empty((len(group), *info.shape), dtype=info.dtype)
            places.update(zip(group, block.unbind(), strict=True))
        shares = self._shares(wanted)
        if len(shares) == 1:
            found = self._read_some(shares[0], places)
        else:
            with ThreadPoolExecutor(len(shares)) as pool:
                parts = list(pool.map(lambda share: self._read_some(share, places), shares))
            found = {key: tensor for part in parts for key, tensor in part.items()}
        return {key: found[key] for key in wanted}

    def _shares(self, keys: Sequence[str]) -> list[list[str]]:
        """The tensors in the order of the file, cut where a thread's part of a large file ends."""
        ordered = sorted(keys, key=lambda key: self._stored[key].start)
        total = sum(self._stored[key].length for key in keys)
        threads = min(MAX_THREADS, os.cpu_count() or 1, 1 + total // LARGE)
        shares: list[list[str]] = [[] for _ in range(threads)]
        before = 0
        for key in ordered:
            shares[min(threads - 1, before * threads // max(1, total))].append(key)
            before += self._stored[key].length
        return shares

    def _read_some(self, keys: Iterable[str], places: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with _opened(self.path) as file:
            if _stamp(file) != self._stamp:
                raise IPAdapterError(f"{self.path.name} was changed after it was opened: try again.")
            return {key: read_stored(file, self._stored[key], self.path.name, places.get(key)) for key in keys}


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Reads the header of a model file: .safetensors, or what ``torch.save`` writes (.bin, .pt, .pth, .ckpt).

    Raises:
        IPAdapterError: if the file is missing, unreadable, damaged or no model file, or asks to run something.
    """
    path = Path(path)
    name = path.name
    with _opened(path) as file:
        stamp = _stamp(file)
        size = stamp[0]
        head = file.read(512)
        if _looks_like_safetensors(head):
            kind = "safetensors"
            stored, metadata = _safetensors_header(file, size, name)
            _second_opinion(path)
        else:
            kind, metadata = "pickle", {}
            if head.startswith(ZIP_MAGIC):
                stored = index_zip(file, size, name)
            elif looks_like_pickle(head):
                stored = index_legacy(file, size, name)
            else:
                raise _unknown(head, size, name)
    tensors = {key: TensorInfo(tensor.shape, tensor.dtype) for key, tensor in stored.items()}
    return TensorFile(
        path, kind, MappingProxyType(tensors), MappingProxyType(metadata), stamp, MappingProxyType(stored)
    )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path.is_dir():
        raise IPAdapterError(f"{path.name} is a folder where a model file is expected: choose the file inside it.")
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise IPAdapterError(f"The model file {path.name} isn't there: refresh the list or put it back.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, IPAdapterError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise IPAdapterError(f"The model file {path.name} can't be read ({reason}): check its permissions.") from error


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


# --- safetensors ------------------------------------------------------------------------------------------------------

_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
# Not every torch that WebUIs ship has every dtype.
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, of) for name, of in _DTYPE_NAMES.items() if hasattr(torch, of)
}


def _looks_like_safetensors(head: bytes) -> bool:
    # Eight bytes of length, of which the upper two are never needed, and then JSON.
    return len(head) > 8 and head[6:9] == b"\0\0{"


def _safetensors_header(file: BinaryIO, size: int, name: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER or 8 + length > size:
        limits = f"the file has {size} and at most {MAX_HEADER} are read"
        raise _damaged(name, f"its header claims {length} bytes, {limits}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(name, f"its header is no JSON: {str(error)[:80]}") from error
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(name, "its metadata are no texts")
    start = 8 + length
    return {key: _place(key, entry, start, size - start, name) for key, entry in header.items()}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _place(key: str, entry: Any, start: int, data: int, name: str) -> StoredTensor:
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype_name = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2 and isinstance(dtype_name, str)):
        raise _damaged(name, f"its tensor {key[:100]!r} is malformed")
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        raise IPAdapterError(
            f"{name} holds the tensor {key[:100]!r} as {dtype_name[:20]}, which this PyTorch "
            f"({torch.__version__}) can't "
            "hold: get the file in half precision."
        )
    begin, end = offsets
    if not begin <= end <= data or end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(name, f"its tensor {key[:100]!r} doesn't fit the file")
    strides = tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))
    return StoredTensor(dtype, tuple(shape), strides, start + begin, end - begin, sys.byteorder != "little")


def _are_counts(numbers: Any) -> bool:
    if not isinstance(numbers, list) or len(numbers) > 16:
        return False
    # A loop, since a folder of large adapters has some hundred thousand of these, and all() takes thrice as long.
    for n in numbers:  # noqa: SIM110
        if type(n) is not int or not 0 <= n <= 2**48:
            return False
    return True


def _second_opinion(path: Path) -> None:
    """The library that will read the data checks what we don't, such as gaps between tensors."""
    try:
        with safe_open(str(path), framework="pt", device="cpu"):
            pass
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _damaged(path.name, str(error)) from error


# --- sentences --------------------------------------------------------------------------------------------------------

_SIGNATURES = (
    (b"version https://git-lfs", "the pointer that Git LFS leaves in place of a large file"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"{", "a JSON text"),
    (b"gguf", "a GGUF file"),
    (b"\x89png", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)


def _unknown(head: bytes, size: int, name: str) -> IPAdapterError:
    start = head.lstrip().lower()
    if size == 0:
        return IPAdapterError(f"{name} is empty: download it again.")
    what = next((what for signature, what in _SIGNATURES if start.startswith(signature)), None)
    if what is not None:
        return IPAdapterError(f"{name} is {what}, not a model file: download the model itself.")
    return IPAdapterError(
        f"{name} is neither a safetensors file nor one of PyTorch's (or only the beginning of one): download it again."
    )


def _damaged(name: str, what: str) -> IPAdapterError:
    return IPAdapterError(f"{name} is damaged or cut short ({' '.join(what.split())[:200]}): download it again.")

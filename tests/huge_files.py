"""Model files of public layout and full size that take no room: everything but their headers is a hole."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]

FLOATS = {2: ("F16", "HalfStorage"), 4: ("F32", "FloatStorage")}
"""The dtype in safetensors and the storage in torch, by the bytes of an element (``item`` below)."""


def huge_safetensors(path: Path, shapes: Shapes, item: int = 4, **metadata: str) -> Path:
    """A safetensors file of zeros."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + item * math.prod(shape)
        header[name] = {"dtype": FLOATS[item][0], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def huge_zip(path: Path, shapes: Shapes, item: int = 4, grouped: bool = False) -> Path:
    """What ``torch.save`` writes of a dict of zeros, whose directory lies behind the data.

    Args:
        grouped: a dict of dicts, by what stands before the first dot of the names.
    """
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _data_pkl(shapes, item, grouped=grouped))
        for number, shape in enumerate(shapes.values()):
            record = zipfile.ZipInfo(f"archive/data/{number}")
            archive.writestr(record, b"")
            # The record gets its size afterwards, in its own header and in the directory, without being written.
            record.file_size = record.compress_size = item * math.prod(shape)
            file.seek(record.header_offset)
            file.write(record.FileHeader(zip64=False))
            file.seek(record.file_size, io.SEEK_CUR)
            archive.start_dir = file.tell()
    return path


def huge_legacy(path: Path, shapes: Shapes, item: int = 4, grouped: bool = False) -> Path:
    """What ``torch.save`` wrote of it before it knew zip; ``grouped`` as for :func:`huge_zip`."""
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            file.write(pickle.dumps(value, 2))
        file.write(_data_pkl(shapes, item, legacy=True, grouped=grouped))
        file.write(pickle.dumps([str(number) for number in range(len(shapes))], 2))
        for shape in shapes.values():
            file.write(struct.pack("<q", math.prod(shape)))
            file.seek(item * math.prod(shape), io.SEEK_CUR)
        file.truncate()
    return path


class _Storage:
    """Stands for a tensor's storage, which a pickle names and doesn't hold."""

    def __init__(self, key: str, numel: int) -> None:
        self.key, self.numel = key, numel


class _Tensor:
    """Pickles as a tensor does."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self._storage, self._shape = storage, shape

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        from torch._utils import _rebuild_tensor_v2

        strides = tuple(math.prod(self._shape[i + 1 :]) for i in range(len(self._shape)))
        return _rebuild_tensor_v2, (self._storage, 0, self._shape, strides, False, {})


def _data_pkl(shapes: Shapes, item: int, *, legacy: bool = False, grouped: bool = False) -> bytes:
    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> tuple[object, ...] | None:
            if not isinstance(value, _Storage):
                return None
            plain = ("storage", getattr(torch, FLOATS[item][1]), value.key, "cpu", value.numel)
            return (*plain, None) if legacy else plain

    file = io.BytesIO()
    tensors = {
        name: _Tensor(_Storage(str(number), math.prod(shape)), shape)
        for number, (name, shape) in enumerate(shapes.items())
    }
    groups: dict[str, dict[str, _Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {})[key] = tensor
    Pickler(file, 2).dump(groups if grouped else tensors)
    return file.getvalue()

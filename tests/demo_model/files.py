"""Files that training writes with nothing but the standard library and torch: safetensors and PNG."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; a half-written one never has that name."""
    header: dict[str, object] = {}
    parts: list[bytes] = []
    at = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        data = bytes(tensor.flatten().view(torch.uint8).numpy().data)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(data)],
        }
        parts.append(data)
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _replace(path, struct.pack("<Q", len(text)) + text + b"".join(parts))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that :func:`save_tensors` wrote."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + at for at in entry["data_offsets"])
        dtype = dtypes[entry["dtype"]]
        count = (end - start) // dtype.itemsize
        tensors[name] = torch.frombuffer(data, dtype=dtype, offset=start, count=count).view(entry["shape"]).clone()
    return tensors


def save_png(picture: Tensor, path: Path) -> None:
    """Write ``[3, H, W]`` in 0..1."""
    rows = (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous()
    height, width, _ = rows.shape
    raw = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows.view(height, -1)], 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(raw.numpy().tobytes(), 6))
    _replace(path, b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b""))


def sheet(pictures: Tensor, columns: int) -> Tensor:
    """Pictures ``[N, 3, S, S]`` side by side in rows, as one picture; the last row is filled up with white."""
    n, _, size, _ = pictures.shape
    rows = -(-n // columns)
    full = torch.ones(rows * columns, 3, size, size, device=pictures.device)
    full[:n] = pictures
    return full.view(rows, columns, 3, size, size).permute(2, 0, 3, 1, 4).reshape(3, rows * size, columns * size)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(data)
    os.replace(beside, path)

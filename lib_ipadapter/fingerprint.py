"""A short name for what a model file holds, in milliseconds: a whole hash costs seconds for each gigabyte.

A hash of the header alone wouldn't tell adapters of one shape apart, such as plus and plus-face.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from .errors import IPAdapterError
from .tensorfile import MAX_HEADER

SAMPLE = 64 * 1024
"""Bytes that are read at each of the three places."""

FileIdentity = tuple[str, int, int]

_known: dict[FileIdentity, str] = {}


def file_identity(path: Path) -> FileIdentity:
    """What changes when a file does.

    Raises:
        IPAdapterError: if the file can't be read.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise IPAdapterError(
            f"The file {path.name} can't be read ({error.strerror}): refresh the model list."
        ) from error
    return str(path), stat.st_size, stat.st_mtime_ns


def fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 (64 hexadecimal digits) over a file's size, its header, and 64 KiB each from three places of its data.

    The places are the start, the middle and the end of the tensor data; files that aren't safetensors count as data
    from the first byte on. A file is read once for every change of its size or time.

    Raises:
        IPAdapterError: if the file can't be read.
    """
    path = Path(path)
    try:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in _known:
            with path.open("rb") as file:
                _known[key] = _digest(file, stat.st_size)
        return _known[key]
    except OSError as error:
        raise IPAdapterError(
            f"The file {path.name} can't be read ({error.strerror or error}): refresh the model list."
        ) from error


def _digest(file: BinaryIO, size: int) -> str:
    start = _header_size(file, size)
    digest = hashlib.sha256(f"{size}\n".encode())
    file.seek(0)
    digest.update(file.read(start))
    for place in (start, start + max(0, size - start - SAMPLE) // 2, max(start, size - SAMPLE)):
        file.seek(place)
        digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _header_size(file: BinaryIO, size: int) -> int:
    """Bytes before the tensor data of a safetensors file; 0 for any other."""
    head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return 8 + length if head[8:] == b"{" and length <= MAX_HEADER and 8 + length <= size else 0

"""Pictures uploaded in the page, kept in memory by the hash of their content.

A unit in the page carries the hash and not the picture, so that a generation's arguments stay a few hundred
bytes. The store is bounded: the pictures that were used least recently go first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from io import BytesIO
from typing import TYPE_CHECKING, Any

from .errors import IPAdapterError
from .pictures import picture_hash, read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

LIMIT_BYTES = 256 * 2**20
"""Bytes that are kept by default, as PNG: some fifteen photographs of twelve megapixels, hundreds of small pictures."""


class UploadStore:
    """A thread-safe store of pictures by sha256, holding at most ``limit_bytes`` of PNG files; nothing is lost in them.

    The newest picture always stays, however large it is: the unit that was just filled with it must work.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, picture: Image) -> str:
        """Keep a ``picture`` and return its sha256 (64 hexadecimal digits); the same picture is kept once.

        One that isn't RGB is kept as :func:`~.pictures.read_picture` sees it.
        """
        rgb = picture if picture.mode == "RGB" else read_picture(picture)
        sha256 = picture_hash(rgb)
        with self._lock:
            known = sha256 in self._files
            if known:
                self._files.move_to_end(sha256)
        if not known:
            file = _png(rgb)  # takes a second for a large photograph, and nobody need wait for it
            with self._lock:
                self._bytes += len(file) - len(self._files.pop(sha256, b""))
                self._files[sha256] = file
                while self._bytes > self._limit and len(self._files) > 1:
                    self._bytes -= len(self._files.popitem(last=False)[1])
        return sha256

    def get(self, sha256: str) -> Image:
        """The RGB picture with this hash, a new one for every call.

        Raises:
            IPAdapterError: if it isn't kept (any more).
        """
        with self._lock:
            file = self._files.get(sha256.lower())
            if file is None:
                raise IPAdapterError(
                    f'The uploaded picture with sha256 "{sha256[:64]}" isn\'t kept here (the WebUI that took it keeps '
                    "it until it restarts or many others are uploaded, and no other WebUI has it): upload it again, or "
                    "send it as base64."
                )
            self._files.move_to_end(sha256.lower())
        return read_picture(file)

    def png(self, sha256: str) -> bytes:
        """The picture with this hash as a PNG file; raises as :meth:`get`."""
        return _png(self.get(sha256))

    def listing(self) -> list[dict[str, Any]]:
        """What is kept, the latest used last, ready for JSON: ``sha256`` and ``bytes``."""
        with self._lock:
            return [{"sha256": sha256, "bytes": len(file)} for sha256, file in self._files.items()]

    def forget(self, sha256: str) -> bool:
        """Drops the picture with this hash; whether there was one."""
        with self._lock:
            file = self._files.pop(sha256.lower(), None)
            self._bytes -= len(file or b"")
            return file is not None


def _png(rgb: Image) -> bytes:
    bare = rgb.copy()
    bare.info = {}  # metadata such as a transparent colour would be written along and change what is read
    file = BytesIO()
    bare.save(file, "PNG", compress_level=1)
    return file.getvalue()


_default = UploadStore()


def add(picture: Image) -> str:
    """Keep ``picture`` in the default store; see :meth:`UploadStore.add`."""
    return _default.add(picture)


def get(sha256: str) -> Image:
    """A picture of the default store; see :meth:`UploadStore.get`."""
    return _default.get(sha256)


def png(sha256: str) -> bytes:
    """A picture of the default store as a file; see :meth:`UploadStore.png`."""
    return _default.png(sha256)


def listing() -> list[dict[str, Any]]:
    """What the default store keeps; see :meth:`UploadStore.listing`."""
    return _default.listing()


def forget(sha256: str) -> bool:
    """Drops a picture of the default store; see :meth:`UploadStore.forget`."""
    return _default.forget(sha256)

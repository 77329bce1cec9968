"""Reference pictures by the hash of their content: in memory while they are fresh, on disk once a generation used them.

A unit carries the hash and not the picture, so that a generation's arguments stay a few hundred bytes and an infotext
can say which picture it was. Both parts are bounded: the pictures that were used least recently go first.

Where strangers may reach the WebUI (:attr:`Rules.guarded`), the hash in an infotext must not be enough to get at
somebody's picture, and no host says whose session a generation belongs to. There :meth:`References.add` returns a
handle instead, which only a secret of this WebUI can make of the hash: whoever added a picture has its handle, and
nobody else can guess it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as images

from .errors import IPAdapterError
from .pictures import picture_hash, read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

MEMORY_BYTES = 256 * 2**20
"""Bytes that are kept in memory, as PNG: some fifteen photographs of twelve megapixels, hundreds of small pictures."""
DISK_MB = 1024
"""Megabytes that are kept on disk by default."""
ON, LOCAL, OFF = "on", "when the WebUI is local", "off"
CHOICES = (LOCAL, ON, OFF)
"""When references are kept on disk."""

_FILE = re.compile(r"([0-9a-f]{64})\.png", re.ASCII)
_KEY_FILE = "handles.key"
_ABANDONED = 3600.0
"""Seconds after which a file that was never finished is nobody's any more."""


@dataclass(frozen=True)
class Rules:
    """What holds now, by the owner's settings and the way the WebUI was started.

    Attributes:
        folder: where pictures are kept on disk; None: nowhere.
        limit_bytes: how much may lie there.
        guarded: whether strangers may reach the WebUI.
    """

    folder: Path | None = None
    limit_bytes: int = DISK_MB * 10**6
    guarded: bool = False


def rules_of(folder: Path, choice: object, limit_mb: object, local: bool) -> Rules:
    """The rules that settings make; what isn't a known choice counts as the default."""
    on = choice == ON or (choice != OFF and local)
    limit = limit_mb if isinstance(limit_mb, (int, float)) and not isinstance(limit_mb, bool) else DISK_MB
    return Rules(folder if on else None, int(limit * 10**6), not local)


@dataclass
class _Kept:
    """A picture in memory."""

    file: bytes
    used: float
    owners: set[str] = field(default_factory=set)


class References:
    """A thread-safe store of pictures as PNG files; nothing is lost in them, and no metadata is in them.

    In memory the newest picture always stays, however large it is: the unit that was just filled with it must work.

    Args:
        rules: asked every time.
        memory_bytes: how much is kept in memory.
    """

    def __init__(self, rules: Callable[[], Rules] = Rules, memory_bytes: int = MEMORY_BYTES) -> None:
        self.rules = rules
        self._limit = memory_bytes
        self._files: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._disk = threading.Lock()
        self._secret = b""
        self._handles: dict[str, str] = {}

    # Pictures in and out

    def add(self, picture: Image, owner: str = "") -> str:
        """Keep a ``picture`` in memory and return its name for units, 64 hexadecimal digits: its sha256 or handle.

        One that isn't RGB is kept as :func:`~.pictures.read_picture` sees it. ``owner`` is the session it came from.
        """
        rgb = picture if picture.mode == "RGB" else read_picture(picture)
        sha256 = picture_hash(rgb)
        with self._lock:
            known = self._files.get(sha256)
            if known is not None:
                self._files.move_to_end(sha256)
                known.owners |= {owner} - {""}
        if known is None:
            self._remember(sha256, _png(rgb), owner)  # a large photograph takes a second, and nobody need wait for it
        return self._handle(sha256) if self.rules().guarded else sha256

    def get(self, sha256: str, owner: str = "") -> Image:
        """The RGB picture of this name, a new one for every call.

        Raises:
            IPAdapterError: if it isn't kept (any more), or not for this owner.
        """
        return read_picture(self.png(sha256, owner))

    def png(self, sha256: str, owner: str = "") -> bytes:
        """The same as a file."""
        content = self.resolve(sha256, owner)
        with self._lock:
            kept = self._files.get(content)
            if kept is not None:
                self._files.move_to_end(content)
                kept.used = time.time()
                return kept.file
        file = self._read(content)
        if file is None:
            raise _missing(sha256)
        self._remember(content, file, owner)
        return file

    def has(self, sha256: str, owner: str = "") -> bool:
        """Whether :meth:`get` would find it."""
        try:
            self.resolve(sha256, owner)
        except IPAdapterError:
            return False
        return True

    def resolve(self, name: str, owner: str = "") -> str:
        """The sha256 of the picture that a unit's name stands for; raises as :meth:`get`."""
        rules, name = self.rules(), name.lower()
        content: str | None = name
        if rules.guarded:
            content = self._handles.get(name) or self._handle_on_disk(name)
            if content is None and owner:
                with self._lock:
                    kept = self._files.get(name)
                content = name if kept is not None and owner in kept.owners else None
        if content is None or not (content in self._files or self._is_on_disk(content)):
            raise _missing(name)
        return content

    def keep(self, sha256: str, read: Callable[[], Image]) -> str:
        """Store a picture that a generation uses on disk, if that is wanted; never fails.

        Args:
            sha256: of its content.
            read: gets it, if it has to be written.

        Returns:
            Why it couldn't be stored, as a sentence; '' if all is well.
        """
        rules = self.rules()
        if rules.folder is None:
            return ""
        path = rules.folder / f"{sha256}.png"
        try:
            if path.is_file():
                with suppress(OSError):
                    os.utime(path)
                return ""
            with self._lock:
                kept = self._files.get(sha256)
            file = kept.file if kept is not None else _png(read())
            if len(file) > rules.limit_bytes:
                raise OSError(
                    0, f"it takes {len(file) / 1e6:.1f} MB, and {rules.limit_bytes / 1e6:g} MB are allowed in all"
                )
            with self._disk:
                write_private(path, file)
                _trim(rules.folder, rules.limit_bytes, path)
        except (OSError, IPAdapterError) as error:
            reason = getattr(error, "strerror", None) or error
            return (
                f"The reference picture {sha256[:10]}… couldn't be stored in {rules.folder.as_posix()} ({reason}), so "
                "the infotext won't bring it back after a restart: make room, or switch the store off in Settings."
            )
        return ""

    # What is there

    def listing(self, owner: str = "") -> list[dict[str, Any]]:
        """What is kept, the last used first: sha256, width, height, bytes, and when it was used (ISO time).

        Where strangers may reach the WebUI, that is what this owner added.
        """
        found: dict[str, tuple[float, int, tuple[int, int]]] = {}
        rules = self.rules()
        with self._lock:
            for sha256, kept in self._files.items():
                if not rules.guarded or (owner and owner in kept.owners):
                    found[sha256] = (kept.used, len(kept.file), _size(BytesIO(kept.file)))
        for path in _stored(rules.folder):
            sha256 = path.stem
            with suppress(OSError):
                stat = path.stat()
                if sha256 in found:
                    found[sha256] = (max(stat.st_mtime, found[sha256][0]), *found[sha256][1:])
                elif not rules.guarded:
                    found[sha256] = (stat.st_mtime, stat.st_size, _size(path))
        return [
            {
                "sha256": sha256,
                "width": size[0],
                "height": size[1],
                "bytes": length,
                "used": datetime.fromtimestamp(used, timezone.utc).isoformat(timespec="seconds"),
            }
            for sha256, (used, length, size) in sorted(found.items(), key=lambda item: item[1], reverse=True)
        ]

    def forget(self, sha256: str, owner: str = "") -> bool:
        """Remove a picture from memory and disk; whether it was there.

        Raises:
            IPAdapterError: if its file can't be removed.
        """
        try:
            content = self.resolve(sha256, owner)
        except IPAdapterError:
            return False
        with self._lock:
            kept = self._files.pop(content, None)
            self._bytes -= len(kept.file) if kept is not None else 0
            self._handles = {handle: other for handle, other in self._handles.items() if other != content}
        folder = self.rules().folder
        if folder is not None:
            try:
                (folder / f"{content}.png").unlink(missing_ok=True)
            except OSError as error:
                raise IPAdapterError(
                    f"The file {content}.png in {folder.as_posix()} can't be removed ({error.strerror or error}): "
                    "remove it by hand."
                ) from error
        return True

    def forget_all(self, owner: str = "") -> int:
        """Remove everything that :meth:`listing` lists; how many pictures that were."""
        return sum(self.forget(each["sha256"], owner) for each in self.listing(owner))

    # Inside

    def _remember(self, sha256: str, file: bytes, owner: str) -> None:
        with self._lock:
            before = self._files.pop(sha256, None)
            owners = ({owner} - {""}) | (before.owners if before is not None else set())
            self._files[sha256] = _Kept(file, time.time(), owners)
            self._bytes += len(file) - (len(before.file) if before is not None else 0)
            while self._bytes > self._limit and len(self._files) > 1:
                self._bytes -= len(self._files.popitem(last=False)[1].file)

    def _is_on_disk(self, sha256: str) -> bool:
        folder = self.rules().folder
        return (
            folder is not None and _FILE.fullmatch(f"{sha256}.png") is not None and (folder / f"{sha256}.png").is_file()
        )

    def _read(self, sha256: str) -> bytes | None:
        """A file of the store; None if there is none, or if it isn't the picture that its name says."""
        folder = self.rules().folder
        if folder is None:
            return None
        path = folder / f"{sha256}.png"
        try:
            file = path.read_bytes()
            if picture_hash(read_picture(file)) != sha256:
                return None
            with suppress(OSError):
                os.utime(path)
            return file
        except (OSError, IPAdapterError):
            return None

    def _handle(self, sha256: str) -> str:
        handle = hmac.new(self._key(), sha256.encode(), hashlib.sha256).hexdigest()
        self._handles[handle] = sha256
        return handle

    def _handle_on_disk(self, handle: str) -> str | None:
        """What a handle from before a restart stands for."""
        for path in _stored(self.rules().folder):
            self._handle(path.stem)
        return self._handles.get(handle)

    def _key(self) -> bytes:
        """The secret; beside the pictures, so that handles last as long as these, or else for this life."""
        with self._disk:
            folder = self.rules().folder
            if not self._secret and folder is not None:
                path = folder / _KEY_FILE
                with suppress(OSError):
                    if not path.exists():
                        write_private(path, secrets.token_bytes(32))
                    self._secret = path.read_bytes()
            if len(self._secret) < 32:
                self._secret = secrets.token_bytes(32)
            return self._secret


def _missing(sha256: str) -> IPAdapterError:
    return IPAdapterError(
        f'The reference picture with sha256 "{sha256[:64]}" isn\'t kept here (it stays until the WebUI restarts or '
        "many others come, longer in the reference store of Settings, and where strangers can reach the WebUI it is "
        "only for who added it): upload it again, or send it as base64."
    )


def _png(rgb: Image) -> bytes:
    bare = rgb.copy()
    bare.info = {}  # metadata such as a transparent colour would be written along and change what is read
    file = BytesIO()
    bare.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _size(file: Path | BytesIO) -> tuple[int, int]:
    """Width and height by a file's header; 0 for what is none."""
    try:
        with images.open(file, formats=["PNG"]) as picture:
            return picture.size
    except (OSError, ValueError):
        return 0, 0


def _stored(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    try:
        return [path for path in folder.iterdir() if _FILE.fullmatch(path.name)]
    except OSError:
        return []


def write_private(path: Path, content: bytes) -> None:
    """Puts a file of the owner's alone into the folder of the owner's alone, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600), "wb"
        ) as file:
            file.write(content)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def _trim(folder: Path, limit: int, newest: Path) -> None:
    """Removes the files used least recently until all of them fit, and what a crash has left half written."""
    for path in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
    found = []
    for path in _stored(folder):
        with suppress(OSError):
            stat = path.stat()
            found.append((path == newest, stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, _, size, _ in found)
    for _, _, size, path in sorted(found):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size


default = References()
"""What the page, the API and generations of this load share."""

add, get, png, has, resolve = default.add, default.get, default.png, default.has, default.resolve
keep, listing, forget, forget_all = default.keep, default.listing, default.forget, default.forget_all

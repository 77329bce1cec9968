"""PyTorch's own model files (.bin, .pt, .pth, .ckpt), read without running anything that stands in them.

``torch.save`` has written two containers: a zip archive (``data.pkl`` and one uncompressed record for every
storage), and before torch 1.6 a chain of pickles followed by the storages. Both are read here, the description of
the tensors by :class:`~.pickle_reader.PickleReader`, and every size, offset and stride in it is checked.
"""

from __future__ import annotations

import io
import math
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import torch

from .errors import IPAdapterError
from .pickle_reader import MAX_HEAD, PickleReader, StorageRef, TensorRef

MAX_ENTRIES = 200_000
MAX_NESTING = 16
MAX_NAME = 1024
MAX_DIMENSIONS = 16
MAX_NUMBER = 2**48
MAX_DIRECTORY = 8 * 1024**2
"""Bytes of a zip archive's directory; a checkpoint's has some hundred thousand."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

WRAPPERS = ("state_dict", "model_state_dict", "module", "model")
"""Groups that training programs put around a model's tensors; their names are left out of the tensors' names."""

ZIP_MAGIC = b"PK\x03\x04"
_TEXT_PICKLE = re.compile(rb"\(*[ci][\w.]+\n[\w.]+\n")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file; all of it is checked.

    Attributes:
        shape, strides: in elements.
        start: the first element's first byte, from the start of the file.
        length: bytes from there to the end of the last element.
        swapped: the bytes of an element are in the other order than this machine's.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    length: int
    swapped: bool = False

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the file as they do in a contiguous tensor."""
        step = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != step:
                return False
            step *= length
        return True


@dataclass(frozen=True)
class _Region:
    """The bytes of one storage in the file."""

    start: int
    length: int
    swapped: bool = False


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a pickle without a zip archive around it."""
    return (len(head) > 1 and head[0] == 0x80 and head[1] <= 5) or _TEXT_PICKLE.match(head) is not None


def index_zip(file: BinaryIO, size: int, name: str) -> dict[str, StoredTensor]:
    """The tensors of a zip container by name; their data isn't read.

    Args:
        file: opened for reading, ``size`` bytes long.
        name: what to call it in a sentence.

    Raises:
        IPAdapterError: if it is damaged, hostile or something else.
    """
    archive = _Archive(file, size, name)
    head = archive.region("data.pkl")
    if head.length > MAX_HEAD:
        raise IPAdapterError(
            f"{name} has a data.pkl of {head.length} bytes and at most {MAX_HEAD} are read: get it as .safetensors."
        )
    file.seek(head.start)
    value = PickleReader(io.BytesIO(file.read(head.length)), name).load()
    swapped = archive.byte_order() != sys.byteorder

    def region(storage: StorageRef, itemsize: int) -> _Region:
        found = archive.region(f"data/{storage.key}")
        if found.length < storage.numel * itemsize:
            raise IPAdapterError(
                f"{name} says that its storage {_short(storage.key)} has {storage.numel} elements, but only "
                f"{found.length} bytes are there: download it again."
            )
        return _Region(found.start, storage.numel * itemsize, swapped)

    return _resolve(value, region, size, name)


def index_legacy(file: BinaryIO, size: int, name: str) -> dict[str, StoredTensor]:
    """The tensors of a file from before the zip container, by name; as :func:`index_zip`."""
    file.seek(0)
    reader = PickleReader(file, name)
    if reader.load() != LEGACY_MAGIC or reader.load() != LEGACY_PROTOCOL:
        raise IPAdapterError(f"{name} is a pickle, but not a PyTorch model file: choose the model file itself.")
    reader.load()  # The writing machine's sizes; the storages are little-endian whatever they say.
    value = reader.load()
    keys = reader.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        _damaged(name, "its list of storages is none")

    itemsizes: dict[str, int] = {}
    for storage in reader.storages:
        _check_storage(storage, name)
        if itemsizes.setdefault(storage.key, _itemsize(storage, name)) != _itemsize(storage, name):
            _damaged(name, f"its storage {_short(storage.key)} has two element types")

    regions: dict[str, _Region] = {}
    position = reader.tell()
    for key in keys:
        file.seek(position)
        count_bytes = file.read(8)
        if len(count_bytes) < 8:
            _damaged(name, f"it ends before its storage {_short(key)}")
        (count,) = struct.unpack("<q", count_bytes)
        if key not in itemsizes:
            # Nothing says how wide its elements are, so nothing behind it can be found either.
            _damaged(name, f"nothing is said of its storage {_short(key)}")
        length = count * itemsizes[key]
        position += 8
        if count < 0 or position + length > size:
            _damaged(name, f"its storage {_short(key)} claims {count} elements and the file ends before them")
        regions[key] = _Region(position, length, sys.byteorder != "little")
        position += length

    def region(storage: StorageRef, itemsize: int) -> _Region:
        found = regions.get(storage.key)
        if found is None:
            _damaged(name, f"its storage {_short(storage.key)} isn't there")
        if found.length != storage.numel * itemsize:
            _damaged(
                name,
                f"its storage {_short(storage.key)} has {found.length} bytes where {storage.numel} elements are told",
            )
        return found

    return _resolve(value, region, size, name)


def read_stored(file: BinaryIO, stored: StoredTensor, name: str, place: torch.Tensor | None = None) -> torch.Tensor:
    """The data of one tensor, contiguous and its own, in host memory.

    Args:
        file: opened for reading.
        stored: where it lies there.
        name: what to call the file in a sentence.
        place: a contiguous tensor to fill, in place of a new one.

    Raises:
        IPAdapterError: if the file has become shorter.
    """
    if place is None:
        place = torch.empty(stored.shape, dtype=stored.dtype)
    if 0 in stored.shape:
        return place
    # As it lies in the file, straight into its place.
    if stored.is_contiguous and not stored.swapped and stored.dtype != torch.bool:
        _fill(place.view(-1).view(torch.uint8), file, stored.start, name)
        return place
    data = torch.empty(stored.length, dtype=torch.uint8)
    _fill(data, file, stored.start, name)
    if stored.swapped:
        itemsize = stored.dtype.itemsize
        part = itemsize // 2 if stored.dtype.is_complex else itemsize
        data = data.view(-1, part).flip(1).reshape(-1)
    flat = data.ne(0) if stored.dtype == torch.bool else data.view(stored.dtype)
    return place.copy_(flat.as_strided(stored.shape, stored.strides))


def _fill(data: torch.Tensor, file: BinaryIO, start: int, name: str) -> None:
    file.seek(start)
    view = data.numpy().data
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise IPAdapterError(f"{name} has become shorter while it was read: download it again.")
        done += count


class _Archive:
    """A zip container's directory."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self._file, self._size, self._name = file, size, name
        try:
            with zipfile.ZipFile(_Window(file, name)) as archive:
                self._records: dict[str, zipfile.ZipInfo] = {info.filename: info for info in archive.infolist()}
        except IPAdapterError:
            raise
        except Exception as error:
            # zipfile has no closed list of what it raises for bytes that are no archive.
            raise IPAdapterError(
                f"{name} is damaged or cut short (its zip directory can't be read: {str(error)[:80]}): download "
                "it again."
            ) from error
        roots = {record.partition("/")[0] for record in self._records if record.partition("/")[2] == "data.pkl"}
        if any(record.endswith("/constants.pkl") or "/code/" in record for record in self._records):
            raise IPAdapterError(
                f"{name} is a TorchScript program, not a file of tensors: get the model as .safetensors or .bin."
            )
        if len(roots) != 1:
            raise IPAdapterError(
                f"{name} is a zip archive, but not a PyTorch model file (it has no data.pkl): unpack it, or "
                "choose the model "
                "file itself."
            )
        self._root = roots.pop()

    def region(self, record: str) -> _Region:
        """Where the bytes of a record lie."""
        info = self._records.get(f"{self._root}/{record}")
        if info is None:
            _damaged(self._name, f"its record {_short(record)} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise IPAdapterError(
                f"{self._name} has its record {_short(record)} compressed or encrypted, which PyTorch never "
                "writes: get the "
                "original file."
            )
        header_size = 30
        if info.header_offset < 0 or info.header_offset + header_size > self._size:
            _damaged(self._name, f"its record {_short(record)} lies outside the file")
        self._file.seek(info.header_offset)
        header = self._file.read(header_size)
        if header[:4] != ZIP_MAGIC:
            _damaged(self._name, f"its record {_short(record)} has no header")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        start = info.header_offset + header_size + name_length + extra_length
        if start + info.file_size > self._size:
            _damaged(self._name, f"its record {_short(record)} reaches beyond the end")
        return _Region(start, info.file_size)

    def byte_order(self) -> str:
        """``little`` or ``big``; files without the record are little-endian."""
        if f"{self._root}/byteorder" not in self._records:
            return "little"
        region = self.region("byteorder")
        self._file.seek(region.start)
        order = self._file.read(min(region.length, 16)).decode("latin-1")
        if order not in ("little", "big"):
            _damaged(self._name, f"its byte order is {order!r}")
        return order


class _Window(io.RawIOBase):
    """A file as zipfile sees it: no single read is larger than an honest directory."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__()
        self._file, self._name = file, name

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY:
            _damaged(self._name, f"its zip directory claims {count} bytes")
        return self._file.read(min(count, MAX_DIRECTORY) if count >= 0 else MAX_DIRECTORY)


def _flatten(value: Any, name: str) -> Iterator[tuple[str, TensorRef]]:
    """Every tensor in nested dicts, names joined with a dot; whatever is neither dict nor tensor is passed over."""
    if not isinstance(value, dict):
        raise IPAdapterError(f"{name} holds no named tensors: choose a model file.")
    seen = 0

    def walk(group: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, TensorRef]]:
        nonlocal seen
        if depth > MAX_NESTING:
            _damaged(name, f"its groups are nested more than {MAX_NESTING} deep")
        wrapper = next((key for key in WRAPPERS if not prefix and isinstance(group.get(key), dict)), None)
        for key, item in group.items():
            seen += 1
            if seen > MAX_ENTRIES:
                _damaged(name, f"it has more than {MAX_ENTRIES} entries")
            full = f"{prefix}{key}" if key != wrapper else prefix
            if len(full) > MAX_NAME:
                _damaged(name, f"a tensor's name is longer than {MAX_NAME}")
            if isinstance(item, TensorRef):
                yield full, item
            elif isinstance(item, dict):
                yield from walk(item, full and full + ".", depth + 1)

    yield from walk(value, "", 1)


def _resolve(value: Any, region: Callable[[StorageRef, int], _Region], size: int, name: str) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    regions: dict[int, _Region] = {}
    total = 0
    for key, tensor in _flatten(value, name):
        if key in found:
            _damaged(name, f"two tensors are called {_short(key)}")
        storage = _storage_of(tensor, name)
        if id(storage) not in regions:
            regions[id(storage)] = _part(storage, region(storage, _itemsize(storage, name)), name)
        stored = _place(tensor, storage, regions[id(storage)], key, name)
        found[key] = stored
        # Views may share a storage, but a small file can't become gigabytes of tensors.
        total += math.prod(stored.shape) * stored.dtype.itemsize
        if total > 8 * size + 64 * 1024**2:
            _damaged(name, f"its tensors would take more than {total // 1024**2} MiB and the file has {size} bytes")
    return found


def _storage_of(tensor: TensorRef, name: str) -> StorageRef:
    if not isinstance(tensor.storage, StorageRef):
        _damaged(name, "a tensor has no storage")
    _check_storage(tensor.storage, name)
    return tensor.storage


def _check_storage(storage: StorageRef, name: str) -> None:
    if not isinstance(storage.key, str) or len(storage.key) > MAX_NAME or not _is_count(storage.numel):
        _damaged(name, "a storage has no proper name or size")


def _itemsize(storage: StorageRef, name: str) -> int:
    if storage.dtype is None:
        _damaged(name, f"its storage {_short(storage.key)} has no element type")
    return storage.dtype.itemsize


def _part(storage: StorageRef, whole: _Region, name: str) -> _Region:
    """The part of a storage that a view of it means; such views stand in files from before torch 1.0."""
    if storage.view is None:
        return whole
    view = storage.view
    if not (isinstance(view, tuple) and len(view) == 3 and _is_count(view[1]) and _is_count(view[2])):
        _damaged(name, f"its storage {_short(storage.key)} has a malformed view")
    itemsize = _itemsize(storage, name)
    start, length = view[1] * itemsize, view[2] * itemsize
    if start + length > whole.length:
        _damaged(name, f"a view of its storage {_short(storage.key)} reaches beyond it")
    return _Region(whole.start + start, length, whole.swapped)


def _place(tensor: TensorRef, storage: StorageRef, region: _Region, key: str, name: str) -> StoredTensor:
    dtype = tensor.dtype if tensor.dtype is not None else storage.dtype
    shape, strides = tensor.size, tensor.stride
    counts = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_DIMENSIONS
    if (
        not counts
        or not isinstance(dtype, torch.dtype)
        or not all(_is_count(number) for number in (*shape, *strides, tensor.offset))
    ):
        _damaged(name, f"its tensor {_short(key)} has an impossible shape, stride or offset")
    itemsize = dtype.itemsize
    if 0 in shape:
        return StoredTensor(dtype, shape, strides, region.start, 0, region.swapped)
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    start, length = tensor.offset * itemsize, (last + 1) * itemsize
    if start + length > region.length:
        _damaged(
            name,
            f"its tensor {_short(key)} needs {start + length} bytes of the storage {_short(storage.key)}, which has "
            f"{region.length}",
        )
    return StoredTensor(dtype, shape, strides, region.start + start, length, region.swapped)


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number <= MAX_NUMBER


def _short(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:100])


def _damaged(name: str, what: str) -> NoReturn:
    raise IPAdapterError(f"{name} is damaged or cut short ({what}): download it again.")

"""From a unit to K/V: finds its files, reads them when needed, encodes its pictures, and remembers what it made."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from . import uploads
from .clip_vision import CLIPVision, load_clip_vision
from .encoding import (
    LoadedAdapter,
    Runner,
    encode,
    image_kv,
    load_adapter,
    load_negative,
    resolve_uncond,
    token_kv,
    uncond_features,
)
from .errors import IPAdapterError
from .formulations import Formulation, resolve_formulation
from .hosts.base import UNetInfo
from .injection import Term
from .library import Library
from .packing import in_host_memory
from .pictures import clip_preprocess, picture_hash, prepare, read_picture, to_pixels
from .plan import ImageKV
from .progress import Window
from .recognise import AdapterKind, recognise_adapter
from .rows import COND, UNCOND
from .tensorfile import open_tensors
from .units import ImageRef, Unit

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
FileIdentity = tuple[str, int, int]


class Cache(Generic[V]):
    """The most recently used values."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of ``key``, made when it isn't there."""
        return self.get_all([key], lambda _: [make()])[0]

    def get_all(self, keys: Sequence[K], make: Callable[[Sequence[K]], Sequence[V]]) -> list[V]:
        """The values of ``keys``; those that aren't there are made in one go, each once."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._values]
        if missing:
            self._values.update(zip(missing, make(missing), strict=True))
        values = [self._values[key] for key in keys]
        for key in keys:
            self._values.move_to_end(key)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return values

    def clear(self) -> None:
        """Forgets everything."""
        self._values.clear()


@dataclass(frozen=True)
class PreparedUnit:
    """A unit whose pictures are K/V, in host memory."""

    unit: Unit
    kind: AdapterKind
    formulation: Formulation
    uncond: str
    conds: tuple[ImageKV, ...]
    unconds: tuple[ImageKV, ...]

    @property
    def window(self) -> Window:
        """When it acts."""
        return Window(self.unit.start, self.unit.stop)

    def term(self, info: UNetInfo) -> Term:
        """The unit on a UNet; raises :class:`IPAdapterError` if its adapter is made for another one."""
        check_fit(self.unit.model, self.kind, info)
        prompts = {COND: self.conds, UNCOND: self.unconds}
        return Term(self.formulation, self.window, prompts, self.unit.weight, max(info.widths))

    def infotext(self) -> str:
        """Every setting that says how the unit acted, ``auto`` resolved."""
        resolved = {"formulation": self.formulation.name, "uncond": self.uncond}
        parts = []
        for name in (field.name for field in fields(self.unit) if field.name not in ("enabled", "images")):
            value = resolved.get(name, getattr(self.unit, name))
            if value != "":
                parts.append(f"{name}: {repr(value).removesuffix('.0') if isinstance(value, float) else value}")
        return ", ".join(parts)


KEPT_ENCODERS, KEPT_ADAPTERS, KEPT_KINDS = 1, 2, 64
KEPT_FEATURES, KEPT_KV = 64, 64


class Preparer:
    """Makes K/V of units, each file and picture once for as long as it stays in the caches.

    Args:
        library: the files.
        run: where modules compute.
    """

    def __init__(self, library: Library, run: Runner) -> None:
        self._library = library
        self._run = run
        self._encoders: Cache[CLIPVision] = Cache(KEPT_ENCODERS)
        self._adapters: Cache[LoadedAdapter] = Cache(KEPT_ADAPTERS)
        self._kinds: Cache[AdapterKind] = Cache(KEPT_KINDS)
        self._features: Cache[Tensor] = Cache(KEPT_FEATURES)
        self._kv: Cache[ImageKV] = Cache(KEPT_KV)

    def prepare(self, unit: Unit, info: UNetInfo) -> PreparedUnit:
        """K/V of a unit's pictures, and of none.

        Raises:
            IPAdapterError: for a file or picture that is missing, broken or something else, or made for another UNet.
        """
        # A job inside a job (a face detailer's) starts in inference mode, whose tensors can't be kept for later ones.
        with torch.inference_mode(False), torch.no_grad():
            return self._prepare(unit, info)

    def _prepare(self, unit: Unit, info: UNetInfo) -> PreparedUnit:
        path = self._library.adapter_path(unit.model)
        kind = self._kinds.get(file_identity(path), lambda: recognise_adapter(open_tensors(path).tensors, path.name))
        check_fit(unit.model, kind, info)
        job = _Job(self, unit, path, kind, self._library.encoder_for(kind))
        uncond = resolve_uncond(unit.uncond, kind.variant)
        conds = tuple(job.picture_kv(unit.images))
        # Each picture has its uncond tokens: in one softmax the uncond side must weigh as much as the cond side.
        unconds = () if uncond == "none" else (job.uncond_kv(uncond),) * len(conds)
        return PreparedUnit(unit, kind, resolve_formulation(unit.formulation, kind.variant), uncond, conds, unconds)

    def clear(self) -> None:
        """Forgets all models, features and K/V."""
        for cache in (self._encoders, self._adapters, self._kinds, self._features, self._kv):
            cache.clear()

    def encoder(self, path: Path) -> CLIPVision:
        """The image encoder of a file."""
        return self._encoders.get(file_identity(path), lambda: load_clip_vision(path))

    def adapter(self, path: Path) -> LoadedAdapter:
        """The adapter of a file."""
        return self._adapters.get(file_identity(path), lambda: load_adapter(path))


@dataclass(frozen=True)
class _Job:
    """One unit on its way through a preparer's caches."""

    of: Preparer
    unit: Unit
    path: Path
    kind: AdapterKind
    encoder_path: Path

    def picture_kv(self, refs: Sequence[ImageRef]) -> list[ImageKV]:
        """Of each picture; those not seen yet go through encoder and adapter together."""
        read: dict[Hashable, Callable[[], Image.Image]] = {}
        keys = []
        for ref in refs:
            sha256, picture = self._source(ref)
            keys.append((sha256, self.unit.preparation, file_identity(self.encoder_path), self.kind.output))
            read[keys[-1]] = picture

        def features(missing: Sequence[Hashable]) -> list[Tensor]:
            return self._features([read[key]() for key in missing])

        return self._kept(keys, lambda missing: self.of._features.get_all(missing, features))

    @staticmethod
    def _source(ref: ImageRef) -> tuple[str, Callable[[], Image.Image]]:
        """A picture's hash, and how to read it: an upload goes by its hash, and need not be decoded for that."""
        if ref.sha256:
            return ref.sha256, lambda: uploads.get(ref.sha256)
        picture = read_picture(ref.data)
        return picture_hash(picture), lambda: picture

    def uncond_kv(self, source: str) -> ImageKV:
        if source == "file":
            path = self.of._library.negative_path(self.unit.negative)

            def from_file() -> ImageKV:
                tokens = load_negative(path, self.kind.context_width)
                return _in_host_memory(token_kv(self.of._run, self.of.adapter(self.path).model, tokens))

            return self.of._kv.get((file_identity(path), file_identity(self.path)), from_file)

        def features(_: Sequence[Hashable]) -> list[Tensor]:
            return [uncond_features(self.of._run, source, self.kind, self.of.encoder(self.encoder_path))]

        return self._kept([(source, file_identity(self.encoder_path), self.kind.output)], features)[0]

    def _features(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        encoder = self.of.encoder(self.encoder_path)
        size = encoder.kind.image_size
        prepared = [prepare(picture, self.unit.preparation, size) for picture in pictures]
        together = encode(self.of._run, encoder, self.kind.output, clip_preprocess(to_pixels(prepared), size))
        return [one.clone() for one in torch.split(together, 1)]  # each may outlive the others

    def _kept(
        self, keys: Sequence[Hashable], features: Callable[[Sequence[Hashable]], Sequence[Tensor]]
    ) -> list[ImageKV]:
        """K/V by the keys of the features that they are made from."""
        adapter = file_identity(self.path)

        def kv(missing: Sequence[tuple[Hashable, FileIdentity]]) -> list[ImageKV]:
            given = torch.cat(list(features([key for key, _ in missing])))
            pairs = image_kv(self.of._run, self.of.adapter(self.path).model, given)
            return [_in_host_memory([t[n : n + 1] for t in pairs]) for n in range(len(missing))]

        return self.of._kv.get_all([(key, adapter) for key in keys], kv)


def _in_host_memory(pairs: list[Tensor]) -> ImageKV:
    # What is kept between jobs must not take room on the device.
    return ImageKV(tuple(in_host_memory(pairs[::2])), tuple(in_host_memory(pairs[1::2])))


def file_identity(path: Path) -> FileIdentity:
    """What changes when a file does."""
    try:
        stat = path.stat()
    except OSError as error:
        raise IPAdapterError(
            f"The file {path.name} can't be read ({error.strerror}): refresh the model list."
        ) from error
    return str(path), stat.st_size, stat.st_mtime_ns


def check_fit(name: str, kind: AdapterKind, info: UNetInfo) -> None:
    """Raises :class:`IPAdapterError` if an adapter's layers aren't those of the UNet."""
    if kind.layer_widths == info.widths and kind.context_width == info.context_width:
        return
    family = "SDXL" if len(info.keys) == 70 else "SD2" if info.context_width == 1024 else "SD1.5"
    raise IPAdapterError(
        f"The adapter {name} ({kind.description}) is made for another model family: it has {len(kind.layer_widths)} "
        f"layers for a text context {kind.context_width} wide, the loaded checkpoint ({family}) {len(info.keys)} and "
        f"{info.context_width}; choose an adapter for this checkpoint, or another checkpoint."
    )

"""From a unit to K/V: finds its files, reads them when needed, encodes its pictures, and remembers what it made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import references
from .clip_vision import CLIPVision, load_clip_vision
from .encoding import (
    ZERO_EMBEDS,
    LoadedAdapter,
    Runner,
    encode,
    image_kv,
    load_adapter,
    load_negative,
    resolve_uncond,
    token_kv,
    uncond_pixels,
    zero_embeds,
)
from .errors import IPAdapterError
from .fingerprint import fingerprint
from .formulations import Formulation, resolve_formulation
from .hosts.base import UNetInfo
from .infotext import Facts
from .injection import Term
from .kept import Kept
from .library import Library
from .mask_pictures import MaskPictures, PreparedMasks, told
from .masks import Canvas, Mask
from .packing import in_host_memory
from .pictures import clip_preprocess, picture_hash, prepare, read_picture, to_pixels
from .plan import ImageKV
from .progress import Window
from .recognise import AdapterKind, recognise_adapter
from .rows import COND, UNCOND
from .tensorfile import open_tensors
from .units import MIDDLE, Crop, ImageRef, Unit
from .weighing import Weighed, weigh

FileIdentity = tuple[str, int, int]


@dataclass(frozen=True)
class PreparedUnit:
    """A unit whose pictures are K/V, in host memory."""

    unit: Unit
    kind: AdapterKind
    formulation: Formulation
    uncond: str
    conds: tuple[ImageKV, ...]
    unconds: tuple[ImageKV, ...]
    weighed: Weighed
    fingerprint: str
    masks: PreparedMasks
    hashes: tuple[str, ...]
    """Of the content of each picture of the unit, also those that take no part."""
    problems: tuple[str, ...] = ()
    """Why pictures couldn't be stored."""

    @property
    def window(self) -> Window:
        """When it acts."""
        return Window(self.unit.start, self.unit.stop, self.unit.timing)

    def term(self, info: UNetInfo) -> Term:
        """The unit on a UNet; raises :class:`IPAdapterError` if its adapter is made for another one."""
        check_fit(self.unit.model, self.kind, info)
        places = dict.fromkeys((COND, UNCOND), self.masks.places) if self.is_masked else {}
        return Term(self.formulation, self.window, self.weighed, places)

    @property
    def is_masked(self) -> bool:
        """Whether any picture acts in a part of the canvas alone."""
        return any(self.masks.places)

    def on_canvas(self, canvas: Canvas) -> list[str]:
        """Puts the masks on a pass's canvas, and says what is odd about that."""
        return [sentence for place in dict.fromkeys(self.masks.places) if place for sentence in told(place, canvas)]

    @property
    def by_hash(self) -> Unit:
        """The unit with its pictures by the hash of their content."""
        images = zip(self.unit.images, self.hashes, self.masks.images, strict=True)
        return replace(
            self.unit,
            images=tuple(replace(ref, data="", sha256=sha256, mask=mask) for ref, sha256, mask in images),
            mask=self.masks.unit,
        )

    @property
    def facts(self) -> Facts:
        """What the parameters of a picture say beside the unit."""
        return Facts(self.fingerprint, self.formulation.name, self.uncond)


class Preparer:
    """Makes K/V of units, each file and picture once for as long as what is made of it is kept.

    Args:
        library: the files.
        run: where modules compute.
        limit: bytes of host memory for what is kept from one generation to the next.
        first: the role whose rows the host puts first when both are in one batch.
    """

    def __init__(self, library: Library, run: Runner, limit: Callable[[], int], first: int) -> None:
        self._library = library
        self._run = run
        self._first = first
        self._kept = Kept(limit, _weigh)
        self._masks = MaskPictures(self._kept)

    def prepare(self, units: Sequence[Unit], info: UNetInfo) -> list[PreparedUnit]:
        """K/V of the pictures of a generation's units, and of none.

        Raises:
            IPAdapterError: for a file or picture that is missing, broken or something else, or made for another UNet.
        """
        # A job inside a job (a face detailer's) starts in inference mode, whose tensors can't be kept for later ones.
        with torch.inference_mode(False), torch.no_grad():
            try:
                return [self._prepare(unit, info) for unit in units]
            finally:
                self._kept.trim()

    def _prepare(self, unit: Unit, info: UNetInfo) -> PreparedUnit:
        path = self._library.adapter_path(unit.model)
        kind = self._kept.get(
            ("kind", file_identity(path)), lambda: recognise_adapter(open_tensors(path).tensors, path.name)
        )
        check_fit(unit.model, kind, info)
        job = _Job(self, unit, path, kind, self._library.encoder_for(kind))
        uncond = resolve_uncond(unit.uncond, kind.variant)
        conds, none = job.image_kv(uncond)
        # Each picture has its uncond tokens: in one softmax the uncond side must weigh as much as the cond side.
        unconds = () if none is None else (none,) * len(conds)
        formulation = resolve_formulation(unit.formulation, kind.variant)
        shares = tuple(image.weight for image in unit.acting_images)
        prompts = {COND: tuple(conds), UNCOND: unconds}
        widest = max(info.widths)
        weighed = self._kept.get(
            ("weighed", job.source(uncond), formulation.name, unit.weight, shares, widest),
            lambda: weigh(prompts, formulation, unit.weight, shares, widest, self._first),
        )
        masks = self._masks.prepare(unit)
        return PreparedUnit(
            unit,
            kind,
            formulation,
            uncond,
            tuple(conds),
            unconds,
            weighed,
            fingerprint(path),
            masks,
            job.hashes,
            (*job.stored(), *masks.problems),
        )

    def pictures(self, unit: Unit) -> list[Image.Image]:
        """The pictures of a unit that take part, as they were given."""
        return [references.get(ref.sha256) if ref.sha256 else read_picture(ref.data) for ref in unit.acting_images]

    def clear(self) -> None:
        """Forgets all models, features and K/V."""
        self._kept.clear()

    def encoder(self, path: Path) -> CLIPVision:
        """The image encoder of a file."""
        return self._kept.get(("encoder", file_identity(path)), lambda: load_clip_vision(path))

    @contextmanager
    def adapter(self, path: Path) -> Iterator[Callable[[], LoadedAdapter]]:
        """The adapter of a file, which is read while the block runs; what is given waits for it."""
        key = ("adapter", file_identity(path))
        with ThreadPoolExecutor(1) as pool:
            reading = None if key in self._kept else pool.submit(load_adapter, path)
            yield lambda: self._kept.get(key, lambda: load_adapter(path) if reading is None else reading.result())


@dataclass(frozen=True)
class _Job:
    """One unit on its way through what a preparer keeps."""

    of: Preparer
    unit: Unit
    path: Path
    kind: AdapterKind
    encoder_path: Path

    def image_kv(self, uncond: str) -> tuple[list[ImageKV], ImageKV | None]:
        """Of each picture, and of no picture; what isn't made yet goes through encoder and adapter on one loading.

        A unit's pictures are encoded together and kept together: the last digits of each depend on the others, and
        shall not depend on which of them were known before.
        """
        encoder, adapter = self._files
        distinct = dict(self._sources)
        pictures = ("features", tuple(distinct), self.unit.preparation, encoder, self.kind.output)
        none = ("features", uncond, "", encoder, self.kind.output)
        encoded = uncond not in ("none", "file")

        def features(missing: Sequence[Hashable]) -> list[Tensor]:
            tower = self.of.encoder(self.encoder_path)
            size = tower.kind.image_size
            pixels: dict[Hashable, Tensor] = {}
            if pictures in missing:
                pixels[pictures] = torch.cat([self._pixels(read, crop, size) for (_, crop), read in distinct.items()])
            if none in missing and uncond != ZERO_EMBEDS:
                pixels[none] = uncond_pixels(uncond, size)
            made = dict(zip(pixels, encode(self.of._run, tower, self.kind.output, list(pixels.values())), strict=True))
            return [made[key] if key in made else zero_embeds(self.kind, tower.kind) for key in missing]

        def kv(missing: Sequence[tuple[str, Hashable, FileIdentity]]) -> list[list[ImageKV]]:
            with self.of.adapter(self.path) as adapter:
                given = self.of._kept.get_all([key for _, key, _ in missing], features)
                made = image_kv(self.of._run, adapter().model, given)
            return [
                [_in_host_memory([t[n : n + 1] for t in pairs]) for n in range(pairs[0].shape[0])] for pairs in made
            ]

        keys = [("K/V", key, adapter) for key in ((pictures, none) if encoded else (pictures,))]
        of_pictures, *of_none = self.of._kept.get_all(keys, kv)
        by_picture = dict(zip(distinct, of_pictures, strict=True))
        conds = [by_picture[picture] for picture, _ in self._sources]
        if uncond == "file":
            return conds, self._negative()
        return conds, of_none[0][0] if encoded else None

    def source(self, uncond: str) -> Hashable:
        """What K and V of the pictures and of none are made of."""
        negative = file_identity(self.of._library.negative_path(self.unit.negative)) if uncond == "file" else None
        return tuple(picture for picture, _ in self._sources), self.unit.preparation, uncond, negative, self._files

    @cached_property
    def _files(self) -> tuple[FileIdentity, FileIdentity]:
        """Encoder and adapter."""
        return file_identity(self.encoder_path), file_identity(self.path)

    @cached_property
    def references(self) -> tuple[tuple[str, Callable[[], Image.Image]], ...]:
        """Of each picture of the unit, also those that take no part, its hash, and how to read it."""
        return tuple(self._reference(ref) for ref in self.unit.images)

    @cached_property
    def _sources(self) -> list[tuple[tuple[str, Crop], Callable[[], Image.Image]]]:
        """What the encoder sees of each picture that takes part (its hash and crop), and how to read it."""
        acting = self.unit.acting_images
        return [
            ((sha256, ref.crop if self.unit.preparation == "crop" else MIDDLE), read)
            for ref, (sha256, read) in zip(self.unit.images, self.references, strict=True)
            if ref in acting
        ]

    @property
    def hashes(self) -> tuple[str, ...]:
        """Of all pictures."""
        return tuple(sha256 for sha256, _ in self.references)

    def stored(self) -> tuple[str, ...]:
        """Keeps the pictures for those who paste the result's parameters; what went wrong, in sentences."""
        tried = (references.keep(sha256, read) for sha256, read in self.references)
        return tuple(problem for problem in tried if problem)

    def _reference(self, ref: ImageRef) -> tuple[str, Callable[[], Image.Image]]:
        """The hash of a picture's content, and how to read it.

        A picture that is known by what was received isn't decoded for that.
        """
        if ref.sha256:
            takes_part = ref in self.unit.acting_images
            sha256 = references.resolve(ref.sha256) if takes_part or references.has(ref.sha256) else ref.sha256
            return sha256, lambda: references.get(ref.sha256)
        picture = cache(lambda: read_picture(ref.data))
        received = hashlib.sha256(ref.data.encode("utf-8", "surrogatepass")).digest()
        sha256 = self.of._kept.get(("received", received), lambda: picture_hash(picture()))
        return sha256, picture

    def _pixels(self, read: Callable[[], Image.Image], crop: Crop, size: int) -> Tensor:
        return clip_preprocess(to_pixels([prepare(read(), self.unit.preparation, size, crop)]), size)

    def _negative(self) -> ImageKV:
        path = self.of._library.negative_path(self.unit.negative)

        def from_file() -> ImageKV:
            with self.of.adapter(self.path) as adapter:
                tokens = load_negative(path, self.kind.context_width)
                return _in_host_memory(token_kv(self.of._run, adapter().model, tokens))

        return self.of._kept.get(("negative K/V", file_identity(path), file_identity(self.path)), from_file)


SMALL = 1024
"""Bytes that count for what isn't made of tensors."""


def _weigh(value: object) -> int:
    if isinstance(value, LoadedAdapter):
        return value.model.nbytes
    if isinstance(value, CLIPVision):
        return sum(parameter.nbytes for parameter in value.parameters())
    if isinstance(value, list):
        return sum(map(_weigh, value))
    if isinstance(value, ImageKV):
        return sum(tensor.nbytes for tensor in (*value.keys, *value.values))
    if isinstance(value, Mask):
        return value.values.nbytes
    return value.nbytes if isinstance(value, (Tensor, Weighed)) else SMALL


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

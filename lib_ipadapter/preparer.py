"""From a unit to K/V: finds its files, reads them when needed, encodes its pictures, and remembers what it made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import references, saved
from .clip_vision import CLIPVision, load_clip_vision
from .encoding import LoadedAdapter, Runner, load_adapter
from .errors import IPAdapterError
from .fingerprint import file_identity, fingerprint
from .formulations import Formulation, resolve_formulation
from .gathering import Found, Gathering
from .hosts.base import UNetInfo
from .infotext import Facts
from .injection import Term
from .kept import Kept
from .layer_weights import LayerWeights, on_unet
from .library import Library
from .mask_pictures import MaskPictures, PreparedMasks, told
from .masks import Canvas, Mask, Where
from .pictures import read_picture
from .places import Batch, Place, place_of
from .plan import ImageKV
from .progress import Window
from .recognise import AdapterKind, recognise_adapter
from .refs import ImageRef
from .reweighing import Unweighed
from .rows import COND, UNCOND
from .steps import curve_of
from .tensorfile import open_tensors
from .units import Unit
from .weighing import Weighed, arrange, weigh


@dataclass(frozen=True)
class Part:
    """Pictures of a unit that act in the same places, as K/V in host memory."""

    place: Place
    conds: tuple[ImageKV, ...]
    unconds: tuple[ImageKV, ...]
    weigh: Callable[[float | None], Weighed | Unweighed]
    """All of them at a weight; None: at one that changes while sampling."""
    where: Mapping[int, tuple[Where, ...]]
    """By role, where on the canvas each of them acts; empty: everywhere."""


@dataclass(frozen=True)
class PreparedUnit:
    """A unit whose pictures are K/V, in host memory."""

    unit: Unit
    kind: AdapterKind
    formulation: Formulation
    uncond: str
    parts: tuple[Part, ...]
    fingerprint: str
    masks: PreparedMasks
    hashes: tuple[str, ...]
    """Of the content of each picture of the unit, also those that take no part; '' for a saved reference."""
    negative_hashes: tuple[str, ...] = ()
    """The same of the negative pictures."""
    problems: tuple[str, ...] = ()
    """Why pictures couldn't be stored."""

    @property
    def conds(self) -> tuple[ImageKV, ...]:
        """Of all pictures."""
        return tuple(image for part in self.parts for image in part.conds)

    def until(self, hires: bool) -> Window:
        """The part of a pass behind which the unit doesn't act any more: up to its stop, or to its curve's last 0."""
        return Window(0.0, min(self.unit.stop, curve_of(self.unit, hires).over), self.unit.timing)

    def terms(self, info: UNetInfo, batch: Batch) -> list[Term]:
        """The unit on a UNet, in one pass of one batch: nothing if none of its pictures acts there.

        Raises:
            IPAdapterError: if its adapter is made for another UNet.
        """
        check_fit(self.unit.model, self.kind, info)
        window = Window(self.unit.start, self.unit.stop, self.unit.timing)
        curve = curve_of(self.unit, batch.hires)
        weight = self.unit.weight * curve.only if curve.only else None
        placed = [(part, part.place.items(batch)) for part in self.parts]
        return [
            Term(self.formulation, window, part.weigh(weight), curve, items, self.unit.balance, part.where)
            for part, items in placed
            if items is None or items
        ]

    @property
    def is_masked(self) -> bool:
        """Whether any picture acts in a part of the canvas alone."""
        return any(self.masks.where)

    def on_canvas(self, canvas: Canvas) -> list[str]:
        """Puts the masks on a pass's canvas, and says what is odd about that."""
        return [sentence for where in dict.fromkeys(self.masks.where) if where for sentence in told(where, canvas)]

    @property
    def by_hash(self) -> Unit:
        """The unit with its pictures by the hash of their content."""
        return replace(
            self.unit,
            images=tuple(
                replace(ref, mask=mask)
                for ref, mask in zip(_by_hash(self.unit.images, self.hashes), self.masks.images, strict=True)
            ),
            negative_images=_by_hash(self.unit.negative_images, self.negative_hashes),
            mask=self.masks.unit,
        )

    @property
    def facts(self) -> Facts:
        """What the parameters of a picture say beside the unit."""
        return Facts(self.fingerprint, self.formulation.name, self.uncond)


def _by_hash(refs: Sequence[ImageRef], hashes: Sequence[str]) -> tuple[ImageRef, ...]:
    return tuple(
        replace(ref, data="", sha256=sha256) if sha256 else ref for ref, sha256 in zip(refs, hashes, strict=True)
    )


def _where(masks: PreparedMasks, found: Found) -> Mapping[int, tuple[Where, ...]]:
    """Where on the canvas found pictures act; a negative acts where the picture does that it stands against."""
    conds = [masks.where[number] for number in found.owners]
    if not any(conds):
        return {}
    unconds = tuple(conds[n % len(conds)] for n in range(len(found.unconds)))
    return {COND: tuple(conds), UNCOND: unconds}


class Preparer:
    """Makes K/V of units, each file and picture once for as long as what is made of it is kept.

    Args:
        library: the files.
        run: where modules compute.
        limit: bytes of host memory for what is kept from one generation to the next.
        first: the role whose rows the host puts first when both are in one batch.
    """

    def __init__(self, library: Library, run: Runner, limit: Callable[[], int], first: int) -> None:
        self.library = library
        self.run = run
        self._first = first
        self.kept = Kept(limit, _weigh)
        self._masks = MaskPictures(self.kept)

    def prepare(self, units: Sequence[Unit], info: UNetInfo, places: Sequence[Place | None] = ()) -> list[PreparedUnit]:
        """K/V of the pictures of a generation's units, and of none.

        Args:
            units: each has a picture that takes part.
            info: the UNet they are for.
            places: of each unit, where it acts, if the unit itself doesn't say.

        Raises:
            IPAdapterError: for a file or picture that is missing, broken or something else, or made for another UNet.
        """
        # A job inside a job (a face detailer's) starts in inference mode, whose tensors can't be kept for later ones.
        with torch.inference_mode(False), torch.no_grad():
            try:
                pairs = zip(units, places or (None,) * len(units), strict=True)
                return [self._prepare(unit, info, place) for unit, place in pairs]
            finally:
                self.kept.trim()

    def _prepare(self, unit: Unit, info: UNetInfo, place: Place | None) -> PreparedUnit:
        path = self.library.adapter_path(unit.model)
        kind = self.kept.get(
            ("kind", file_identity(path)), lambda: recognise_adapter(open_tensors(path).tensors, path.name)
        )
        check_fit(unit.model, kind, info)
        job = Gathering(self, unit, path, kind, self.library.encoder_for(kind))
        formulation = resolve_formulation(unit.formulation, kind.variant)
        widest = max(info.widths)
        only = curve_of(unit, hires=False).only
        masks = self._masks.prepare(unit)
        parts = []
        for found in job.parts():
            by_layer = on_unet(unit.layers, info.keys, unit.weight, unit.composition_weight, len(found.conds))
            weigh_part = self._weigher(unit, found, formulation, widest, by_layer)
            if only:  # while there is time; what a later pass has in its place is weighed when that begins
                weigh_part(unit.weight * only)
            where = _where(masks, found)
            parts.append(Part(place or place_of(unit, found.number), found.conds, found.unconds, weigh_part, where))
        return PreparedUnit(
            unit,
            kind,
            formulation,
            job.uncond,
            tuple(parts),
            fingerprint(path),
            masks,
            job.hashes(unit.images),
            job.hashes(unit.negative_images),
            (*job.stored(), *masks.problems),
        )

    def _weigher(
        self, unit: Unit, found: Found, formulation: Formulation, widest: int, by_layer: LayerWeights | None
    ) -> Callable[[float | None], Weighed | Unweighed]:
        """See :attr:`Part.weigh`."""
        prompts = {COND: found.conds, UNCOND: found.unconds}
        shares = {COND: found.shares, UNCOND: found.uncond_shares}
        source = ("weighed", found.source, formulation.name, found.shares, found.uncond_shares, widest, by_layer)
        made: dict[float, Weighed] = {}

        def at(weight: float | None) -> Weighed | Unweighed:
            if weight is None:
                return Unweighed(arrange(prompts, shares, self._first), formulation, unit.weight, widest, by_layer)
            if weight not in made:
                with torch.inference_mode(False), torch.no_grad():
                    made[weight] = self.kept.get(
                        (*source, weight),
                        lambda: weigh(prompts, formulation, weight, shares, widest, self._first, by_layer),
                    )
                self.kept.trim()
            return made[weight]

        return at

    def save(self, unit: Unit, name: str) -> saved.SavedReference:
        """Saves the pictures of a unit that take part, encoded, under a checked name."""
        path = self.library.adapter_path(unit.model)
        kind = recognise_adapter(open_tensors(path).tensors, path.name)
        encoder = self.library.encoder_for(kind)
        with torch.inference_mode(False), torch.no_grad():
            try:
                features, weights = Gathering(self, unit, path, kind, encoder).features()
            finally:
                self.kept.trim()
        return saved.default.save(name, unit, kind, (path, encoder), features, weights, self.pictures(unit))

    def pictures(self, unit: Unit) -> list[Image.Image]:
        """The pictures of a unit that take part, as they were given; of saved references the thumbnails."""
        return [picture for ref in unit.acting_images for picture in _shown(ref)]

    def clear(self) -> None:
        """Forgets all models, features and K/V."""
        self.kept.clear()

    def encoder(self, path: Path) -> CLIPVision:
        """The image encoder of a file."""
        return self.kept.get(("encoder", file_identity(path)), lambda: load_clip_vision(path))

    @contextmanager
    def adapter(self, path: Path) -> Iterator[Callable[[], LoadedAdapter]]:
        """The adapter of a file, which is read while the block runs; what is given waits for it."""
        key = ("adapter", file_identity(path))
        with ThreadPoolExecutor(1) as pool:
            reading = None if key in self.kept else pool.submit(load_adapter, path)
            yield lambda: self.kept.get(key, lambda: load_adapter(path) if reading is None else reading.result())


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


def _shown(ref: ImageRef) -> list[Image.Image]:
    if ref.saved:
        return [saved.default.thumbnail(ref.saved)]
    return [references.get(ref.sha256) if ref.sha256 else read_picture(ref.data)]


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

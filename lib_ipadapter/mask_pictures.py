"""From the masks that a unit asks for to those that act: read, checked, and known by the hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from PIL import Image

from . import references
from .errors import IPAdapterError
from .kept import Kept
from .masks import Canvas, Mask, Where, of_picture, of_template, overlap
from .pictures import BLACK, picture_hash, read_picture
from .refs import MaskRef
from .units import Unit

T = TypeVar("T")


@dataclass(frozen=True)
class PreparedMasks:
    """The masks of a unit."""

    unit: MaskRef
    """The unit's own, by the hash of its content."""
    images: tuple[MaskRef, ...]
    """Those of all its pictures, likewise."""
    where: tuple[Where, ...]
    """Where each of all pictures acts; empty for one that takes no part."""
    problems: tuple[str, ...]
    """Why masks couldn't be stored."""


class MaskPictures:
    """Reads masks, each once for as long as it is kept."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def prepare(self, unit: Unit, store: bool = True) -> PreparedMasks:
        """All masks of a unit.

        Args:
            store: whether their pictures are kept for those who paste the result's parameters.

        Raises:
            IPAdapterError: for a mask that can't be read or is black, and for a picture that would act nowhere because
                its mask and the unit's have nothing in common.
        """
        problems: list[str] = []
        made: dict[MaskRef, Mask] = {}  # equal masks are one, so that their pictures share an attention

        def by_hash(ref: MaskRef, whose: str, acts: bool) -> MaskRef:
            if ref.template or not ref or not (acts or ref.data or references.has(ref.sha256)):
                return ref
            sha256, read = self._source(ref, whose)
            problem = references.keep(sha256, read) if store else ""
            problems.extend([problem] if problem else [])
            return replace(ref, data="", sha256=sha256)

        def mask(ref: MaskRef, named: MaskRef, whose: str) -> Where:
            """As many masks as make a difference: one, or none."""
            if not ref:
                return ()
            if named not in made:
                made[named] = self._mask(ref, named, whose)
            if made[named].is_black:
                raise IPAdapterError(
                    f"The mask of {whose} is black everywhere, so it would act nowhere: paint white where it shall "
                    "act (transparent counts as black), or turn the mask round with invert."
                )
            return () if made[named].is_white else (made[named],)

        acting = unit.acting_images
        own = by_hash(unit.mask, "the unit", bool(acting))
        images: list[MaskRef] = []
        all_where: list[Where] = []
        everywhere = mask(unit.mask, own, "the unit") if acting else ()
        for number, ref in enumerate(unit.images, 1):
            whose, acts = f"picture {number}", ref in acting
            images.append(by_hash(ref.mask, whose, acts))
            where = (*everywhere, *mask(ref.mask, images[-1], whose)) if acts else ()
            if not overlap(where):
                raise IPAdapterError(
                    f"The masks of the unit and of {whose} have nothing in common, so that it would act nowhere: let "
                    "them overlap, or take one of them out."
                )
            all_where.append(where)
        return PreparedMasks(own, tuple(images), tuple(all_where), tuple(problems))

    def _mask(self, ref: MaskRef, named: MaskRef, whose: str) -> Mask:
        """The mask of ``ref``, which is ``named`` by the hash of its content."""
        if ref.template:
            return of_template(ref.template, ref.feather, ref.invert)
        return self._kept.get(
            ("mask", named), lambda: of_picture(_read(self._source(ref, whose)[1], whose), ref.feather, ref.invert)
        )

    def _source(self, ref: MaskRef, whose: str) -> tuple[str, Callable[[], Image.Image]]:
        """The hash of a mask's picture, and how to read it."""
        if ref.sha256:
            return _read(lambda: references.resolve(ref.sha256), whose), lambda: references.get(ref.sha256)
        picture = cache(lambda: read_picture(ref.data, BLACK))
        received = hashlib.sha256(ref.data.encode("utf-8", "surrogatepass")).digest()
        sha256 = self._kept.get(("received mask", received), lambda: picture_hash(_read(picture, whose)))
        return sha256, picture


def _read(read: Callable[[], T], whose: str) -> T:
    try:
        return read()
    except IPAdapterError as error:
        message = str(error)
        raise IPAdapterError(f"The mask of {whose} can't be used: {message[:1].lower()}{message[1:]}") from error


def told(where: Where, canvas: Canvas) -> list[str]:
    """What is odd about masks on a pass's canvas, in sentences; works out their factors for all layers."""
    columns, rows = canvas.size
    sentences = [
        f"A mask of IP-Adapter has {mask.size[0]} x {mask.size[1]} pixels and the canvas {columns:g} x {rows:g}: it is "
        "stretched over it."
        for mask in where
        if mask.size is not None and canvas.stretches(mask)
    ]
    if not canvas.at_every_depth(where)[0].any():
        sentences.append("A mask of IP-Adapter is black in the part that is drawn, so its picture doesn't act there.")
    return sentences

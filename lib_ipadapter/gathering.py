"""One unit's pictures on their way to K/V: read, prepared, encoded, mixed and projected, each once while it is kept.

What is encoded together is kept together: the last digits of each picture depend on the others in a forward, and shall
not depend on which of them were known before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from . import references, saved
from .encoding import (
    PENULTIMATE,
    ZERO_EMBEDS,
    encode,
    image_kv,
    load_negative,
    resolve_uncond,
    token_kv,
    uncond_pixels,
    zero_embeds,
)
from .fingerprint import FileIdentity, file_identity
from .mixtures import MIXTURES, mixed
from .noises import noised
from .packing import in_host_memory
from .pictures import clip_preprocess, picture_hash, prepare, read_picture, to_pixels
from .plan import ImageKV
from .recognise import AdapterKind
from .refs import MIDDLE, ImageRef
from .units import TOGETHER, Unit

if TYPE_CHECKING:
    from .preparer import Preparer

NO_NOISE = "none"
_NEGATIVES = {"pictures": "negative pictures", "noise": "noise"}


def uncond_of(unit: Unit, kind: AdapterKind) -> str:
    """What the negative side sees: "auto" is resolved, and negatives have a name too."""
    return _NEGATIVES.get(unit.negatives) or resolve_uncond(unit.uncond, kind.variant)


@dataclass(frozen=True)
class Take:
    """Where a picture's features are: in which batch of pictures, and in which row; and the picture's weight."""

    batch: Hashable
    row: int
    weight: float


@dataclass(frozen=True)
class Found:
    """Pictures that act in the same places, as K/V in host memory."""

    number: int
    """Of the first of them in the unit, from 0."""
    owners: tuple[int, ...]
    """Of each cond picture, the number of the unit's picture that it comes from; of a mixture, of the first."""
    conds: tuple[ImageKV, ...]
    unconds: tuple[ImageKV, ...]
    shares: tuple[float, ...]
    """Of each cond picture, its part of the unit's weight."""
    uncond_shares: tuple[float, ...]
    source: Hashable
    """What K and V are made of."""


@dataclass(frozen=True)
class Gathering:
    """One unit on its way through what a preparer keeps."""

    of: Preparer
    unit: Unit
    path: Path
    kind: AdapterKind
    encoder_path: Path
    _pixels: dict[Hashable, list[Callable[[int], Tensor]]] = field(default_factory=dict)
    """By batch, what makes the pixels of each of its pictures, given the side of the encoder's square."""
    _mixed: dict[Hashable, tuple[str, tuple[Take, ...]]] = field(default_factory=dict)
    """By mixture, its name and pictures."""
    _references: dict[ImageRef, tuple[str, Callable[[], Image.Image]]] = field(default_factory=dict)
    """Of each picture the hash of its content, and how to read it."""

    @property
    def uncond(self) -> str:
        """See :func:`uncond_of`."""
        return uncond_of(self.unit, self.kind)

    def parts(self) -> list[Found]:
        """K/V of the pictures that take part; what isn't made yet goes through encoder and adapter on one loading."""
        groups = [
            (owners, self._mix(self.unit.mixture, takes), self._against(takes, negatives))
            for owners, takes, negatives in self._groups()
        ]
        batches = [take.batch for _, conds, unconds in groups for take in (*conds, *unconds)]
        by_batch = self._kv(dict.fromkeys(batches))
        file = self._negative() if self.uncond == "file" and self.unit.uncond_weight else None

        def of(takes: Iterable[Take]) -> tuple[ImageKV, ...]:
            return tuple(by_batch[take.batch][take.row] for take in takes)

        found = []
        for owners, conds, unconds in groups:
            shares = tuple(take.weight for take in conds)
            uncond_shares = tuple(take.weight * self.unit.uncond_weight for take in (conds if file else unconds))
            source = (tuple(conds), tuple(unconds), self.unit.negative, file_identity(self.path))
            none = of(unconds) if file is None else (file,) * len(conds)
            owners = owners[: len(conds)]
            found.append(Found(owners[0], owners, of(conds), none, shares, uncond_shares, source))
        return found

    def features(self) -> tuple[Tensor, tuple[float, ...]]:
        """What the encoder says of the pictures that take part, ``[n, …]``, mixed as the unit says; their weights."""
        takes = self._mix(
            self.unit.mixture, [take for each in self._taken(self.unit.images, NO_NOISE) for take in each]
        )
        given = self._features(dict.fromkeys(take.batch for take in takes))
        return torch.cat([given[t.batch][t.row : t.row + 1] for t in takes]), tuple(take.weight for take in takes)

    def hashes(self, refs: Sequence[ImageRef]) -> tuple[str, ...]:
        """Of all of them; '' for a saved reference."""
        return tuple("" if ref.saved else self._reference(ref)[0] for ref in refs)

    def stored(self) -> tuple[str, ...]:
        """Keeps the pictures for those who paste the result's parameters; what went wrong, in sentences."""
        refs = [ref for ref in (*self.unit.images, *self.unit.negative_images) if not ref.saved]
        tried = [references.keep(*self._reference(ref)) for ref in refs]
        return tuple(problem for problem in tried if problem)

    # Which pictures

    def _groups(self) -> list[tuple[tuple[int, ...], list[Take], list[Take] | None]]:
        """Pictures that act in the same places, and their negatives; None: those come from the uncond source.

        Ahead of them, of each the number of the unit's picture that it comes from.
        """
        positions = self._taken(self.unit.images, NO_NOISE)
        negatives = None
        if self.unit.negatives:
            refs = self.unit.negative_images or self.unit.images
            negatives = self._taken(refs, self.unit.noise)
        if self.unit.pictures == TOGETHER:
            flat = None if negatives is None else [take for each in negatives for take in each]
            owners = tuple(number for number, each in enumerate(positions) for _ in each)
            return [(owners, [take for each in positions for take in each], flat)]
        return [
            ((number,) * len(takes), takes, None if negatives is None else negatives[number % len(negatives)])
            for number, takes in enumerate(positions)
            if takes
        ]

    def _against(self, conds: Sequence[Take], negatives: Sequence[Take] | None) -> list[Take]:
        """What stands on the uncond side against pictures; nothing if that is a file."""
        if self.uncond in ("none", "file") or not self.unit.uncond_weight:
            return []
        name = self.unit.mixture
        if negatives is not None:
            name = MIXTURES[name].of_negatives or name
            against = self._mix(name, negatives)
            # In one softmax the uncond side must weigh as much as the cond side.
            return [against[n % len(against)] for n in range(max(len(against), self._tokens(conds)))] if against else []
        batch = ("features", self.uncond, "", *self._seen_by)
        weights = [1.0] if MIXTURES[name].mix else [take.weight for take in conds]
        return [Take(batch, 0, weight) for weight in weights]

    def _tokens(self, conds: Sequence[Take]) -> int:
        """How many pictures' tokens the cond side has."""
        return 1 if MIXTURES[self.unit.mixture].mix else len(conds)

    def _mix(self, name: str, takes: Sequence[Take]) -> list[Take]:
        if MIXTURES[name].mix is None or not takes:
            return list(takes)
        key = ("mixed", name, tuple(takes))
        self._mixed[key] = (name, tuple(takes))
        return [Take(key, 0, 1.0)]

    def _taken(self, refs: Sequence[ImageRef], noise: str) -> list[list[Take]]:
        """Of each of them its features; none of one that takes no part."""
        sources = {ref: self._source(ref, noise) for ref in refs if ref.weight and not ref.saved}
        distinct = dict(sources.values())
        batch = ("features", tuple(distinct), self.unit.preparation, *self._seen_by)
        self._pixels[batch] = list(distinct.values())
        row = {key: n for n, key in enumerate(distinct)}

        def of(ref: ImageRef) -> list[Take]:
            if not ref.weight:
                return []
            if ref.saved:
                known = self._saved(ref.saved)
                return [Take(known.key, n, ref.weight * weight) for n, weight in enumerate(known.weights)]
            return [Take(batch, row[sources[ref][0]], ref.weight)]

        return [of(ref) for ref in refs]

    def _source(self, ref: ImageRef, noise: str) -> tuple[Hashable, Callable[[int], Tensor]]:
        """What the encoder sees of a picture (its hash, crop and noise), and what makes that."""
        sha256, read = self._reference(ref)
        crop = ref.crop if self.unit.preparation == "crop" else MIDDLE
        strength = self.unit.noise_strength if noise != NO_NOISE else 0.0

        def pixels(size: int) -> Tensor:
            seen = prepare(read(), self.unit.preparation, size, crop)
            if strength:
                seen = noised(seen, noise, strength, sha256)
            return clip_preprocess(to_pixels([seen]), size)

        return ((sha256, crop, noise, strength) if strength else (sha256, crop)), pixels

    def _saved(self, name: str) -> saved.SavedReference:
        known = saved.default.read(name)
        known.check(self.kind, self.encoder_path)
        return known

    def _reference(self, ref: ImageRef) -> tuple[str, Callable[[], Image.Image]]:
        """The hash of a picture's content, and how to read it.

        A picture that is known by what was received isn't decoded for that.
        """
        if ref not in self._references:
            self._references[ref] = self._find(ref)
        return self._references[ref]

    def _find(self, ref: ImageRef) -> tuple[str, Callable[[], Image.Image]]:
        if ref.sha256:
            takes_part = ref.weight != 0
            sha256 = references.resolve(ref.sha256) if takes_part or references.has(ref.sha256) else ref.sha256
            return sha256, partial(references.get, ref.sha256)
        picture = cache(lambda: read_picture(ref.data))
        received = hashlib.sha256(ref.data.encode("utf-8", "surrogatepass")).digest()
        return self.of.kept.get(("received", received), lambda: picture_hash(picture())), picture

    # What is made of them

    @cached_property
    def _seen_by(self) -> tuple[FileIdentity, str]:
        """The encoder, and which of its outputs is taken."""
        return file_identity(self.encoder_path), self.kind.output

    def _kv(self, batches: Iterable[Hashable]) -> dict[Hashable, list[ImageKV]]:
        adapter = file_identity(self.path)

        def make(missing: Sequence[tuple[str, Hashable, FileIdentity]]) -> list[list[ImageKV]]:
            with self.of.adapter(self.path) as loaded:
                given = self._features([batch for _, batch, _ in missing])
                made = image_kv(self.of.run, loaded().model, [given[batch] for _, batch, _ in missing])
            return [
                [_in_host_memory([t[n : n + 1] for t in pairs]) for n in range(pairs[0].shape[0])] for pairs in made
            ]

        keys = [("K/V", batch, adapter) for batch in batches]
        return dict(zip((batch for _, batch, _ in keys), self.of.kept.get_all(keys, make), strict=True))

    def _features(self, batches: Iterable[Hashable]) -> dict[Hashable, Tensor]:
        """Of batches, mixtures among them, ``[B, …]`` each."""
        wanted = list(batches)
        parts = [[t.batch for t in self._mixed[each][1]] if each in self._mixed else [each] for each in wanted]
        plain = list(dict.fromkeys(batch for each in parts for batch in each))
        known = dict(zip(plain, self.of.kept.get_all(plain, self._encoded), strict=True))
        for each in wanted:
            if each in self._mixed:
                name, takes = self._mixed[each]
                rows = torch.cat([known[t.batch][t.row : t.row + 1] for t in takes])
                known[each] = mixed(name, rows, [take.weight for take in takes])
        return known

    def _encoded(self, missing: Sequence[Hashable]) -> list[Tensor]:
        """What the encoder says of batches that aren't known yet, and of no picture; what files say of saved ones."""
        uncond = ("features", self.uncond, "", *self._seen_by)
        made: dict[Hashable, Tensor] = {each: saved.default.features(each) for each in missing if saved.is_key(each)}
        if uncond in missing and self.uncond == ZERO_EMBEDS and self.kind.output != PENULTIMATE:
            made[uncond] = torch.zeros(1, self.kind.embedding_width)
        if any(each not in made for each in missing):
            tower = self.of.encoder(self.encoder_path)
            size = tower.kind.image_size
            pixels: dict[Hashable, Tensor] = {}
            for each in missing:
                if each in self._pixels:
                    pixels[each] = torch.cat([make(size) for make in self._pixels[each]])
                elif each not in made and self.uncond == ZERO_EMBEDS:
                    made[each] = zero_embeds(self.kind, tower.kind)
                elif each not in made:
                    pixels[each] = uncond_pixels(self.uncond, size)
            seen = encode(self.of.run, tower, self.kind.output, list(pixels.values()))
            made.update(zip(pixels, seen, strict=True))
        return [made[each] for each in missing]

    def _negative(self) -> ImageKV:
        path = self.of.library.negative_path(self.unit.negative)

        def from_file() -> ImageKV:
            with self.of.adapter(self.path) as adapter:
                tokens = load_negative(path, self.kind.context_width)
                return _in_host_memory(token_kv(self.of.run, adapter().model, tokens))

        return self.of.kept.get(("negative K/V", file_identity(path), file_identity(self.path)), from_file)


def _in_host_memory(pairs: list[Tensor]) -> ImageKV:
    # What is kept between jobs must not take room on the device.
    return ImageKV(tuple(in_host_memory(pairs[::2])), tuple(in_host_memory(pairs[1::2])))

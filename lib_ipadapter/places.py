"""Where in a job a picture acts: everywhere, in one generation of several, or in single pictures of a batch.

A job draws ``n_iter`` batches one after another (generations here), each of ``batch_size`` pictures (its items), and
each perhaps in two passes. A :class:`Place` answers for one pass of one batch which items it means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .errors import IPAdapterError
from .units import PER_GENERATION, PER_ITEM, TOGETHER, Unit

Items = frozenset[int] | None
"""Items of a batch; None: all of them, so that nobody need know which row is whose."""


@dataclass(frozen=True)
class Batch:
    """One pass of one batch of a job."""

    generation: int = 0
    """How many batches came before."""
    size: int = 1
    hires: bool = False
    """Whether it is the hires pass."""


class Place(Protocol):
    """Where in a job something acts."""

    def items(self, batch: Batch) -> Items:
        """The items of a batch in which it acts; an empty set: in none."""


def _of(wanted: frozenset[int], batch: Batch) -> Items:
    return None if len(wanted) == batch.size else wanted


@dataclass(frozen=True)
class Everywhere:
    """In every picture of the job."""

    def items(self, batch: Batch) -> Items:
        """See :class:`Place`."""
        return None


@dataclass(frozen=True)
class InGenerations:
    """In every ``of``-th generation, the first of them being ``number`` (from 0)."""

    number: int
    of: int

    def items(self, batch: Batch) -> Items:
        """See :class:`Place`."""
        return None if batch.generation % self.of == self.number else frozenset()


@dataclass(frozen=True)
class InItems:
    """In every ``of``-th item of each batch, the first of them being ``number`` (from 0)."""

    number: int
    of: int

    def items(self, batch: Batch) -> Items:
        """See :class:`Place`."""
        return _of(frozenset(range(self.number, batch.size, self.of)), batch)


@dataclass(frozen=True)
class InPictures:
    """In pictures of the job by their number (from 0), one set for each pass."""

    first: frozenset[int]
    hires: frozenset[int]
    batch_size: int

    def items(self, batch: Batch) -> Items:
        """See :class:`Place`."""
        start = batch.generation * self.batch_size
        wanted = self.hires if batch.hires else self.first
        return _of(frozenset(n for n in range(batch.size) if start + n in wanted), batch)


EVERYWHERE = Everywhere()


def place_of(unit: Unit, number: int) -> Place:
    """Where the picture ``number`` (from 0) of a unit acts. Where there are fewer than places, they take turns."""
    if unit.pictures == TOGETHER:
        return EVERYWHERE
    return (InGenerations if unit.pictures == PER_GENERATION else InItems)(number, len(unit.images))


def check_batch(units: Sequence[Unit], batch_size: int) -> None:
    """Raises :class:`IPAdapterError` if a unit has pictures for more items than a job's batches have."""
    for unit in units:
        if unit.pictures == PER_ITEM and len(unit.images) > batch_size:
            raise IPAdapterError(
                f"The unit has {len(unit.images)} pictures, one per batch item, and the batch size is {batch_size}: "
                'raise the batch size, take pictures out, or set "pictures" to "one per generation".'
            )

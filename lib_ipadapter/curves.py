"""Curves: how a unit's weight goes along a pass, as text, as points, and as a number at any progress.

``0.2@0, 0.8@0.3, 0@0.7`` has a value at each of three positions. A position is progress, 0 to 1 by the unit's timing;
a value is a factor of the unit's weight. Between two points the factor is linear, before the first and after the last
it is constant. Two points at one position are a jump: up to it the first one's value is approached, from it on the
second one's holds. So ``1@0.5, 0@0.5`` is what a stop of 0.5 is.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .errors import IPAdapterError
from .progress import SLACK

VALUE_RANGE = (-5.0, 5.0)
POSITION_RANGE = (0.0, 1.0)
MAX_POINTS = 64
EXAMPLE = "0.2@0, 0.8@0.3, 0@0.7"

_ENTRY = re.compile(r"[^,;\r\n]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_SHOWN_CHARACTERS = 24


class Point(NamedTuple):
    """A corner of a curve."""

    position: float
    """Progress, 0 to 1."""
    value: float
    """Factor of the unit's weight."""


@dataclass(frozen=True)
class Curve:
    """A factor of a unit's weight at every progress; without points it is 1 everywhere.

    The points' positions ascend, and at most two of them are equal; :func:`parse` sees to it.
    """

    points: tuple[Point, ...] = ()

    def at(self, progress: float) -> float:
        """The factor at ``progress``. A position counts as reached a little before it, as a start and a stop do."""
        return self._between(bisect_right(self._positions, progress + SLACK), progress)

    def until(self, position: float) -> float:
        """The factor just before ``position``: another one than at it where the curve jumps."""
        return self._between(bisect_left(self._positions, position), position)

    def scaled(self, factor: float) -> Curve:
        """The curve with every value times ``factor``."""
        points = self.points or (Point(0.0, 1.0),)
        return Curve(tuple(Point(position, value * factor) for position, value in points))

    @property
    def only(self) -> float | None:
        """The one value that the curve has wherever it isn't 0; 0 if it is 0 everywhere, None if there are several."""
        values = {value for _, value in self.points if value} or {0.0 if self.points else 1.0}
        ramps = any(a.value != b.value and a.position < b.position for a, b in self._sides)
        return None if ramps or len(values) > 1 else values.pop()

    @property
    def is_whole(self) -> bool:
        """Whether it is the same everywhere."""
        return len({value for _, value in self.points}) < 2

    @property
    def over(self) -> float:
        """The position from which on it stays 0: 1 if it never does, 0 if it always is."""
        zeros = 0
        for point in reversed(self.points):
            if point.value:
                break
            zeros += 1
        if not zeros:
            return 1.0
        return 0.0 if zeros == len(self.points) else self.points[-zeros].position

    def _between(self, reached: int, progress: float) -> float:
        """The factor at ``progress``, when so many points lie before it."""
        if not self.points:
            return 1.0
        if reached in (0, len(self.points)):
            return self.points[min(reached, len(self.points) - 1)].value
        before, after = self.points[reached - 1 : reached + 1]
        share = max(0.0, progress - before.position) / (after.position - before.position)
        return before.value + (after.value - before.value) * share

    @property
    def _sides(self) -> Iterator[tuple[Point, Point]]:
        return zip(self.points, self.points[1:], strict=False)

    @cached_property
    def _positions(self) -> tuple[float, ...]:
        return tuple(position for position, _ in self.points)


ALWAYS = Curve()
"""The curve of a unit that has none."""


def parse(text: str, name: str = "curve") -> Curve:
    """Reads a curve; the inverse of :func:`write`.

    Points are parted by commas, semicolons or new lines (a value of an X/Y/Z axis can't hold commas); spaces and empty
    entries mean nothing. An empty text is :data:`ALWAYS`.

    Args:
        text: ``value@position`` of each point.
        name: of the field that errors speak of.

    Raises:
        IPAdapterError: with the number, from 1, of the character where the text can't be read.
    """
    points: list[Point] = []
    for entry in _ENTRY.finditer(text):
        shown = entry[0].strip()
        if not shown:
            continue
        start = entry.start() + len(entry[0]) - len(entry[0].lstrip())
        value, at, position = shown.partition("@")
        if not at:
            raise _error(name, start, f"{_quoted(shown)} has no @ between a value and a position")
        factor = _number(name, "value", value, start, VALUE_RANGE)
        point = Point(_number(name, "position", position, start + len(value) + 1, POSITION_RANGE), factor)
        if points and point.position < points[-1].position:
            words = f"the position {point.position:g} comes after {points[-1].position:g}; positions must ascend"
            raise _error(name, start, words)
        if len(points) > 1 and point.position == points[-2].position:
            raise _error(name, start, f"there are two points at {point.position:g} already, which is a jump")
        if len(points) == MAX_POINTS:
            raise _error(name, start, f"there are {MAX_POINTS} points already, which is the most that a curve can have")
        points.append(point)
    return Curve(tuple(points))


def _number(name: str, what: str, text: str, place: int, limits: tuple[float, float]) -> float:
    low, high = limits
    place += len(text) - len(text.lstrip())
    text = text.strip()
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not low <= number <= high:
        found = f"the {what} is {_quoted(text)}" if text else f"the {what} is missing"
        raise _error(name, place, f"{found}; allowed is a number from {low:g} to {high:g}")
    return number + 0.0  # -0.0 becomes 0.0


def _error(name: str, place: int, words: str) -> IPAdapterError:
    return IPAdapterError(
        f'The field "{name}" can\'t be read at character {place + 1}: {words}. Write value@position, such as {EXAMPLE}.'
    )


def _quoted(text: str) -> str:
    clipped = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
    return json.dumps(clipped, ensure_ascii=False)


def write(points: Iterable[tuple[float, float]]) -> str:
    """The text of points, ``(position, value)`` each, without loss."""
    return ", ".join(f"{_shortest(value)}@{_shortest(position)}" for position, value in points)


def _shortest(number: float) -> str:
    return repr(float(number)).removesuffix(".0")

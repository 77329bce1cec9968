"""Axes of an X/Y/Z grid: each sets one field of one unit in every cell.

A cell is a copy of the job. An axis writes what it sets onto the copy, and the script reads it there
(:func:`overridden`); no arguments are touched, neither ours nor others'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import IPAdapterError
from .layer_weights import TYPES
from .masks import TEMPLATES
from .pictures import read_picture
from .refs import ImageRef
from .units import FORMULATIONS, HIRES, MIXTURES, NOISES, PICTURES, PREPARATIONS, TIMINGS, UNCONDS, Unit

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIX = "[IP-Adapter"
"""How every label of ours begins, so that ours are known again in a list that outlives us."""
NUMBERS = (1, 2)
"""The units that have axes."""
_ATTRIBUTE = "ip_adapter_axes"
_HASH = re.compile(r"[0-9a-fA-F]{64}")

Overrides = Mapping[tuple[int, str], Any]
"""What is set: by a unit's number and a field's name."""
ReadPicture = Callable[[str, Unit], ImageRef]


class Store(Protocol):
    """Pictures by hash; see ``references``."""

    def add(self, picture: Image) -> str:
        """Keeps a picture; its hash."""

    def get(self, sha256: str) -> Image:
        """The picture with this hash; raises :class:`IPAdapterError` if it isn't kept."""


class _Number:
    """The type of an axis of numbers.

    X/Y/Z plot understands ranges for a type that equals ``float``, and calls it with each single value; what isn't a
    number then gets a sentence instead of Python's.
    """

    def __init__(self, label: str) -> None:
        self._label = label

    def __eq__(self, other: object) -> bool:
        return other is float

    def __hash__(self) -> int:
        return hash(float)

    def __call__(self, value: object) -> float:
        try:
            return float(value)  # type: ignore[arg-type]  # a text or a number of a range
        except ValueError:
            raise IPAdapterError(
                f"The axis {self._label} has the value {value!r:.60}; allowed are numbers, and ranges such as 0-1 [5]."
            ) from None


SWITCH = ("off", "on")


def _switch(label: str) -> Callable[[object], bool]:
    """The type of an axis of on and off."""

    def read(value: object) -> bool:
        text = str(value).strip().lower()
        if text not in SWITCH:
            raise IPAdapterError(f"The axis {label} has the value {value!r:.60}; allowed are off and on.")
        return text == "on"

    return read


@dataclass(frozen=True)
class _Kind:
    """One row of the table: what can be varied."""

    label: str
    field: str
    choices: tuple[str, ...] = ()
    number: bool = False
    cost: float = 0.0
    """Above 0 where a change is slow, so that the grid changes it seldom."""


_KINDS = (
    _Kind("model", "model", cost=0.5),
    _Kind("image", "images", cost=0.2),
    _Kind("weight", "weight", number=True),
    _Kind("start", "start", number=True),
    _Kind("stop", "stop", number=True),
    _Kind("formulation", "formulation", FORMULATIONS),
    _Kind("uncond", "uncond", tuple(each for each in UNCONDS if each != "file")),
    _Kind("preparation", "preparation", PREPARATIONS),
    _Kind("timing", "timing", TIMINGS),
    _Kind("curve", "curve"),
    _Kind("hires", "hires", HIRES),
    _Kind("layers", "layers", tuple(TYPES)),
    _Kind("mixture", "mixture", MIXTURES),
    _Kind("mask", "mask", tuple(TEMPLATES)),
    _Kind("composition weight", "composition_weight", number=True),
    _Kind("hires curve", "hires_curve"),
    _Kind("hires scale", "hires_scale", number=True),
    _Kind("inside jobs", "nested", SWITCH),
    _Kind("pictures", "pictures", PICTURES),
    _Kind("balance", "balance", SWITCH),
    _Kind("noise", "noise", NOISES),
    _Kind("noise strength", "noise_strength", number=True),
    _Kind("uncond weight", "uncond_weight", number=True),
)


@dataclass(frozen=True)
class Axis:
    """What X/Y/Z plot is given for one axis; the names are those of its ``AxisOption``."""

    label: str
    type: Callable[[Any], Any]
    apply: Callable[[Any, Any, Any], None]
    confirm: Callable[[Any, Sequence[Any]], None]
    format_value: Callable[[Any, Any, Any], str]
    cost: float
    choices: Callable[[], list[str]] | None


def make(
    models: Callable[[], list[str]],
    find_model: Callable[[str], object],
    picture_reader: Callable[[Any], ReadPicture],
    title: str,
) -> list[Axis]:
    """All axes.

    Args:
        models: names of the adapters.
        find_model: raises :class:`IPAdapterError` for a name that isn't one.
        picture_reader: of a job, what reads the values of its picture axis.
        title: of the script whose arguments hold the units.
    """

    def axis(number: int, kind: _Kind) -> Axis:
        label = f"{PREFIX}{'' if number == 1 else f' {number}'}] {kind.label}"

        def apply(p: Any, value: Any, _: Any) -> None:
            setattr(p, _ATTRIBUTE, {**of(p), (number, kind.field): value})  # another one: copies of a job share it

        def confirm(p: Any, values: Sequence[Any]) -> None:
            """Before the grid starts."""
            for value in values:
                if kind.field == "model":
                    find_model(value)
                overridden(_arguments(p, title), {(number, kind.field): value}, picture_reader(p), before=True)

        listed = models if kind.field == "model" else (lambda: list(kind.choices)) if kind.choices else None
        made: Callable[[Any], Any] = str
        if kind.number:
            made = _Number(label)
        elif kind.choices == SWITCH:
            made = _switch(label)
        return Axis(label, made, apply, confirm, _shown, kind.cost, listed)

    return [axis(number, kind) for number in NUMBERS for kind in _KINDS]


def of(p: Any) -> Overrides:
    """What the axes have set for a job."""
    overrides: Overrides = getattr(p, _ATTRIBUTE, {})
    return overrides


def overridden(args: Sequence[Any], overrides: Overrides, read: ReadPicture, before: bool = False) -> Sequence[Any]:
    """The script's arguments with what the axes set.

    Args:
        before: whether the grid hasn't begun: what other axes set is still unknown, so that a start isn't held against
            the unit's stop; and IP-Adapter must be on, while a cell's script may well start jobs without it.

    Raises:
        IPAdapterError: if a unit isn't there or is off, so that every cell would be the same, or a value isn't allowed.
    """
    changed = list(args)
    first = 1 if changed and isinstance(changed[0], bool) else 0
    is_on = bool(changed) and changed[0] is not False
    if not overrides or not (is_on or before):
        return args
    if not is_on:
        raise IPAdapterError(
            "An axis of the X/Y/Z grid varies an IP-Adapter unit, and IP-Adapter is switched off: switch it on and "
            "fill the unit, or choose another axis."
        )
    for number in sorted({number for number, _ in overrides}):
        place = first + number - 1
        slot = changed[place] if place < len(changed) else None
        unit = Unit.from_json(slot) if slot and str(slot).strip() else Unit(enabled=False)
        if not unit.enabled:
            raise IPAdapterError(
                f"An axis of the X/Y/Z grid varies IP-Adapter unit {number}, which is off: fill it and switch it on, "
                "or choose another axis."
            )
        changes: dict[str, Any] = {field: value for (of_unit, field), value in overrides.items() if of_unit == number}
        if "images" in changes:
            changes["images"] = (read(changes["images"], unit),)
        if "uncond" in changes:
            changes["negative"] = ""
        if before and "start" in changes:
            changes["stop"] = 1.0
        elif before and "stop" in changes:
            changes["start"] = 0.0
        changed[place] = replace(unit, **changes)
    return changed


def picture(value: str, unit: Unit, store: Store, files: bool) -> ImageRef:
    """The picture that a value of the axis names: a number of the unit's own, a hash, or a file.

    Args:
        files: whether files of this machine may be read for who asks.

    Raises:
        IPAdapterError: if there is no such picture, or it may not be read.
    """
    value = value.strip()
    if value.isdecimal() and len(value) < 10:
        if not 1 <= int(value) <= len(unit.images):
            raise IPAdapterError(
                f"The axis of images has the value {value} and the unit has {len(unit.images)} pictures: give a number "
                "from 1 to that, or a picture's sha256."
            )
        return unit.images[int(value) - 1]
    if _HASH.fullmatch(value):
        store.get(value.lower())
        return ImageRef(sha256=value)
    if not files:
        raise IPAdapterError(
            f"The axis of images has the value {value!r:.60}; allowed are a number of the unit's own pictures and the "
            "sha256 of a kept one, and in the page of a WebUI that other machines can't reach also a file."
        )
    return ImageRef(sha256=store.add(read_picture(Path(value))))


def _arguments(p: Any, title: str) -> Sequence[Any]:
    """Our script's part of a job's arguments."""
    script = next(each for each in p.scripts.alwayson_scripts if each.title() == title)
    arguments: Sequence[Any] = p.script_args[script.args_from : script.args_to]
    return arguments


def _shown(_: Any, axis: Any, value: Any) -> str:
    """The label of a cell's row or column."""
    if isinstance(value, float):
        return f"{axis.label}: {round(value, 8):g}"
    if isinstance(value, bool):
        return f"{axis.label}: {SWITCH[value]}"
    text = value[:10] if _HASH.fullmatch(value) else Path(value).name
    return f"{axis.label}: {text}"

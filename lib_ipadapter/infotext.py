"""Units in a picture's parameters: written for people, and read back without loss.

One text a unit, ``model: plus.safetensors [0123456789], weight: 0.6, formulation: auto (joint), picture 1: <sha256>``.
What is left out has the schema's default; words in round brackets say what "auto" became, for the reader alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ERROR_KEY, IPAdapterError
from .refs import MIDDLE, NO_MASK, ImageRef, MaskRef
from .units import PICTURE_FIELDS, UNIT_SLOTS, Unit

KEY = "IP-Adapter"
"""Key of a unit's text, before its number."""
OUR_KEY = re.compile(rf"{KEY} (\d+)|{ERROR_KEY}", re.ASCII)
"""Every key of ours among a picture's parameters; its group is a unit's number."""
DIGITS = 10
"""Digits of a model's fingerprint."""
HIDDEN = "hidden"
"""Stands for the hash of a picture that a setting leaves out."""
SAVED = "saved"
"""Stands for a picture that is a saved reference, whose name comes last."""

_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"(?=\s*(?:$|,|\[))', re.DOTALL)
_FIELD = re.compile(r"([a-z][a-z0-9 _-]*):(?:\s+(.*))?", re.DOTALL | re.ASCII)
_PICTURE = re.compile(r"(negative )?picture \d+", re.ASCII)
_MODEL = re.compile(rf"(.*) \[([0-9a-f]{{{DIGITS}}})\]", re.DOTALL | re.ASCII)
_RESOLVED = re.compile(r"auto \([^()]*\)")
_PLAIN = re.compile(r"[^\s\"\\,:()\[\]](?:[^\"\\,:()\[\]\r\n\t]*[^\s\"\\,:()\[\]])?")
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_FIELDS = {each.name: each for each in fields(Unit) if each.name not in (*PICTURE_FIELDS, "mask")}
_WORDS = {"weight": 1, "crop": 3, "mask": 1, "feather": 1, "inverted": 0}
"""What may stand behind a picture's hash, and how many words follow each."""


@dataclass(frozen=True)
class Facts:
    """What a generation found out about a unit: its model's fingerprint, and what "auto" became."""

    fingerprint: str = ""
    formulation: str = ""
    uncond: str = ""


@dataclass(frozen=True)
class Parsed:
    """What a picture's parameters say of us.

    Attributes:
        enabled: whether they have any unit.
        units: one for each of :data:`~.units.UNIT_SLOTS` slots, None where there is none.
        notes: sentences that say what couldn't be restored as it was.
        unknown: fields that a newer version has written, as they stand there, by the unit's number.
    """

    enabled: bool = False
    units: tuple[Unit | None, ...] = (None,) * UNIT_SLOTS
    notes: tuple[str, ...] = ()
    unknown: Mapping[int, Mapping[str, str]] = field(default_factory=dict)

    def slots(self) -> list[str]:
        """The units as the script's arguments have them."""
        return ["" if unit is None else unit.to_json() for unit in self.units]


def write(units: Mapping[int, Unit], facts: Mapping[int, Facts] | None = None, hashes: bool = True) -> dict[str, str]:
    """The parameters of units by number, whose pictures are given by hash; without ``hashes``, these are left out."""
    known = facts or {}
    return {f"{KEY} {number}": _text(unit, known.get(number, Facts()), hashes) for number, unit in units.items()}


def parse(
    params: Mapping[str, Any],
    find_model: Callable[[str, str], tuple[str, str]] = lambda name, _: (name, ""),
    has_picture: Callable[[str], bool] = lambda _: True,
) -> Parsed:
    """Reads what :func:`write` (or an older version of it) has written.

    Args:
        params: all parameters of a picture, as a host has split them.
        find_model: what a model of this name and fingerprint ('' if there is none) is called here, and a note on that.
        has_picture: whether the picture with a hash can be had.
    """
    units: list[Unit | None] = [None] * UNIT_SLOTS
    notes: list[str] = []
    unknown: dict[int, dict[str, str]] = {}
    for key, value in params.items():
        match = OUR_KEY.fullmatch(str(key))
        if match is None or match[1] is None or value is None:
            continue
        number = int(match[1])
        if not 1 <= number <= UNIT_SLOTS:
            notes.append(f"Unit {number} is left out: there are {UNIT_SLOTS} units.")
            continue
        reader = _Reader(str(value), find_model, has_picture)
        units[number - 1] = reader.unit
        notes += [f"Unit {number}: {note}" for note in reader.notes]
        if reader.unknown:
            unknown[number] = reader.unknown
    return Parsed(any(units), tuple(units), tuple(notes), unknown)


# --- Writing ----------------------------------------------------------------------------------------------------------


def _text(unit: Unit, facts: Facts, hashes: bool) -> str:
    parts = []
    for name, each in _FIELDS.items():
        value = getattr(unit, name)
        resolved = getattr(facts, name, "") if value == "auto" else ""
        # The weight is always there: it is what a reader looks for, and no unit's text may be empty.
        if value != each.default or resolved or name == "weight":
            parts.append(f"{name}: {_value(value)}{f' ({resolved})' if resolved else ''}")
            if name == "model" and facts.fingerprint:
                parts[-1] += f" [{facts.fingerprint[:DIGITS]}]"
    if unit.mask:
        parts.append("mask: " + " ".join(_mask(unit.mask, hashes)))
    for word, refs in (("picture", unit.images), ("negative picture", unit.negative_images)):
        parts += [f"{word} {number}: {_picture(ref, hashes)}" for number, ref in enumerate(refs, 1)]
    return ", ".join(parts)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _number(value)
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _picture(ref: ImageRef, hashes: bool) -> str:
    if not (ref.sha256 or ref.saved):
        raise ValueError("a picture in parameters is given by its hash")
    words = [SAVED] if ref.saved else [ref.sha256 if hashes else HIDDEN]
    if ref.weight != 1.0:
        words.append(f"weight {_number(ref.weight)}")
    if ref.crop != MIDDLE:
        words.append("crop " + " ".join(map(_number, ref.crop)))
    if ref.mask:
        words += ["mask", *_mask(ref.mask, hashes)]
    if ref.saved:
        words.append(f"name {ref.saved}")
    return " ".join(words)


def _mask(ref: MaskRef, hashes: bool) -> list[str]:
    if ref.data:
        raise ValueError("a mask in parameters is given by its hash")
    words = [ref.template.replace(" ", "-") or (ref.sha256 if hashes else HIDDEN)]
    if ref.feather:
        words += ["feather", _number(ref.feather)]
    return [*words, "inverted"] if ref.invert else words


# --- Reading ----------------------------------------------------------------------------------------------------------


class _Reader:
    """One unit's text, read on construction; nothing in it can make that fail."""

    def __init__(
        self, text: str, find_model: Callable[[str, str], tuple[str, str]], has_picture: Callable[[str], bool]
    ) -> None:
        self.notes: list[str] = []
        self.unknown: dict[str, str] = {}
        self._has_picture = has_picture
        values: dict[str, Any] = {}
        pictures: dict[str, list[ImageRef]] = {field: [] for field in PICTURE_FIELDS}
        named = 0
        for name, value in _parts(text):
            match = _PICTURE.fullmatch(name)
            if match is not None:
                named += not match[1]
                picture = self._picture(name, value)
                if picture is not None:
                    pictures["negative_images" if match[1] else "images"].append(picture)
            elif name == "model":
                values[name] = self._model(value, find_model)
            elif name == "mask":
                values[name] = self._mask("its mask", self._by_word(name, ["mask", *value.split()]))
            elif name in _FIELDS:
                values[name] = _typed(name, value)
            else:
                self.unknown[name] = value
        if not named:
            self.notes.append("the infotext names no pictures, so add them again.")
        self.unit = self._unit({**values, **{field: tuple(refs) for field, refs in pictures.items() if refs}})
        if self.unknown:
            names = ", ".join(f"{name} ({value})" for name, value in self.unknown.items())
            self.notes.append(f"this version of the extension doesn't know, and so doesn't do: {names}.")

    def _model(self, value: str, find_model: Callable[[str, str], tuple[str, str]]) -> str:
        match = _MODEL.fullmatch(value)
        name, note = find_model(_unquoted(match[1] if match else value), match[2] if match else "")
        if note:
            self.notes.append(note)
        return name

    def _picture(self, name: str, value: str) -> ImageRef | None:
        given_as, _, saved = value.partition(" name ") if value.startswith(f"{SAVED} ") else (value, "", "")
        words = given_as.split()
        if words[:1] == [HIDDEN]:
            self.notes.append(f"the infotext has no hash of {name}, so add the picture again.")
            return None
        given = self._by_word(name, words[1:])
        values: dict[str, Any] = {"saved": saved} if saved else {"sha256": words[0] if words else ""}
        values["mask"] = self._mask(f"the mask of {name}", given)
        if "weight" in given:
            values["weight"] = given["weight"][0] if given["weight"] else []
        if "crop" in given:
            values["crop"] = given["crop"]
        try:
            ref = ImageRef(**values)
        except IPAdapterError as error:
            self.notes.append(f"{name} can't be read, so add it again: {error}")
            return None
        if ref.saved:
            return ref  # one that isn't there is said, with those that are, when it is used
        if not self._has_picture(ref.sha256):
            # It stays in the unit: a unit never acts with fewer pictures than it was given.
            self.notes.append(f"{name} ({ref.sha256}) isn't kept here, so add it again, or take it out.")
        return ref

    def _by_word(self, name: str, words: list[str]) -> dict[str, list[str]]:
        """What follows each known word; an unknown one takes all the rest."""
        found: dict[str, list[str]] = {}
        while words:
            key, count = words[0], _WORDS.get(words[0], len(words) - 1)
            given, words = words[1 : 1 + count], words[1 + count :]
            if key in _WORDS:
                found[key] = given
            else:
                self.unknown[f"{name} {key}"] = " ".join(given)
        return found

    def _mask(self, name: str, given: Mapping[str, list[str]]) -> MaskRef:
        if "mask" not in given:
            return NO_MASK
        source = " ".join(given["mask"])
        if source == HIDDEN:
            self.notes.append(f"the infotext has no hash of {name}, so add it again.")
            return NO_MASK
        values: dict[str, Any] = {"sha256" if _HASH.fullmatch(source) else "template": source}
        if "feather" in given:
            values["feather"] = " ".join(given["feather"])
        try:
            ref = MaskRef(invert="inverted" in given, **values)
            if not ref:
                raise IPAdapterError("it is empty.")
        except IPAdapterError as error:
            self.notes.append(f"{name} can't be read, so choose it again: {error}")
            return NO_MASK
        if ref.sha256 and not self._has_picture(ref.sha256):
            # It stays in the unit, which would act everywhere without it.
            self.notes.append(f"{name} ({ref.sha256}) isn't kept here, so choose it again, or take it out.")
        return ref

    def _unit(self, values: dict[str, Any]) -> Unit:
        """The unit of all values that it takes; the others are kept as unknown."""
        try:
            return Unit(**values)
        except IPAdapterError:
            pass
        taken: dict[str, Any] = {}
        # Some fields are allowed together only, such as start and stop: each is tried with all that follow it.
        for name in sorted(values, key=lambda each: (each not in PICTURE_FIELDS, each in ("start", "uncond"))):
            try:
                Unit(**{**taken, name: values[name]})
            except IPAdapterError:
                continue
            taken[name] = values[name]
        for together in (("start", "stop"), ("uncond", "negative")):
            try:
                both = {name: values[name] for name in together}
                Unit(**{**taken, **both})
            except (IPAdapterError, KeyError):
                continue
            taken.update(both)
        self.unknown.update({name: str(value) for name, value in values.items() if name not in taken})
        return Unit(**taken)


def _typed(name: str, value: str) -> Any:
    if _RESOLVED.fullmatch(value):
        return "auto"
    if isinstance(_FIELDS[name].default, bool):
        return {"true": True, "false": False}.get(value, value)
    return _unquoted(value)


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """Fields and their raw values; a comma in an unquoted name, which old versions wrote, belongs to the name."""
    found: list[list[str]] = []
    for part in _split(text):
        match = _FIELD.fullmatch(part.strip())
        if match is not None:
            found.append([match[1], match[2] or ""])
        elif found:
            found[-1][1] += f",{part}"
    for name, value in found:
        yield name, value.strip()


def _split(text: str) -> Iterator[str]:
    """The text at its commas, but for those inside a value in quotes."""
    start = place = 0
    while place < len(text):
        quoted = _QUOTED.match(text, place) if text[start:place].rstrip().endswith(":") else None
        if quoted is not None:
            place = quoted.end()
            continue
        if text[place] == ",":
            yield text[start:place]
            start = place + 1
        place += 1
    yield text[start:]


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            read = json.loads(value)
        except ValueError:
            return value
        return read if isinstance(read, str) else value
    return value

"""Units: what is asked for, one image prompt each.

:class:`Unit` is the single description that the page, the HTTP API and infotext share. It is validated when
it is made, so whoever holds one never checks it again, and it goes to JSON and back without loss.

The schema only grows: a new field is a new key whose default is what happened before it existed, no field is
renamed, and the defaults below are constants. A setting may fill what a new unit in the page starts with, but
never what a request or an infotext means.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from . import curves, layer_weights
from .errors import IPAdapterError
from .masks import TEMPLATES

SCHEMA_VERSION = 1
"""Version of the unit's JSON, written with every unit; a newer one is refused, an older one is read."""

UNIT_SLOTS = 10
"""How many units one generation can have: the number of positions that the script offers for them."""

FORMULATIONS = ("auto", "joint", "decoupled", "K+V", "K+V with penalty", "K+mean(V) with penalty")
UNCONDS = ("auto", "zero pixels", "zero embeds", "black picture", "none", "file")
PREPARATIONS = ("crop", "squash", "pad")
TIMINGS = ("noise", "steps")
HIRES = ("same", "scaled", "off")
MIXTURES = ("concat", "average", "normalised average", "norm average", "add", "subtract", "max", "min")
TOGETHER, PER_GENERATION, PER_ITEM = "together", "one per generation", "one per batch item"
PICTURES = (TOGETHER, PER_GENERATION, PER_ITEM)
NOISES = ("none", "gaussian", "shuffle", "fade")
WEIGHT_RANGE = (-5.0, 5.0)
HIRES_SCALE_RANGE = (0.0, 5.0)
WINDOW_RANGE = (0.0, 1.0)

# Names that other tools use for the same thing; they only make the hint of an error better, they are not
# accepted.
FOREIGN_NAMES = {
    "begin": "start",
    "control_mode": "formulation",
    "end": "stop",
    "ending_step": "stop",
    "guidance_end": "stop",
    "effective_region_mask": "mask",
    "guidance_start": "start",
    "module": "model",
    "picture": "images",
    "resize_mode": "preparation",
    "scale": "weight",
    "starting_step": "start",
    "strength": "weight",
}

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SAVED = re.compile(r"[\w .-]{1,64}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_SHOWN_CHARACTERS = 40


Crop = tuple[float, float, float]
MIDDLE: Crop = (0.5, 0.5, 1.0)
"""The crop that a picture has by default: its middle, as large as can be."""
ZOOM_RANGE = (1.0, 10.0)


SHORTEST_PICTURE = 32
"""Characters below which a mask's text can only be meant as a template's name: no picture is so few bytes."""


@dataclass(frozen=True)
class MaskRef:
    """Where a unit, or one of its pictures, acts: nothing (everywhere), or one of three.

    ``template`` is a key of :data:`.masks.TEMPLATES`, ``data`` a picture's bytes as text (base64 or a data URI),
    ``sha256`` the hash of a picture that is kept. The picture is stretched over the canvas; white acts, black and what
    is transparent don't. ``feather`` is the width of soft edges as a share of the canvas's shorter side, 0…1, and
    ``invert`` turns the mask round.
    """

    template: str = ""
    data: str = ""
    sha256: str = ""
    feather: float = 0.0
    invert: bool = False

    def __post_init__(self) -> None:
        if all(getattr(self, each.name) is each.default for each in fields(self)):
            return  # the default of other classes, made before the functions that check exist
        for name in ("template", "data", "sha256"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise IPAdapterError(f'The mask\'s "{name}" is {_shown(value)}; allowed is a text.')
            if name != "data" or not value.strip():
                object.__setattr__(self, name, value.strip())
        given = [name for name in ("template", "data", "sha256") if getattr(self, name)]
        if len(given) > 1:
            raise IPAdapterError(
                f"The mask has {' and '.join(f'{chr(34)}{name}{chr(34)}' for name in given)}; allowed is one of "
                '"template", "data" (base64 or a data URI) and "sha256" (the hash of a kept picture).'
            )
        if self.template:
            object.__setattr__(self, "template", _as_template(self.template))
        if self.sha256:
            object.__setattr__(self, "sha256", _as_hash("mask", self.sha256))
        object.__setattr__(self, "feather", _as_number("feather", self.feather, WINDOW_RANGE))
        _require_bool("invert", self.invert)
        if not given and self != MaskRef():
            raise IPAdapterError(
                'The mask has "feather" or "invert" and nothing that they change; allowed is to give "template", '
                '"data" or "sha256" too, or to leave them out.'
            )

    def __bool__(self) -> bool:
        """Whether there is a mask."""
        return bool(self.template or self.data or self.sha256)

    @classmethod
    def from_json(cls, value: object) -> MaskRef:
        """Read a mask: a text (a template's name, base64, a data URI, or '' for none), or an object of the fields."""
        if isinstance(value, MaskRef):
            return value
        if isinstance(value, str):
            return cls() if not value.strip() else cls(template=value) if _is_name(value) else cls(data=value)
        if isinstance(value, Mapping):
            _refuse_unknown(value, tuple(field.name for field in fields(cls)))
            return cls(**value)
        raise IPAdapterError(
            f'The field "mask" is {_shown(value)}; allowed is a template\'s name, base64, a data URI, or an object '
            'such as {"template": "left half", "feather": 0.1}.'
        )

    def to_json(self) -> str | dict[str, Any]:
        """The JSON value that :meth:`from_json` reads back: a bare text if it says all."""
        values = {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}
        if not values:
            return ""
        says_all = list(values) == ["template"] or (list(values) == ["data"] and not _is_name(self.data))
        return str(next(iter(values.values()))) if says_all else values


NO_MASK = MaskRef()


@dataclass(frozen=True)
class ImageRef:
    """One picture of a unit: its bytes as text (base64 or a data URI), the hash of an uploaded one, or a saved one.

    Exactly one of ``data``, ``sha256`` (64 hexadecimal digits) and ``saved`` (its name) is filled; otherwise
    :class:`IPAdapterError`. ``weight`` multiplies the unit's for this picture. ``crop`` says which square the
    preparation "crop" takes (the others show the whole picture): x and y from 0 (left, top) to 1 (right, bottom) of
    the way that the square can go, and a zoom from 1 (the shorter side) to 10. A saved reference is encoded already,
    so it has no crop. ``mask`` says where on the canvas this picture acts; with the unit's it is multiplied.
    """

    data: str = ""
    sha256: str = ""
    weight: float = 1.0
    crop: Crop = MIDDLE
    saved: str = ""
    mask: MaskRef = NO_MASK

    def __post_init__(self) -> None:
        for name, value in (("data", self.data), ("sha256", self.sha256), ("saved", self.saved)):
            if not isinstance(value, str):
                raise IPAdapterError(f'The picture\'s "{name}" is {_shown(value)}; allowed is a text.')
        filled = sum((bool(self.data.strip()), bool(self.sha256), bool(self.saved)))
        if filled != 1:
            raise IPAdapterError(
                f'The picture has {("none", "", "two", "all")[filled]} of "data", "sha256" and "saved"; allowed is '
                "exactly one: base64 or a data URI, the hash of an uploaded picture, or a saved reference's name."
            )
        if self.saved:
            object.__setattr__(self, "data", "")
            object.__setattr__(self, "saved", saved_name(self.saved))
        if self.sha256:
            object.__setattr__(self, "data", "")
            object.__setattr__(self, "sha256", _as_hash("picture", self.sha256))
        object.__setattr__(self, "weight", _as_number("weight", self.weight, WEIGHT_RANGE))
        object.__setattr__(self, "crop", _as_crop(self.crop))
        object.__setattr__(self, "mask", MaskRef.from_json(self.mask))
        if self.saved and self.crop != MIDDLE:
            raise IPAdapterError(
                f'The picture\'s "crop" is given beside "saved" ({_shown(self.saved)}), which is encoded already; '
                "allowed is a crop of a picture: leave it out."
            )

    @classmethod
    def from_json(cls, value: object) -> ImageRef:
        """Read one entry of ``images``: a text, or an object of this class' fields."""
        if isinstance(value, ImageRef):
            return value
        if isinstance(value, str):
            if not value.strip():
                raise IPAdapterError("The picture is empty; allowed is base64 or a data URI, or leave it out.")
            return cls(data=value)
        if isinstance(value, Mapping):
            _refuse_unknown(value, tuple(field.name for field in fields(cls)))
            return cls(**value)
        raise IPAdapterError(
            f"The picture is {_shown(value)}; allowed is base64, a data URI, "
            '{"sha256": "…"} for an uploaded picture, or {"saved": "…"} for a saved reference.'
        )

    def to_json(self) -> str | dict[str, Any]:
        """The JSON value that :meth:`from_json` reads back: a bare text if it says all."""
        kind = "sha256" if self.sha256 else "saved" if self.saved else "data"
        values: dict[str, Any] = {kind: getattr(self, kind)}
        if self.weight != 1.0:
            values["weight"] = self.weight
        if self.crop != MIDDLE:
            values["crop"] = list(self.crop)
        if self.mask:
            values["mask"] = self.mask.to_json()
        return self.data if list(values) == ["data"] else values


@dataclass(frozen=True)
class Unit:
    """One image prompt as asked for.

    ``model`` is the adapter's file name as listed, ``images`` its pictures. ``weight`` is finite and in −5…5.
    ``start`` and ``stop`` bound the window of progress (0 = pure noise, 1 = done) in which the unit acts,
    0 ≤ start < stop ≤ 1; ``timing`` says what they are parts of: the noise schedule, or the steps of a pass.
    ``uncond`` says what the negative rows see; "file" needs ``negative``, the file's
    name as listed. ``preparation`` says how a picture that isn't square meets the image encoder.
    ``curve`` is the text of factors of the weight along the same measure, see :mod:`.curves`; it and the window both
    apply. In the hires pass ``hires_curve`` stands in its place, if there is one, and ``hires`` says whether the unit
    acts there with the same weight, with ``hires_scale`` times as much, or not at all. ``nested`` says whether it acts
    in jobs that an extension starts inside the job, a face detailer's, say. ``layers`` says how much of the weight each
    layer group gets: a name or custom text, see :mod:`.layer_weights`; the types that know a ``composition_weight``
    take the weight in its place while that is None.

    ``mixture`` says how several pictures become the unit's (see ``mixtures``), ``pictures`` whether all of them act
    everywhere, or one in each generation or batch item. ``balance`` keeps the share of the pictures of a joint softmax
    at that of one. ``negative_images`` stand in place of the ``uncond`` source, and so do the pictures themselves made
    unrecognisable by ``noise`` of ``noise_strength``, 0…1; both together are those pictures with the noise.
    ``uncond_weight`` multiplies the weight on the negative side. ``mask`` says where on the
    canvas the unit acts.

    Numbers may also come as texts ("0.6"), which is how hosts hand over what an API caller sent so. Anything
    that isn't allowed raises :class:`IPAdapterError` with one sentence that names the field, the value and
    what is allowed.
    """

    enabled: bool = True
    model: str = ""
    images: tuple[ImageRef, ...] = ()
    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    formulation: str = "auto"
    uncond: str = "auto"
    negative: str = ""
    preparation: str = "crop"
    timing: str = "noise"
    curve: str = ""
    hires_curve: str = ""
    hires: str = "same"
    hires_scale: float = 0.5
    nested: bool = True
    layers: str = layer_weights.ALL
    composition_weight: float | None = None
    mixture: str = "concat"
    pictures: str = TOGETHER
    balance: bool = False
    negative_images: tuple[ImageRef, ...] = ()
    noise: str = "none"
    noise_strength: float = 1.0
    uncond_weight: float = 1.0
    mask: MaskRef = NO_MASK

    def __post_init__(self) -> None:
        _require_bool("enabled", self.enabled)
        _require_text("model", self.model)
        _require_text("negative", self.negative)
        object.__setattr__(self, "images", _as_images("images", self.images))
        object.__setattr__(self, "weight", _as_number("weight", self.weight, WEIGHT_RANGE))
        object.__setattr__(self, "start", _as_number("start", self.start, WINDOW_RANGE))
        object.__setattr__(self, "stop", _as_number("stop", self.stop, WINDOW_RANGE))
        if self.start >= self.stop:
            raise IPAdapterError(
                f'The field "start" is {_shown(self.start)} and "stop" is {_shown(self.stop)}; '
                "allowed is a start that is smaller than the stop, both from 0 to 1."
            )
        _require_choice("formulation", self.formulation, FORMULATIONS)
        _require_choice("uncond", self.uncond, UNCONDS)
        _require_choice("preparation", self.preparation, PREPARATIONS)
        _require_choice("timing", self.timing, TIMINGS)
        for name in ("curve", "hires_curve"):
            object.__setattr__(self, name, _as_curve(name, getattr(self, name)))
        _require_choice("hires", self.hires, HIRES)
        object.__setattr__(self, "hires_scale", _as_number("hires_scale", self.hires_scale, HIRES_SCALE_RANGE))
        _require_bool("nested", self.nested)
        _require_text("layers", self.layers)
        object.__setattr__(self, "layers", layer_weights.read(self.layers))
        if self.composition_weight is not None:
            value = _as_number("composition_weight", self.composition_weight, WEIGHT_RANGE)
            object.__setattr__(self, "composition_weight", value)
        object.__setattr__(self, "mask", MaskRef.from_json(self.mask))
        if self.uncond == "file" and not self.negative:
            raise IPAdapterError(
                'The field "negative" is empty while "uncond" is "file"; allowed is a negative file by name '
                'or another "uncond".'
            )
        if self.negative and self.uncond != "file":
            raise IPAdapterError(
                f'The field "negative" is {_shown(self.negative)} while "uncond" is "{self.uncond}"; '
                'allowed is a negative file only with "uncond" set to "file".'
            )
        _require_choice("mixture", self.mixture, MIXTURES)
        _require_choice("pictures", self.pictures, PICTURES)
        _require_bool("balance", self.balance)
        object.__setattr__(self, "negative_images", _as_images("negative_images", self.negative_images))
        _require_choice("noise", self.noise, NOISES)
        object.__setattr__(self, "noise_strength", _as_number("noise_strength", self.noise_strength, WINDOW_RANGE))
        object.__setattr__(self, "uncond_weight", _as_number("uncond_weight", self.uncond_weight, WEIGHT_RANGE))
        self._check_mixture()
        self._check_negatives()

    def _check_mixture(self) -> None:
        if self.pictures != TOGETHER and self.mixture != "concat":
            raise IPAdapterError(
                f'The field "mixture" is "{self.mixture}" while "pictures" is "{self.pictures}", where each picture '
                'is alone; allowed is a mixture of pictures "together", or "concat".'
            )
        if self.mixture != "concat" and len({image.mask for image in self.acting_images}) > 1:
            raise IPAdapterError(
                f'The field "mixture" is "{self.mixture}", which makes one of all pictures, while they have different '
                'masks; allowed is one mask for all of them, the unit\'s own, or "concat".'
            )

    def _check_negatives(self) -> None:
        given = "negative_images" if self.negative_images else "noise" if self.noise != "none" else ""
        if given and self.uncond != "auto":
            raise IPAdapterError(
                f'The field "uncond" is "{self.uncond}" while "{given}" is given, which stands in its place; '
                'allowed is "auto", or one of the two.'
            )
        if self.pictures != TOGETHER and len(self.negative_images) > max(1, len(self.images)):
            raise IPAdapterError(
                f'The field "negative_images" has {len(self.negative_images)} pictures and "images" '
                f'{len(self.images)} while "pictures" is "{self.pictures}"; allowed are at most as many negative '
                "pictures, since each picture has one."
            )
        if any(ref.mask for ref in self.negative_images):
            raise IPAdapterError(
                'The field "negative_images" has a picture with a mask; allowed are masks of "images", for a negative '
                "picture acts where the picture does that it stands against."
            )
        for ref in self.negative_images:
            if ref.saved and self.noise != "none":
                raise IPAdapterError(_noise_of_saved(self.noise, ref.saved))
        if self.noise != "none" and not self.negative_images:
            for ref in self.acting_images:
                if ref.saved:
                    raise IPAdapterError(_noise_of_saved(self.noise, ref.saved))

    @property
    def negatives(self) -> str:
        """What the negative side sees instead of the ``uncond`` source: "pictures", "noise", or "" for that source."""
        return "pictures" if self.negative_images else "noise" if self.noise != "none" else ""

    @property
    def acting_images(self) -> tuple[ImageRef, ...]:
        """The pictures that take part: those whose weight, and the unit's, isn't 0."""
        return tuple(image for image in self.images if self.weight * image.weight != 0)

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any] | Unit) -> Unit:
        """Read a unit from its JSON text, or from the object that such a text holds.

        Fields that are left out have their defaults. Raises :class:`IPAdapterError` for text that is no JSON
        object, unknown fields, a version newer than :data:`SCHEMA_VERSION`, and whatever :class:`Unit` itself
        refuses.
        """
        if isinstance(source, Unit):
            return source
        values = _parse_object(source) if isinstance(source, str) else source
        if not isinstance(values, Mapping):
            raise IPAdapterError(f"The unit is {_shown(values)}; allowed is an object or its JSON text.")
        _refuse_unknown(values, ("version", *_FIELD_NAMES))
        _check_version(values.get("version", SCHEMA_VERSION))
        return cls(**{name: value for name, value in values.items() if name != "version"})

    def to_json(self) -> str:
        """The unit as compact JSON: the version, and the fields that differ from their defaults."""
        values: dict[str, Any] = {"version": SCHEMA_VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                values[field.name] = _as_json(value)
        return json.dumps(values, separators=(",", ":"), allow_nan=False)


PICTURE_FIELDS = ("images", "negative_images")
"""The fields that are pictures."""
_FIELD_NAMES = tuple(field.name for field in fields(Unit))


def saved_name(value: str) -> str:
    """The name of a saved reference, without spaces around it, in Unicode's composed form as file systems compare it.

    Raises:
        IPAdapterError: unless it is 1 to 64 letters, digits, spaces, dots, hyphens and underscores.
    """
    name = unicodedata.normalize("NFC", value).strip(" ")
    if not _SAVED.fullmatch(name):
        raise IPAdapterError(
            f"The saved reference's name is {_shown(value)}; allowed are 1 to 64 letters, digits, spaces, dots, "
            "hyphens and underscores."
        )
    return name


def _noise_of_saved(noise: str, name: str) -> str:
    return (
        f'The field "noise" is "{noise}" and the picture it is for is the saved reference {_shown(name)}, which is '
        "encoded already; allowed is noise on a picture: give negative_images or the picture itself."
    )


def parse_script_args(args: Sequence[object]) -> tuple[bool, list[Unit]]:
    """Read the always-on script's arguments: whether it is on, and the units that act.

    ``args`` is empty (hosts may call hooks with no arguments at all), ``[on, slot, …]``, or ``[unit, …]``,
    which is on by itself. A slot or unit is an object, its JSON text, or unused: ``''`` or ``None``.
    Switched-off units are dropped, and so is a bare ``{}``. Off gives ``(False, [])`` without reading any
    slot.

    Raises :class:`IPAdapterError` with the unit's number for a bad unit, for more than :data:`UNIT_SLOTS` of
    them, for a unit that asks for something but has no picture, and when the script is on with no picture at
    all.
    """
    if not args:
        return False, []
    first = args[0]
    explicit = isinstance(first, bool)
    if explicit and not first:
        return False, []
    if not (explicit or _is_unused(first) or isinstance(first, (str, Mapping, Unit))):
        raise IPAdapterError(f"The first argument is {_shown(first)}; allowed is true, false, or a unit.")

    slots = list(args[1:] if explicit else args)
    beyond = [slot for slot in slots[UNIT_SLOTS:] if not _is_unused(slot)]
    if beyond:
        raise IPAdapterError(
            f"The argument after unit {UNIT_SLOTS} is {_shown(beyond[0])}; allowed are at most {UNIT_SLOTS} units."
        )
    asked = [(number, _parse_unit(number, slot)) for number, slot in enumerate(slots, 1) if not _is_unused(slot)]
    enabled = [(number, unit) for number, unit in asked if unit.enabled]
    if not enabled and not explicit:
        return False, []

    if not any(unit.images for _, unit in enabled):
        raise IPAdapterError(
            "IP-Adapter is switched on but has no picture in any enabled unit; "
            "give a unit a picture or switch IP-Adapter off."
        )
    active: list[Unit] = []
    for number, unit in enabled:
        if unit.images:
            active.append(unit)
        elif unit != Unit():
            raise IPAdapterError(f"Unit {number} has no picture; give it at least one or switch it off.")
    return True, active


def _parse_unit(number: int, slot: object) -> Unit:
    try:
        return Unit.from_json(slot)  # type: ignore[arg-type]  # checked there, with a sentence
    except IPAdapterError as error:
        message = str(error)
        raise IPAdapterError(f"Unit {number}: {message[:1].lower()}{message[1:]}") from error


def _is_unused(slot: object) -> bool:
    return slot is None or (isinstance(slot, str) and not slot.strip())


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [image.to_json() for image in value]
    return value.to_json() if isinstance(value, MaskRef) else value


def _parse_object(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_pairs)
    except IPAdapterError:
        raise
    except (ValueError, RecursionError) as error:
        raise IPAdapterError(
            f"The unit is {_shown(text)}, which can't be read as JSON; "
            'allowed is an object such as {"model": "…", "images": ["base64"]}.'
        ) from error


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise IPAdapterError(
                f"The field {_shown(name)} is given twice, as {_shown(values[name])} and {_shown(value)}; "
                "allowed is one value for each field."
            )
        values[name] = value
    return values


def _refuse_unknown(values: Mapping[Any, Any], known: Sequence[str]) -> None:
    for name, value in values.items():
        if name in known:
            continue
        near = _nearest(str(name), known)
        hint = f'the nearest known field is "{near}" and ' if near else ""
        raise IPAdapterError(
            f"The field {_shown(name)} (value {_shown(value)}) is unknown; {hint}allowed are {', '.join(known)}."
        )


def _nearest(name: str, known: Sequence[str]) -> str | None:
    lowered = name.lower()
    foreign = FOREIGN_NAMES.get(lowered)
    if foreign in known:
        return foreign
    return next(iter(difflib.get_close_matches(lowered[:100], known, n=1, cutoff=0.5)), None)


def _check_version(value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= SCHEMA_VERSION:  # type: ignore[operator]
        raise IPAdapterError(
            f'The field "version" is {_shown(value)}; allowed is a whole number from 1 to {SCHEMA_VERSION}, '
            "a newer one needs a newer version of this extension."
        )


def _require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise IPAdapterError(f'The field "{name}" is {_shown(value)}; allowed are true and false.')


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise IPAdapterError(f'The field "{name}" is {_shown(value)}; allowed is a text.')


def _require_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise IPAdapterError(f'The field "{name}" is {_shown(value)}; allowed are {", ".join(allowed)}.')


def _as_number(name: str, value: object, limits: tuple[float, float]) -> float:
    """``value`` as a float within ``limits``; a bool is no number, a text that spells one is."""
    low, high = limits
    number = math.nan
    if isinstance(value, str):
        if _NUMBER.fullmatch(value.strip()):
            number = float(value)
    elif not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not low <= number <= high:  # NaN fails every comparison
        raise IPAdapterError(
            f'The field "{name}" is {_shown(value)}; allowed is a finite number from {_shown(low)} to {_shown(high)}.'
        )
    return number + 0.0  # −0.0 becomes 0.0


def _as_hash(owner: str, value: str) -> str:
    lowered = value.lower()
    if not _SHA256.fullmatch(lowered):
        raise IPAdapterError(f'The {owner}\'s "sha256" is {_shown(value)}; allowed are 64 hexadecimal digits.')
    return lowered


def _is_name(text: str) -> bool:
    """Whether a mask's text is the name of a template, or meant as one."""
    text = text.strip()
    return _template_key(text) in TEMPLATES or (len(text) < SHORTEST_PICTURE and text[:5].lower() != "data:")


def _template_key(name: str) -> str:
    return " ".join(name.lower().replace("-", " ").replace("_", " ").split())


def _as_template(name: str) -> str:
    key = _template_key(name)
    if key not in TEMPLATES:
        near = _nearest(key, tuple(TEMPLATES))
        hint = f'the nearest is "{near}" and ' if near else ""
        raise IPAdapterError(
            f"The mask is {_shown(name)}, which is no template; {hint}allowed are "
            f"{', '.join(TEMPLATES)}, base64 and a data URI."
        )
    return key


def _as_curve(name: str, value: object) -> str:
    """``value`` as :func:`.curves.write` writes it, so that equal curves are equal texts."""
    if not isinstance(value, str):
        raise IPAdapterError(f'The field "{name}" is {_shown(value)}; allowed is a text such as "{curves.EXAMPLE}".')
    return curves.write(curves.parse(value, name).points)


def _as_crop(value: object) -> Crop:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise IPAdapterError(
            f'The field "crop" is {_shown(value)}; allowed is [x, y, zoom], x and y from 0 to 1, zoom from 1 to 10.'
        )
    x, y = (_as_number(f"crop {name}", each, WINDOW_RANGE) for name, each in zip("xy", value, strict=False))
    return x, y, _as_number("crop zoom", value[2], ZOOM_RANGE)


def _as_images(name: str, value: object) -> tuple[ImageRef, ...]:
    """The pictures of a field from one value or a list; only an empty list means that there is none."""
    if isinstance(value, (str, Mapping, ImageRef)):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        raise IPAdapterError(f'The field "{name}" is {_shown(value)}; allowed is a picture or a list of pictures.')
    images = []
    for position, item in enumerate(value, 1):
        try:
            images.append(ImageRef.from_json(item))
        except IPAdapterError as error:
            message = str(error).removeprefix("The ")
            raise IPAdapterError(f'The field "{name}", picture {position} of {len(value)}: the {message}') from error
    return tuple(images)


def _shown(value: object) -> str:
    """``value`` as an error quotes it: as JSON would write it, and short."""
    if isinstance(value, str):
        clipped = value if len(value) <= _SHOWN_CHARACTERS else value[: _SHOWN_CHARACTERS - 1] + "…"
        return json.dumps(clipped, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**_SHOWN_CHARACTERS else "a whole number with too many digits"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else ("infinity" if value > 0 else "-infinity")
        return repr(value).removesuffix(".0")
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    return f"a {type(value).__name__}"

"""Units: what is asked for, one image prompt each.

:class:`Unit` is the single description that the page, the HTTP API and infotext share. It is validated when
it is made, so whoever holds one never checks it again, and it goes to JSON and back without loss.

The schema only grows: a new field is a new key whose default is what happened before it existed, no field is
renamed, and the defaults below are constants. A setting may fill what a new unit in the page starts with, but
never what a request or an infotext means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from . import curves, layer_weights
from .checks import (
    SHARE_RANGE,
    WEIGHT_RANGE,
    as_number,
    refuse_unknown,
    require_bool,
    require_choice,
    require_text,
    shown,
)
from .errors import IPAdapterError
from .presets import fields_of
from .refs import NO_MASK, ImageRef, MaskRef, as_images

SCHEMA_VERSION = 1
"""Version of the unit's JSON, written with every unit; a newer one is refused, an older one is read."""

UNIT_SLOTS = 10
"""How many units one generation can have: the number of positions that the script offers for them."""

FORMULATIONS = ("auto", "joint", "decoupled", "K+V", "K+V with penalty", "K+mean(V) with penalty")
UNCONDS = ("auto", "zero pixels", "zero embeds", "black picture", "none", "file", "auto black")
PREPARATIONS = ("crop", "squash", "pad")
TIMINGS = ("noise", "steps")
HIRES = ("same", "scaled", "off")
MIXTURES = ("concat", "average", "normalised average", "norm average", "add", "subtract", "max", "min")
TOGETHER, PER_GENERATION, PER_ITEM = "together", "one per generation", "one per batch item"
PICTURES = (TOGETHER, PER_GENERATION, PER_ITEM)
NOISES = ("none", "gaussian", "shuffle", "fade")
HIRES_SCALE_RANGE = (0.0, 5.0)


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
    canvas the unit acts. ``influence`` asks for a map of where each picture acted, see :mod:`.influence`.

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
    influence: bool = False

    def __post_init__(self) -> None:
        require_bool("enabled", self.enabled)
        require_bool("influence", self.influence)
        require_text("model", self.model)
        require_text("negative", self.negative)
        object.__setattr__(self, "images", as_images("images", self.images))
        object.__setattr__(self, "weight", as_number("weight", self.weight, WEIGHT_RANGE))
        object.__setattr__(self, "start", as_number("start", self.start, SHARE_RANGE))
        object.__setattr__(self, "stop", as_number("stop", self.stop, SHARE_RANGE))
        if self.start >= self.stop:
            raise IPAdapterError(
                f'The field "start" is {shown(self.start)} and "stop" is {shown(self.stop)}; '
                "allowed is a start that is smaller than the stop, both from 0 to 1."
            )
        require_choice("formulation", self.formulation, FORMULATIONS)
        require_choice("uncond", self.uncond, UNCONDS)
        require_choice("preparation", self.preparation, PREPARATIONS)
        require_choice("timing", self.timing, TIMINGS)
        for name in ("curve", "hires_curve"):
            object.__setattr__(self, name, _as_curve(name, getattr(self, name)))
        require_choice("hires", self.hires, HIRES)
        object.__setattr__(self, "hires_scale", as_number("hires_scale", self.hires_scale, HIRES_SCALE_RANGE))
        require_bool("nested", self.nested)
        require_text("layers", self.layers)
        object.__setattr__(self, "layers", layer_weights.read(self.layers))
        if self.composition_weight is not None:
            value = as_number("composition_weight", self.composition_weight, WEIGHT_RANGE)
            object.__setattr__(self, "composition_weight", value)
        object.__setattr__(self, "mask", MaskRef.from_json(self.mask))
        if self.uncond == "file" and not self.negative:
            raise IPAdapterError(
                'The field "negative" is empty while "uncond" is "file"; allowed is a negative file by name '
                'or another "uncond".'
            )
        if self.negative and self.uncond != "file":
            raise IPAdapterError(
                f'The field "negative" is {shown(self.negative)} while "uncond" is "{self.uncond}"; '
                'allowed is a negative file only with "uncond" set to "file".'
            )
        require_choice("mixture", self.mixture, MIXTURES)
        require_choice("pictures", self.pictures, PICTURES)
        require_bool("balance", self.balance)
        object.__setattr__(self, "negative_images", as_images("negative_images", self.negative_images))
        require_choice("noise", self.noise, NOISES)
        object.__setattr__(self, "noise_strength", as_number("noise_strength", self.noise_strength, SHARE_RANGE))
        object.__setattr__(self, "uncond_weight", as_number("uncond_weight", self.uncond_weight, WEIGHT_RANGE))
        self._check_mixture()
        self._check_negatives()

    def _check_mixture(self) -> None:
        wanted = layer_weights.pictures_of(self.layers)
        if wanted and (self.pictures != TOGETHER or self.mixture != "concat"):
            name = "mixture" if self.pictures == TOGETHER else "pictures"
            raise IPAdapterError(
                f'The field "layers" is "{self.layers}", which is over {wanted} pictures at once, while "{name}" is '
                f'"{getattr(self, name)}"; allowed is a "{name}" of '
                f'"{"concat" if name == "mixture" else TOGETHER}", or another type of layers.'
            )
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

        Fields that are left out have their defaults, or those of ``"preset"`` (see :mod:`.presets`). Raises
        :class:`IPAdapterError` for text that is no JSON object, unknown fields, a version newer than
        :data:`SCHEMA_VERSION`, and whatever :class:`Unit` itself refuses.
        """
        if isinstance(source, Unit):
            return source
        values = _parse_object(source) if isinstance(source, str) else source
        if not isinstance(values, Mapping):
            raise IPAdapterError(f"The unit is {shown(values)}; allowed is an object or its JSON text.")
        refuse_unknown(values, ("version", "preset", *_FIELD_NAMES))
        _check_version(values.get("version", SCHEMA_VERSION))
        given = {name: value for name, value in values.items() if name not in ("version", "preset")}
        if "preset" in values:
            given = _with_preset(values["preset"], given)
        return cls(**given)

    def to_json(self) -> str:
        """The unit as compact JSON: the version, and the fields that differ from their defaults."""
        values: dict[str, Any] = {"version": SCHEMA_VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                values[field.name] = _as_json(value)
        return json.dumps(values, separators=(",", ":"), allow_nan=False)


def _with_preset(name: object, given: dict[str, Any]) -> dict[str, Any]:
    """Fields with a preset's where they say nothing themselves."""
    preset = dict(fields_of(name))
    if given.get("uncond", preset["uncond"]) != preset["uncond"]:
        preset.pop("negative", None)  # which only the preset's own source takes
    return {**preset, **given}


PICTURE_FIELDS = ("images", "negative_images")
"""The fields that are pictures."""
_FIELD_NAMES = tuple(field.name for field in fields(Unit))


def _noise_of_saved(noise: str, name: str) -> str:
    return (
        f'The field "noise" is "{noise}" and the picture it is for is the saved reference {shown(name)}, which is '
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
        raise IPAdapterError(f"The first argument is {shown(first)}; allowed is true, false, or a unit.")

    slots = list(args[1:] if explicit else args)
    beyond = [slot for slot in slots[UNIT_SLOTS:] if not _is_unused(slot)]
    if beyond:
        raise IPAdapterError(
            f"The argument after unit {UNIT_SLOTS} is {shown(beyond[0])}; allowed are at most {UNIT_SLOTS} units."
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
            f"The unit is {shown(text)}, which can't be read as JSON; "
            'allowed is an object such as {"model": "…", "images": ["base64"]}.'
        ) from error


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise IPAdapterError(
                f"The field {shown(name)} is given twice, as {shown(values[name])} and {shown(value)}; "
                "allowed is one value for each field."
            )
        values[name] = value
    return values


def _check_version(value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= SCHEMA_VERSION:  # type: ignore[operator]
        raise IPAdapterError(
            f'The field "version" is {shown(value)}; allowed is a whole number from 1 to {SCHEMA_VERSION}, '
            "a newer one needs a newer version of this extension."
        )


def _as_curve(name: str, value: object) -> str:
    """``value`` as :func:`.curves.write` writes it, so that equal curves are equal texts."""
    if not isinstance(value, str):
        raise IPAdapterError(f'The field "{name}" is {shown(value)}; allowed is a text such as "{curves.EXAMPLE}".')
    return curves.write(curves.parse(value, name).points)

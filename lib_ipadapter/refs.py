"""Pictures and masks as they are asked for: by their bytes, by the hash of what is kept, or by a name.

Both are checked when they are made, and go to JSON and back without loss.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .checks import SHARE_RANGE, WEIGHT_RANGE, as_number, nearest, refuse_unknown, require_bool, shown
from .errors import IPAdapterError
from .masks import TEMPLATES

Crop = tuple[float, float, float]
MIDDLE: Crop = (0.5, 0.5, 1.0)
"""The crop that a picture has by default: its middle, as large as can be."""
ZOOM_RANGE = (1.0, 10.0)

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SAVED = re.compile(r"[\w .-]{1,64}")

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
        for name in ("template", "data", "sha256"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise IPAdapterError(f'The mask\'s "{name}" is {shown(value)}; allowed is a text.')
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
        object.__setattr__(self, "feather", as_number("feather", self.feather, SHARE_RANGE))
        require_bool("invert", self.invert)
        if not given and (self.feather or self.invert):
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
            refuse_unknown(value, tuple(field.name for field in fields(cls)))
            return cls(**value)
        raise IPAdapterError(
            f'The field "mask" is {shown(value)}; allowed is a template\'s name, base64, a data URI, or an object '
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
                raise IPAdapterError(f'The picture\'s "{name}" is {shown(value)}; allowed is a text.')
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
        object.__setattr__(self, "weight", as_number("weight", self.weight, WEIGHT_RANGE))
        object.__setattr__(self, "crop", _as_crop(self.crop))
        object.__setattr__(self, "mask", MaskRef.from_json(self.mask))
        if self.saved and self.crop != MIDDLE:
            raise IPAdapterError(
                f'The picture\'s "crop" is given beside "saved" ({shown(self.saved)}), which is encoded already; '
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
            refuse_unknown(value, tuple(field.name for field in fields(cls)))
            return cls(**value)
        raise IPAdapterError(
            f"The picture is {shown(value)}; allowed is base64, a data URI, "
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


def saved_name(value: str) -> str:
    """The name of a saved reference, without spaces around it, in Unicode's composed form as file systems compare it.

    Raises:
        IPAdapterError: unless it is 1 to 64 letters, digits, spaces, dots, hyphens and underscores.
    """
    name = unicodedata.normalize("NFC", value).strip(" ")
    if not _SAVED.fullmatch(name):
        raise IPAdapterError(
            f"The saved reference's name is {shown(value)}; allowed are 1 to 64 letters, digits, spaces, dots, "
            "hyphens and underscores."
        )
    return name


def _as_hash(owner: str, value: str) -> str:
    lowered = value.lower()
    if not _SHA256.fullmatch(lowered):
        raise IPAdapterError(f'The {owner}\'s "sha256" is {shown(value)}; allowed are 64 hexadecimal digits.')
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
        near = nearest(key, tuple(TEMPLATES))
        hint = f'the nearest is "{near}" and ' if near else ""
        raise IPAdapterError(
            f"The mask is {shown(name)}, which is no template; {hint}allowed are "
            f"{', '.join(TEMPLATES)}, base64 and a data URI."
        )
    return key


def _as_crop(value: object) -> Crop:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise IPAdapterError(
            f'The field "crop" is {shown(value)}; allowed is [x, y, zoom], x and y from 0 to 1, zoom from 1 to 10.'
        )
    x, y = (as_number(f"crop {name}", each, SHARE_RANGE) for name, each in zip("xy", value, strict=False))
    return x, y, as_number("crop zoom", value[2], ZOOM_RANGE)


def as_images(name: str, value: object) -> tuple[ImageRef, ...]:
    """The pictures of a field from one value or a list; only an empty list means that there is none."""
    if isinstance(value, (str, Mapping, ImageRef)):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        raise IPAdapterError(f'The field "{name}" is {shown(value)}; allowed is a picture or a list of pictures.')
    images = []
    for position, item in enumerate(value, 1):
        try:
            images.append(ImageRef.from_json(item))
        except IPAdapterError as error:
            message = str(error).removeprefix("The ")
            raise IPAdapterError(f'The field "{name}", picture {position} of {len(value)}: the {message}') from error
    return tuple(images)

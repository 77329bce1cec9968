"""Checks of what people, hosts and files give, and how their sentences quote it.

A check returns what it allows, or raises :class:`IPAdapterError` with one sentence that names the field, the value and
what is allowed.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import IPAdapterError

WEIGHT_RANGE = (-5.0, 5.0)
SHARE_RANGE = (0.0, 1.0)

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

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_SHOWN_CHARACTERS = 40


def refuse_unknown(values: Mapping[Any, Any], known: Sequence[str]) -> None:
    """Every field must be one of ``known``."""
    for name, value in values.items():
        if name in known:
            continue
        near = nearest(str(name), known)
        hint = f'the nearest known field is "{near}" and ' if near else ""
        raise IPAdapterError(
            f"The field {shown(name)} (value {shown(value)}) is unknown; {hint}allowed are {', '.join(known)}."
        )


def nearest(name: str, known: Sequence[str]) -> str | None:
    """That of ``known`` which ``name`` may be meant to be."""
    lowered = name.lower()
    foreign = FOREIGN_NAMES.get(lowered)
    if foreign in known:
        return foreign
    return next(iter(difflib.get_close_matches(lowered[:100], known, n=1, cutoff=0.5)), None)


def require_bool(name: str, value: object) -> None:
    """It must be true or false."""
    if not isinstance(value, bool):
        raise IPAdapterError(f'The field "{name}" is {shown(value)}; allowed are true and false.')


def require_text(name: str, value: object) -> None:
    """It must be a text."""
    if not isinstance(value, str):
        raise IPAdapterError(f'The field "{name}" is {shown(value)}; allowed is a text.')


def require_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """It must be one of the texts ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise IPAdapterError(f'The field "{name}" is {shown(value)}; allowed are {", ".join(allowed)}.')


def as_number(name: str, value: object, limits: tuple[float, float]) -> float:
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
            f'The field "{name}" is {shown(value)}; allowed is a finite number from {shown(low)} to {shown(high)}.'
        )
    return number + 0.0  # −0.0 becomes 0.0


def shown(value: object) -> str:
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

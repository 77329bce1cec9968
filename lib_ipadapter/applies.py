"""Which controls and values apply: to the chosen model, and to a unit's other fields. The page disables the rest.

Both are data that goes to the page as it stands; a new field or restriction is a new entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .layer_weights import SD, XL
from .recognise import AdapterKind
from .units import UNCONDS

NEEDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "negative": ("uncond", ("file",)),
    "crop": ("preparation", ("crop",)),
}
"""By the control: the field that decides, and the values of it with which the control applies."""

NEEDS_FILE: Mapping[str, str] = {"file": "negative"}
"""By the uncond source: the field whose files it takes, so it applies if one of them does."""


def files_for(kind: AdapterKind, negatives: Mapping[str, int]) -> dict[str, list[str]]:
    """The files that fit an adapter, by the unit's field: image tokens must be as wide as the adapter takes them.

    Args:
        negatives: width of the image tokens of each negative file.
    """
    return {
        "negative": sorted((name for name, width in negatives.items() if width == kind.context_width), key=str.lower)
    }


def values_for(files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The values that apply, by the field that has some which don't, given the files that fit."""
    return {"uncond": [each for each in UNCONDS if each not in NEEDS_FILE or files[NEEDS_FILE[each]]]}


def facts(kind: AdapterKind | None, negatives: Mapping[str, int]) -> dict[str, Any]:
    """All that the page needs, ready for JSON: ``needs``, by field the ``files`` and ``values`` that apply, ``groups``.

    The last is how many layer groups the UNet has that the adapter was made for. Where no model is known nothing is
    ruled out by it.
    """
    if kind is None:
        return {"needs": NEEDS, "values": {}, "files": {"negative": sorted(negatives, key=str.lower)}, "groups": SD}
    files = files_for(kind, negatives)
    count = XL if len(kind.layer_widths) > SD else SD
    return {"needs": NEEDS, "values": values_for(files), "files": files, "groups": count}

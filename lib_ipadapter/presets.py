"""Compatibility presets: the fields of a unit that make it compute what another program's image prompt computes.

A preset is no field of a unit: choosing one sets the fields, which are what is written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import shown
from .errors import IPAdapterError

FOOOCUS_NEGATIVE = "fooocus_ip_negative.safetensors"
"""The public name of Fooocus' file of image tokens for the negative side."""


@dataclass(frozen=True)
class Preset:
    """What makes a unit like another program's.

    Attributes:
        fields: a unit's, by name.
        differs: for people: what it can't make equal.
    """

    fields: Mapping[str, Any]
    differs: str


PRESETS: Mapping[str, Preset] = {
    "like Fooocus": Preset(
        {
            "formulation": "joint",
            "preparation": "squash",
            "uncond": "file",
            "negative": FOOOCUS_NEGATIVE,
            "timing": "noise",
        },
        f"its Lanczos filter; it needs its file {FOOOCUS_NEGATIVE} in a model folder, and has plus adapters alone",
    ),
    "like ComfyUI": Preset(
        {"formulation": "decoupled", "preparation": "crop", "uncond": "auto black", "timing": "noise"},
        'ComfyUI_IPAdapter_plus\' embeds scaling "V only"; its others are formulations here',
    ),
    "like A1111 ControlNet": Preset(
        {"formulation": "decoupled", "preparation": "squash", "uncond": "auto", "timing": "steps"},
        "its area filter; plus' negative side is a file inside it; of several pictures it averages image tokens",
    ),
    "like diffusers": Preset(
        {"formulation": "decoupled", "preparation": "crop", "uncond": "auto", "timing": "noise"},
        "nothing; it knows no start and stop",
    ),
    "like Forge": Preset(
        {"formulation": "decoupled", "preparation": "crop", "uncond": "auto black", "timing": "noise"},
        "of several pictures it uses the first",
    ),
}
"""By name. Formulas: as read in each program's public source."""


def fields_of(name: object) -> Mapping[str, Any]:
    """The fields that a preset sets.

    Raises:
        IPAdapterError: there is no such preset.
    """
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise IPAdapterError(f'The field "preset" is {shown(name)}; allowed are {", ".join(PRESETS)}.')
    return preset.fields

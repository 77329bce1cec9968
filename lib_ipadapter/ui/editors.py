"""What the page's editors of layers, time, place, mixtures and negatives need, as data in the page.

They are drawn by ``javascript/ip_adapter_editors.js`` when a person first opens them, and write a unit's slot; so they
are no components and cost the page nothing until then.
"""

from __future__ import annotations

import html
import json
from typing import Any

from .. import layer_weights, masks, mixtures, presets
from ..checks import SHARE_RANGE, WEIGHT_RANGE
from ..units import HIRES, HIRES_SCALE_RANGE, NOISES, PICTURES, Unit

_DEFAULT = Unit()

_HIRES_HELP = ("as in the first pass", "strength times the hires scale", "it doesn't act there")
_PICTURES_HELP = (
    "all of them in every result",
    "one picture per generation of a batch count",
    "picture i for item i of a batch",
)
_NOISE_HELP = ("none", "coloured grain over it", "its pixels in another order", "grain in its place by the strength")


def _choice(section: str, name: str, label: str, options: dict[str, str]) -> dict[str, Any]:
    return {"section": section, "name": name, "label": label, "options": options, "default": getattr(_DEFAULT, name)}


def _number(
    section: str, name: str, label: str, bounds: tuple[float, float], help: str, needs: dict[str, Any] | None = None
) -> dict[str, Any]:
    field = {"section": section, "name": name, "label": label, "bounds": bounds, "help": help, "needs": needs or {}}
    return {**field, "default": getattr(_DEFAULT, name)}


def _switch(section: str, name: str, label: str, help: str) -> dict[str, Any]:
    return {"section": section, "name": name, "label": label, "help": help, "default": getattr(_DEFAULT, name)}


def _text(section: str, name: str, label: str, help: str) -> dict[str, Any]:
    return {**_switch(section, name, label, help), "text": True}


def _knows_composition(groups: tuple[layer_weights.Group, ...]) -> bool:
    return any(group.composition for group in groups)


def facts() -> dict[str, Any]:
    """Sections, fields with their options, ranges and defaults, and the tables of layer types and mask templates."""
    types = layer_weights.TYPES
    composed = [name for name, each in types.items() if any(map(_knows_composition, each.tables.values()))]
    fields = [
        _choice("Layers", "layers", "Layers", {name: each.help for name, each in types.items()}),
        _number(
            "Layers",
            "composition_weight",
            "Composition weight",
            WEIGHT_RANGE,
            "-5 to 5; empty: the strength.",
            {"layers": composed},
        ),
        _text("Time", "curve", "Curve", "Factor@progress, such as 0.2@0, 0.8@0.3, 0@0.7; empty: 1 all along."),
        _text("Time", "hires_curve", "Hires curve", "In its place in the hires pass; empty: the same curve."),
        _choice("Time", "hires", "Hires pass", dict(zip(HIRES, _HIRES_HELP, strict=True))),
        _number("Time", "hires_scale", "Hires scale", HIRES_SCALE_RANGE, "0 to 5", {"hires": ["scaled"]}),
        _switch("Time", "nested", "In nested jobs", "Also in what a face detailer and the like draw inside the job."),
        _choice("Mixture", "mixture", "Mixture", {each.name: each.help for each in mixtures.MIXTURES.values()}),
        _choice("Mixture", "pictures", "Pictures", dict(zip(PICTURES, _PICTURES_HELP, strict=True))),
        _switch("Mixture", "balance", "Balance", "Several pictures together count as one beside the text."),
        _choice("Negative", "noise", "Noise", dict(zip(NOISES, _NOISE_HELP, strict=True))),
        _number("Negative", "noise_strength", "Noise strength", SHARE_RANGE, "0 to 1", {"noise": list(NOISES[1:])}),
        _number("Negative", "uncond_weight", "Uncond strength", WEIGHT_RANGE, "-5 to 5, times the strength."),
        _switch(
            "Influence", "influence", "Influence map", "Shows where each picture acted, beside the results; slower."
        ),
    ]
    return {
        "sections": ["Layers", "Time", "Place", "Mixture", "Negative", "Influence", "Saved", "Compatibility"],
        "presets": {name: {"fields": each.fields, "differs": each.differs} for name, each in presets.PRESETS.items()},
        "fields": fields,
        "types": {
            name: {
                str(count): [[g.weight, g.composition, g.swapped, g.picture] for g in table]
                for count, table in each.tables.items()
            }
            for name, each in types.items()
        },
        "templates": {
            name: {"values": each.values, "columns": each.columns, "rows": each.rows}
            for name, each in masks.TEMPLATES.items()
        },
    }


def shared_facts() -> str:
    """The element that holds :func:`facts`, once for all units of an accordion."""
    text = html.escape(json.dumps(facts()), quote=True)
    return f'<div class="ip-adapter-editors-facts" hidden data-facts="{text}"></div>'


def place(elem_id: str) -> str:
    """The folded element that a unit's editors are drawn into."""
    return (
        f'<details class="ip-adapter-editors" id="{html.escape(elem_id)}">'
        "<summary>Layers, time, place, mixture, negative</summary></details>"
    )

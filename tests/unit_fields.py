"""Fields of a unit that stand for themselves, whatever its pictures are; for hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from lib_ipadapter.layer_weights import ALL, pictures_of
from lib_ipadapter.units import FORMULATIONS, HIRES, PREPARATIONS, TIMINGS, TOGETHER
from tests.curve_points import curve_texts
from tests.layer_texts import layer_texts

weights = st.floats(-5, 5)


@st.composite
def plain_fields(draw: st.DrawFn, mixture: str, pictures: str) -> dict[str, Any]:
    """Values of these fields, beside a unit's ``mixture`` and ``pictures``."""
    layers = draw(layer_texts)
    if pictures_of(layers) and (mixture != "concat" or pictures != TOGETHER):
        layers = ALL
    return {
        "enabled": draw(st.booleans()),
        "weight": draw(weights),
        "formulation": draw(st.sampled_from(FORMULATIONS)),
        "preparation": draw(st.sampled_from(PREPARATIONS)),
        "timing": draw(st.sampled_from(TIMINGS)),
        "curve": draw(curve_texts),
        "hires_curve": draw(curve_texts),
        "hires": draw(st.sampled_from(HIRES)),
        "hires_scale": draw(st.floats(0, 5)),
        "nested": draw(st.booleans()),
        "influence": draw(st.booleans()),
        "layers": layers,
        "composition_weight": draw(st.none() | weights),
    }

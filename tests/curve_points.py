"""Any curve, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from lib_ipadapter.curves import Point, write

_values = st.floats(-5, 5).map(lambda value: value + 0.0)  # -0.0 is written as 0


@st.composite
def curve_points(draw: st.DrawFn) -> tuple[Point, ...]:
    """Points of a curve: at ascending positions, at some of them two, which is a jump."""
    points: list[Point] = []
    for position in sorted(draw(st.sets(st.floats(0, 1).map(lambda value: value + 0.0), min_size=1, max_size=5))):
        points += [Point(position, value) for value in draw(st.lists(_values, min_size=1, max_size=2))]
    return tuple(points)


curve_texts = st.just("") | curve_points().map(write)

"""Curves: text and points, values against numpy's own interpolation, and what a plot and a sentence are told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib_ipadapter import curves
from lib_ipadapter.curves import ALWAYS, Curve, Point, parse, write
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.progress import Window
from lib_ipadapter.steps import factors, never_acted, of_scheduler
from lib_ipadapter.units import Unit
from tests.curve_points import curve_points

progresses = st.floats(0, 1)


# --- Text


@given(curve_points())
@example((Point(0.1 + 0.2, 1 / 3), Point(1.0, 5e-324)))
def test_what_is_written_is_read(points: tuple[Point, ...]) -> None:
    assert parse(write(points)).points == points
    assert Unit(curve=write(points)).curve == write(points)


@pytest.mark.parametrize(
    "text",
    ["0.2@0, .8@0.3,0@7e-1", "0.2@0; .8@0.3; 0@.7", " 0.2 @ 0 \r\n+0.8@0.30\n\n0@0.7\n", ",0.2@-0,;0.8@0.3,-0@0.7,"],
)
def test_spaces_separators_and_spellings_mean_nothing(text: str) -> None:
    assert parse(text).points == ((0.0, 0.2), (0.3, 0.8), (0.7, 0.0))
    assert Unit(curve=text) == Unit(curve="0.2@0, 0.8@0.3, 0@0.7")
    assert math.copysign(1, parse(text).points[-1].value) == 1


@pytest.mark.parametrize("text", ["", "  ", ",;\n"])
def test_an_empty_text_is_no_curve(text: str) -> None:
    assert parse(text) == ALWAYS
    assert Unit(curve=text, hires_curve=text) == Unit()


BAD: list[tuple[str, int, str]] = [
    ("0.2@0, 0.8", 8, '"0.8" has no @'),
    ("0.2@0, 0.8@x", 12, 'the position is "x"; allowed is a number from 0 to 1'),
    ("0.2@0,  y @0.3", 9, 'the value is "y"; allowed is a number from -5 to 5'),
    ("0.2@0, 5.1@0.3", 8, 'the value is "5.1"'),
    ("0.2@0, 1@1.1", 10, 'the position is "1.1"'),
    ("1@-0.1", 3, 'the position is "-0.1"'),
    ("@0", 1, "the value is missing"),
    ("1@", 3, "the position is missing"),
    ("1@0@1", 3, 'the position is "0@1"'),
    ("nan@0", 1, 'the value is "nan"'),
    ("1@inf", 3, 'the position is "inf"'),
    ("1e999@0", 1, 'the value is "1e999"'),
    ("1_0@0", 1, 'the value is "1_0"'),
    ("0,5@0", 1, '"0" has no @'),
    ("1@0.5\n1@0.2", 7, "0.2 comes after 0.5; positions must ascend"),
    ("1@.5, 0@.5, 1@.5", 13, "two points at 0.5 already"),
    ("1@0," * 2 + "x" * 300, 9, '"xxxxxxxxxxxxxxxxxxxxxxx…" has no @'),
    (", ".join(f"1@{n / 100:.2f}" for n in range(65)), 64 * 8 + 1, "64 points already"),
]


@pytest.mark.parametrize(("text", "place", "words"), BAD)
@pytest.mark.parametrize("name", ["curve", "hires_curve"])
def test_what_cannot_be_read_is_pointed_at(text: str, place: int, words: str, name: str) -> None:
    with pytest.raises(IPAdapterError) as caught:
        Unit(**{name: text})  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f'The field "{name}" can\'t be read at character {place}: ')
    assert words in message and curves.EXAMPLE in message and message.endswith(".") and len(message) < 300


@pytest.mark.parametrize("value", [None, 3, True, ["1@0"], {"a": 1}, b"1@0"])
def test_a_curve_is_a_text(value: object) -> None:
    with pytest.raises(IPAdapterError, match=r'"curve" is .*; allowed is a text such as'):
        Unit.from_json({"curve": value})


@given(st.text(st.sampled_from("0123456789.@,;e+- \nx"), max_size=20))
def test_any_text_gives_a_curve_or_a_place(text: str) -> None:
    try:
        curve = parse(text)
    except IPAdapterError as error:
        place = int(str(error).split("character ")[1].split(":")[0])
        assert 1 <= place <= len(text) + 1
    else:
        assert parse(write(curve.points)) == curve


# --- Values


@given(curve_points(), progresses)
def test_values_are_those_of_numpy(points: tuple[Point, ...], progress: float) -> None:
    """Where no position is near: what happens at one is told by the tests below."""
    positions, values = (np.array(each, dtype=np.float64) for each in zip(*points, strict=True))
    if np.abs(positions - progress).min() > 2e-6:
        wanted = np.interp(progress, positions, values)
        assert Curve(points).at(progress) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@given(curve_points(), progresses)
def test_values_stay_between_those_of_the_points(points: tuple[Point, ...], progress: float) -> None:
    values = [value for _, value in points]
    slack = 1e-12
    assert min(values) - slack <= Curve(points).at(progress) <= max(values) + slack


def test_where_the_value_stays_it_is_the_very_number() -> None:
    curve = parse("0.1@0.2, 0.1@0.7, 0.3@0.9")
    assert {curve.at(n / 70) for n in range(50)} == {0.1}
    assert {curve.at(p) for p in (0.9, 0.95, 1.0)} == {0.3}


@pytest.mark.parametrize("off", [-3e-6, -5e-7, 0.0, 5e-7, 3e-6])
@pytest.mark.parametrize("position", [0.0, 0.25, 0.5, 0.999])
def test_a_jump_is_where_a_start_and_a_stop_are(position: float, off: float) -> None:
    progress = min(1.0, max(0.0, position + off))
    if position:  # a stop of 0 isn't allowed
        assert parse(f"1@{position}, 0@{position}").at(progress) == Window(0.0, position).contains(progress)
    assert parse(f"0@{position}, 1@{position}").at(progress) == Window(position, 1.0).contains(progress)


@pytest.mark.parametrize("start", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("stop", [0.6, 1.0])
def test_start_and_stop_are_the_special_case(start: float, stop: float) -> None:
    progress = of_scheduler("karras", 17)
    rising = f"0@{start}, 1@{start}, " if start else ""
    curve = f"{rising}1@{stop}, 0@{stop}" if stop < 1 else f"{rising}1@1"
    window = factors(Unit(start=start, stop=stop), progress)
    assert factors(Unit(curve=curve), progress) == window
    assert factors(Unit(curve="0.5@0, 2@1", start=start, stop=stop), progress) == [
        pytest.approx(0.5 + 1.5 * p) if inside else 0.0 for p, inside in zip(progress, window, strict=True)
    ]


# --- What is known of a curve


@pytest.mark.parametrize(
    ("text", "only", "whole", "over"),
    [
        ("", 1.0, True, 1.0),
        ("0.5@0.3", 0.5, True, 1.0),
        ("0.5@0.3, 0.5@0.6", 0.5, True, 1.0),
        ("0@0.3", 0.0, True, 0.0),
        ("1@0.5, 0@0.5", 1.0, False, 0.5),
        ("0@0.2, -2@0.2, -2@0.5, 0@0.5", -2.0, False, 0.5),
        ("1@0.5, 0@0.5, 0@0.7, 1@0.7", 1.0, False, 1.0),
        ("1@0, 0@0.5, 0@0.9", None, False, 0.5),
        ("1@0.5, 0.5@0.5", None, False, 1.0),
        ("0@0, 1@1", None, False, 1.0),
        ("1@0, 0@1", None, False, 1.0),
    ],
)
def test_properties(text: str, only: float | None, whole: bool, over: float) -> None:
    curve = parse(text)
    assert (curve.only, curve.is_whole, curve.over) == (only, whole, over)


@given(curve_points(), progresses)
def test_properties_hold_everywhere(points: tuple[Point, ...], progress: float) -> None:
    curve = Curve(points)
    if curve.only is not None:
        assert curve.at(progress) in (0.0, curve.only)
    if curve.is_whole:
        assert curve.at(progress) == curve.at(0.0)
    if curve.over < 1 and progress >= curve.over:
        assert curve.at(progress) == 0
    assert curve.scaled(0.5).at(progress) == pytest.approx(0.5 * curve.at(progress), rel=1e-9, abs=1e-300)


@given(curve_points(), progresses)
def test_between_points_it_is_straight(points: tuple[Point, ...], progress: float) -> None:
    positions, values = zip(*points, strict=True)
    if np.abs(np.array(positions) - progress).min() > 2e-6:
        assert Curve(points).at(progress) == pytest.approx(np.interp(progress, positions, values), rel=1e-9, abs=1e-12)


# --- Sentences


@pytest.mark.parametrize(
    ("fields", "hires", "words"),
    [
        ({"curve": "0@0, 1@0.2"}, False, ("curve (0@0, 1@0.2) isn't 0", "choose a curve that isn't 0 there")),
        ({"curve": "1@0, 0@0.9", "stop": 0.4}, False, ("to stop 0.4 where its curve", "choose a stop above 0.50")),
        ({"curve": "1@0, 0@0.9", "start": 0.95}, False, ("choose a start of 0.90 or less",)),
        ({"hires_curve": "0@0"}, True, ("curve (0@0) isn't 0", "isn't 0 there")),
        ({"curve": "1@0", "hires": "scaled"}, True, ("curve (0.5@0)",)),
        ({"curve": ", ".join(f"0@{n / 64}" for n in range(64))}, False, ("0@0.10…) isn't 0",)),
    ],
)
def test_what_is_said_of_a_unit_that_never_acts(fields: dict[str, object], hires: bool, words: tuple[str, ...]) -> None:
    sentence = never_acted(Unit(model="one", **fields), (0.5, 0.9), hires)  # type: ignore[arg-type]
    assert all(each in sentence for each in words), sentence
    assert sentence.endswith(".") and sentence.count(". ") == 0 and len(sentence) < 400


def test_the_hires_pass_has_its_own_factors() -> None:
    progress = [0.0, 0.25, 0.5, 0.75]
    ramp = {"curve": "0@0, 1@1"}
    assert factors(Unit(**ramp), progress, hires=True) == progress  # type: ignore[arg-type]
    scaled = Unit(**ramp, hires="scaled", hires_scale=0.4)  # type: ignore[arg-type]
    assert factors(scaled, progress, hires=True) == pytest.approx([0.4 * p for p in progress])
    assert factors(scaled, progress) == progress
    other = Unit(**ramp, hires_curve="1@0, 0@1", hires="scaled", hires_scale=0.5)  # type: ignore[arg-type]
    assert factors(other, progress, hires=True) == pytest.approx([0.5 * (1 - p) for p in progress])
    assert factors(Unit(hires="scaled"), progress, hires=True) == [0.5] * 4
    for off in (Unit(hires="off"), Unit(hires="scaled", hires_scale=0)):
        assert factors(off, progress, hires=True) == [0.0] * 4
        assert factors(off, progress) == [1.0] * 4

"""Units: JSON without loss, one sentence for every bad input, and the script's arguments."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_ipadapter.checks import FOREIGN_NAMES
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.masks import TEMPLATES
from lib_ipadapter.refs import MIDDLE, NO_MASK, ImageRef, MaskRef
from lib_ipadapter.units import (
    FORMULATIONS,
    MIXTURES,
    NOISES,
    PICTURES,
    PREPARATIONS,
    SCHEMA_VERSION,
    UNCONDS,
    UNIT_SLOTS,
    Unit,
    parse_script_args,
)
from tests.unit_fields import plain_fields

PICTURE = "data:image/png;base64,iVBORw0KGgo="
SHA256 = "0123456789abcdef" * 4

# Everything that may stand in a JSON document, lone surrogates of broken file names included.
any_text = st.text(st.characters(), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)
sources = st.one_of(
    any_text.filter(str.strip).map(lambda text: {"data": text}),
    st.text("0123456789abcdef", min_size=64, max_size=64).map(lambda text: {"sha256": text}),
)
names = st.from_regex(r"[\w.-]([\w .-]{0,20}[\w.-])?", fullmatch=True).filter(
    lambda text: unicodedata.normalize("NFC", text) == text
)
crops = st.just(MIDDLE) | st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(1, 10))
mask_refs = st.just(NO_MASK) | st.builds(
    lambda source, feather, invert: MaskRef(**source, feather=feather, invert=invert),
    sources | st.sampled_from(sorted(TEMPLATES)).map(lambda name: {"template": name}),
    st.just(0.0) | st.floats(0, 1),
    st.booleans(),
)
image_refs = st.builds(
    lambda source, weight, crop, mask: ImageRef(**source, weight=weight, crop=crop, mask=mask),
    sources,
    st.just(1.0) | st.floats(-5, 5),
    crops,
    mask_refs,
) | st.builds(ImageRef, saved=names, weight=st.floats(-5, 5))


@st.composite
def mixing(draw: st.DrawFn) -> dict[str, Any]:
    """Fields about several pictures that are allowed together, ``uncond`` being "auto"."""
    images = tuple(draw(st.lists(image_refs, max_size=3)))
    pictures = draw(st.sampled_from(PICTURES))
    mixture = draw(st.sampled_from(MIXTURES)) if pictures == "together" else "concat"
    if mixture != "concat":
        images = tuple(dataclasses.replace(ref, mask=NO_MASK) for ref in images)
    negatives = tuple(
        dataclasses.replace(ref, mask=NO_MASK) for ref in draw(st.lists(image_refs, max_size=max(1, len(images))))
    )
    noise = draw(st.sampled_from(NOISES)) if not any(ref.saved for ref in (*images, *negatives)) else "none"
    return {
        "images": images,
        "mixture": mixture,
        "pictures": pictures,
        "balance": draw(st.booleans()),
        "negative_images": negatives,
        "noise": noise,
        "noise_strength": draw(st.floats(0, 1)),
        "uncond_weight": draw(st.floats(-5, 5)),
    }


@st.composite
def units(draw: st.DrawFn) -> Unit:
    start, stop = sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True)))
    mixed = draw(mixing())
    has_negatives = mixed["negative_images"] or mixed["noise"] != "none"
    uncond = "auto" if has_negatives else draw(st.sampled_from(UNCONDS))
    return Unit(
        **draw(plain_fields(mixed["mixture"], mixed["pictures"])),
        **mixed,
        model=draw(any_text),
        start=start,
        stop=stop,
        uncond=uncond,
        negative=draw(any_text.filter(bool)) if uncond == "file" else "",
        mask=draw(mask_refs),
    )


def sentence_of(call: Any, *args: Any, **kwargs: Any) -> str:
    """The message of the IPAdapterError that the call raises, checked to be one sentence."""
    with pytest.raises(IPAdapterError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 400, message
    assert caught.value.status_code == 422 and caught.value.detail == message
    return message


# --- JSON


@given(units())
def test_json_round_trip_keeps_every_field(unit: Unit) -> None:
    text = unit.to_json()
    assert Unit.from_json(text) == unit
    assert Unit.from_json(json.loads(text)) == unit
    assert Unit.from_json(text).to_json() == text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    text.encode("utf-8")  # travels as it is


def test_json_holds_only_what_differs_from_the_defaults() -> None:
    assert json.loads(Unit().to_json()) == {"version": SCHEMA_VERSION}
    unit = Unit(model="a.safetensors", images=(ImageRef(sha256=SHA256), ImageRef(data=PICTURE)), weight=0.6)
    assert json.loads(unit.to_json()) == {
        "version": SCHEMA_VERSION,
        "model": "a.safetensors",
        "images": [{"sha256": SHA256}, PICTURE],
        "weight": 0.6,
    }


def test_the_defaults_are_the_schema_s() -> None:
    assert dataclasses.asdict(Unit()) == {
        "enabled": True,
        "model": "",
        "images": (),
        "weight": 1.0,
        "start": 0.0,
        "stop": 1.0,
        "formulation": "auto",
        "uncond": "auto",
        "negative": "",
        "preparation": "crop",
        "timing": "noise",
        "curve": "",
        "hires_curve": "",
        "hires": "same",
        "hires_scale": 0.5,
        "nested": True,
        "layers": "all",
        "composition_weight": None,
        "mixture": "concat",
        "pictures": "together",
        "balance": False,
        "negative_images": (),
        "noise": "none",
        "noise_strength": 1.0,
        "uncond_weight": 1.0,
        "mask": dataclasses.asdict(NO_MASK),
        "influence": False,
    }
    assert Unit.from_json("{}") == Unit.from_json({}) == Unit.from_json({"version": 1}) == Unit()


def test_preparations_are_those_of_the_pictures_module() -> None:
    from lib_ipadapter import pictures

    assert set(pictures.PREPARATIONS) == set(PREPARATIONS)


@pytest.mark.parametrize("images", [PICTURE, [PICTURE], {"data": PICTURE}, (ImageRef(data=PICTURE),)])
def test_images_may_be_one_or_a_list(images: object) -> None:
    assert Unit.from_json({"images": images}).images == (ImageRef(data=PICTURE),)


def test_upper_case_hashes_are_the_same_picture() -> None:
    assert Unit.from_json({"images": {"sha256": SHA256.upper()}}).images == (ImageRef(sha256=SHA256),)


def test_a_picture_has_a_weight_and_a_crop() -> None:
    unit = Unit.from_json({"images": [{"sha256": SHA256, "weight": "0.5", "crop": [0, "0.25", 2]}, PICTURE]})
    assert unit.images == (ImageRef(sha256=SHA256, weight=0.5, crop=(0.0, 0.25, 2.0)), ImageRef(data=PICTURE))
    assert ImageRef(data=PICTURE, weight=0.5).to_json() == {"data": PICTURE, "weight": 0.5}
    assert ImageRef(data=PICTURE).to_json() == PICTURE


@pytest.mark.parametrize(
    ("given_value", "words"),
    [
        ({"weight": 6}, 'field "weight" is 6'),
        ({"weight": True}, 'field "weight" is true'),
        ({"crop": 3}, r'field "crop" is 3; allowed is \[x, y, zoom\]'),
        ({"crop": [0.5, 0.5]}, 'field "crop" is a list of 2'),
        ({"crop": [0.5, 1.5, 1]}, 'field "crop y" is 1.5'),
        ({"crop": [0.5, 0.5, 0.5]}, 'field "crop zoom" is 0.5; allowed is a finite number from 1 to 10'),
        ({"wieght": 1}, '"weight"'),
    ],
)
def test_wrong_weights_and_crops_of_a_picture(given_value: dict[str, Any], words: str) -> None:
    message = sentence_of(Unit.from_json, {"images": [PICTURE, {"sha256": SHA256, **given_value}]})
    assert message.startswith('The field "images", picture 2 of 2: ')
    assert re.search(words, message), message


MASKS = [
    ("left half", MaskRef(template="left half"), "left half"),
    (" Top-Left_quarter ", MaskRef(template="top left quarter"), "top left quarter"),
    ({"template": "edges", "feather": "0.1"}, MaskRef(template="edges", feather=0.1), None),
    ({"template": "edges", "feather": 0, "invert": False}, MaskRef(template="edges"), "edges"),
    (PICTURE, MaskRef(data=PICTURE), PICTURE),
    ({"data": PICTURE, "invert": True}, MaskRef(data=PICTURE, invert=True), None),
    ({"data": "centre"}, MaskRef(data="centre"), {"data": "centre"}),
    ({"sha256": SHA256.upper()}, MaskRef(sha256=SHA256), {"sha256": SHA256}),
    ("", NO_MASK, None),
    ("  ", NO_MASK, None),
    ({}, NO_MASK, None),
]


@pytest.mark.parametrize(("given_value", "wanted", "written"), MASKS)
def test_masks_of_units_and_pictures(given_value: Any, wanted: MaskRef, written: Any) -> None:
    unit = Unit.from_json({"mask": given_value, "images": [{"data": PICTURE, "mask": given_value}]})
    assert unit.mask == unit.images[0].mask == wanted
    assert Unit.from_json(unit.to_json()) == unit
    if written is not None:
        assert json.loads(unit.to_json())["mask"] == written
        assert json.loads(unit.to_json())["images"][0]["mask"] == written
    if not wanted:
        assert "mask" not in unit.to_json()


@pytest.mark.parametrize(
    ("given_value", "words"),
    [
        (
            "left haf",
            r'mask is "left haf", which is no template; the nearest is "left half" and allowed are left half, ',
        ),
        ({"template": "nowhere"}, 'mask is "nowhere"'),
        (3, 'field "mask" is 3'),
        (None, 'field "mask" is null'),
        ([], 'field "mask" is a list'),
        ({"template": "centre", "data": PICTURE}, 'mask has "template" and "data"; allowed is one of'),
        ({"sha256": "abc"}, 'mask\'s "sha256" is "abc"; allowed are 64 hexadecimal digits'),
        ({"template": 3}, 'mask\'s "template" is 3; allowed is a text'),
        ({"template": "centre", "feather": 1.5}, 'field "feather" is 1.5; allowed is a finite number from 0 to 1'),
        ({"template": "centre", "invert": "yes"}, 'field "invert" is "yes"; allowed are true and false'),
        ({"feather": 0.5}, 'mask has "feather" or "invert" and nothing that they change'),
        ({"invert": True}, "nothing that they change"),
        ({"feather": False}, 'field "feather" is false'),
        ({"templat": "centre"}, '"template"'),
    ],
)
@pytest.mark.parametrize("of_picture", [True, False])
def test_wrong_masks(given_value: Any, words: str, of_picture: bool) -> None:
    values = {"images": [{"data": PICTURE, "mask": given_value}]} if of_picture else {"mask": given_value}
    assert words in sentence_of(Unit.from_json, values)


def test_masks_and_mixtures() -> None:
    left, right = (ImageRef(data=PICTURE, mask=MaskRef(template=name)) for name in ("left half", "right half"))
    Unit(images=(left, right))
    Unit(images=(left, left), mixture="average", mask=MaskRef(template="top half"))
    Unit(images=(left, dataclasses.replace(right, weight=0)), mixture="average")
    with pytest.raises(IPAdapterError, match='"mixture" is "average", which makes one of all pictures'):
        Unit(images=(left, right), mixture="average")
    with pytest.raises(IPAdapterError, match='"negative_images" has a picture with a mask'):
        Unit(images=(left,), negative_images=(right,))


def test_pictures_that_take_part() -> None:
    one, off = ImageRef(data=PICTURE, weight=-0.5), ImageRef(data=PICTURE, weight=0)
    assert Unit(images=(off, one)).acting_images == (one,)
    assert Unit(images=(one,), weight=0).acting_images == ()


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        ("0.6", 0.6),
        (" -1.5 ", -1.5),
        ("1e-1", 0.1),
        (".5", 0.5),
        ("2.", 2.0),
        (2, 2.0),
        (np.float32(0.5), 0.5),
    ],
)
def test_numbers_may_be_texts_or_other_number_types(given_value: object, expected: float) -> None:
    weight = Unit.from_json({"weight": given_value}).weight
    assert weight == expected and type(weight) is float


def test_negative_zero_is_zero() -> None:
    assert math.copysign(1, Unit(weight=-0.0).weight) == 1


# --- Bad input

OUT_OF_RANGE = [
    (math.nan, "NaN"),
    (math.inf, "infinity"),
    (-math.inf, "-infinity"),
    (np.float64("nan"), "NaN"),
    ("nan", '"nan"'),
    ("inf", '"inf"'),
    ("1_0", '"1_0"'),
    ("0,6", '"0,6"'),
    ("\N{FULLWIDTH DIGIT ONE}", '"\N{FULLWIDTH DIGIT ONE}"'),
    ("", '""'),
    ("1e999", '"1e999"'),
    (True, "true"),
    (False, "false"),
    (None, "null"),
    (10**400, "a whole number with too many digits"),
    (5.0000001, "5.0000001"),
    (-6, "-6"),
    ([1], "a list of 1"),
    ({}, "an object"),
    (1j, "a complex"),
]


@pytest.mark.parametrize(("value", "shown"), OUT_OF_RANGE)
@pytest.mark.parametrize(
    ("field", "allowed"), [("weight", "from -5 to 5"), ("start", "from 0 to 1"), ("stop", "from 0 to 1")]
)
def test_bad_numbers_name_field_value_and_range(field: str, allowed: str, value: object, shown: str) -> None:
    message = sentence_of(Unit.from_json, {field: value})
    assert f'"{field}" is {shown};' in message and allowed in message
    assert sentence_of(Unit, **{field: value}) == message


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_lets_through_are_caught(text: str) -> None:
    assert '"weight"' in sentence_of(Unit.from_json, f'{{"weight": {text}}}')


@pytest.mark.parametrize(("start", "stop"), [(0.8, 0.5), (0.5, 0.5), (1, 1), (0, 0)])
def test_the_window_must_not_be_empty(start: float, stop: float) -> None:
    message = sentence_of(Unit.from_json, {"start": start, "stop": stop})
    assert f'"start" is {start} and "stop" is {stop};' in message and "smaller" in message


@pytest.mark.parametrize("field", ["formulation", "uncond", "preparation"])
@pytest.mark.parametrize("value", ["Auto", "", None, 3, True, ["auto"], {"auto": 1}])
def test_bad_choices_name_field_value_and_choices(field: str, value: object) -> None:
    allowed = {"formulation": FORMULATIONS, "uncond": UNCONDS, "preparation": PREPARATIONS}[field]
    message = sentence_of(Unit.from_json, {field: value})
    assert f'"{field}" is ' in message and ", ".join(allowed) in message


@pytest.mark.parametrize("value", [1, 0, "true", None, [], 1.0])
def test_enabled_is_true_or_false(value: object) -> None:
    assert '"enabled" is ' in sentence_of(Unit.from_json, {"enabled": value})


@pytest.mark.parametrize("field", ["model", "negative"])
@pytest.mark.parametrize("value", [None, 3, True, ["a"], {"name": "a"}, b"a"])
def test_names_are_texts(field: str, value: object) -> None:
    assert f'"{field}" is ' in sentence_of(Unit.from_json, {field: value})


def test_a_negative_file_and_its_uncond_belong_together() -> None:
    assert '"negative" is empty' in sentence_of(Unit.from_json, {"uncond": "file"})
    message = sentence_of(Unit.from_json, {"negative": "n.safetensors"})
    assert '"negative" is "n.safetensors" while "uncond" is "auto"' in message


@pytest.mark.parametrize("value", ["", "  ", None, 3, True, b"x", {}])
@pytest.mark.parametrize("alone", [True, False])
def test_empty_and_wrong_pictures_are_named(value: object, alone: bool) -> None:
    message = sentence_of(Unit.from_json, {"images": value if alone else [PICTURE, value]})
    assert '"images"' in message and (alone or "picture 2 of 2" in message)


@pytest.mark.parametrize(
    "value",
    [
        {"sha256": "abc"},
        {"sha256": SHA256 + "0"},
        {"sha256": "g" * 64},
        {"sha256": SHA256 + "\n"},
        {"sha256": 7},
        {"sha256": SHA256, "data": PICTURE},
        {"data": 7},
        {"data": " "},
        {"sha": SHA256},
    ],
)
def test_bad_picture_objects_are_named(value: object) -> None:
    assert '"images", picture 1 of 1: the ' in sentence_of(Unit.from_json, {"images": value})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("wieght", "weight"),
        ("Weight", "weight"),
        ("image", "images"),
        ("guidance_end", "stop"),
        ("modle", "model"),
        ("enable", "enabled"),
        ("startt", "start"),
    ],
)
def test_unknown_fields_name_the_nearest(name: str, near: str) -> None:
    message = sentence_of(Unit.from_json, {name: 0.6})
    assert f'"{name}" (value 0.6) is unknown' in message and f'nearest known field is "{near}"' in message


def test_unknown_fields_far_from_all_list_the_known() -> None:
    message = sentence_of(Unit.from_json, {"zzz": None})
    assert "nearest" not in message and all(field.name in message for field in dataclasses.fields(Unit))


def test_hints_lead_to_fields_that_exist() -> None:
    names = {field.name for field in dataclasses.fields(Unit)}
    assert set(FOREIGN_NAMES.values()) <= names and not set(FOREIGN_NAMES) & names


@pytest.mark.parametrize("value", [0, SCHEMA_VERSION + 1, "1", True, None, 1.0])
def test_versions_that_are_not_known_are_refused(value: object) -> None:
    assert '"version" is ' in sentence_of(Unit.from_json, {"version": value})


@pytest.mark.parametrize(
    "text",
    ["nonsense", "[1, 2]", "3", "null", "true", "", "{", '{"a"}', "[" * 100_000, '{"weight": ' + "9" * 5000],
)
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    sentence_of(Unit.from_json, text)


def test_a_field_given_twice_is_refused() -> None:
    message = sentence_of(Unit.from_json, '{"weight": 1, "weight": 0.5}')
    assert '"weight" is given twice, as 1 and 0.5' in message


@given(st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Unit)]) | any_text, json_values))
def test_whatever_json_says_gives_a_valid_unit_or_one_sentence(values: dict[str, Any]) -> None:
    try:
        unit = Unit.from_json(values)
    except IPAdapterError as error:
        assert re.fullmatch(r"[^\n]+\.", str(error))
    else:
        assert Unit.from_json(unit.to_json()) == unit
        assert -5 <= unit.weight <= 5 and 0 <= unit.start < unit.stop <= 1


# --- The script's arguments

ONE = {"model": "one", "images": PICTURE}
TWO = {"model": "two", "images": [PICTURE, {"sha256": SHA256}], "weight": "0.6"}
EMPTY_SLOTS = [""] * UNIT_SLOTS


@pytest.mark.parametrize(
    "args",
    [
        [],
        [False],
        [False, *EMPTY_SLOTS],
        [False, "not even JSON"],
        [False, ONE],
        [""],
        [None, None],
        [*EMPTY_SLOTS, ""],
        [{**ONE, "enabled": False}],
    ],
)
def test_off(args: list[object]) -> None:
    assert parse_script_args(args) == (False, [])
    assert parse_script_args(tuple(args)) == (False, [])


@pytest.mark.parametrize(
    "args",
    [
        [True, ONE, TWO],
        [ONE, TWO],
        [True, "", None, json.dumps(ONE), " ", json.dumps(TWO), *[""] * 5],
        [json.dumps(ONE), TWO, *[""] * 9],
        ["", ONE, TWO],
        [True, ONE, {**TWO, "enabled": False}, {}, TWO],
        [True, Unit.from_json(ONE), Unit.from_json(TWO)],
    ],
)
def test_forms_of_the_arguments(args: list[object]) -> None:
    on, active = parse_script_args(args)
    assert on is True
    assert active == [Unit.from_json(ONE), Unit.from_json(TWO)]
    assert active[1].weight == 0.6


def test_ten_units_are_taken_and_an_eleventh_is_an_error() -> None:
    ten = [{**ONE, "weight": index / 10} for index in range(UNIT_SLOTS)]
    for args in ([True, *ten], [True, *ten, ""], ten, [*ten, ""], [*ten, "", None]):
        assert [unit.weight for unit in parse_script_args(args)[1]] == [index / 10 for index in range(UNIT_SLOTS)]
    for args in ([True, *ten, ONE], [*ten, ONE], [True, *EMPTY_SLOTS, ONE], [True, *ten, 3]):
        message = sentence_of(parse_script_args, args)
        assert "at most 10 units" in message


@pytest.mark.parametrize(
    "args",
    [
        [True],
        [True, *EMPTY_SLOTS],
        [True, {"model": "one"}],
        [True, {**ONE, "enabled": False}],
        [{}],
        [{"model": "one", "images": []}],
    ],
)
def test_on_without_any_picture_is_an_error(args: list[object]) -> None:
    assert "has no picture" in sentence_of(parse_script_args, args)


def test_a_unit_that_asks_for_something_without_a_picture_is_named() -> None:
    assert "Unit 2 has no picture" in sentence_of(parse_script_args, [True, ONE, {"model": "two"}])


@pytest.mark.parametrize("first", [1, 0, 0.5, [True], (ONE,), b"{}"])
def test_a_first_argument_of_another_kind_is_an_error(first: object) -> None:
    assert "first argument" in sentence_of(parse_script_args, [first, ONE])


@pytest.mark.parametrize(
    ("slot", "part"),
    [
        ({"weight": math.nan, "images": PICTURE}, 'unit 3: the field "weight" is NaN'),
        ({"enabled": False, "wieght": 1}, 'unit 3: the field "wieght"'),
        ("true", "unit 3: the unit is true"),
        (True, "unit 3: the unit is true"),
        ([ONE], "unit 3: the unit is a list of 1"),
        ("{", "unit 3: the unit is "),
        ({"images": [""]}, 'unit 3: the field "images", picture 1 of 1'),
    ],
)
def test_a_bad_unit_is_named_by_its_number(slot: object, part: str) -> None:
    assert part in sentence_of(parse_script_args, [True, ONE, "", slot]).lower().replace("nan", "NaN")


@given(st.lists(json_values | st.just(ONE) | st.just(True), max_size=13))
def test_whatever_the_arguments_are_gives_units_or_one_sentence(args: list[object]) -> None:
    try:
        on, active = parse_script_args(args)
    except IPAdapterError as error:
        assert re.fullmatch(r"[^\n]+\.", str(error))
    else:
        assert on == bool(active)
        assert all(unit.enabled and unit.images for unit in active)

"""Units in a picture's parameters: whatever is written is read back, through the hosts' own writer and reader."""

from __future__ import annotations

import json
import random
import string
import unicodedata
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lib_ipadapter.infotext import KEY, Facts, parse, write
from lib_ipadapter.masks import TEMPLATES
from lib_ipadapter.refs import NO_MASK, ImageRef, MaskRef
from lib_ipadapter.units import MIXTURES, NOISES, PICTURES, PREPARATIONS, TIMINGS, UNCONDS, UNIT_SLOTS, Unit
from tests.embedded.infotext import create_infotext, parse_generation_parameters
from tests.unit_fields import plain_fields, weights

HASH = "0123456789abcdef" * 4
ODD = ",:\"\\\n\r\t[]() '{}<>&;=äß日本\U0001f600\u00a0\u2028\x00\x1f"


def through_host(keys: dict[str, str], prompt: str = "a cat", negative: str = "") -> dict[str, Any]:
    """Parameters as the embedded host writes them into a picture and reads them from there."""
    return parse_generation_parameters(create_infotext(job(keys, prompt, negative), 0, no_error))


def job(keys: dict[str, str], prompt: str, negative: str) -> SimpleNamespace:
    """A job of one picture."""
    return SimpleNamespace(
        batch_size=1,
        all_prompts=[prompt],
        all_negative_prompts=[negative],
        steps=8,
        sampler_name="Euler",
        scheduler="Automatic",
        cfg_scale=7.0,
        all_seeds=[1],
        width=64,
        height=64,
        sd_model=SimpleNamespace(sd_model_hash="0", sd_checkpoint_info=SimpleNamespace(name_for_extra="model")),
        extra_generation_params=keys,
    )


def no_error(*args: object) -> None:
    raise AssertionError(args)


texts = st.text(st.one_of(st.sampled_from(ODD), st.characters(codec="utf-8")), min_size=1, max_size=30)
parts = st.floats(0, 1)
crops = st.tuples(parts, parts, st.floats(1, 10))
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
masks = st.just(NO_MASK) | st.builds(
    lambda source, feather, invert: MaskRef(**source, feather=feather, invert=invert),
    hashes.map(lambda text: {"sha256": text}) | st.sampled_from(sorted(TEMPLATES)).map(lambda name: {"template": name}),
    st.just(0.0) | parts,
    st.booleans(),
)
names = st.from_regex(r"[\w.-]([\w .-]{0,20}[\w.-])?", fullmatch=True).filter(
    lambda text: unicodedata.normalize("NFC", text) == text
)
odd_names = st.sampled_from(("name x", "weight 1 name  a", "mask name a"))
saved_images = st.builds(ImageRef, saved=names | odd_names, weight=weights, mask=masks)
images = st.builds(ImageRef, sha256=hashes, weight=weights, crop=crops, mask=masks) | saved_images


@st.composite
def units(draw: st.DrawFn) -> Unit:
    """Any unit whose pictures are given by hash."""
    start, stop = sorted(draw(st.tuples(parts, parts).filter(lambda pair: pair[0] != pair[1])))
    pictures = tuple(draw(st.lists(images, max_size=4)))
    negatives = tuple(replace(each, mask=NO_MASK) for each in draw(st.lists(images, max_size=max(1, len(pictures)))))
    noise = draw(st.sampled_from(NOISES)) if not any(ref.saved for ref in (*pictures, *negatives)) else "none"
    uncond = "auto" if negatives or noise != "none" else draw(st.sampled_from(UNCONDS))
    places = draw(st.sampled_from(PICTURES))
    mixture = draw(st.sampled_from(MIXTURES)) if places == "together" else "concat"
    if mixture != "concat":
        pictures = tuple(replace(each, mask=NO_MASK) for each in pictures)
    return Unit(
        **draw(plain_fields(mixture, places)),
        model=draw(st.one_of(st.just(""), texts)),
        images=pictures,
        mixture=mixture,
        pictures=places,
        balance=draw(st.booleans()),
        negative_images=negatives,
        noise=noise,
        noise_strength=draw(parts),
        uncond_weight=draw(weights),
        start=start,
        stop=stop,
        uncond=uncond,
        negative=draw(texts) if uncond == "file" else "",
        mask=draw(masks),
    )


facts = st.builds(
    Facts,
    fingerprint=st.one_of(st.just(""), hashes),
    formulation=st.sampled_from(("", "joint")),
    uncond=st.sampled_from(("", "zero embeds")),
)


@settings(max_examples=300, deadline=None)
@given(units(), facts, st.integers(1, UNIT_SLOTS), st.text(max_size=40), st.text(max_size=40))
def test_what_is_written_is_read(unit: Unit, known: Facts, number: int, prompt: str, negative: str) -> None:
    keys = write({number: unit}, {number: known})
    if "\n" in prompt:
        prompt += "\nand more"  # a prompt that ends in something like parameters belongs to the host
    found = parse(through_host(keys, prompt, negative))
    assert found.units[number - 1] == unit
    assert found.unknown == {}
    assert [slot for slot in found.slots() if slot] == [unit.to_json()]


def test_a_thousand_random_units_come_back() -> None:
    generator = random.Random(0)
    letters = string.ascii_letters + ODD
    for _ in range(1000):
        start, stop = sorted(generator.sample([n / 100 for n in range(101)], 2))
        uncond = generator.choice(UNCONDS)
        unit = Unit(
            model="".join(generator.choices(letters, k=generator.randint(1, 40))),
            images=tuple(
                ImageRef(
                    sha256=f"{generator.getrandbits(256):064x}",
                    weight=round(generator.uniform(-5, 5), 2),
                    crop=(generator.random(), generator.random(), generator.uniform(1, 10)),
                )
                for _ in range(generator.randint(0, 3))
            ),
            weight=generator.choice([1.0, 0.0, generator.uniform(-5, 5)]),
            start=start,
            stop=stop,
            formulation=generator.choice(("auto", "joint", "decoupled")),
            uncond=uncond,
            negative="".join(generator.choices(letters, k=9)) if uncond == "file" else "",
            preparation=generator.choice(PREPARATIONS),
            timing=generator.choice(TIMINGS),
        )
        known = Facts(f"{generator.getrandbits(256):064x}", "joint", "zero pixels")
        params = through_host(write({1: unit}, {1: known}), 'a "cat", sitting: on\nthe mat', 'bad, "worse"')
        assert parse(params).units[0] == unit


@pytest.mark.parametrize(
    "prompt", ['say "hi", and: go', "one,\ntwo: 2,\nthree", "IP-Adapter 1: x, y", 'odd " quote', "日本, ä: ö\n\nü"]
)
def test_prompts_do_not_matter(prompt: str) -> None:
    unit = Unit(model='a "b", c: d.safetensors', images=(ImageRef(sha256=HASH),), weight=0.5)
    params = through_host(write({2: unit}), prompt, prompt)
    assert params["Prompt"] == prompt
    assert parse(params).units[1] == unit


def test_a_plain_unit_reads_well() -> None:
    unit = Unit(model="plus.safetensors", images=(ImageRef(sha256=HASH), ImageRef(sha256=HASH, weight=0.5)))
    known = Facts("a" * 64, "joint", "zero pixels")
    assert write({1: unit}, {1: known}) == {
        "IP-Adapter 1": f"model: plus.safetensors [aaaaaaaaaa], weight: 1, formulation: auto (joint), "
        f"uncond: auto (zero pixels), picture 1: {HASH}, picture 2: {HASH} weight 0.5"
    }


def test_masks_read_well() -> None:
    images = (
        ImageRef(sha256=HASH, weight=0.5, mask=MaskRef(template="top left quarter", feather=0.1)),
        ImageRef(sha256=HASH, mask=MaskRef(sha256=HASH)),
    )
    unit = Unit(model="a", images=images, mask=MaskRef(template="left half", invert=True))
    keys = write({1: unit})
    assert keys == {
        "IP-Adapter 1": "model: a, weight: 1, mask: left-half inverted, "
        f"picture 1: {HASH} weight 0.5 mask top-left-quarter feather 0.1, picture 2: {HASH} mask {HASH}"
    }
    found = parse(through_host(keys), has_picture=lambda _: False)
    assert found.units[0] == unit
    assert any(note.startswith(f"Unit 1: the mask of picture 2 ({HASH}) isn't kept here") for note in found.notes)


def test_hashes_of_masks_can_be_left_out() -> None:
    unit = Unit(model="a", images=(ImageRef(sha256=HASH),), mask=MaskRef(sha256="e" * 64, feather=0.5))
    keys = write({1: unit}, hashes=False)
    assert "mask: hidden feather 0.5" in keys["IP-Adapter 1"]
    found = parse(keys)
    assert found.units[0] == Unit(model="a")
    assert "Unit 1: the infotext has no hash of its mask, so add it again." in found.notes
    template = replace(unit, mask=MaskRef(template="centre"))
    assert parse(write({1: template}, hashes=False)).units[0] == replace(template, images=())


@pytest.mark.parametrize("mask", ["left-haf", "", "left-half feather", "left-half feather 7", HASH[:-1]])
def test_a_mask_that_cannot_be_read_is_said(mask: str) -> None:
    for text in (f"mask: {mask}, picture 1: {HASH}", f"picture 1: {HASH} mask {mask}"):
        found = parse({"IP-Adapter 1": text})
        assert found.units[0] == Unit(images=(ImageRef(sha256=HASH),))
        (note,) = found.notes
        assert "mask" in note and "can't be read, so choose it again" in note


def test_several_units_keep_their_numbers() -> None:
    wanted = {n: Unit(model=f"{n}.safetensors", images=(ImageRef(sha256=HASH),)) for n in (1, 3, UNIT_SLOTS)}
    found = parse(through_host(write(wanted)))
    assert found.enabled
    assert {n: unit for n, unit in enumerate(found.units, 1) if unit is not None} == wanted
    assert found.notes == ()


def test_other_parameters_switch_us_off() -> None:
    found = parse({"Prompt": "x", "IP-Adapter error": "It can't be.", "IP-Adapter": "model: x", "ControlNet 0": "x: 1"})
    assert not found.enabled
    assert found.slots() == [""] * UNIT_SLOTS
    assert found.notes == ()


def test_an_older_version_is_read() -> None:
    text = "model: a, b.safetensors, weight: 0.8, start: 0, stop: 0.5, formulation: joint, uncond: zero pixels, "
    text += "preparation: crop, timing: noise"
    found = parse(through_host({"IP-Adapter 1": text}))
    assert found.units[0] == Unit(
        model="a, b.safetensors", weight=0.8, stop=0.5, formulation="joint", uncond="zero pixels"
    )
    assert found.notes == ("Unit 1: the infotext names no pictures, so add them again.",)


def test_what_a_newer_version_wrote_is_kept_and_named() -> None:
    text = (
        f'model: x.bin, weight: 0.5, veil: "a, b: c", formulation: triple (soft), picture 1: {HASH} weight 2 tint red'
    )
    found = parse(through_host({"IP-Adapter 1": text}))
    assert found.units[0] == Unit(model="x.bin", weight=0.5, images=(ImageRef(sha256=HASH, weight=2),))
    assert found.unknown == {1: {"veil": '"a, b: c"', "formulation": "triple (soft)", "picture 1 tint": "red"}}
    (note,) = found.notes
    for name in found.unknown[1]:
        assert name in note


def test_one_bad_value_takes_no_other_with_it() -> None:
    text = f"model: x, weight: 77, start: 0.5, stop: 0.9, uncond: file, negative: n, picture 1: {HASH}, picture 2: zz"
    found = parse({"IP-Adapter 2": text})
    assert found.units[1] == Unit(
        model="x", start=0.5, stop=0.9, uncond="file", negative="n", images=(ImageRef(sha256=HASH),)
    )
    assert found.unknown == {2: {"weight": "77"}}
    assert any("picture 2" in note for note in found.notes)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from('model:weight,picture 1[]"\\()0.5 \n' + HASH), max_size=120))
def test_any_text_is_read_without_an_error(text: str) -> None:
    found = parse({"IP-Adapter 1": text})
    assert found.enabled
    assert isinstance(found.units[0], Unit)


def test_missing_pictures_are_named_and_stay() -> None:
    other = "f" * 64
    unit = Unit(model="x", images=(ImageRef(sha256=HASH), ImageRef(sha256=other)))
    found = parse(write({1: unit}), has_picture=lambda sha256: sha256 == HASH)
    assert found.units[0] == unit
    (note,) = found.notes
    assert other in note and "picture 2" in note and HASH not in note


def test_hashes_can_be_left_out() -> None:
    unit = Unit(model="x", images=(ImageRef(sha256=HASH, weight=0.5), ImageRef(sha256=HASH)), weight=0.5)
    keys = write({1: unit}, hashes=False)
    assert HASH not in json.dumps(keys)
    found = parse(keys)
    assert found.units[0] == replace(unit, images=())
    assert len(found.notes) == 2 and "picture 1" in found.notes[0]


def test_a_renamed_model_is_asked_for_by_its_fingerprint() -> None:
    asked = []

    def find(name: str, fingerprint: str) -> tuple[str, str]:
        asked.append((name, fingerprint))
        return "new.safetensors", "it is called new.safetensors here."

    unit = Unit(model="old [x].safetensors", images=(ImageRef(sha256=HASH),))
    found = parse(through_host(write({1: unit}, {1: Facts("ab" * 32)})), find)
    assert asked == [("old [x].safetensors", "ab" * 5)]
    assert found.units[0] == replace(unit, model="new.safetensors")
    assert found.notes == ("Unit 1: it is called new.safetensors here.",)


def test_a_unit_beyond_the_slots_is_named() -> None:
    found = parse({f"{KEY} {UNIT_SLOTS + 1}": "model: x", f"{KEY} 0": "model: y"})
    assert not found.enabled
    assert len(found.notes) == 2


def test_only_hashes_are_written() -> None:
    with pytest.raises(ValueError, match="by its hash"):
        write({1: Unit(images=(ImageRef(data="aGk="),))})
    with pytest.raises(ValueError, match="by its hash"):
        write({1: Unit(mask=MaskRef(data="aGk="))})


EXIF_IFD, USER_COMMENT = 0x8769, 0x9286


def in_a_file(text: str, kind: str) -> str:
    """An infotext through a picture file, stored as the hosts do: a PNG's text, or EXIF's comment in UTF-16."""
    file, picture = BytesIO(), Image.new("RGB", (8, 8))
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        picture.save(file, kind, pnginfo=info)
        return str(Image.open(file).info["parameters"])
    exif = Image.Exif()
    exif[EXIF_IFD] = {USER_COMMENT: b"UNICODE\0" + text.encode("utf_16_be")}
    picture.save(file, kind, exif=exif)
    stored = Image.open(file).getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
    return bytes(stored[8:]).decode("utf_16_be")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_file_format_of_the_hosts_keeps_them(kind: str) -> None:
    images = tuple(ImageRef(sha256=f"{n:064x}", weight=0.1, crop=(0.1, 0.2, 3.3)) for n in range(10))
    wanted = {n: Unit(model=f"{n} {ODD} x.safetensors", images=images, weight=0.5) for n in range(1, UNIT_SLOTS + 1)}
    text = create_infotext(job(write(wanted), "日本 \U0001f600", "ä"), 0, no_error)
    found = parse(parse_generation_parameters(in_a_file(text, kind)))
    assert {n: unit for n, unit in enumerate(found.units, 1) if unit is not None} == wanted

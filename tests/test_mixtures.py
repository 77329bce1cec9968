"""Several pictures as one, and in the places of a job, against float64; and through whole generations."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.formulations import DECOUPLED, JOINT, Formulation
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.mixtures import MIXTURES, mixed
from lib_ipadapter.places import Batch, InGenerations, InItems, InPictures, Items
from lib_ipadapter.plan import scaled_dot_product
from lib_ipadapter.progress import Window
from lib_ipadapter.refs import ImageRef
from lib_ipadapter.rows import COND, OTHER, UNCOND, Call, items_in_order, items_of_rows
from lib_ipadapter.units import MIXTURES as NAMES
from lib_ipadapter.units import Unit
from lib_ipadapter.weighing import weigh
from tests.bare_model import softmax_attention
from tests.embedded import Host
from tests.embedded_hosts import request, unit
from tests.photos import base64_photo
from tests.test_generation import difference, pixels, same
from tests.test_injection import HEADS, LAYERS, WIDEST, WIDTH, assert_close, picture, text

PHOTOS = ("astronaut", "chelsea", "coffee")


# --- The formulas


def expected(name: str, e: np.ndarray, w: list[float]) -> np.ndarray:
    """Number by number, picture by picture."""
    n = len(e)
    if name == "average":
        return sum(w[i] * e[i] for i in range(n)) / sum(abs(each) for each in w)
    if name == "normalised average":
        lengths = np.sqrt((e**2).sum(axis=-1, keepdims=True))
        return sum(w[i] * e[i] / lengths[i] for i in range(n)) / sum(map(abs, w)) * (sum(lengths) / n)
    if name == "norm average":
        over_pictures = np.sqrt(sum(e[i] ** 2 for i in range(n)))
        return sum(w[i] * e[i] / over_pictures for i in range(n)) / sum(map(abs, w))
    weighted = [w[i] * e[i] for i in range(n)]
    if name == "add":
        return sum(weighted)
    if name == "subtract":
        return weighted[0] - (sum(weighted[1:]) / (n - 1) if n > 1 else 0)
    return {"max": np.maximum, "min": np.minimum}[name].reduce(weighted)


MIXING = [name for name in NAMES if name != "concat"]


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@given(st.lists(st.floats(0.1, 3) | st.floats(-3, -0.1), min_size=1, max_size=4), st.integers(0, 100))
def test_a_mixture_is_its_formula(name: str, shape: tuple[int, ...], weights: list[float], seed: int) -> None:
    e = torch.randn(len(weights), *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = mixed(name, e, weights)
    assert found.shape == (1, *shape) and found.dtype == e.dtype
    np.testing.assert_allclose(found[0].numpy(), expected(name, e.numpy(), weights), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in MIXING if name != "norm average"])
def test_a_mixture_of_one_picture_is_that_picture(name: str) -> None:
    e = torch.randn(1, 3, 5)
    assert torch.allclose(mixed(name, e, [1.0]), e, rtol=1e-6)


@pytest.mark.parametrize("name", MIXING)
def test_features_of_zero_make_no_infinities(name: str) -> None:
    assert bool(mixed(name, torch.zeros(2, 3, 5), [1.0, 1.0]).isfinite().all())


def test_the_table_has_every_name() -> None:
    assert tuple(MIXTURES) == NAMES
    assert all(each.help for each in MIXTURES.values())
    with pytest.raises(ValueError, match="leaves"):
        mixed("concat", torch.zeros(2, 3), [1.0, 1.0])


# --- Places


def test_places_in_a_job() -> None:
    assert [InGenerations(1, 3).items(Batch(n, 2)) for n in range(5)] == [
        *(frozenset(), None, frozenset()),
        *(frozenset(), None),
    ]
    assert InItems(0, 2).items(Batch(0, 5)) == {0, 2, 4}
    assert InItems(0, 1).items(Batch(0, 5)) is None
    assert InItems(1, 2).items(Batch(0, 1)) == frozenset()
    place = InPictures(frozenset({0, 3}), frozenset({2, 3}), 2)
    assert [place.items(Batch(n, 2)) for n in range(2)] == [{0}, {1}]
    assert [place.items(Batch(n, 2, hires=True)) for n in range(2)] == [frozenset(), None]


def test_items_of_rows() -> None:
    assert items_of_rows((1, 0), 3, 6) == (0, 1, 2, 0, 1, 2)
    assert items_of_rows((1, 0), 2, 8) == (0, 1) * 4  # tiles
    assert items_of_rows((1, 0), 2, 6, 4) is None  # regions
    assert items_of_rows((1, 0), 1, 3, 2) == (0, 0, 0)
    assert items_in_order((COND, UNCOND), (2, 1)) == {COND: (0, 0, 1), UNCOND: (0, 1)}


Placed = tuple[Formulation, float, Items, int]
"""Formulation, weight, items and seed of a unit of one picture."""

PLACED: dict[str, list[Placed]] = {
    "one item of two": [(JOINT, 0.7, frozenset({1}), 1)],
    "each its own": [(JOINT, 0.7, frozenset({0}), 1), (JOINT, 1.1, frozenset({1}), 2)],
    "each its own, decoupled": [(DECOUPLED, 0.7, frozenset({0}), 1), (DECOUPLED, 1.1, frozenset({1}), 2)],
    "beside one for all": [(JOINT, 0.5, None, 1), (DECOUPLED, 0.7, frozenset({0}), 2), (JOINT, 0.9, frozenset({1}), 3)],
}
CALLS = {
    "chunks": ((UNCOND, UNCOND, COND, COND), (0, 1, 0, 1)),
    "AND": ((UNCOND, UNCOND, COND, COND, COND, COND), (0, 1, 0, 1, 0, 1)),
    "picture by picture": ((COND, COND, COND, UNCOND, UNCOND), (0, 0, 1, 0, 1)),
    "cond alone": ((COND, COND), (0, 1)),
    "padding": ((UNCOND, UNCOND, COND, COND, OTHER), (0, 1, 0, 1, 0)),
}


@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lengths", [(7, 7), (14, 7)])
def test_every_row_sees_the_pictures_of_its_item(placed: str, call: str, lengths: tuple[int, int]) -> None:
    roles, items = CALLS[call]
    specs = PLACED[placed]
    terms, raw = [], []
    for formulation, weight, where, seed in specs:
        prompts = {COND: (picture(4, seed),), UNCOND: (picture(4, seed + 50),)}
        weighed = weigh(prompts, formulation, weight, (), WIDEST, UNCOND)
        terms.append(Term(formulation, Window(), weighed, items=where))
        raw.append(prompts)
    seen = max(lengths)
    q = text(len(roles), 1)[0]
    real = {COND: lengths[0], UNCOND: lengths[1], OTHER: seen}
    rows = [text(1, real[role], seed=row)[1:] for row, role in enumerate(roles)]
    k, v = (torch.stack([r[n][0].repeat(seen // r[n].shape[1], 1) for r in rows]) for n in range(2))
    injection = Injection(terms, LAYERS)
    assert injection.asks_items
    known = Call(roles, 0.5, {COND: lengths[0], UNCOND: lengths[1]}, items=items)
    plan = injection.plan(known, seen, torch.device("cpu"), torch.float32)
    out = plan.attend(0, q, k, v, HEADS, scaled_dot_product, None)
    wanted = []
    for row, (role, item) in enumerate(zip(roles, items, strict=True)):
        query = q[row].double().numpy()
        keys, values = [rows[row][0][0].double().numpy()], [rows[row][1][0].double().numpy()]
        added = np.zeros_like(query)
        for (formulation, weight, where, _), prompts in zip(specs, raw, strict=True):
            if role == OTHER or not (where is None or item in where):
                continue
            ik, iv = (kind[0][0].double().numpy() for kind in (prompts[role][0].keys, prompts[role][0].values))
            scale = weight * WIDTH / WIDEST
            if formulation is JOINT:
                keys.append(ik * scale)
                values.append(iv - iv.mean(0) + iv.mean(0) * scale)
            else:
                added += weight * softmax_attention(query, ik, iv, HEADS)
        wanted.append(softmax_attention(query, np.concatenate(keys), np.concatenate(values), HEADS) + added)
    assert_close(out, np.stack(wanted))


def test_rows_of_unknown_items_are_refused() -> None:
    weighed = weigh({COND: (picture(4, 1),)}, JOINT, 1.0, (), WIDEST, UNCOND)
    injection = Injection([Term(JOINT, Window(), weighed, items=frozenset({0}))], LAYERS)
    with pytest.raises(IPAdapterError, match="which row belongs to which"):
        injection.plan(Call((COND, COND), 0.5), 7, torch.device("cpu"), torch.float32)


# --- Generations


def images(*photos: str, weights: tuple[float, ...] = ()) -> list[Any]:
    if not weights:
        return [base64_photo(name) for name in photos]
    return [{"data": base64_photo(name), "weight": w} for name, w in zip(photos, weights, strict=True)]


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_mixtures_differ_and_come_back_from_the_infotext(host: Host, kind: str) -> None:
    drawn = {}
    for name in NAMES:
        result = host.txt2img(**request(unit(kind, photos=PHOTOS[:2], mixture=name)))
        drawn[name] = result.image
        assert (f"mixture: {name}" in result.infotexts[0]) is (name != "concat")
    for a, b in itertools.combinations(NAMES, 2):
        # The demo's resampler normalises what it is given: a mean and a sum are the same to it, but for rounding.
        scaled = kind == "plus" and (a, b) == ("average", "add")
        apart = np.abs(pixels(drawn[a]) - pixels(drawn[b])).max()
        assert apart <= 1 if scaled else apart > 0, (a, b)
    assert not host.errors


def test_a_mixture_of_one_picture_draws_that_picture(host: Host) -> None:
    alone = host.txt2img(**request(unit("plus"))).image
    for name in ("average", "add", "max", "min", "subtract"):
        assert np.abs(pixels(host.txt2img(**request(unit("plus", mixture=name))).image) - pixels(alone)).max() <= 1
    twice = unit("plus", photos=("astronaut", "astronaut"), mixture="average")
    assert np.abs(pixels(host.txt2img(**request(twice)).image) - pixels(alone)).max() <= 1


def test_a_mixture_has_the_tokens_of_one_picture_projected_from_the_mix(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the image projection, against float64."""
    gathering: Any = importlib.import_module("sd_image_prompt.gathering")
    given: list[list[torch.Tensor]] = []
    original = gathering.image_kv

    def watched(run: Any, model: Any, features: Any) -> Any:
        given.append(list(features))
        return original(run, model, features)

    monkeypatch.setattr(gathering, "image_kv", watched)
    live: Any = importlib.import_module("sd_image_prompt").live_session
    live._preparer.clear()
    plain = {**unit("plus"), "images": images(*PHOTOS)}
    host.txt2img(**request(plain))
    (features,) = [each for each in given.pop() if each.shape[0] == 3]
    weights = (1.0, 0.5, -0.25)
    mix = {**unit("plus", mixture="normalised average"), "images": images(*PHOTOS, weights=weights)}
    host.txt2img(**request(mix))
    (found,) = given.pop()
    wanted = expected("normalised average", features.double().numpy(), list(weights))
    np.testing.assert_allclose(found[0].double().numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("formulation", ["joint", "decoupled"])
@pytest.mark.parametrize("options", [{}, {"split_calls": True}, {"row_order": "a1111"}])
def test_one_picture_for_each_batch_item(host_of: Any, formulation: str, options: dict[str, Any]) -> None:
    """Each is what it is when its picture is the unit's only one."""
    host = host_of("sd15", **options)
    fields: dict[str, Any] = {"prompt": "a red house AND a car", "negative_prompt": "x " * 90, "batch_size": 3}
    each = unit("base", photos=PHOTOS, formulation=formulation, pictures="one per batch item")
    drawn = host.txt2img(**request(each, **fields)).images
    for n, name in enumerate(PHOTOS):
        alone = host.txt2img(**request(unit("base", photos=(name,), formulation=formulation), **fields)).images
        assert np.abs(pixels(drawn[n]) - pixels(alone[n])).max() <= 2, name
        assert difference(drawn[n], alone[(n + 1) % 3]) > 1
    assert not host.errors


def test_fewer_pictures_than_batch_items_take_turns(host: Host) -> None:
    each = unit("base", photos=PHOTOS[:2], pictures="one per batch item")
    drawn = host.txt2img(**request(each, batch_size=3, enable_hr=True, hr_scale=1.25)).images
    first = host.txt2img(**request(unit("base"), batch_size=3, enable_hr=True, hr_scale=1.25)).images
    assert [bool(np.abs(pixels(a) - pixels(b)).max() <= 2) for a, b in zip(drawn, first, strict=True)] == [
        *(True, False, True)
    ]


def test_more_pictures_than_batch_items_are_refused(host: Host) -> None:
    with pytest.raises(ValueError, match="3 pictures, one per batch item, and the batch size is 2"):
        host.txt2img(**request(unit(photos=PHOTOS, pictures="one per batch item"), batch_size=2))


def test_one_picture_for_each_generation(host: Host) -> None:
    each = unit("base", photos=PHOTOS[:2], pictures="one per generation")
    drawn = host.txt2img(**request(each, n_iter=3)).images
    for n, name in enumerate(("astronaut", "chelsea", "astronaut")):
        alone = host.txt2img(**request(unit("base", photos=(name,)), n_iter=3)).images
        assert np.abs(pixels(drawn[n]) - pixels(alone[n])).max() <= 1
        assert difference(drawn[n], alone[n]) < 0.1
    off = {**each, "images": images(*PHOTOS[:2], weights=(1.0, 0.0))}
    plain = host.txt2img(**request(n_iter=2)).images
    assert [same(a, b) for a, b in zip(host.txt2img(**request(off, n_iter=2)).images, plain, strict=True)] == [
        *(False, True)
    ]
    assert not host.errors


def test_a_window_that_no_step_lies_in_is_said_in_its_generation_too(host: Host) -> None:
    each = unit("base", photos=PHOTOS[:2], pictures="one per generation", start=0.3, stop=0.4)
    with pytest.raises(ValueError, match="would never act"):
        host.txt2img(**request(each, n_iter=2))


# --- The negative side


def uncond_features(host: Host, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any]) -> list[torch.Tensor]:
    """What reaches the image projection when nothing is known."""
    gathering: Any = importlib.import_module("sd_image_prompt.gathering")
    given: list[torch.Tensor] = []
    original = gathering.image_kv

    def watched(run: Any, model: Any, features: Any) -> Any:
        given.extend(features)
        return original(run, model, features)

    live: Any = importlib.import_module("sd_image_prompt").live_session
    live._preparer.clear()
    with monkeypatch.context() as patched:
        patched.setattr(gathering, "image_kv", watched)
        host.txt2img(**request(wanted))
    return given


def test_a_negative_picture_stands_in_place_of_the_uncond_source(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    chelsea = uncond_features(host, monkeypatch, unit("plus", photos=("chelsea",)))[0]
    with_negative = unit("plus", negative_images=[base64_photo("chelsea")])
    found = uncond_features(host, monkeypatch, with_negative)
    assert len(found) == 2 and torch.equal(found[1], chelsea)
    result = host.txt2img(**request(with_negative))
    assert "uncond: auto (negative pictures)" in result.infotexts[0] and "negative picture 1: " in result.infotexts[0]
    assert difference(result.image, host.txt2img(**request(unit("plus"))).image) > 1


def test_the_negative_side_has_as_many_tokens(host: Host) -> None:
    """In one softmax it must weigh as much; so one negative picture stands against each of three."""
    live: Any = importlib.import_module("sd_image_prompt").live_session
    for negatives, wanted in (((), 3), (("chelsea",), 3), (("chelsea", "coffee"), 3), (PHOTOS, 3)):
        one = Unit.from_json(unit("plus", photos=PHOTOS, negative_images=images(*negatives)))
        (prepared,) = live._preparer.prepare([_as_loaded(one)], live._host.unet_info(_job(host)))
        assert [len(part.unconds) for part in prepared.parts] == [wanted]


def _as_loaded(one: Unit) -> Any:
    return importlib.import_module("sd_image_prompt.units").Unit.from_json(one.to_json())


def _job(host: Host) -> Any:
    return host.Txt2Img()


@pytest.mark.parametrize("noise", ["gaussian", "shuffle", "fade"])
def test_noise_makes_the_picture_its_own_negative(host: Host, noise: str) -> None:
    plain = host.txt2img(**request(unit("plus"))).image
    drawn = [host.txt2img(**request(unit("plus", noise=noise, noise_strength=s))).image for s in (0.3, 0.3, 1.0)]
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2]) and not same(drawn[0], plain)
    weak = host.txt2img(**request(unit("plus", noise=noise, noise_strength=0.0))).image
    itself = host.txt2img(**request(unit("plus", negative_images=[base64_photo()]))).image
    assert same(weak, itself)


def test_the_strength_of_the_negative_side(host: Host) -> None:
    none = host.txt2img(**request(unit("plus", uncond="none"))).image
    off = host.txt2img(**request(unit("plus", uncond_weight=0.0))).image
    half = host.txt2img(**request(unit("plus", uncond_weight=0.5))).image
    plain = host.txt2img(**request(unit("plus"))).image
    assert same(none, off)
    assert not same(half, plain) and not same(half, off)


def test_the_weight_of_the_negative_side_is_its_factor() -> None:
    prompts = {COND: (picture(4, 1),), UNCOND: (picture(4, 2),)}
    found = weigh(prompts, DECOUPLED, 0.8, {COND: (1.0,), UNCOND: (0.5,)}, WIDEST, UNCOND)
    there = found.on(torch.device("cpu"), torch.float32)
    assert torch.allclose(there[UNCOND][0].values[0], 0.4 * prompts[UNCOND][0].values[0])
    assert torch.allclose(there[COND][0].values[0], 0.8 * prompts[COND][0].values[0])


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"mixture": "blend"}, 'The field "mixture" is "blend"'),
        ({"pictures": "all"}, 'The field "pictures" is "all"'),
        ({"pictures": "one per batch item", "mixture": "add"}, 'a mixture of pictures "together"'),
        ({"noise": "dust"}, 'The field "noise" is "dust"'),
        ({"noise_strength": 1.5}, 'The field "noise_strength" is 1.5'),
        ({"uncond_weight": 6}, 'The field "uncond_weight" is 6'),
        ({"balance": 1}, 'The field "balance" is 1'),
        ({"negative_images": ["QQ=="], "uncond": "none"}, 'while "negative_images" is given'),
        ({"noise": "fade", "uncond": "black picture"}, 'while "noise" is given'),
        ({"negative_images": 3}, 'The field "negative_images" is 3'),
        ({"negative_images": [""]}, 'The field "negative_images", picture 1 of 1'),
        ({"noise": "fade", "images": [{"saved": "a"}]}, 'the saved reference "a", which is encoded already'),
        (
            {"pictures": "one per generation", "images": ["QQ=="], "negative_images": ["QQ==", "QQ=="]},
            "has 2 pictures and",
        ),
    ],
)
def test_bad_fields_have_a_sentence(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(IPAdapterError) as caught:
        Unit.from_json(fields)
    assert part in str(caught.value)


def test_a_picture_is_one_of_three_kinds() -> None:
    with pytest.raises(IPAdapterError, match='none of "data", "sha256" and "saved"'):
        ImageRef()
    with pytest.raises(IPAdapterError, match="two of"):
        ImageRef(data="QQ==", saved="a")
    with pytest.raises(IPAdapterError, match="encoded already"):
        ImageRef(saved="a", crop=(0, 0, 2))
    assert ImageRef(saved=" a b ").saved == "a b"
    for name in ("a/b", "a\\b", "", " ", "a:b", "x" * 65, "a\n", "../a"):
        with pytest.raises(IPAdapterError):
            ImageRef(saved=name)

"""Layer weights: the tables against formulas written out here, and what layers then do against float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from lib_ipadapter import layer_weights
from lib_ipadapter.curves import parse
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.formulations import DECOUPLED, FORMULATIONS, JOINT, Formulation
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.layer_weights import SD, TYPES, XL, effective, groups, on_unet, read, write
from lib_ipadapter.layers import SD15, SDXL, LayerKey
from lib_ipadapter.plan import ImageKV, LayeredPlan, Plan, scaled_dot_product
from lib_ipadapter.progress import Window
from lib_ipadapter.reweighing import Unweighed
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.units import Unit
from lib_ipadapter.weighing import Prompts, arrange, weigh
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded_hosts import request, unit
from tests.layer_texts import layer_factors

KEYS: Mapping[int, Sequence[LayerKey]] = {SD: SD15, XL: SDXL}
W, C = 0.8, 0.3
CPU = torch.device("cpu")

FINE = (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15)
"""Groups of SD1.5's two finer levels."""


def expected(name: str, count: int, w: float, c: float) -> list[float]:
    """Of every group, from the common formulas; nothing of the tables under test."""
    t = range(count)
    if name in ("all", "ease in", "ease out", "ease in-out", "reverse in-out"):
        half = count / 2
        ramps = {
            "all": [1.0 for _ in t],
            "ease in": [0.05 + 0.95 * (1 - n / count) for n in t],
            "ease out": [0.05 + 0.95 * n / count for n in t],
            "ease in-out": [0.05 + 0.95 * (1 - abs(n - half) / half) for n in t],
            "reverse in-out": [0.05 + 0.95 * abs(n - half) / half for n in t],
        }
        return [w * each for each in ramps[name]]
    middle = 6 if count == 16 else 4
    if name in ("weak input", "weak middle", "weak output", "strong middle"):
        weak = {"weak input": "i", "weak middle": "m", "weak output": "o", "strong middle": "io"}[name]
        return [w * (0.2 if ("i" if n < middle else "m" if n == middle else "o") in weak else 1.0) for n in t]
    xl: dict[str, dict[int, float]] = {
        "style": {6: w},
        "composition": {3: w},
        "strong style": {n: w for n in range(11) if n != 3},
        "strong composition": {n: w for n in range(11) if n != 6},
        "style and composition": {3: c, 6: w},
        "strong style and composition": {**dict.fromkeys(range(11), w), 3: c},
        "style precise": {3: c, 6: w},
        "composition precise": {**dict.fromkeys(range(11), 0.1 * c), 3: w, 6: c},
        "style narrow": {6: w},
        "composition wide": {3: w},
        "style image and composition image": {3: c, 6: w},
    }
    sd: dict[str, dict[int, float]] = {
        "style": dict.fromkeys(FINE, w),
        "composition": {4: 0.25 * w, 5: w},
        "strong style": {n: w for n in range(16) if n not in (4, 5)},
        "strong composition": dict.fromkeys(range(4, 9), w),
        "style and composition": {**dict.fromkeys(FINE, w), 4: 0.25 * c, 5: c},
        "strong style and composition": {**dict.fromkeys(range(16), w), 4: c, 5: c},
        "style precise": {**dict.fromkeys(FINE, w), 4: 0.25 * c, 5: c},
        "composition precise": {**dict.fromkeys(FINE, c), 4: 0.25 * w, 5: w, 6: 0.1 * c, 7: 0.1 * c, 8: 0.1 * c},
        "style narrow": {7: w, 8: w, 9: w},
        "composition wide": {4: w, 5: w, 6: w},
        "style image and composition image": {**dict.fromkeys(FINE, w), 4: 0.25 * c, 5: c},
    }
    return [(sd if count == 16 else xl)[name].get(n, 0.0) for n in t]


SWAPPED = {
    ("style precise", SD): {4, 5},
    ("style precise", XL): {3},
    ("composition precise", SD): set(range(16)) - {4, 5},
    ("composition precise", XL): set(range(11)) - {3},
}
"""Groups in which the picture acts on the uncond rows."""
SECOND = {SD: {4, 5}, XL: {3}}
"""Groups of the composition image."""


@pytest.mark.parametrize("count", [SD, XL])
@pytest.mark.parametrize("name", TYPES)
def test_every_table(name: str, count: int) -> None:
    shown = effective(name, W, C, count)
    assert [each["group"] for each in shown] == list(range(count))
    assert [each["weight"] for each in shown] == pytest.approx(expected(name, count, W, C))
    assert {n for n in range(count) if shown[n].get("acts on") == "uncond"} == SWAPPED.get((name, count), set())
    assert TYPES[name].help and "\n" not in TYPES[name].help


def test_groups_are_those_of_the_forward_pass() -> None:
    sd = groups(SD15)
    # The file has the output blocks before the middle; the UNet runs the middle before them.
    assert sd == [[0], [1], [2], [3], [4], [5], [15], *([n] for n in range(6, 15))]
    xl = groups(SDXL)
    assert [len(each) for each in xl] == [2, 2, 10, 10, 10, 10, 10, 10, 2, 2, 2]
    assert xl[3] == list(range(14, 24)) and xl[4] == list(range(60, 70)) and xl[6] == list(range(34, 44))


# --- What layers do ---------------------------------------------------------------------------------------------------

HEADS, QUERIES, TEXT, WIDTH, WIDEST = 2, 5, 7, 8, 16


def picture(seed: int, layers: int) -> ImageKV:
    generator = torch.Generator().manual_seed(seed)
    return ImageKV.from_pairs([torch.randn(1, 4, WIDTH, generator=generator) for _ in range(2 * layers)])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One row in float64, head by head."""
    made = []
    for head in range(HEADS):
        of = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        logits = q[:, of] @ k[:, of].T / math.sqrt(WIDTH // HEADS)
        made.append(torch.softmax(logits, dim=1) @ v[:, of])
    return torch.cat(made, dim=1)


def weighed64(name: str, k: torch.Tensor, v: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each formulation's formula."""
    penalised = weight * WIDTH / WIDEST
    mean = v.mean(0, keepdim=True)
    return {
        "joint": lambda: (k * penalised, v - mean + penalised * mean),
        "decoupled": lambda: (k, v * weight),
        "K+V": lambda: (k * weight, v * weight),
        "K+V with penalty": lambda: (k * penalised, v * penalised),
        "K+mean(V) with penalty": lambda: (k * penalised, v - mean + penalised * mean),
    }[name]()


def wanted64(
    formulation: str,
    rows: Sequence[int],
    layer: int,
    text: Sequence[torch.Tensor],
    pictures: Mapping[int, Sequence[tuple[ImageKV, float]]],
) -> torch.Tensor:
    """A layer's output, row by row, in float64; ``pictures``: of each role, with the weight that each has here."""
    made = []
    for row, role in enumerate(rows):
        q, k, v = (each[row].double() for each in text)
        pairs = [
            weighed64(formulation, image.keys[layer][0].double(), image.values[layer][0].double(), weight)
            for image, weight in pictures.get(role, ())
        ]
        if formulation == "joint":
            made.append(attention(q, torch.cat([k, *(p[0] for p in pairs)]), torch.cat([v, *(p[1] for p in pairs)])))
            continue
        out = attention(q, k, v)
        if pairs:
            keys, values = zip(*pairs, strict=True)
            out = out + attention(q, torch.cat(keys), torch.cat(values))
        made.append(out)
    return torch.stack(made)


ROWS = [(UNCOND, COND), (COND, UNCOND), (COND,), (UNCOND, UNCOND, COND, COND)]


@pytest.mark.parametrize("count", [SD, XL])
@pytest.mark.parametrize("formulation", FORMULATIONS.values(), ids=lambda each: each.name)
@pytest.mark.parametrize("name", TYPES)
def test_every_type_against_float64(name: str, formulation: Formulation, count: int) -> None:
    keys = KEYS[count]
    first, second, none = (picture(seed, len(keys)) for seed in range(3))
    prompts: Prompts = {COND: (first, second), UNCOND: (none, none)}
    by_layer = on_unet(name, keys, W, C, 2)
    weighed = weigh(prompts, formulation, W, (), WIDEST, UNCOND, by_layer)
    injection = Injection([Term(formulation, Window(), weighed)], len(keys))
    weights = expected(name, count, W, C)
    for rows in ROWS if count == SD else ROWS[:1]:
        plan = injection.plan(Call(rows, 0.5), TEXT, CPU, torch.float32)
        for group, layers in enumerate(groups(keys)):
            weight, layer = weights[group], layers[-1]
            here = plan.at(layer)
            conds, unconds = [(first, weight), (second, weight)], [(none, weight), (none, weight)]
            pictures = {COND: conds, UNCOND: unconds}
            if group in SWAPPED.get((name, count), ()):
                pictures = {UNCOND: conds}
            if TYPES[name].pictures:
                n = 1 if group in SECOND[count] else 0
                pictures = {COND: conds[n : n + 1], UNCOND: unconds[:1]}
            if weight == 0:
                assert here.idle
                continue
            text = rows_of_text(layer, len(rows))
            found = here.attend(layer, *text, HEADS, scaled_dot_product, None)
            torch.testing.assert_close(
                found.double(), wanted64(formulation.name, rows, layer, text, pictures), rtol=1e-5, atol=1e-5
            )


def rows_of_text(layer: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(50 + layer)
    q, k, v = (torch.randn(rows, n, WIDTH, generator=generator) for n in (QUERIES, TEXT, TEXT))
    return q, k, v


@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
@pytest.mark.parametrize("name", ["style", "composition precise", "style image and composition image", "0:1, 7:-0.5"])
def test_a_curve_changes_all_layers_alike(name: str, formulation: Formulation) -> None:
    prompts: Prompts = {COND: (picture(0, 16), picture(1, 16)), UNCOND: (picture(2, 16),) * 2}
    by_layer = on_unet(name, SD15, W, C, 2)
    curve = parse("0.4@0, 1.2@1")
    unweighed = Unweighed(arrange(prompts, (), UNCOND), formulation, W, WIDEST, by_layer)
    varying = Injection([Term(formulation, Window(), unweighed, curve)], 16)
    for progress in (0.0, 0.5, 1.0):
        at = curve.at(progress)
        constant = weigh(prompts, formulation, W * at, (), WIDEST, UNCOND, by_layer)
        plans = [
            each.plan(Call((UNCOND, COND), progress), TEXT, CPU, torch.float32)
            for each in (varying, Injection([Term(formulation, Window(), constant)], 16))
        ]
        for layer in range(16):
            text = rows_of_text(layer, 2)
            assert [plan.at(layer).idle for plan in plans] in ([True] * 2, [False] * 2)
            if not plans[0].at(layer).idle:
                a, b = (plan.at(layer).attend(layer, *text, HEADS, scaled_dot_product, None) for plan in plans)
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_units_of_different_layers_act_together() -> None:
    """One everywhere, one in style layers, one in composition layers; each layer has those that it should."""
    pictures = [picture(seed, 16) for seed in range(3)]
    terms = [
        Term(
            DECOUPLED,
            Window(),
            weigh({COND: (each,)}, DECOUPLED, W, (), WIDEST, UNCOND, on_unet(name, SD15, W, None, 1)),
        )
        for each, name in zip(pictures, ("all", "style", "composition"), strict=True)
    ]
    plan = Injection(terms, 16).plan(Call((COND,), 0.5), TEXT, CPU, torch.float32)
    for layer, names in ((0, (0, 1)), (5, (0, 2)), (8, (0, 1)), (6, (0,)), (15, (0,))):
        text = rows_of_text(layer, 1)
        found = plan.at(layer).attend(layer, *text, HEADS, scaled_dot_product, None)
        out = wanted64("decoupled", (COND,), layer, text, {})
        for n in names:
            out = out + wanted64("decoupled", (COND,), layer, text, {COND: [(pictures[n], W)]})
            out = out - wanted64("decoupled", (COND,), layer, text, {})
        torch.testing.assert_close(found.double(), out, rtol=1e-5, atol=1e-5)


def test_all_layers_alike_are_one_plan() -> None:
    """Nothing is looked up by layer where nothing differs by layer."""
    weighed = weigh({COND: (picture(0, 16),)}, JOINT, W, (), WIDEST, UNCOND, on_unet("all", SD15, W, None, 1))
    plan = Injection([Term(JOINT, Window(), weighed)], 16).plan(Call((COND,), 0.5), TEXT, CPU, torch.float32)
    assert isinstance(plan, Plan) and plan.at(3) is plan
    some = weigh({COND: (picture(0, 16),)}, JOINT, W, (), WIDEST, UNCOND, on_unet("style", SD15, W, None, 1))
    plan = Injection([Term(JOINT, Window(), some)], 16).plan(Call((COND,), 0.5), TEXT, CPU, torch.float32)
    assert isinstance(plan, LayeredPlan) and plan.at(0) is plan.at(1) and plan.at(5).idle


# --- Text -------------------------------------------------------------------------------------------------------------


@given(layer_factors)
def test_custom_text_round_trip(factors: dict[int, float]) -> None:
    text = write(factors)
    assert read(text) == text
    assert layer_weights._parse(text) == factors
    assert Unit(layers=text).layers == text


def test_equal_texts() -> None:
    assert read(" 3:0.5 ;\n0 : 1.0,") == "0:1, 3:0.5"
    assert read(" Ease  IN ") == "ease in"
    assert read("") == "all"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:1, x", 'at character 6 has "x", which is neither a type nor a group with its factor'),
        ("0:1, 16:1", 'at character 6 has "16:1", and the last layer group is 15 on SD1.x, 10 on SDXL'),
        ("0:1,0:2", "group 0 has a factor already"),
        ("0:6", "a factor lies between -5 and 5"),
        ("0:0", "by which no layer acts"),
        ("0:nan", "neither a type"),
        ("0:1e400", "a factor lies between -5 and 5"),
        ("styl", "allowed are all, ease in"),
    ],
)
def test_text_that_is_neither(text: str, message: str) -> None:
    with pytest.raises(IPAdapterError) as error:
        Unit(layers=text)
    assert message in str(error.value)


def test_what_does_not_fit_the_checkpoint_or_the_pictures() -> None:
    with pytest.raises(IPAdapterError, match="names layer group 12, and the loaded checkpoint has groups 0 to 10"):
        on_unet("12:1", SDXL, 1.0, None, 1)
    with pytest.raises(IPAdapterError, match="needs 2 pictures that act, and the unit has 3"):
        on_unet("style image and composition image", SDXL, 1.0, None, 3)
    assert on_unet("style and composition", SDXL, 1.0, 0.0, 1).factors[14:24] == (0.0,) * 10  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixture": "average"}, '"mixture" is "average"; allowed is a "mixture" of "concat"'),
        (
            {"pictures": "one per batch item"},
            '"pictures" is "one per batch item"; allowed is a "pictures" of "together"',
        ),
    ],
)
def test_a_type_over_two_pictures_wants_them_at_once(fields: dict[str, str], message: str) -> None:
    with pytest.raises(IPAdapterError) as error:
        Unit(layers="style image and composition image", **fields)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_the_units_fields_go_round() -> None:
    unit = Unit(layers="style precise", composition_weight=0.0, formulation="K+mean(V) with penalty")
    assert Unit.from_json(unit.to_json()) == unit
    assert replace(unit, composition_weight="0.5").composition_weight == 0.5  # type: ignore[arg-type]
    with pytest.raises(IPAdapterError, match="composition_weight"):
        Unit(composition_weight="much")  # type: ignore[arg-type]


# --- In a host --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_generations_with_layer_weights(host_of: Any, shape: str) -> None:
    """Each type draws another picture; equal weights by custom text draw the same one; the text tells them."""
    host: Host = host_of(shape)

    def draw(**fields: Any) -> Any:
        return host.txt2img(**request(unit("plus", shape, weight=0.9, **fields)))

    everything = draw()
    count = SD if shape == "sd15" else XL
    by_hand = draw(layers=", ".join(f"{n}:1" for n in range(count)))
    assert by_hand.images[0].tobytes() == everything.images[0].tobytes()
    drawn = {everything.images[0].tobytes()}
    for name in ("style", "composition", "style precise", "ease out"):
        result = draw(layers=name)
        assert f"layers: {name}" in result.infotexts[0]
        drawn.add(result.images[0].tobytes())
    assert len(drawn) == 5
    assert draw(layers="style and composition", composition_weight=0).images[0].tobytes() == (
        draw(layers="style").images[0].tobytes()
    )
    with pytest.raises(Exception, match="needs 2 pictures that act, and the unit has 1"):
        draw(layers="style image and composition image")


def test_style_of_one_picture_and_composition_of_another(host: Host) -> None:
    pair = unit("plus", photos=("astronaut", "chelsea"), layers="style image and composition image")
    as_two = (unit("plus", layers="style"), unit("plus", photos=("chelsea",), layers="composition"))
    together = host.txt2img(**request(pair)).images[0]
    apart = host.txt2img(**request(*as_two)).images[0]
    difference = np.abs(np.asarray(together, dtype=float) - np.asarray(apart, dtype=float))
    # encoded in one batch or in two: the last digits differ
    assert difference.max() <= 1
    turned = unit("plus", photos=("chelsea", "astronaut"), layers="style image and composition image")
    assert host.txt2img(**request(turned)).images[0].tobytes() != together.tobytes()


def test_check_tells_the_weight_of_every_group(host: Host) -> None:
    asked = {"unit": unit("plus", layers="style and composition", weight=0.8, composition_weight=0.4)}
    answer = Client(host.app).post("/ip-adapter/check", json=asked).json()
    assert [each["weight"] for each in answer["layers"]] == pytest.approx(
        expected("style and composition", SD, 0.8, 0.4)
    )

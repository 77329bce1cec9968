"""Both formulations on rows that differ in text length, image tokens and role, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_ipadapter import plan as plan_module
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.formulations import DECOUPLED, JOINT, Formulation, resolve_formulation
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.plan import ImageKV, Plan, scaled_dot_product
from lib_ipadapter.progress import Window
from lib_ipadapter.rows import COND, OTHER, UNCOND, Call, roles_of_rows
from lib_ipadapter.weighing import Prompts, weigh
from tests.bare_model import softmax_attention

WIDTH, HEADS, QUERIES, LAYERS = 32, 4, 5, 2
WIDEST = 64


def picture(tokens: int, seed: int) -> ImageKV:
    generator = torch.Generator().manual_seed(seed)
    return ImageKV.from_pairs([torch.randn(1, tokens, WIDTH, generator=generator) for _ in range(2 * LAYERS)])


@dataclass(frozen=True, kw_only=True)
class RawTerm(Term):
    """A term that still knows what it was made of."""

    prompts: Prompts = field(kw_only=True)
    weight: float = field(kw_only=True)


def term(
    formulation: Formulation,
    weight: float = 0.7,
    conds: Sequence[int] = (4,),
    unconds: Sequence[int] = (4,),
    seed: int = 0,
) -> RawTerm:
    prompts = {
        COND: tuple(picture(tokens, seed + n) for n, tokens in enumerate(conds)),
        UNCOND: tuple(picture(tokens, seed + 50 + n) for n, tokens in enumerate(unconds)),
    }
    weighed = weigh(prompts, formulation, weight, (), WIDEST, UNCOND)
    return RawTerm(formulation, Window(), weighed, prompts=prompts, weight=weight)


def text(rows: int, tokens: int, seed: int = 99) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, n, WIDTH, generator=generator) for n in (QUERIES, tokens, tokens))
    return q, k, v


def expected(
    terms: list[RawTerm],
    roles: tuple[int, ...],
    q: torch.Tensor,
    ks: list[torch.Tensor],
    vs: list[torch.Tensor],
    layer: int,
) -> np.ndarray:
    """Row by row in float64; ``ks`` and ``vs`` hold each row's real text tokens."""
    rows = []
    for row, role in enumerate(roles):
        query = q[row].double().numpy()
        keys, values = [ks[row].double().numpy()], [vs[row].double().numpy()]
        added = np.zeros((QUERIES, WIDTH))
        for each in terms:
            images, weight = each.prompts.get(role, ()), each.weight
            if each.formulation is JOINT:
                for image in images:
                    scale = weight * WIDTH / WIDEST
                    v = image.values[layer][0].double().numpy()
                    mean = v.mean(axis=0, keepdims=True)
                    keys.append(image.keys[layer][0].double().numpy() * scale)
                    values.append(v - mean + mean * scale)
            elif images:
                k = np.concatenate([image.keys[layer][0].double().numpy() for image in images])
                v = np.concatenate([image.values[layer][0].double().numpy() for image in images])
                added += weight * softmax_attention(query, k, v, HEADS)
        rows.append(softmax_attention(query, np.concatenate(keys), np.concatenate(values), HEADS) + added)
    return np.stack(rows)


def plan_for(injection: Injection, call: Call, tokens: int) -> Plan:
    return injection.plan(call, tokens, torch.device("cpu"), torch.float32)


def assert_close(out: torch.Tensor, wanted: np.ndarray) -> None:
    assert np.abs(out.double().numpy() - wanted).max() / np.abs(wanted).max() < 1e-5


COMBINATIONS = {
    "joint": [(JOINT, 0.7, (4,), (4,))],
    "joint, three pictures": [(JOINT, 1.3, (4, 4, 4), (4, 4, 4))],
    "joint, no uncond": [(JOINT, 1.0, (4,), ())],
    "joint, uneven": [(JOINT, -0.5, (4,), (9,))],
    "decoupled": [(DECOUPLED, 0.7, (4,), (4,))],
    "decoupled, three pictures": [(DECOUPLED, -0.4, (4, 4, 4), (4, 4, 4))],
    "decoupled, no uncond": [(DECOUPLED, 1.0, (4,), ())],
    "both": [(JOINT, 0.6, (4, 16), (4, 16)), (DECOUPLED, 0.9, (4,), ()), (DECOUPLED, 0.3, (16,), (3,))],
}
ROLES = [(1, 0), (0,), (1,), (0, 1), (1, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 1, 0, 0, 0, OTHER)]


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("roles", ROLES)
def test_equal_prompts(combination: str, roles: tuple[int, ...]) -> None:
    terms = [term(*spec, seed=100 * n) for n, spec in enumerate(COMBINATIONS[combination])]
    injection = Injection(terms, LAYERS)
    q, k, v = text(len(roles), 7)
    for layer in range(LAYERS):
        out = plan_for(injection, Call(roles, 0.5), 7).attend(layer, q, k, v, HEADS, scaled_dot_product, None)
        assert_close(out, expected(terms, roles, q, list(k), list(v), layer))


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize(("cond", "uncond", "seen"), [(14, 7, 14), (7, 14, 14), (14, 21, 42), (7, 7, 28)])
def test_prompts_that_the_host_repeats(
    combination: str, roles: tuple[int, ...], cond: int, uncond: int, seen: int
) -> None:
    terms = [term(*spec, seed=100 * n) for n, spec in enumerate(COMBINATIONS[combination])]
    injection = Injection(terms, LAYERS)
    q = text(len(roles), 1)[0]
    real = {COND: cond, UNCOND: uncond, OTHER: seen}
    rows = [text(1, real[role], seed=row)[1:] for row, role in enumerate(roles)]
    ks, vs = [k[0] for k, _ in rows], [v[0] for _, v in rows]
    k = torch.stack([t.repeat(seen // t.shape[0], 1) for t in ks])
    v = torch.stack([t.repeat(seen // t.shape[0], 1) for t in vs])
    call = Call(roles, 0.5, {COND: cond, UNCOND: uncond})
    for layer in range(LAYERS):
        out = plan_for(injection, call, seen).attend(layer, q, k, v, HEADS, scaled_dot_product, None)
        assert_close(out, expected(terms, roles, q, ks, vs, layer))


def test_repeats_would_matter_in_one_softmax() -> None:
    """Without knowing the real lengths the picture's share falls: the case above isn't true by accident."""
    terms = [term(JOINT)]
    q, k, v = text(1, 7)
    k, v = k.repeat(1, 2, 1), v.repeat(1, 2, 1)
    known = plan_for(Injection(terms, LAYERS), Call((0,), 0.5, {COND: 7}), 14)
    unknown = plan_for(Injection(terms, LAYERS), Call((0,), 0.5), 14)
    a, b = (p.attend(0, q, k, v, HEADS, scaled_dot_product, None) for p in (known, unknown))
    assert float((a - b).abs().max()) > 1e-2


def test_a_length_that_is_no_whole_number_of_repeats_is_refused() -> None:
    with pytest.raises(IPAdapterError, match="100 text tokens where the prompt has 77"):
        plan_for(Injection([term(JOINT)], LAYERS), Call((0,), 0.5, {COND: 77}), 100)


def test_an_opaque_replacement_gets_the_extended_tokens_or_the_unit_is_refused() -> None:
    terms = [term(JOINT)]
    q, k, v = text(2, 7)

    def replaced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        return scaled_dot_product(q, k, v, heads) * 2

    plan = plan_for(Injection(terms, LAYERS), Call((1, 0), 0.5), 7)
    out = plan.attend(0, q, k, v, HEADS, scaled_dot_product, replaced)
    assert_close(out, 2 * expected(terms, (1, 0), q, list(k), list(v), 0))
    uneven = plan_for(Injection([term(JOINT, unconds=(9,))], LAYERS), Call((1, 0), 0.5), 7)
    with pytest.raises(IPAdapterError, match="decoupled"):
        uneven.attend(0, q, k, v, HEADS, scaled_dot_product, replaced)


def test_nothing_active_is_idle() -> None:
    early = term(JOINT)
    injection = Injection([Term(JOINT, Window(0.0, 0.5), early.weighed)], LAYERS)
    assert not plan_for(injection, Call((1, 0), 0.4), 7).idle
    assert plan_for(injection, Call((1, 0), 0.6), 7).idle
    assert plan_for(Injection([term(DECOUPLED, unconds=())], LAYERS), Call((1,), 0.4), 7).idle
    assert injection.acted == [True]
    assert injection.progress_seen() == (0.4, 0.6)


def test_the_same_kind_of_call_is_planned_once() -> None:
    injection = Injection([term(JOINT)], LAYERS)
    assert plan_for(injection, Call((1, 0), 0.1), 7) is plan_for(injection, Call((1, 0), 0.2), 7)
    for n in range(200):
        plan_for(injection, Call((0,) * (n + 1), 0.1), 7)
    assert len(injection._plans) <= 64


def test_one_uncond_of_several_pictures_is_kept_once() -> None:
    uncond = picture(4, 9)
    prompts = {COND: (picture(4, 1), picture(4, 2)), UNCOND: (uncond, uncond)}
    with torch.inference_mode():
        weighed = weigh(prompts, JOINT, 0.5, (), WIDEST, UNCOND)
    moved = weighed.on(torch.device("cpu"), torch.float64)
    assert moved[UNCOND][0] is moved[UNCOND][1]
    raw = picture(4, 2)
    k, v = JOINT.weigh(raw.keys[1], raw.values[1], 0.5, WIDTH / WIDEST)
    assert torch.equal(moved[COND][1].keys[1], k.double())
    assert torch.allclose(moved[COND][1].values[1], v.double(), rtol=0, atol=1e-6)
    assert len({image.keys[0].untyped_storage()._cdata for images in moved.values() for image in images}) == 1
    assert moved[COND][0].keys[0].untyped_storage().nbytes() == 2 * 3 * 4 * WIDTH * 8 * LAYERS
    assert weighed.nbytes == 2 * 3 * 4 * WIDTH * 4 * LAYERS


def test_what_is_where_it_is_needed_is_not_copied() -> None:
    weighed = weigh({COND: (picture(4, 1),)}, JOINT, 0.5, (), WIDEST, UNCOND)
    there = weighed.on(torch.device("cpu"), torch.float32)
    assert there[COND][0].keys[0].untyped_storage()._cdata == weighed.stacks[0].untyped_storage()._cdata


@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
def test_a_picture_has_its_share_of_the_weight_in_both_roles(formulation: Formulation) -> None:
    uncond = picture(4, 9)
    prompts = {COND: (picture(4, 1), picture(4, 2), picture(4, 3)), UNCOND: (uncond, uncond, uncond)}
    found = weigh(prompts, formulation, 0.8, (1.0, -0.5, 1.0), WIDEST, UNCOND).on(torch.device("cpu"), torch.float32)
    for role, images in prompts.items():
        for each, raw, share in zip(found[role], images, (1.0, -0.5, 1.0), strict=True):
            k, v = formulation.weigh(raw.keys[1], raw.values[1], 0.8 * share, WIDTH / WIDEST)
            torch.testing.assert_close(each.keys[1], k, rtol=0, atol=1e-6)
            torch.testing.assert_close(each.values[1], v, rtol=0, atol=1e-6)
    assert torch.equal(found[UNCOND][0].keys[0], found[UNCOND][2].keys[0])
    assert found[UNCOND][0] is not found[UNCOND][1]


def test_pictures_that_repeat_count_as_often_unless_all_are_the_same() -> None:
    """In an attention of its own, copies of the same tokens change nothing where nothing else is there."""
    a, b = picture(4, 1), picture(4, 2)
    q, k, v = text(1, 7)

    def out(*images: ImageKV) -> torch.Tensor:
        weighed = weigh({COND: images}, DECOUPLED, 1.0, (), WIDEST, UNCOND)
        plan = plan_for(Injection([Term(DECOUPLED, Window(), weighed)], LAYERS), Call((COND,), 0.5), 7)
        return plan.attend(0, q, k, v, HEADS, scaled_dot_product, None)

    plain = scaled_dot_product(q, k, v, HEADS)

    def alone(*images: ImageKV) -> torch.Tensor:
        keys, values = (torch.cat([getattr(image, kind)[0] for image in images], dim=1) for kind in ("keys", "values"))
        return plain + scaled_dot_product(q, keys, values, HEADS)

    torch.testing.assert_close(out(a, a), alone(a))
    torch.testing.assert_close(out(a, a, b), alone(a, a, b))
    assert not torch.allclose(out(a, a, b), out(a, b))


def test_weight_zero_is_no_term() -> None:
    for formulation in (JOINT, DECOUPLED):
        for weight, shares in ((0.0, [1.0]), (0.5, [0.0])):
            with pytest.raises(ValueError, match="weight 0"):
                weigh({COND: (picture(4, 1),)}, formulation, weight, shares, WIDEST, UNCOND)


def test_cond_and_uncond_of_different_adapters_are_refused() -> None:
    longer = picture(4, 1)
    longer = ImageKV(longer.keys * 2, longer.values * 2)
    with pytest.raises(IPAdapterError, match="K and V for 2 and 4 cross-attention layers"):
        weigh({COND: (longer,), UNCOND: (picture(4, 2),)}, JOINT, 1.0, (), WIDEST, UNCOND)


def test_another_number_of_layers_is_refused() -> None:
    with pytest.raises(IPAdapterError, match="2 cross-attention layers and the UNet has 70"):
        Injection([term(JOINT)], 70)


def test_auto_is_joint_for_plus_and_decoupled_for_the_rest() -> None:
    assert resolve_formulation("auto", "plus") is JOINT
    assert resolve_formulation("auto", "base") is DECOUPLED
    assert resolve_formulation("auto", "full-face") is DECOUPLED
    assert resolve_formulation("joint", "base") is JOINT
    with pytest.raises(IPAdapterError, match="'sum'"):
        resolve_formulation("sum", "base")


# Rows


@pytest.mark.parametrize(
    ("chunks", "images", "rows", "unet_rows", "wanted"),
    [
        ([1, 0], 1, 2, None, "uc"),
        ([1, 0], 2, 4, 4, "uucc"),
        ([1, 0, 0], 2, 6, 6, "uucccc"),
        ([0], 3, 3, 3, "ccc"),
        ([1, 0], 1, 6, 6, "ucucuc"),  # tiles
        ([1, 0], 1, 4, 2, "uccc"),  # regional prompts
        ([1, 0], 2, 8, 4, "uucccccc"),
        ([1, 0], 1, 5, 2, "ucccc"),
    ],
)
def test_roles(chunks: list[int], images: int, rows: int, unet_rows: int | None, wanted: str) -> None:
    assert "".join("cuo"[role] for role in roles_of_rows(chunks, images, rows, unet_rows)) == wanted


def test_a_padding_row_of_a_regional_prompt_gets_nothing() -> None:
    assert roles_of_rows([1, 0], 2, 9, 4) == (1, 1, 0, 0, 0, 0, 0, 0, OTHER)


@pytest.mark.parametrize(
    ("chunks", "images", "rows", "unet_rows"), [([1, 0], 1, 3, 3), ([1, 0], 3, 11, 6), ([], 1, 2, 2), ([1], 1, 3, 1)]
)
def test_rows_that_nothing_explains(chunks: list[int], images: int, rows: int, unet_rows: int) -> None:
    with pytest.raises(IPAdapterError, match=f"sees {rows} rows"):
        roles_of_rows(chunks, images, rows, unet_rows)


@given(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 5))
def test_plain_and_tiled_calls_repeat_the_chunks(chunks: list[int], images: int, tiles: int) -> None:
    rows = len(chunks) * images * tiles
    roles = roles_of_rows(chunks, images, rows)
    assert len(roles) == rows
    assert roles == tuple(itertools.chain.from_iterable([role] * images for role in chunks)) * tiles


@settings(deadline=None, max_examples=60)
@given(
    roles=st.lists(st.sampled_from([0, 1, OTHER]), min_size=1, max_size=7),
    lengths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    combination=st.sampled_from(sorted(COMBINATIONS)),
)
def test_any_arrangement_of_rows(roles: list[int], lengths: tuple[int, int], combination: str) -> None:
    terms = [term(*spec, seed=100 * n) for n, spec in enumerate(COMBINATIONS[combination])]
    seen = 6 * 3
    real = {COND: 3 * lengths[0], UNCOND: 3 * lengths[1], OTHER: seen}
    rows = [text(1, real[role], seed=row)[1:] for row, role in enumerate(roles)]
    ks, vs = [k[0] for k, _ in rows], [v[0] for _, v in rows]
    k, v = (torch.stack([t.repeat(seen // t.shape[0], 1) for t in ts]) for ts in (ks, vs))
    q = text(len(roles), 1)[0]
    call = Call(tuple(roles), 0.5, {COND: real[COND], UNCOND: real[UNCOND]})
    out = plan_for(Injection(terms, LAYERS), call, seen).attend(1, q, k, v, HEADS, scaled_dot_product, None)
    assert_close(out, expected(terms, tuple(roles), q, ks, vs, 1))


@pytest.mark.parametrize("combination", ["joint", "joint, three pictures", "joint, no uncond", "joint, uneven"])
@pytest.mark.parametrize("roles", ROLES)
def test_the_gate_gives_what_one_softmax_gives(combination: str, roles: tuple[int, ...]) -> None:
    terms = [term(*spec) for spec in COMBINATIONS[combination]]
    plan = plan_for(Injection(terms, LAYERS), Call(roles, 0.5), 7)
    q, k, v = text(len(roles), 7)
    out = plan.gate(1, q, k, scaled_dot_product(q, k, v, HEADS), HEADS)
    assert_close(out, expected(terms, roles, q, list(k), list(v), 1))


def meta_plan(combination: str, roles: tuple[int, ...]) -> Plan:
    injection = Injection([term(*spec, seed=100 * n) for n, spec in enumerate(COMBINATIONS[combination])], LAYERS)
    call = Call(roles, 0.5, {COND: 7, UNCOND: 14})
    return injection.plan(call, 14, torch.device("meta"), torch.float32)


def attend_on_meta(plan: Plan, rows: int) -> None:
    q, k, v = (torch.empty(rows, n, WIDTH, device="meta") for n in (QUERIES, 14, 14))
    for layer in range(LAYERS):
        out = plan.attend(layer, q, k, v, HEADS, scaled_dot_product, None)
        assert out.device.type == "meta"


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("roles", ROLES)
def test_no_layer_reads_or_moves_anything(combination: str, roles: tuple[int, ...], forbidden_calls: list[str]) -> None:
    plan = meta_plan(combination, roles)
    forbidden_calls.clear()
    attend_on_meta(plan, len(roles))
    assert forbidden_calls == []


@pytest.mark.parametrize("fault", ["to", "float"])
def test_a_layer_that_did_would_be_found_out(
    fault: str, forbidden_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = plan_module.scaled_dot_product

    def faulty(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        if fault == "to":
            k = torch.zeros(k.shape).to(q)  # K/V that live in host memory
        else:
            float(k.flatten()[0])
        return original(q, k, v, heads)

    plan = meta_plan("decoupled", (1, 0))
    forbidden_calls.clear()
    monkeypatch.setattr(plan_module, "scaled_dot_product", faulty)
    if fault == "to":
        attend_on_meta(plan, 2)
        assert forbidden_calls == ["to"] * LAYERS
    else:
        with pytest.raises((RuntimeError, NotImplementedError)):
            attend_on_meta(plan, 2)
        assert forbidden_calls == ["__float__"]

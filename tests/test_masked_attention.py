"""Masks in both formulations, through both kinds of host's seam, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.formulations import DECOUPLED, JOINT, Formulation
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.masks import Canvas, Mask, Region, Where, of_picture, of_template
from lib_ipadapter.plan import ImageKV, Plan, scaled_dot_product
from lib_ipadapter.progress import Window
from lib_ipadapter.rows import COND, OTHER, UNCOND, Call
from lib_ipadapter.weighing import Prompts, weigh
from tests.photos import photo

WIDTH, HEADS, LAYERS, WIDEST, TEXT = 32, 4, 2, 64, 7
LATENT = (5, 6)
QUERIES = (30, 9, 4, 1)
"""Of the depths of that latent: 5 x 6, 3 x 3, 2 x 2, 1 x 1."""

LEFT, RIGHT = of_template("left half"), of_template("right half")
SOFT_LEFT, SOFT_RIGHT = of_template("left half", 0.4), of_template("right half", 0.4)
COFFEE, COFFEE_INVERTED = of_picture(photo("coffee"), 0.1), of_picture(photo("coffee"), 0.1, invert=True)
MASKS = (LEFT, RIGHT, SOFT_LEFT, of_template("centre", 0.2), COFFEE)

rng = np.random.default_rng(0)


def picture(tokens: int, seed: int) -> ImageKV:
    generator = torch.Generator().manual_seed(seed)
    return ImageKV.from_pairs([torch.randn(1, tokens, WIDTH, generator=generator) for _ in range(2 * LAYERS)])


@dataclass(frozen=True)
class Spec:
    """A unit: its pictures by role (numbers of tokens; the same seed is the same picture), weight, and places."""

    formulation: Formulation
    places: Sequence[Where]
    """Of each picture."""
    tokens: Sequence[int] = ()
    """Of each picture; empty: 4."""
    weight: float = 0.7
    seeds: Sequence[int] = ()
    """Which picture each of them is; empty: all differ."""
    uncond: bool = True
    balance: bool = False

    def prompts(self, number: int) -> Prompts:
        tokens = self.tokens or (4,) * len(self.places)
        seeds = self.seeds or range(100 * number, 100 * number + len(self.places))
        conds = tuple(picture(n, seed) for n, seed in zip(tokens, seeds, strict=True))
        none = picture(tokens[0], 1000 + seeds[0])
        return {COND: conds, UNCOND: (none,) * len(conds) if self.uncond else ()}


def injection_of(specs: Sequence[Spec], canvas: Canvas | None = Canvas(LATENT)) -> Injection:  # noqa: B008
    terms = []
    for number, spec in enumerate(specs):
        weighed = weigh(spec.prompts(number), spec.formulation, spec.weight, (), WIDEST, UNCOND)
        where = dict.fromkeys((COND, UNCOND), tuple(spec.places))
        terms.append(Term(spec.formulation, Window(), weighed, where=where, balance=spec.balance))
    made = Injection(terms, LAYERS)
    made.canvas = canvas
    return made


def text(rows: int, queries: int, tokens: int = TEXT, seed: int = 99) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, n, WIDTH, generator=generator) for n in (queries, tokens, tokens))
    return q, k, v


def factors(place: Where, queries: int) -> np.ndarray:
    """``[N, 1]``: the masks' averages on the grid of so many queries."""
    depth = QUERIES.index(queries)
    found = np.ones(queries)
    for mask in place:
        found = found * mask.on(LATENT, depth).ravel()
    return found[:, None]


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Softmax of logits, each exponential times its factor ``[N, M]``."""
    outs = []
    for qh, kh, vh in zip(*(np.split(t, HEADS, axis=1) for t in (q, k, v)), strict=True):
        logits = qh @ kh.T / np.sqrt(qh.shape[1])
        shares = np.exp(logits - logits.max(axis=1, keepdims=True)) * factor
        outs.append(shares / shares.sum(axis=1, keepdims=True) @ vh)
    return np.concatenate(outs, axis=1)


def expected(
    specs: Sequence[Spec], roles: Sequence[int], q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], layer: int
) -> np.ndarray:
    queries, rows = q.shape[1], []
    for row, role in enumerate(roles):
        query, key, value = (t[row].double().numpy() for t in (q, ks, vs))
        keys, values, shares = [key], [value], [np.ones((queries, len(key)))]
        added = np.zeros((queries, WIDTH))
        for number, spec in enumerate(specs):
            images = spec.prompts(number).get(role, ())
            by_place: dict[Where, list[ImageKV]] = {}
            for image, place in zip(images, spec.places, strict=False):
                by_place.setdefault(place, []).append(image)
            for place, together in by_place.items():
                factor = factors(place, queries)
                if spec.formulation is DECOUPLED:
                    if all(torch.equal(each.keys[0], together[0].keys[0]) for each in together):
                        together = together[:1]
                    k = np.concatenate([image.keys[layer][0].double().numpy() for image in together])
                    v = np.concatenate([image.values[layer][0].double().numpy() for image in together])
                    added += spec.weight * factor * attention(query, k, v, np.ones((queries, len(k))))
                    continue
                for image in together:
                    scale = spec.weight * WIDTH / WIDEST
                    v = image.values[layer][0].double().numpy()
                    mean = v.mean(axis=0, keepdims=True)
                    keys.append(image.keys[layer][0].double().numpy() * scale)
                    values.append(v - mean + mean * scale)
                    shares.append(np.repeat(factor, len(v), axis=1))
        rows.append(
            attention(query, np.concatenate(keys), np.concatenate(values), np.concatenate(shares, axis=1)) + added
        )
    return np.stack(rows)


def plan_of(injection: Injection, roles: Sequence[int], tokens: int = TEXT, **call: object) -> Plan:
    made = replace(Call(tuple(roles), 0.5, latent=LATENT), **call)  # type: ignore[arg-type]
    return injection.plan(made, tokens, torch.device("cpu"), torch.float32)


def by_replacement(plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As hosts with ``patches_replace`` do it."""
    return plan.attend(layer, q, k, v, HEADS, scaled_dot_product, None)


def by_hooks(plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As AUTOMATIC1111's hooks do it."""
    from lib_ipadapter.layout import KEYS, VALUES

    if plan.uniform:
        out = scaled_dot_product(q, plan.extended(layer, KEYS, k)[0][0], plan.extended(layer, VALUES, v)[0][0], HEADS)
    else:
        out = plan.gate(layer, q, k, scaled_dot_product(q, k, v, HEADS), HEADS)
    return plan.add(layer, q, out, HEADS)


SEAMS = {"replacement": by_replacement, "hooks": by_hooks}


def assert_close(out: Tensor, wanted: np.ndarray, limit: float = 1e-5) -> None:
    assert np.isfinite(out.numpy()).all()
    assert np.abs(out.double().numpy() - wanted).max() / np.abs(wanted).max() < limit


CASES: dict[str, list[Spec]] = {
    "joint": [Spec(JOINT, [(LEFT,)])],
    "joint, soft": [Spec(JOINT, [(SOFT_LEFT,)], weight=1.4)],
    "joint, a photograph": [Spec(JOINT, [(COFFEE,)], weight=1.4)],
    "joint, one picture of two": [Spec(JOINT, [(LEFT,), ()])],
    "joint, two places": [Spec(JOINT, [(LEFT,), (SOFT_RIGHT,), (LEFT, COFFEE)])],
    "joint, unequal tokens": [Spec(JOINT, [(LEFT,), (RIGHT,)], tokens=[4, 9])],
    "joint, no uncond": [Spec(JOINT, [(LEFT,), (RIGHT,)], uncond=False)],
    "joint, two units": [Spec(JOINT, [(SOFT_LEFT,)]), Spec(JOINT, [()], tokens=[9]), Spec(JOINT, [(RIGHT,)])],
    "decoupled": [Spec(DECOUPLED, [(LEFT,)])],
    "decoupled, soft": [Spec(DECOUPLED, [(SOFT_LEFT,)], weight=-0.6)],
    "decoupled, a photograph": [Spec(DECOUPLED, [(COFFEE,)])],
    "decoupled, one picture of two": [Spec(DECOUPLED, [(LEFT,), ()])],
    "decoupled, one place": [Spec(DECOUPLED, [(LEFT,), (LEFT,)])],
    "decoupled, three places": [Spec(DECOUPLED, [(LEFT,), (SOFT_RIGHT,), (LEFT, COFFEE), (LEFT,)])],
    "decoupled, unequal tokens": [Spec(DECOUPLED, [(LEFT,), (RIGHT,)], tokens=[4, 9])],
    "decoupled, no uncond": [Spec(DECOUPLED, [(LEFT,), (RIGHT,)], uncond=False)],
    "both": [Spec(JOINT, [(LEFT,), (RIGHT,)]), Spec(DECOUPLED, [(SOFT_LEFT,)]), Spec(DECOUPLED, [()])],
}
ROLES = [(1, 0), (0,), (1,), (0, 1), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, OTHER)]


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("roles", ROLES)
def test_against_float64(seam: str, case: str, roles: tuple[int, ...]) -> None:
    injection = injection_of(CASES[case])
    for queries in QUERIES:
        q, k, v = text(len(roles), queries)
        out = SEAMS[seam](plan_of(injection, roles), 1, q, k, v)
        assert_close(out, expected(CASES[case], roles, q, list(k), list(v), 1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize(("cond", "uncond", "seen"), [(14, 7, 14), (7, 7, 14), (14, 21, 42)])
def test_prompts_that_the_host_repeats(case: str, roles: tuple[int, ...], cond: int, uncond: int, seen: int) -> None:
    real = {COND: cond, UNCOND: uncond, OTHER: seen}
    rows = [text(1, 1, real[role], seed=row)[1:] for row, role in enumerate(roles)]
    ks, vs = [k[0] for k, _ in rows], [v[0] for _, v in rows]
    k, v = (torch.stack([t.repeat(seen // len(t), 1) for t in ts]) for ts in (ks, vs))
    q = text(len(roles), 9)[0]
    plan = plan_of(injection_of(CASES[case]), roles, seen, text_tokens={COND: cond, UNCOND: uncond})
    assert_close(by_replacement(plan, 0, q, k, v), expected(CASES[case], roles, q, ks, vs, 0))


places = st.lists(st.sampled_from(MASKS), max_size=2, unique=True).map(tuple)
specs = st.builds(
    Spec,
    formulation=st.sampled_from([JOINT, DECOUPLED]),
    places=st.lists(places, min_size=1, max_size=3),
    weight=st.sampled_from([-0.5, 0.3, 1.0, 1.6]),
    uncond=st.booleans(),
)


@settings(deadline=None, max_examples=80)
@given(
    units=st.lists(specs, min_size=1, max_size=3),
    roles=st.lists(st.sampled_from([COND, UNCOND, OTHER]), min_size=1, max_size=5),
    seam=st.sampled_from(sorted(SEAMS)),
    queries=st.sampled_from(QUERIES),
)
def test_any_units(units: list[Spec], roles: list[int], seam: str, queries: int) -> None:
    q, k, v = text(len(roles), queries)
    out = SEAMS[seam](plan_of(injection_of(units), roles), 0, q, k, v)
    assert_close(out, expected(units, roles, q, list(k), list(v), 0), 3e-5)


COMPLEMENTARY: dict[str, list[Mask]] = {
    "halves": [LEFT, RIGHT],
    "soft halves": [SOFT_LEFT, SOFT_RIGHT],
    "thirds": [of_template(name, 0.2) for name in ("top third", "middle row", "bottom third")],
    "a photograph": [COFFEE, COFFEE_INVERTED],
}


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
@pytest.mark.parametrize("masks", COMPLEMENTARY)
@pytest.mark.parametrize("as_units", [True, False])
@pytest.mark.parametrize("within", [(), (of_template("centre", 0.3),)])
def test_complementary_masks_of_a_picture_add_up_to_no_mask(
    seam: str, formulation: Formulation, masks: str, as_units: bool, within: Where
) -> None:
    """As pictures of one unit and as units of their own; and with a mask around them, to that one alone."""
    parts = [(*within, mask) for mask in COMPLEMENTARY[masks]]
    if as_units:
        split = [Spec(formulation, [place], seeds=[5]) for place in parts]
    else:
        split = [Spec(formulation, parts, seeds=[5] * len(parts))]
    roles = (UNCOND, COND)
    for queries in QUERIES:
        q, k, v = text(2, queries)
        wanted = SEAMS[seam](plan_of(injection_of([Spec(formulation, [within], seeds=[5])]), roles), 0, q, k, v)
        plan = plan_of(injection_of(split), roles)
        assert not plan.idle
        out = SEAMS[seam](plan, 0, q, k, v)
        assert float((out - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
        assert float((out - scaled_dot_product(q, k, v, HEADS)).abs().max()) > 1e-3


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
def test_queries_outside_a_mask_have_what_they_have_without_the_unit(seam: str, formulation: Formulation) -> None:
    injection = injection_of([Spec(formulation, [(LEFT,)], weight=1.5)])
    for queries, columns in zip(QUERIES[:3:2], (6, 2), strict=True):  # an even number of columns
        q, k, v = text(2, queries)
        plain = scaled_dot_product(q, k, v, HEADS)
        out = SEAMS[seam](plan_of(injection, (1, 0)), 0, q, k, v)
        difference = (out - plain).abs().amax(dim=(0, 2)).view(-1, columns)
        assert float(difference[:, columns // 2 :].max()) <= (
            0.0 if seam == "hooks" or formulation is DECOUPLED else 1e-6
        )
        assert float(difference[:, : columns // 2].min()) > 1e-2


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("roles", ROLES)
def test_masks_of_balanced_pictures(seam: str, roles: tuple[int, ...]) -> None:
    """Each of three pictures weighs as a third of one, which is one beside three times the text."""
    spec = Spec(JOINT, [(LEFT,), (SOFT_RIGHT,), ()], balance=True)
    plan = plan_of(injection_of([spec]), roles)
    for queries in QUERIES:
        q, k, v = text(len(roles), queries)
        real = [t.repeat(3, 1) if role != OTHER else t for t, role in zip(k, roles, strict=True)]
        values = [t.repeat(3, 1) if role != OTHER else t for t, role in zip(v, roles, strict=True)]
        out = SEAMS[seam](plan, 1, q, k, v)
        assert_close(out, expected([spec], roles, q, real, values, 1))


def test_both_seams_agree() -> None:
    for case in CASES.values():
        plan = plan_of(injection_of(case), (1, 0))
        q, k, v = text(2, 30)
        a, b = (seam(plan, 0, q, k, v) for seam in SEAMS.values())
        assert float((a - b).abs().max()) < 1e-5


def test_pictures_of_one_place_share_an_attention() -> None:
    plan = plan_of(injection_of([Spec(DECOUPLED, [(LEFT,), (RIGHT,), (LEFT,), (LEFT,)])]), (1, 0))
    assert len(plan.added) == 2 + 1  # one picture in both roles at once
    alone = plan_of(injection_of([Spec(DECOUPLED, [(LEFT,)] * 3)]), (1, 0))
    assert len(alone.added) == 2
    single = plan_of(injection_of([Spec(DECOUPLED, [(LEFT,)])]), (1, 0))
    assert len(single.added) == 1


def test_half_precision_is_near() -> None:
    for case in ("joint, two places", "decoupled, three places"):
        roles = (1, 0)
        q, k, v = (t.half() for t in text(2, 30))
        injection = injection_of(CASES[case])
        plan = injection.plan(Call(roles, 0.5, latent=LATENT), TEXT, torch.device("cpu"), torch.float16)
        wanted = expected(CASES[case], roles, q, list(k), list(v), 0)
        for seam in SEAMS.values():
            out = seam(plan, 0, q, k, v)
            assert out.dtype is torch.float16
            assert_close(out.float(), wanted, 5e-3)


# Where masks can't be


def test_a_replacement_of_others_takes_no_mask_in_the_softmax() -> None:
    q, k, v = text(2, 30)

    def replaced(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return scaled_dot_product(q, k, v, heads) * 2

    with pytest.raises(IPAdapterError, match="a mask in one softmax"):
        plan_of(injection_of([Spec(JOINT, [(LEFT,)])]), (1, 0)).attend(0, q, k, v, HEADS, scaled_dot_product, replaced)
    case = [Spec(DECOUPLED, [(LEFT,)])]
    out = plan_of(injection_of(case), (1, 0)).attend(0, q, k, v, HEADS, scaled_dot_product, replaced)
    wanted = expected(case, (1, 0), q, list(k), list(v), 0) + scaled_dot_product(q, k, v, HEADS).double().numpy()
    assert_close(out, wanted)


def test_tiles_are_refused() -> None:
    injection = injection_of([Spec(DECOUPLED, [(LEFT,)])])
    for call in ({"tiles": 3}, {"latent": (5, 4)}):
        with pytest.raises(IPAdapterError, match=r"drawn in tiles .* of 48 x 40 pixels|of 32 x 40 pixels .* 48 x 40"):
            plan_of(injection, (1, 0), **call)
    with pytest.raises(IPAdapterError, match="doesn't say how large"):
        plan_of(injection, (1, 0), latent=None)
    unmasked = injection_of([Spec(DECOUPLED, [()])])
    assert not plan_of(unmasked, (1, 0), latent=(5, 4), tiles=3).idle


def test_only_units_that_act_mind_tiles() -> None:
    masked = injection_of([Spec(JOINT, [(LEFT,)])]).terms[0]
    injection = Injection([replace(masked, window=Window(0.0, 0.3))], LAYERS)
    injection.canvas = Canvas(LATENT)
    assert plan_of(injection, (1, 0), tiles=2).idle
    with pytest.raises(IPAdapterError, match="tiles"):
        plan_of(injection, (1, 0), tiles=2, progress=0.2)


def test_where_the_host_gives_no_latent_beforehand_the_first_call_has_it() -> None:
    injection = injection_of([Spec(JOINT, [(LEFT,)])], None)
    q, k, v = text(2, 30)
    assert_close(
        by_replacement(plan_of(injection, (1, 0)), 0, q, k, v),
        expected([Spec(JOINT, [(LEFT,)])], (1, 0), q, list(k), list(v), 0),
    )
    with pytest.raises(IPAdapterError, match="tiles"):
        plan_of(injection, (1, 0), latent=(5, 5))


@pytest.mark.parametrize("seam", SEAMS)
def test_a_grid_that_no_layer_has_is_refused(seam: str) -> None:
    for formulation in (JOINT, DECOUPLED):
        plan = plan_of(injection_of([Spec(formulation, [(LEFT,)])]), (1, 0))
        with pytest.raises(IPAdapterError, match="has 12 queries, which no layer of a canvas of 48 x 40 pixels has"):
            SEAMS[seam](plan, 0, *text(2, 12))


def test_a_part_of_the_canvas() -> None:
    """Left of the middle the mask acts; the pass draws the left half, so it acts in all of it."""
    region = Region(0.0, 0.0, 0.5, 1.0, (96, 40))
    masked, plain = (injection_of([Spec(JOINT, [place])], Canvas(LATENT, region)) for place in ((LEFT,), ()))
    q, k, v = text(2, 30)
    outs = [by_replacement(plan_of(each, (1, 0)), 0, q, k, v) for each in (masked, plain)]
    assert float((outs[0] - outs[1]).abs().max()) < 1e-6

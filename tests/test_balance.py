"""The share that several pictures get of one softmax, against float64."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from lib_ipadapter import plan as plan_module
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.formulations import DECOUPLED, JOINT
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.plan import scaled_dot_product
from lib_ipadapter.progress import Window
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.weighing import weigh
from tests.embedded import Host
from tests.embedded_hosts import request, unit
from tests.test_generation import difference, pixels, same
from tests.test_hot_path import steady
from tests.test_injection import HEADS, LAYERS, WIDEST, WIDTH, assert_close, picture, plan_for, text

Spec = tuple[tuple[int, ...], tuple[int, ...], bool]
"""Tokens of a unit's pictures, of its uncond pictures, and whether it is balanced."""
SPECS: dict[str, list[Spec]] = {
    "one": [((4,), (4,), True)],
    "three": [((4, 4, 4), (4, 4, 4), True)],
    "no uncond": [((4, 4), (), True)],
    "uneven": [((4, 9), (4,), True)],
    "two units": [((4, 4), (4, 4), True), ((3, 3, 3), (3, 3, 3), True)],
    "one of two units": [((4, 4), (4, 4), True), ((3, 3, 3), (3, 3, 3), False)],
}


def softmax_with_bias(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """In float64: ``bias`` is added to the logits of each key."""
    parts = []
    for h in range(HEADS):
        span = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        logits = q[:, span] @ k[:, span].T / np.sqrt(WIDTH // HEADS) + bias
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        parts.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, span])
    return np.concatenate(parts, axis=1)


def terms_of(specs: list[Spec]) -> tuple[list[Term], list[Any]]:
    terms, raw = [], []
    for n, (conds, unconds, balance) in enumerate(specs):
        prompts = {
            COND: tuple(picture(t, 100 * n + i) for i, t in enumerate(conds)),
            UNCOND: tuple(picture(t, 100 * n + 50 + i) for i, t in enumerate(unconds)),
        }
        weighed = weigh(prompts, JOINT, 0.7, (), WIDEST, UNCOND)
        terms.append(Term(JOINT, Window(), weighed, balance=balance))
        raw.append(prompts)
    return terms, raw


def expected(specs: list[Spec], raw: list[Any], role: int, q: Any, k: Any, v: Any) -> np.ndarray:
    keys, values, bias = [k.double().numpy()], [v.double().numpy()], [np.zeros(len(k))]
    scale = 0.7 * WIDTH / WIDEST
    for (_, _, balance), prompts in zip(specs, raw, strict=True):
        for image in prompts[role]:
            iv = image.values[0][0].double().numpy()
            keys.append(image.keys[0][0].double().numpy() * scale)
            values.append(iv - iv.mean(0) + iv.mean(0) * scale)
            bias.append(np.full(len(iv), -np.log(len(prompts[role])) if balance else 0.0))
    return softmax_with_bias(q.double().numpy(), *(np.concatenate(each) for each in (keys, values, bias)))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("roles", [(1, 0), (0,), (1, 1, 0, 0), (0, 1)])
@pytest.mark.parametrize("lengths", [(7, 7), (14, 7), (7, 21)])
@pytest.mark.parametrize("gate", [False, True])
def test_balanced_pictures_have_log_n_off_their_logits(
    name: str, roles: tuple[int, ...], lengths: tuple[int, int], gate: bool
) -> None:
    specs = SPECS[name]
    terms, raw = terms_of(specs)
    seen = max(lengths) * 1
    real = {COND: lengths[0], UNCOND: lengths[1]}
    q = text(len(roles), 1)[0]
    rows = [text(1, real[role], seed=row)[1:] for row, role in enumerate(roles)]
    k, v = (torch.stack([r[n][0].repeat(seen // r[n].shape[1], 1) for r in rows]) for n in range(2))
    plan = plan_for(Injection(terms, LAYERS), Call(roles, 0.5, real), seen)
    if gate:
        # Where nobody gets between q, k, v and the output: that of the text alone is given.
        alone = torch.cat([scaled_dot_product(q[n : n + 1], *rows[n], HEADS) for n in range(len(roles))])
        out = plan.gate(0, q, k, alone, HEADS)
    else:
        out = plan.attend(0, q, k, v, HEADS, scaled_dot_product, None)
    wanted = [expected(specs, raw, role, q[n], rows[n][0][0], rows[n][1][0]) for n, role in enumerate(roles)]
    assert_close(out, np.stack(wanted))


def test_an_opaque_replacement_is_given_the_balance_too() -> None:
    terms, raw = terms_of(SPECS["three"])
    q, k, v = text(2, 7)
    plan = plan_for(Injection(terms, LAYERS), Call((1, 0), 0.5), 7)
    assert plan.uniform
    out = plan.attend(0, q, k, v, HEADS, scaled_dot_product, scaled_dot_product)
    wanted = [expected(SPECS["three"], raw, role, q[n], k[n], v[n]) for n, role in enumerate((1, 0))]
    assert_close(out, np.stack(wanted))


def test_too_many_repeats_are_refused_before_sampling() -> None:
    specs: list[Spec] = [((1,) * 9, (), True), ((1,) * 8, (), True)]
    with pytest.raises(IPAdapterError, match=re.escape("Units with 8 and 9 pictures")):
        Injection(terms_of(specs)[0], LAYERS)
    Injection(terms_of([(*spec[:2], False) for spec in specs])[0], LAYERS)


def test_it_is_still_one_copy() -> None:
    from tests.test_hot_path import EQUAL, injection, rows

    made = injection("sdxl", JOINT, 4)
    plain = steady("sdxl", made, Call(rows(2), 0.5, EQUAL)).counts
    made.terms = tuple(Term(t.formulation, t.window, t.weighed, balance=True) for t in made.terms)
    made._plans.clear()
    assert steady("sdxl", made, Call(rows(2), 0.5, EQUAL)).counts == plain


# --- Generations


def test_copies_of_a_picture_weigh_as_much_as_one(host: Host) -> None:
    alone = host.txt2img(**request(unit("plus", formulation="joint"))).image
    thrice = unit("plus", photos=("astronaut",) * 3, formulation="joint")
    balanced = host.txt2img(**request({**thrice, "balance": True}))
    assert np.abs(pixels(balanced.image) - pixels(alone)).max() <= 2
    assert difference(host.txt2img(**request(thrice)).image, alone) > 1
    assert "balance: true" in balanced.infotexts[0]
    assert not host.errors


def test_it_says_nothing_in_the_decoupled_form(host: Host) -> None:
    two = unit("base", photos=("astronaut", "coffee"), formulation="decoupled")
    assert same(host.txt2img(**request(two)).image, host.txt2img(**request({**two, "balance": True})).image)
    assert DECOUPLED.joins_softmax is False


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the repeats the case of three pictures is another."""
    monkeypatch.setattr(plan_module, "text_repeats", lambda units, role: 1)
    monkeypatch.setattr("lib_ipadapter.balance.Counted.copies", lambda self, role, repeats: 1)
    with pytest.raises(AssertionError):
        test_balanced_pictures_have_log_n_off_their_logits("three", (1, 0), (7, 7), False)

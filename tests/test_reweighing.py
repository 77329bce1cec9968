"""A weight that changes while sampling: each step is that of the constant weight, and costs a few large operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch

from lib_ipadapter import injection as injection_module
from lib_ipadapter.curves import Curve, parse
from lib_ipadapter.formulations import DECOUPLED, JOINT, Formulation
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.plan import ImageKV, Plan, scaled_dot_product
from lib_ipadapter.progress import STEPS, Window
from lib_ipadapter.reweighing import Adjustable, Unweighed
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.weighing import Prompts, arrange, weigh
from tests.bare_model import softmax_attention

WIDTHS, HEADS, QUERIES, TEXT = (32, 16, 32, 16, 16), 4, 5, 7
WIDEST = 64
CPU = torch.device("cpu")
RAMP = parse("0.2@0, 1.5@0.3, 0@0.7, -1@1")
PROGRESS = [0.0, 0.1, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0]


def picture(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> ImageKV:
    generator = torch.Generator().manual_seed(seed)
    return ImageKV.from_pairs([torch.randn(1, tokens, w, generator=generator).to(dtype) for w in WIDTHS for _ in "kv"])


A, B, C, NONE = (picture(4, seed) for seed in range(4))
UNITS: dict[str, tuple[Prompts, tuple[float, ...]]] = {
    "one": ({COND: (A,), UNCOND: (NONE,)}, ()),
    "no uncond": ({COND: (A,), UNCOND: ()}, ()),
    "three": ({COND: (A, B, C), UNCOND: (NONE,) * 3}, ()),
    "shares": ({COND: (A, B, C), UNCOND: (NONE,) * 3}, (1.0, -0.5, 1.0)),
    "repeated": ({COND: (A, B, A), UNCOND: (NONE,) * 3}, ()),
    "twice the same": ({COND: (A, A), UNCOND: (A, A)}, ()),
    "uneven": ({COND: (A, picture(9, 7)), UNCOND: (NONE, picture(3, 8))}, ()),
}


def varying(unit: str, formulation: Formulation, first: int, weight: float = 0.7, curve: Curve = RAMP) -> Term:
    prompts, shares = UNITS[unit]
    return Term(formulation, Window(), Unweighed(arrange(prompts, shares, first), formulation, weight, WIDEST), curve)


def constant(unit: str, formulation: Formulation, first: int, weight: float) -> Term:
    prompts, shares = UNITS[unit]
    return Term(formulation, Window(), weigh(prompts, formulation, weight, shares, WIDEST, first))


def outputs(plan: Plan, rows: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of every layer, from random rows."""
    made = []
    for layer, width in enumerate(WIDTHS):
        generator = torch.Generator().manual_seed(99 + layer)
        q, k, v = (torch.randn(rows, n, width, generator=generator).to(dtype) for n in (QUERIES, TEXT, TEXT))
        made.append(plan.attend(layer, q, k, v, HEADS, scaled_dot_product, None))
    return made


def at(injection: Injection, progress: float, roles: Sequence[int], dtype: torch.dtype = torch.float32) -> Plan:
    return injection.plan(Call(tuple(roles), progress), TEXT, CPU, dtype)


@pytest.mark.parametrize("roles", [(UNCOND, COND), (COND, UNCOND), (COND,), (UNCOND, UNCOND, COND, COND)])
@pytest.mark.parametrize("first", [COND, UNCOND])
@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
@pytest.mark.parametrize("unit", UNITS)
def test_every_step_is_that_of_the_constant_weight(
    unit: str, formulation: Formulation, first: int, roles: tuple[int, ...]
) -> None:
    injection = Injection([varying(unit, formulation, first)], len(WIDTHS))
    for progress in PROGRESS:
        plan = at(injection, progress, roles)
        factor = RAMP.at(progress)
        assert plan.idle is (factor == 0)
        if factor:
            wanted = at(Injection([constant(unit, formulation, first, 0.7 * factor)], len(WIDTHS)), progress, roles)
            for found, each in zip(outputs(plan, len(roles)), outputs(wanted, len(roles)), strict=True):
                assert torch.equal(found, each)


@pytest.mark.parametrize("raw", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
def test_in_every_precision(formulation: Formulation, dtype: torch.dtype, raw: torch.dtype) -> None:
    prompts = {COND: (picture(4, 1, raw), picture(4, 2, raw)), UNCOND: (picture(4, 3, raw),) * 2}
    unweighed = Unweighed(arrange(prompts, (), UNCOND), formulation, 0.7, WIDEST)
    injection = Injection([Term(formulation, Window(), unweighed, RAMP)], len(WIDTHS))
    for progress in PROGRESS:
        plan, factor = at(injection, progress, (UNCOND, COND), dtype), RAMP.at(progress)
        if factor:
            weighed = weigh(prompts, formulation, 0.7 * factor, (), WIDEST, UNCOND)
            wanted = at(Injection([Term(formulation, Window(), weighed)], len(WIDTHS)), 0.0, (UNCOND, COND), dtype)
            assert all(
                torch.equal(a, b) for a, b in zip(outputs(plan, 2, dtype), outputs(wanted, 2, dtype), strict=True)
            )


@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
def test_every_step_against_float64(formulation: Formulation) -> None:
    """The formulas, and the curve's lines, written out: 0.2 to 1.5 at 0.3, to 0 at 0.7, to -1 at 1."""
    injection = Injection([varying("three", formulation, UNCOND)], len(WIDTHS))
    for progress in PROGRESS:
        weight = 0.7 * float(np.interp(progress, [0, 0.3, 0.7, 1], [0.2, 1.5, 0, -1]))
        found = outputs(at(injection, progress, (UNCOND, COND)), 2)
        for layer, width in enumerate(WIDTHS):
            generator = torch.Generator().manual_seed(99 + layer)
            q, k, v = (torch.randn(2, n, width, generator=generator).double().numpy() for n in (QUERIES, TEXT, TEXT))
            for row, images in enumerate(((NONE,) * 3, (A, B, C))):
                keys = [image.keys[layer][0].double().numpy() for image in images]
                values = [image.values[layer][0].double().numpy() for image in images]
                wanted = softmax_attention(q[row], k[row], v[row], HEADS)
                if formulation is DECOUPLED:
                    image = softmax_attention(q[row], np.concatenate(keys), np.concatenate(values), HEADS)
                    wanted = wanted + weight * image
                elif weight:
                    scale = weight * width / WIDEST
                    means = [each.mean(axis=0, keepdims=True) for each in values]
                    values = [each + (scale - 1) * mean for each, mean in zip(values, means, strict=True)]
                    k_all = np.concatenate([k[row], *(each * scale for each in keys)])
                    wanted = softmax_attention(q[row], k_all, np.concatenate([v[row], *values]), HEADS)
                assert np.abs(found[layer][row].double().numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_several_units_change_independently() -> None:
    units = [("one", JOINT, RAMP), ("three", DECOUPLED, parse("1@0, 2@1")), ("shares", JOINT, parse("1@0.3, 0@0.3"))]
    terms = [varying(unit, formulation, UNCOND, 0.5, curve) for unit, formulation, curve in units[:2]]
    prompts, shares = UNITS["shares"]
    terms.append(Term(JOINT, Window(), weigh(prompts, JOINT, 0.5, shares, WIDEST, UNCOND), units[2][2]))
    injection = Injection(terms, len(WIDTHS))
    for progress in PROGRESS:
        wanted = [
            constant(unit, formulation, UNCOND, 0.5 * curve.at(progress))
            for unit, formulation, curve in units
            if curve.at(progress)
        ]
        a = outputs(at(injection, progress, (UNCOND, COND)), 2)
        b = outputs(at(Injection(wanted, len(WIDTHS)), 0.0, (UNCOND, COND)), 2)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_steps_can_be_what_is_counted() -> None:
    term = varying("one", DECOUPLED, UNCOND)
    injection = Injection([Term(DECOUPLED, Window(timing=STEPS), term.weighed, RAMP)], len(WIDTHS))
    assert not injection.asks_progress
    for executed in (0.0, 0.5):
        plan = injection.plan(Call((COND,), 0.99, executed=executed), TEXT, CPU, torch.float32)
        wanted = at(Injection([constant("one", DECOUPLED, UNCOND, 0.7 * RAMP.at(executed))], len(WIDTHS)), 0.0, (COND,))
        assert all(torch.equal(x, y) for x, y in zip(outputs(plan, 1), outputs(wanted, 1), strict=True))


@pytest.mark.parametrize("made_in", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("used_in", [torch.no_grad, torch.inference_mode])
def test_weights_change_in_inference_mode_and_out_of_it(
    made_in: Callable[[], AbstractContextManager[object]], used_in: Callable[[], AbstractContextManager[object]]
) -> None:
    with made_in():
        injection = Injection([varying("three", JOINT, UNCOND)], len(WIDTHS))
        injection.to(CPU, torch.float32)
    for progress in (0.0, 0.1):
        with used_in():
            found = outputs(at(injection, progress, (UNCOND, COND)), 2)
        wanted = Injection([constant("three", JOINT, UNCOND, 0.7 * RAMP.at(progress))], len(WIDTHS))
        assert torch.equal(found[0], outputs(at(wanted, 0.0, (UNCOND, COND)), 2)[0])


# --- What it costs


def views(unit: str, formulation: Formulation) -> bool:
    """Whether a plan is made once for all weights."""
    injection = Injection([varying(unit, formulation, UNCOND)], len(WIDTHS))
    with torch.inference_mode():
        return at(injection, 0.0, (UNCOND, COND)) is at(injection, 0.1, (UNCOND, COND))


@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit != "uneven"])
def test_plans_look_at_what_is_weighed(unit: str, formulation: Formulation) -> None:
    assert views(unit, formulation)


def test_a_plan_that_has_copies_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of unequal tokens, which no adapter makes, are put together for an attention of their own."""
    assert views("uneven", JOINT) and not views("uneven", DECOUPLED)
    monkeypatch.setattr(injection_module.Plan, "memory", property(lambda _: set()))
    with pytest.raises(AssertionError):  # they would go unseen
        test_every_step_is_that_of_the_constant_weight("uneven", DECOUPLED, UNCOND, (UNCOND, COND))


def test_nothing_is_weighed_where_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    original = Adjustable.set

    def watched(self: Adjustable, factor: float) -> None:
        found.append(factor)
        original(self, factor)

    monkeypatch.setattr(Adjustable, "set", watched)
    curve = parse("0.5@0.2, 1@0.2, 1@0.5, 0@0.5, 0@0.7, 1@0.7, 2@0.9")
    injection = Injection([varying("one", JOINT, UNCOND, curve=curve)], len(WIDTHS))
    for progress in (0.0, 0.0, 0.1, 0.19, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 0.95, 1.0):
        for roles in ((UNCOND,), (COND,), (COND, COND)):  # several UNet calls in one step
            at(injection, progress, roles)
    assert found == [0.5, 1.0, 2.0]
    found.clear()
    assert at(injection, 1.0, (COND,), torch.float16)  # another place: new K and V, which have no weight yet
    assert found == [2.0]


def test_keys_that_have_no_weight_in_them_are_left_alone() -> None:
    injection = Injection([varying("one", DECOUPLED, UNCOND)], len(WIDTHS))
    at(injection, 0.0, (COND,))
    run = injection._adjustable[0]._runs[0]
    run.to_keys.zero_()
    at(injection, 0.1, (COND,))
    assert not run.to_keys.any() and run.to_values.any()

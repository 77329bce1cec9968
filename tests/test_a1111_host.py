"""AUTOMATIC1111's seam on a module tree of the UNet's shape: hooks on ``to_q``, ``to_k``, ``to_v``, ``to_out[0]``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_ipadapter.curves import parse
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.formulations import DECOUPLED, JOINT, Formulation
from lib_ipadapter.hosts.a1111 import A1111Host
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.layers import SD15, LayerKey
from lib_ipadapter.plan import ImageKV, scaled_dot_product
from lib_ipadapter.progress import Window
from lib_ipadapter.reweighing import Unweighed
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.weighing import arrange, weigh
from tests.bare_model import softmax_attention

HEADS, CHANNELS, CONTEXT, QUERIES = 2, 6, 10, 3
WIDTHS = {"input": 8, "output": 12, "middle": 16}
WIDEST = max(WIDTHS.values())
LAYERS = len(SD15)


# A UNet with nothing but its cross-attention


def whole(attn2: Any, x: Tensor, context: Tensor) -> Tensor:
    """As most of the WebUI's optimisers: everything at once, ``to_out`` as one module."""
    q, k, v = attn2.to_q(x), attn2.to_k(context), attn2.to_v(context)
    return attn2.to_out(scaled_dot_product(q, k, v, HEADS))


def by_hand(attn2: Any, x: Tensor, context: Tensor) -> Tensor:
    """Keys scaled beforehand, heads in the batch, ``to_out``'s parts called one by one."""
    q = attn2.to_q(x)
    k = attn2.to_k(context) * (q.shape[-1] // HEADS) ** -0.5
    v = attn2.to_v(context)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out = torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(-1), v)
    out = out.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)
    return attn2.to_out[1](attn2.to_out[0](out))


def values_first(attn2: Any, x: Tensor, context: Tensor) -> Tensor:
    """The projections in another order."""
    v, k = attn2.to_v(context), attn2.to_k(context)
    out_projection, dropout = attn2.to_out
    return dropout(out_projection(scaled_dot_product(attn2.to_q(x), k, v, HEADS)))


OPTIMISERS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "whole": whole,
    "by hand": by_hand,
    "values first": values_first,
}


class CrossAttention(nn.Module):
    optimiser = staticmethod(whole)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q = nn.Linear(CHANNELS, width, bias=False)
        self.to_k = nn.Linear(CONTEXT, width, bias=False)
        self.to_v = nn.Linear(CONTEXT, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, CHANNELS), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.optimiser(self, x, context)


class Transformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        block = nn.Module()
        block.attn2 = CrossAttention(width)
        self.transformer_blocks = nn.ModuleList([block])


class UNet(nn.Module):
    """ldm's tree; a call runs every layer on ``x [R, N, C]`` and keeps what each returns."""

    def __init__(self) -> None:
        super().__init__()

        def block(name: str, number: int) -> nn.ModuleList:
            has = LayerKey(name, number, 0) in SD15
            return nn.ModuleList([nn.Identity(), *([Transformer(WIDTHS[name])] if has else [])])

        self.input_blocks = nn.ModuleList(block("input", n) for n in range(12))
        self.middle_block = block("middle", 0)
        self.output_blocks = nn.ModuleList(block("output", n) for n in range(12))
        self.outputs: list[Tensor] = []

    def layer(self, key: LayerKey) -> CrossAttention:
        block = self.middle_block if key.block == "middle" else getattr(self, f"{key.block}_blocks")[key.number]
        return block[1].transformer_blocks[key.depth].attn2

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        self.outputs = [self.layer(key)(x, context) for key in SD15]
        return x


def all_hooks(unet: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


# The WebUI


@pytest.fixture
def webui(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The parts of the WebUI that the host asks, as ``modules.*``."""
    parts = {
        "sd_unet": {"current_unet": None},
        "devices": {"device": "cpu", "dtype": torch.float32, "dtype_unet": torch.float32, "torch_gc": lambda: None},
        "lowvram": {"is_enabled": lambda model: False},
        "processing": {"StableDiffusionProcessing": type("Job", (), {}), "Processed": type("Processed", (), {})},
        "shared": {"sd_model": None, "state": SimpleNamespace(interrupted=False, skipped=False)},
    }
    monkeypatch.setitem(sys.modules, "modules", ModuleType("modules"))
    made = {}
    for name, attributes in parts.items():
        made[name] = ModuleType(f"modules.{name}")
        vars(made[name]).update(attributes)
        monkeypatch.setitem(sys.modules, f"modules.{name}", made[name])
    return SimpleNamespace(**made)


@pytest.fixture
def unet() -> Iterator[UNet]:
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(0)
        yield UNet().requires_grad_(False)


@pytest.fixture(params=OPTIMISERS)
def optimiser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As the WebUI does it: on the class, before or after hooks are there."""
    monkeypatch.setattr(CrossAttention, "optimiser", staticmethod(OPTIMISERS[request.param]))
    return str(request.param)


def job(unet: nn.Module, **sampler: Any) -> Any:
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet), cond_stage_key="txt")
    return SimpleNamespace(sd_model=model, sampler=SimpleNamespace(**sampler))


def step(host: A1111Host, cond: int, uncond: int | None, tokens: tuple[int, int] = (7, 7)) -> None:
    """The denoiser callback of a step with so many rows."""
    rows = [None if n is None else torch.zeros(n, t, CONTEXT) for n, t in zip((cond, uncond), tokens, strict=True)]
    host.on_step(SimpleNamespace(text_cond=rows[0], text_uncond=rows[1]))


# Image prompts


def picture(tokens: int, seed: int) -> ImageKV:
    generator = torch.Generator().manual_seed(seed)
    pairs = [torch.randn(1, tokens, WIDTHS[key.block], generator=generator) for key in SD15 for _ in range(2)]
    return ImageKV.from_pairs(pairs)


Spec = tuple[Any, float, Sequence[int], Sequence[int]]

COMBINATIONS: dict[str, list[Spec]] = {
    "joint": [(JOINT, 0.7, (4,), (4,))],
    "joint, two pictures": [(JOINT, 1.3, (4, 4), (4, 4))],
    "joint, no uncond": [(JOINT, 1.0, (4,), ())],
    "joint, uneven": [(JOINT, -0.5, (4,), (9,))],
    "decoupled": [(DECOUPLED, 0.7, (4,), (4,))],
    "decoupled, two pictures": [(DECOUPLED, -0.4, (4, 4), (4, 4))],
    "decoupled, no uncond": [(DECOUPLED, 1.0, (4,), ())],
    "both": [(JOINT, 0.6, (4, 16), (4, 16)), (DECOUPLED, 0.9, (4,), ()), (DECOUPLED, 0.3, (16,), (3,))],
    "both, uneven": [(JOINT, 0.6, (4,), ()), (DECOUPLED, 0.9, (4,), (2,))],
}


def prompts(spec: Spec, seed: int) -> dict[int, tuple[ImageKV, ...]]:
    return {
        role: tuple(picture(tokens, seed + n) for n, tokens in enumerate(pictures))
        for role, pictures, seed in ((COND, spec[2], seed), (UNCOND, spec[3], seed + 50))
    }


def injection_of(specs: Sequence[Spec], window: Window = Window()) -> Injection:  # noqa: B008
    weighed = [weigh(prompts(s, 100 * n), s[0], s[1], (), WIDEST, COND) for n, s in enumerate(specs)]
    return Injection([Term(s[0], window, w) for s, w in zip(specs, weighed, strict=True)], LAYERS)


# One UNet call


def inputs(rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, QUERIES, CHANNELS, generator=generator), torch.randn(
        rows, tokens, CONTEXT, generator=generator
    )


def call_unet(unet: UNet, x: Tensor, context: Tensor, timestep: float = 500.0) -> list[Tensor]:
    unet(x, torch.full((x.shape[0],), timestep), context=context)
    return unet.outputs


def projected(unet: UNet, key: LayerKey, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v without calling a module, so without hooks."""
    attn2: Any = unet.layer(key)
    return (
        F.linear(x, attn2.to_q.weight),
        F.linear(context, attn2.to_k.weight),
        F.linear(context, attn2.to_v.weight),
    )


def to_out(unet: UNet, key: LayerKey, out: Tensor) -> Tensor:
    projection: Any = unet.layer(key).to_out[0]
    return F.linear(out, projection.weight, projection.bias)


def attended(unet: UNet, injection: Injection, roles: tuple[int, ...], x: Tensor, context: Tensor) -> list[Tensor]:
    """What a host that lets the plan attend gets from each layer."""
    plan = injection.plan(Call(roles, 0.5), context.shape[1], x.device, x.dtype)
    outs = []
    for number, key in enumerate(SD15):
        q, k, v = projected(unet, key, x, context)
        outs.append(to_out(unet, key, plan.attend(number, q, k, v, HEADS, scaled_dot_product, None)))
    return outs


def assert_all_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) == LAYERS
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


ARRANGEMENTS = {
    "c u": ((1, 1), [2]),
    "c c u": ((2, 1), [3]),
    "c c u u": ((2, 2), [4]),
    "c c c c u u": ((4, 2), [6]),
    "c, u": ((1, 1), [1, 1]),
    "c c, c c, u u": ((4, 2), [2, 2, 2]),
    "c c c c, c c, u u": ((6, 2), [4, 2, 2]),
    "c c, c u, u": ((3, 2), [2, 2, 1]),
    "c alone": ((1, None), [1]),
}


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_row_gets_its_role_s_tokens_however_the_step_is_cut(
    webui: SimpleNamespace, unet: UNet, optimiser: str, combination: str, arrangement: str
) -> None:
    (cond, uncond), chunks = ARRANGEMENTS[arrangement]
    specs = COMBINATIONS[combination]
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(specs))
    roles = (COND,) * cond + (UNCOND,) * (uncond or 0)
    for each in range(2):  # a second step starts where the first did
        step(host, cond, uncond)
        first = 0
        for number, rows in enumerate(chunks):
            x, context = inputs(rows, 7, seed=10 * each + number)
            found = call_unet(unet, x, context)
            mine = roles[first : first + rows]
            first += rows
            assert_all_close(found, attended(unet, injection_of(specs), mine, x, context))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_layer_against_the_formulas_in_float64(
    webui: SimpleNamespace, unet: UNet, optimiser: str, combination: str
) -> None:
    specs = COMBINATIONS[combination]
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(specs))
    step(host, 2, 1)
    x, context = inputs(3, 7)
    found = call_unet(unet, x, context)
    for number, key in enumerate(SD15):
        q, k, v = (t.double().numpy() for t in projected(unet, key, x, context))
        rows = []
        for row, role in enumerate((COND, COND, UNCOND)):
            keys, values, added = [k[row]], [v[row]], np.zeros_like(q[row])
            for n, spec in enumerate(specs):
                images = prompts(spec, 100 * n)[role]
                image_keys = [image.keys[number][0].double().numpy() for image in images]
                image_values = [image.values[number][0].double().numpy() for image in images]
                if spec[0] is JOINT:
                    scale = spec[1] * WIDTHS[key.block] / WIDEST
                    keys += [t * scale for t in image_keys]
                    values += [t - t.mean(0) + t.mean(0) * scale for t in image_values]
                elif images:
                    image_k, image_v = np.concatenate(image_keys), np.concatenate(image_values)
                    added += spec[1] * softmax_attention(q[row], image_k, image_v, HEADS)
            rows.append(softmax_attention(q[row], np.concatenate(keys), np.concatenate(values), HEADS) + added)
        wanted = to_out(unet, key, torch.from_numpy(np.stack(rows)).float())
        torch.testing.assert_close(found[number], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
def test_a_weight_that_changes_is_that_of_each_step(
    webui: SimpleNamespace, unet: UNet, formulation: Formulation
) -> None:
    spec: Spec = (formulation, 0.6, (4, 4), (4, 4))
    unweighed = Unweighed(arrange(prompts(spec, 0), (), COND), formulation, 0.6, WIDEST)
    host, p = A1111Host(), job(unet)
    host.attach(p, Injection([Term(formulation, Window(), unweighed, parse("0.5@0, 0@0.5, 1@1"))], LAYERS))
    x, context = inputs(2, 7)
    for progress, factor in ((0.0, 0.5), (0.25, 0.25), (0.5, 0.0), (0.75, 0.5), (1.0, 1.0)):
        step(host, 1, 1)
        found = call_unet(unet, x, context, 999 * (1 - progress))
        wanted = Injection([], LAYERS) if not factor else injection_of([(formulation, 0.6 * factor, *spec[2:])])
        assert_all_close(found, attended(unet, wanted, (COND, UNCOND), x, context))


def test_prompts_of_other_lengths_in_one_step(webui: SimpleNamespace, unet: UNet) -> None:
    specs = COMBINATIONS["both"]
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(specs))
    step(host, 2, 2, tokens=(14, 7))
    for roles, tokens in (((COND,) * 2, 14), ((UNCOND,) * 2, 7)):
        x, context = inputs(2, tokens)
        assert_all_close(call_unet(unet, x, context), attended(unet, injection_of(specs), roles, x, context))


def test_skipped_uncond_rows_do_not_shift_the_next_step(webui: SimpleNamespace, unet: UNet) -> None:
    specs = COMBINATIONS["joint"]
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(specs))
    x, context = inputs(1, 7)
    for _ in range(2):
        step(host, 1, 1)
        assert_all_close(call_unet(unet, x, context), attended(unet, injection_of(specs), (COND,), x, context))
    step(host, 1, 1)
    x, context = inputs(2, 7)
    assert_all_close(call_unet(unet, x, context), attended(unet, injection_of(specs), (COND, UNCOND), x, context))


def test_a_step_that_runs_once_more_has_the_same_rows(webui: SimpleNamespace, unet: UNet) -> None:
    """Also where prompt and negative prompt are the same, so that no text tells them apart."""
    specs = COMBINATIONS["joint, no uncond"]
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(specs))
    x, context = inputs(2, 7)
    context[1] = context[0]
    host.on_step(SimpleNamespace(text_cond=context[:1], text_uncond=context[1:]))
    for _ in range(3):
        found = call_unet(unet, x, context)
        assert_all_close(found, attended(unet, injection_of(specs), (COND, UNCOND), x, context))


def test_the_conds_of_sdxl_are_dictionaries(webui: SimpleNamespace, unet: UNet) -> None:
    specs = COMBINATIONS["joint"]
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(specs))
    x, context = inputs(3, 7)
    text_cond, text_uncond = ({"crossattn": rows, "vector": rows[:, 0]} for rows in (context[:2], context[2:]))
    host.on_step(SimpleNamespace(text_cond=text_cond, text_uncond=text_uncond))
    found = call_unet(unet, x, context)
    assert_all_close(found, attended(unet, injection_of(specs), (COND, COND, UNCOND), x, context))


@pytest.mark.parametrize("combination", ["joint", "joint, no uncond", "decoupled", "both, uneven"])
def test_outside_its_window_a_unit_leaves_no_trace(webui: SimpleNamespace, unet: UNet, combination: str) -> None:
    x, context = inputs(2, 7)
    plain = call_unet(unet, x, context)
    injection = injection_of(COMBINATIONS[combination], Window(0.4, 0.6))
    host, p = A1111Host(), job(unet)
    host.attach(p, injection)
    same = []
    for timestep in (999.0, 500.0, 0.0):
        step(host, 1, 1)
        found = call_unet(unet, x, context, timestep)
        same.append(all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)))
    assert same == [True, False, True]
    assert injection.progress_seen() == (0.0, 1.0)


def test_rows_without_image_tokens_keep_their_output_bit_for_bit(webui: SimpleNamespace, unet: UNet) -> None:
    x, context = inputs(2, 7)
    plain = call_unet(unet, x, context)
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(COMBINATIONS["joint, no uncond"]))
    step(host, 1, 1)
    for a, b in zip(call_unet(unet, x, context), plain, strict=True):
        assert torch.equal(a[1], b[1])
        assert not torch.equal(a[0], b[0])


def test_half_precision_keeps_its_type(webui: SimpleNamespace, unet: UNet) -> None:
    webui.devices.dtype_unet = torch.float16
    specs = COMBINATIONS["both, uneven"]
    unet.bfloat16()
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(specs))
    step(host, 1, 1)
    x, context = (t.bfloat16() for t in inputs(2, 7))
    found = call_unet(unet, x, context)
    assert {t.dtype for t in found} == {torch.bfloat16}
    wanted = attended(unet.float(), injection_of(specs), (COND, UNCOND), x.float(), context.float())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


# Rows that can't be told


@pytest.mark.parametrize(("uncond", "calls"), [(1, [3]), (1, [1, 2]), (None, [2]), (2, [2, 2])])
def test_a_call_beyond_the_step_with_another_text_is_refused(
    webui: SimpleNamespace, unet: UNet, uncond: int | None, calls: list[int]
) -> None:
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(COMBINATIONS["joint"]))
    step(host, 1, uncond)
    *fine, wrong = calls
    for rows in fine:
        call_unet(unet, *inputs(rows, 7))
    with pytest.raises(IPAdapterError, match="neither the prompt nor the negative"):
        call_unet(unet, *inputs(wrong, 7))


@pytest.mark.parametrize("roles", [(UNCOND,), (COND,), (UNCOND, COND), (COND, UNCOND, UNCOND)])
@pytest.mark.parametrize("padding", [-2, 0, 3])
def test_a_call_beyond_the_step_is_told_by_its_text(
    webui: SimpleNamespace, unet: UNet, roles: tuple[int, ...], padding: int
) -> None:
    """As self-attention guidance does with the uncond text. Pad options make a call's text longer or shorter."""
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(COMBINATIONS["joint"]))
    x, context = inputs(2, 7)
    host.on_step(SimpleNamespace(text_cond=context[:1], text_uncond={"crossattn": context[1:]}))
    call_unet(unet, x, context)
    texts = {COND: context[0], UNCOND: context[1]}
    given = torch.stack([texts[role] for role in roles])
    given = F.pad(given, (0, 0, 0, padding)) if padding > 0 else given[:, : 7 + padding]
    x = inputs(len(roles), 7, seed=3)[0]
    found = call_unet(unet, x, given)
    assert_all_close(found, attended(unet, injection_of(COMBINATIONS["joint"]), roles, x, given))


def test_a_call_outside_every_step_is_refused(webui: SimpleNamespace, unet: UNet) -> None:
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(COMBINATIONS["joint"]))
    with pytest.raises(IPAdapterError, match="neither the prompt nor the negative"):
        call_unet(unet, *inputs(2, 7))


@pytest.mark.parametrize("combination", ["joint", "joint, no uncond", "decoupled"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_layer_with_other_rows_than_its_unet_is_refused(
    webui: SimpleNamespace, unet: UNet, combination: str, rows: int
) -> None:
    """As when another extension calls the projections once for each region."""
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(COMBINATIONS[combination]))
    step(host, 1, 1)
    x, context = inputs(rows, 7)
    with pytest.raises(IPAdapterError, match=f"sees {rows} rows where the UNet was called with 0"):
        unet.layer(SD15[0])(x, context)
    call_unet(unet, *inputs(2, 7))
    with pytest.raises(IPAdapterError, match=f"sees {rows} rows where the UNet was called with 2"):
        unet.layer(SD15[0])(x, context)


# Coming and going


def test_detach_takes_every_hook_out_and_leaves_others(webui: SimpleNamespace, unet: UNet) -> None:
    x, context = inputs(2, 7)
    plain = call_unet(unet, x, context)
    host, p = A1111Host(), job(unet)
    calls: list[str] = []
    unet.layer(SD15[0]).to_k.register_forward_hook(lambda *_: calls.append("theirs"))
    host.detach(p)  # nothing there yet
    host.attach(p, injection_of(COMBINATIONS["both"]))
    assert all_hooks(unet) == 1 + 1 + 4 * LAYERS
    host.attach(p, injection_of(COMBINATIONS["joint"]))
    assert all_hooks(unet) == 1 + 1 + 4 * LAYERS
    step(host, 1, 1)
    assert not torch.equal(call_unet(unet, x, context)[0], plain[0])
    host.detach(p)
    host.detach(p)
    assert all_hooks(unet) == 1
    step(host, 1, 1)  # the callback of a later job is harmless
    assert all(torch.equal(a, b) for a, b in zip(call_unet(unet, x, context), plain, strict=True))
    assert calls == ["theirs"] * 2


def test_another_unet_is_noticed_and_gets_the_hooks(webui: SimpleNamespace, unet: UNet) -> None:
    """A refiner of another configuration brings one in the middle of sampling."""
    host, p = A1111Host(), job(unet)
    injection = injection_of(COMBINATIONS["joint"])
    assert not host.check(p, injection, unet)
    host.attach(p, injection)
    assert host.check(p, injection, unet)
    other = UNet().requires_grad_(False)
    p.sd_model.model.diffusion_model = other
    assert not host.check(p, injection, unet)
    host.attach(p, injection)
    assert (all_hooks(unet), all_hooks(other)) == (0, 1 + 4 * LAYERS)
    step(host, 1, 1)
    x, context = inputs(2, 7)
    wanted = attended(other, injection_of(COMBINATIONS["joint"]), (COND, UNCOND), x, context)
    assert_all_close(call_unet(other, x, context), wanted)


@pytest.mark.parametrize("method", ["sample", "sample_img2img"])
@pytest.mark.parametrize("end", ["finished", "interrupted", "skipped", "raised"])
def test_the_hooks_go_however_sampling_ends(webui: SimpleNamespace, unet: UNet, method: str, end: str) -> None:
    def sample(*args: object) -> str:
        assert all_hooks(unet) == 1 + 4 * LAYERS
        if end == "raised":
            raise RuntimeError("out of memory")
        if end != "finished":
            setattr(webui.shared.state, end, True)
        return "latent"

    after: list[str] = []
    host, p = A1111Host(), job(unet, **{method: sample})
    for _ in range(2):  # img2img samples a whole batch count with one sampler
        webui.shared.state.interrupted = webui.shared.state.skipped = False
        host.attach(p, injection_of(COMBINATIONS["joint"]))
        host.around_sampling(p, lambda: after.append(end))
        if end == "raised":
            with pytest.raises(RuntimeError, match="out of memory"):
                getattr(p.sampler, method)("x")
        else:
            assert getattr(p.sampler, method)("x") == "latent"
        assert all_hooks(unet) == 0
    assert after == (["finished"] * 2 if end == "finished" else [])


def test_what_is_raised_after_sampling_ends_the_job_without_hooks(webui: SimpleNamespace, unet: UNet) -> None:
    def after() -> None:
        raise IPAdapterError("it never acted")

    host, p = A1111Host(), job(unet, sample=lambda *_: "latent")
    host.attach(p, injection_of(COMBINATIONS["joint"]))
    host.around_sampling(p, after)
    with pytest.raises(IPAdapterError, match="never acted"):
        p.sampler.sample()
    assert all_hooks(unet) == 0


def test_a_failure_in_the_callback_ends_the_next_unet_call(webui: SimpleNamespace, unet: UNet) -> None:
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(COMBINATIONS["joint"]))
    step(host, 1, 1)
    host.fail_in_sampling(p, "the sentence")
    with pytest.raises(IPAdapterError, match="the sentence"):
        call_unet(unet, *inputs(2, 7))
    host.detach(p)
    assert all_hooks(unet) == 0
    call_unet(unet, *inputs(2, 7))


def test_a_failure_in_the_callback_ends_the_sampling_also_when_attaching_failed(
    webui: SimpleNamespace, unet: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refiner's UNet for which the device has no room left, say."""
    host, p, injection = A1111Host(), job(unet), injection_of(COMBINATIONS["joint"])
    host.attach(p, injection)
    monkeypatch.setattr(injection, "to", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        host.attach(p, injection)
    host.fail_in_sampling(p, "the sentence")
    with pytest.raises(IPAdapterError, match="the sentence"):
        call_unet(unet, *inputs(2, 7))
    host.detach(p)
    assert all_hooks(unet) == 0


def test_a_step_whose_uncond_the_webui_left_out(webui: SimpleNamespace, unet: UNet) -> None:
    """Then a further call, of another extension, isn't uncond because uncond rows are left."""
    host, p = A1111Host(), job(unet)
    host.attach(p, injection_of(COMBINATIONS["joint"]))
    x, context = inputs(2, 7)
    for second in (COND, UNCOND):
        host.on_step(SimpleNamespace(text_cond=context[:1], text_uncond=context[1:]))
        for role in (COND, second):
            found = call_unet(unet, x[:1], context[role : role + 1])
            wanted = attended(unet, injection_of(COMBINATIONS["joint"]), (role,), x[:1], context[role : role + 1])
            assert_all_close(found, wanted)


# What it says of the WebUI


def test_the_unet_is_described(webui: SimpleNamespace, unet: UNet) -> None:
    info = A1111Host().unet_info(job(unet))
    assert info.identity is unet
    assert info.keys == SD15
    assert info.widths == tuple(WIDTHS[key.block] for key in SD15)
    assert (info.context_width, info.device, info.dtype) == (CONTEXT, torch.device("cpu"), torch.float32)


def test_a_replaced_unet_an_edit_model_and_other_unets_are_refused(webui: SimpleNamespace, unet: UNet) -> None:
    host = A1111Host()
    edit = job(unet)
    edit.sd_model.cond_stage_key = "edit"
    with pytest.raises(IPAdapterError, match="edits pictures by instruction"):
        host.unet_info(edit)
    with pytest.raises(IPAdapterError, match="has 0 cross-attention layers"):
        host.unet_info(job(nn.Linear(1, 1)))
    unet.middle_block = nn.ModuleList([nn.Identity()])
    with pytest.raises(IPAdapterError, match="has 15 cross-attention layers"):
        host.unet_info(job(unet))
    webui.sd_unet.current_unet = object()
    with pytest.raises(IPAdapterError, match="SD Unet to None"):
        host.unet_info(job(unet))


def test_modules_run_without_grad_and_autocast_in_float32_on_a_cpu(webui: SimpleNamespace) -> None:
    module = nn.Linear(2, 2).half()
    with torch.inference_mode():
        made = A1111Host().run(module, lambda device, dtype: module(torch.ones(1, 2, device=device, dtype=dtype)))
    assert (made.dtype, made.requires_grad, made.is_inference()) == (torch.float32, False, False)


# Pictures for single items of the batch


def placed() -> Injection:
    """A unit for each of two items, one of each formulation."""
    specs: list[Spec] = [(JOINT, 0.7, (4,), (4,)), (DECOUPLED, 0.9, (4,), (4,))]
    weighed = [weigh(prompts(s, 100 * n), s[0], s[1], (), WIDEST, COND) for n, s in enumerate(specs)]
    terms = [Term(s[0], Window(), w, items=frozenset({n})) for n, (s, w) in enumerate(zip(specs, weighed, strict=True))]
    return Injection(terms, LAYERS)


def attended_by_item(
    unet: UNet, roles: tuple[int, ...], items: tuple[int, ...], x: Tensor, context: Tensor
) -> list[Tensor]:
    """Row by row, each with the terms of its item alone, in an injection that knows no items."""
    whole = placed()
    rows = []
    for n, (role, item) in enumerate(zip(roles, items, strict=True)):
        alone = Injection([Term(t.formulation, t.window, t.weighed) for t in whole.terms if t.items == {item}], LAYERS)
        rows.append(attended(unet, alone, (role,), x[n : n + 1], context[n : n + 1]))
    return [torch.cat(layer) for layer in zip(*rows, strict=True)]


@pytest.mark.parametrize("parts", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("told", [True, False])
def test_rows_of_an_item_get_its_pictures(
    webui: SimpleNamespace, unet: UNet, optimiser: str, parts: tuple[int, int], split: int, told: bool
) -> None:
    """Prompts with AND have several rows one after another."""
    if not told and parts[0] != parts[1]:
        pytest.skip("a sampler that doesn't say how many parts a prompt has must have equally many")
    host, p = A1111Host(), job(unet)
    host.attach(p, placed())
    roles = (COND,) * sum(parts) + (UNCOND,) * 2
    items = (*(0,) * parts[0], *(1,) * parts[1], 0, 1)
    cond = SimpleNamespace(batch=[[None] * n for n in parts])
    sampler = SimpleNamespace(sampler_extra_args={"cond": cond} if told else {})
    texts = [torch.zeros(n, 7, CONTEXT) for n in (sum(parts), 2)]
    for _ in range(2):
        host.on_step(
            SimpleNamespace(text_cond=texts[0], text_uncond=texts[1], denoiser=SimpleNamespace(sampler=sampler))
        )
        start = 0
        while start < len(roles):
            span = slice(start, start + (split or len(roles)))
            x, context = inputs(len(roles[span]), 7, seed=start)
            found = call_unet(unet, x, context)
            assert_all_close(found, attended_by_item(unet, roles[span], items[span], x, context))
            start = span.stop


def test_a_call_beyond_the_step_has_one_row_for_each_item_or_is_refused(webui: SimpleNamespace, unet: UNet) -> None:
    host, p = A1111Host(), job(unet)
    host.attach(p, placed())
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randn(2, 7, CONTEXT, generator=generator) for _ in range(2)]
    host.on_step(SimpleNamespace(text_cond=texts[0], text_uncond=texts[1]))
    x, _ = inputs(4, 7)
    call_unet(unet, x, torch.cat(texts))
    again = call_unet(unet, x[:2], texts[1])
    assert_all_close(again, attended_by_item(unet, (UNCOND, UNCOND), (0, 1), x[:2], texts[1]))
    with pytest.raises(IPAdapterError, match="which row belongs to which"):
        call_unet(unet, x[:3], torch.cat(texts)[:3])


def test_what_needs_the_device_waits_for_a_checkpoint_that_is_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTOMATIC1111 loads the first one in a thread, in which torch's load_state_dict takes no ``assign``."""
    loading, asked = threading.Lock(), threading.Event()

    class Shared(ModuleType):
        @property
        def sd_model(self) -> object:
            asked.set()
            with loading:
                return None

    call_queue = ModuleType("modules.call_queue")
    call_queue.queue_lock = threading.Lock()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modules", ModuleType("modules"))
    monkeypatch.setitem(sys.modules, "modules.call_queue", call_queue)
    monkeypatch.setitem(sys.modules, "modules.shared", Shared("modules.shared"))
    entered = threading.Event()

    def work() -> None:
        with A1111Host().alone():
            entered.set()

    with loading:
        thread = threading.Thread(target=work)
        thread.start()
        assert asked.wait(10) and not entered.wait(0.1)
    assert entered.wait(10)
    thread.join()
    assert call_queue.queue_lock.acquire(blocking=False)

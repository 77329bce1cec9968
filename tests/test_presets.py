"""Compatibility presets: each program's formula in float64, over the whole UNet; and how a unit takes a preset."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_ipadapter import IPAdapterModel
from lib_ipadapter.attn2 import CurrentPlan, make_replacement
from lib_ipadapter.encoding import resolve_uncond, uncond_pixels
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.formulations import resolve_formulation
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.layers import LAYOUTS, first_in_forward_order
from lib_ipadapter.plan import ImageKV, scaled_dot_product
from lib_ipadapter.presets import PRESETS
from lib_ipadapter.progress import Window
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.units import Unit
from lib_ipadapter.weighing import weigh
from tests.adapter_files import base_adapter, plus_adapter
from tests.embedded import Host
from tests.embedded.ldm import DiffusionModel
from tests.embedded.shapes import SHAPES, make_unet
from tests.embedded_hosts import request, unit

WEIGHT = 0.7
Images = list[tuple[Tensor, Tensor]]
"""K and V of a row's pictures, ``[T, C]``."""
Formula = Callable[[Tensor, Tensor, Tensor, Images, int, float], Tensor]
"""``(q [N, C], k, v of the text, pictures, heads, C over the widest layer's) -> [N, C]`` of one row."""


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    made = []
    for qh, kh, vh in zip(*(each.chunk(heads, dim=1) for each in (q, k, v)), strict=True):
        made.append(torch.softmax(qh @ kh.T / qh.shape[1] ** 0.5, dim=1) @ vh)
    return torch.cat(made, dim=1)


def fooocus(q: Tensor, k: Tensor, v: Tensor, images: Images, heads: int, share: float) -> Tensor:
    """Key and mean of value scaled with the weight and the channels, all in one softmax."""
    weight = WEIGHT * share
    for keys, values in images:
        mean = values.mean(0, keepdim=True)
        k, v = torch.cat([k, keys * weight]), torch.cat([v, values - mean + mean * weight])
    return attention(q, k, v, heads)


def v_only(q: Tensor, k: Tensor, v: Tensor, images: Images, heads: int, share: float) -> Tensor:
    """Another attention over the pictures' tokens, times the weight."""
    keys, values = (torch.cat(kind) for kind in zip(*images, strict=True))
    return attention(q, k, v, heads) + WEIGHT * attention(q, keys, values, heads)


FORMULAS: dict[str, Formula] = {
    "like Fooocus": fooocus,
    "like ComfyUI": v_only,
    "like A1111 ControlNet": v_only,
    "like diffusers": v_only,
    "like Forge": v_only,
}


@contextmanager
def computing(unet: nn.Module, formula: Formula, rows: list[list[list[Tensor]]]) -> Iterator[None]:
    """Every cross-attention of diffusers' UNet by a formula; ``rows``: of each row its pictures' ``[K0, V0, …]``."""
    blocks = (*unet.down_blocks, *unet.up_blocks, unet.mid_block)
    layers = [m for block in blocks for name, m in block.named_modules() if name.endswith("attn2")]
    widest = max(layer.to_k.out_features for layer in layers)

    class Processor:
        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
            q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            pairs = [[(kv[2 * self.number][0], kv[2 * self.number + 1][0]) for kv in row] for row in rows]
            share = attn.to_k.out_features / widest
            made = [formula(q[n], k[n], v[n], pairs[n], attn.heads, share) for n in range(len(rows))]
            return attn.to_out[0](torch.stack(made))

    before = [layer.processor for layer in layers]
    for number, layer in enumerate(layers):
        layer.processor = Processor(number)
    yield
    for layer, processor in zip(layers, before, strict=True):
        layer.processor = processor


def off(name: str, formula: Formula, shape: str, variant: str, pictures: int) -> float:
    """Largest difference of the UNet's outputs over the largest value: ours by a preset, and the formula's."""
    unit = Unit.from_json({"preset": name, "weight": WEIGHT})
    unet = make_unet(SHAPES[shape], 0)
    blocks = (*unet.down_blocks, *unet.up_blocks, unet.mid_block)
    widths = [m.to_k.out_features for b in blocks for name, m in b.named_modules() if name.endswith("attn2")]
    context = unet.config.cross_attention_dim
    adapter = (base_adapter if variant == "base" else plus_adapter)(widths, context)
    model = IPAdapterModel(adapter, plus=variant == "plus", cross_attention_dim=context, clip_embeddings_dim=128)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(pictures + 1, *((128,) if variant == "base" else (257, 128)), generator=generator)
    if resolve_uncond(unit.uncond, variant) == "zero embeds":
        features[-1] = 0
    kv = [model.ip_layers(model.image_proj_model(each[None])) for each in features]
    x = torch.randn(2, 4, 16, 24, generator=generator)
    text = torch.randn(2, 77, context, generator=generator)
    y = torch.randn(2, SHAPES[shape].vector, generator=generator) if SHAPES[shape].is_sdxl else None
    timesteps = torch.tensor([500, 500])

    formulation = resolve_formulation(unit.formulation, variant)
    images = [ImageKV.from_pairs(each) for each in kv]
    prompts = {COND: tuple(images[:-1]), UNCOND: (images[-1],) * pictures}
    term = Term(formulation, Window(), weigh(prompts, formulation, unit.weight, (), max(widths), UNCOND))
    keys = LAYOUTS[len(widths)]
    current = CurrentPlan(
        Injection([term], len(keys)), lambda _: None, lambda *_: Call((UNCOND, COND), 0.5), first_in_forward_order(keys)
    )
    replacements = {tuple(key): make_replacement(n, current, scaled_dot_product, None) for n, key in enumerate(keys)}
    options = {"patches_replace": {"attn2": replacements}}
    ours = DiffusionModel(copy.deepcopy(unet))(x, timesteps, text, y, transformer_options=options)

    unet.double()
    rows = [[kv[-1]] * pictures, kv[:-1]]
    precise = [[[each.double() for each in one] for one in row] for row in rows]
    with computing(unet, formula, precise):
        theirs = unet(
            x.double(), timesteps, text.double(), class_labels=None if y is None else y.double(), return_dict=False
        )[0]
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
@pytest.mark.parametrize("variant", ["base", "plus"])
@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_whole_unet_output_by_each_programs_formula(name: str, variant: str, shape: str) -> None:
    assert off(name, FORMULAS[name], shape, variant, pictures=2) < 1e-4


@torch.no_grad()
def test_another_programs_formula_is_told_apart() -> None:
    assert off("like ComfyUI", fooocus, "sd15", "plus", pictures=1) > 1e-3
    assert off("like Fooocus", v_only, "sd15", "plus", pictures=1) > 1e-3


@pytest.mark.parametrize(
    ("name", "base", "plus"),
    [
        ("like Fooocus", "file", "file"),
        ("like ComfyUI", "zero embeds", "black picture"),
        ("like A1111 ControlNet", "zero embeds", "zero pixels"),
        ("like diffusers", "zero embeds", "zero pixels"),
        ("like Forge", "zero embeds", "black picture"),
    ],
)
def test_the_negative_side(name: str, base: str, plus: str) -> None:
    uncond = Unit.from_json({"preset": name}).uncond
    assert (resolve_uncond(uncond, "base"), resolve_uncond(uncond, "plus")) == (base, plus)


def test_black_is_black_before_normalising_and_zero_pixels_are_zero_behind_it() -> None:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
    black = uncond_pixels("black picture", 8).double()
    assert (black - (-mean / std).view(1, 3, 1, 1)).abs().max() < 1e-6
    assert not uncond_pixels("zero pixels", 8).any()


def test_fields_of_the_unit_win_and_the_preset_itself_is_not_written() -> None:
    made = Unit.from_json(json.dumps({"preset": "like A1111 ControlNet", "timing": "noise", "weight": 0.5}))
    assert made == Unit(formulation="decoupled", preparation="squash", uncond="auto", timing="noise", weight=0.5)
    assert "preset" not in made.to_json() and Unit.from_json(made.to_json()) == made
    other = Unit.from_json({"preset": "like Fooocus", "uncond": "none"})
    assert (other.formulation, other.uncond, other.negative) == ("joint", "none", "")


@pytest.mark.parametrize("value", ["like Photoshop", "", 3, None])
def test_an_unknown_preset_is_refused_with_those_that_there_are(value: object) -> None:
    with pytest.raises(IPAdapterError, match=r'"preset" is .*allowed are like Fooocus, like ComfyUI,.* like Forge\.'):
        Unit.from_json({"preset": value})


def test_a_job_by_preset_is_the_job_with_its_fields(host: Host) -> None:
    asked = {**unit("plus"), "preset": "like Forge"}
    fields = {**unit("plus"), **PRESETS["like Forge"].fields}
    by_preset, by_fields = (host.txt2img(**request(each)) for each in (asked, fields))
    assert by_preset.image.tobytes() == by_fields.image.tobytes()
    assert by_preset.infotexts == by_fields.infotexts
    assert by_preset.image.tobytes() != host.txt2img(**request(unit("plus"))).image.tobytes()

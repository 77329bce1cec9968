"""The small UNets: diffusers' arithmetic to the bit, patches as Forge applies them, LDM block names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tests.embedded.attention import attention_function
from tests.embedded.ldm import DiffusionModel
from tests.embedded.patcher import KModel, UnetPatcher
from tests.embedded.predictor import Predictor
from tests.embedded.shapes import SHAPES, make_unet

FORGE_KEYS = {
    "block",
    "block_index",
    "transformer_index",
    "cond_or_uncond",
    "cond_indices",
    "uncond_indices",
    "cond_mark",
    "sigmas",
    "original_shape",
    "n_heads",
    "dim_head",
}
LAYOUT = {
    "sd15": {
        **{("input", i): 1 for i in (1, 2, 4, 5, 7, 8)},
        ("middle", 0): 1,
        **{("output", i): 1 for i in range(3, 12)},
    },
    "sdxl": {
        **{("input", i): 2 for i in (4, 5)},
        **{("input", i): 10 for i in (7, 8)},
        ("middle", 0): 10,
        **{("output", i): 10 for i in (0, 1, 2)},
        **{("output", i): 2 for i in (3, 4, 5)},
    },
}
"""Transformer blocks per UNet block, in the order in which the UNet runs them."""


def call(model: DiffusionModel, shape: str, options: dict[str, Any] | None = None, **kwargs: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    spec = SHAPES[shape]
    x = torch.randn((2, 4, 10, 13), generator=generator)
    context = torch.randn((2, 77, spec.context), generator=generator)
    y = torch.randn((2, spec.vector), generator=generator) if spec.is_sdxl else None
    with torch.inference_mode():
        return model(x, torch.tensor([300.0, 300.0]), context, y, transformer_options=options, **kwargs)


def host_options() -> dict[str, Any]:
    sigmas = torch.tensor([1.0])
    mark = torch.tensor([1.0, 0.0])
    return {"cond_or_uncond": [1, 0], "sigmas": sigmas, "cond_mark": mark, "cond_indices": [1], "uncond_indices": [0]}


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    return attention_function(q, k, v, extra["n_heads"])


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def shaped(request: pytest.FixtureRequest) -> tuple[str, DiffusionModel]:
    return request.param, DiffusionModel(make_unet(SHAPES[request.param], 0))


def test_bit_equal_to_diffusers_default_attention(shaped: tuple[str, DiffusionModel]) -> None:
    shape, model = shaped
    ours = call(model, shape)
    reference = copy.deepcopy(model)
    reference.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(ours, call(reference, shape))
    every_block = dict.fromkeys(LAYOUT[shape], plain)
    replaced = call(model, shape, {**host_options(), "patches_replace": {"attn1": every_block, "attn2": every_block}})
    assert torch.equal(ours, replaced)


def test_every_layer_is_reached_in_the_hosts_order_with_forges_options(shaped: tuple[str, DiffusionModel]) -> None:
    shape, model = shaped
    seen: list[dict[str, Any]] = []

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        seen.append(dict(extra) | {"q": tuple(q.shape), "k": tuple(k.shape)})
        return plain(q, k, v, extra)

    call(model, shape, {**host_options(), "patches_replace": {"attn2": dict.fromkeys(LAYOUT[shape], note)}})
    expected = [(*block, depth) for block, depths in LAYOUT[shape].items() for depth in range(depths)]
    assert [(*s["block"], s["block_index"]) for s in seen] == expected
    assert len(seen) == SHAPES[shape].attention_layers
    blocks = list(LAYOUT[shape])
    assert [s["transformer_index"] for s in seen] == [blocks.index((name, number)) for name, number, _ in expected]
    assert all(set(s) - {"q", "k"} == FORGE_KEYS for s in seen)
    assert all(s["original_shape"] == [2, 4, 10, 13] and s["q"][0] == 2 and s["k"][1] == 77 for s in seen)
    assert all(s["q"][2] == s["n_heads"] * s["dim_head"] for s in seen)
    if shape == "sd15":
        assert {s["n_heads"] for s in seen} == {8}
        # sizes halve with ceil: 10x13, 5x7, 3x4, 2x2
        assert [s["q"][1] for s in seen[:7]] == [130, 130, 35, 35, 12, 12, 4]
    else:
        assert {s["dim_head"] for s in seen} == {16}


def test_block_names_lead_to_each_layer_once(shaped: tuple[str, DiffusionModel]) -> None:
    shape, model = shaped
    names = [name for name, _ in model.named_modules() if name.endswith(".attn2")]
    assert len(names) == SHAPES[shape].attention_layers
    first = model.middle_block[1].transformer_blocks[0].attn2
    assert first.to_k.in_features == SHAPES[shape].context
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.unet.parameters()}
    for (name, number), depths in LAYOUT[shape].items():
        block = model.middle_block if name == "middle" else getattr(model, f"{name}_blocks")[number]
        assert len(block[1].transformer_blocks) == depths


def test_a_three_tuple_key_wins_and_other_patches_run_around_it() -> None:
    model = DiffusionModel(make_unet(SHAPES["sd15"], 0))
    order: list[str] = []
    extras: list[int] = []

    def named(name: str) -> Any:
        def replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
            order.append(name)
            extras.append(id(extra))
            return plain(q, k, v, extra)

        return replace

    def before(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict[str, Any]) -> Any:
        if extra["block"] == ("middle", 0):
            order.append("attn2_patch")
            extras.append(id(extra))
            assert context is value
            assert n.shape[-1] == 128
        return n, torch.cat([context, context], 1), torch.cat([value, value], 1)

    def after(n: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        if extra["block"] == ("middle", 0):
            order.append("attn2_output_patch")
            extras.append(id(extra))
        return n

    options = host_options() | {
        "patches_replace": {"attn2": {("middle", 0): named("two"), ("middle", 0, 0): named("three")}},
        "patches": {"attn2_patch": [before], "attn2_output_patch": [after]},
    }
    out = call(model, "sd15", options)
    assert order == ["attn2_patch", "three", "attn2_output_patch"]
    assert len(set(extras)) == 1
    # twice the same tokens: the softmax over them is the same attention
    assert torch.allclose(out, call(model, "sd15"), atol=1e-4)
    with pytest.raises(ValueError, match="input_block_patch"):
        call(model, "sd15", {"patches": {"input_block_patch": [after]}})


def test_clone_copies_options_deeply_but_keeps_functions() -> None:
    patcher = UnetPatcher(
        KModel(DiffusionModel(make_unet(SHAPES["sd15"], 0)), Predictor()), torch.device("cpu"), torch.device("cpu")
    )

    class Callable:
        def __init__(self) -> None:
            self.tensor = torch.ones(1)

        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Any) -> torch.Tensor:
            return plain(q, k, v, extra)

    first = patcher.clone()
    first.set_model_attn2_replace(plain, "input", 1)
    first.set_model_attn2_replace(Callable(), "input", 1, 0)
    assert patcher.model_options == {"transformer_options": {}}
    second = first.clone()
    a, b = (p.model_options["transformer_options"]["patches_replace"]["attn2"] for p in (first, second))
    assert a["input", 1] is b["input", 1]
    assert a["input", 1, 0] is not b["input", 1, 0]
    assert a["input", 1, 0].tensor is not b["input", 1, 0].tensor
    assert second.model is patcher.model
    assert isinstance(second, UnetPatcher)

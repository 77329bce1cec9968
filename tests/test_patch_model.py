"""``patch_model`` against the formula in float64, and against everything that makes it wrong elsewhere."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from lib_ipadapter import IPAdapterError, patch_model, sdp
from tests.bare_model import LAYERS, BareModel, joint_formula, random_kv

ROLE_LISTS = [[1, 0], [0], [1, 0, 0], [0, 1], [1]]
TEXT, QUERIES, HEADS = 7, 5, 8


def call_layer(
    model: BareModel,
    layout: str,
    layer: int,
    roles: list[int],
    batch: int,
    seed: int = 1,
    text: int = TEXT,
    **extra: Any,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    key, width = LAYERS[layout][layer]
    generator = torch.Generator().manual_seed(seed + layer)
    rows = len(roles) * batch
    q, k, v = (torch.randn(rows, n, width, generator=generator) for n in (QUERIES, text, text))
    options = {"n_heads": HEADS, "cond_or_uncond": roles, "block": key[:2], "block_index": key[2], **extra}
    return model.replacements[key](q, k, v, options), (q, k, v)


def relative_error(out: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.abs(out.double().numpy() - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
@pytest.mark.parametrize("pictures", [1, 2, 3])
def test_every_layer_equals_the_formula(layout: str, pictures: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kvs = [(random_kv(layout, 4, generator), random_kv(layout, 6, generator)) for _ in range(pictures)]
    weights = [-0.5, 1.0, 1.7][:pictures]
    model = patch_model(BareModel(0.2), [(kv, 0.5, w) for kv, w in zip(kvs, weights, strict=True)])
    assert set(model.replacements) == {key for key, _ in LAYERS[layout]}
    for layer in range(len(LAYERS[layout])):
        out, (q, k, v) = call_layer(model, layout, layer, [1, 0], 1)
        wanted = joint_formula(q, k, v, HEADS, [1, 0], list(zip(kvs, weights, strict=True)), layer)
        assert relative_error(out, wanted) < 1e-5


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
@pytest.mark.parametrize("weight", [-0.5, 0.3, 1, 1.7])
@pytest.mark.parametrize(("roles", "batch"), list(itertools.product(ROLE_LISTS, [1, 2, 3])))
def test_rows_weights_and_batches(layout: str, weight: float, roles: list[int], batch: int) -> None:
    generator = torch.Generator().manual_seed(3)
    kv = random_kv(layout, 4, generator), random_kv(layout, 4, generator)
    model = patch_model(BareModel(0.2), [(kv, 0.5, weight)])
    for layer in (0, 5, len(LAYERS[layout]) - 1):
        out, (q, k, v) = call_layer(model, layout, layer, roles, batch)
        by_row = [role for role in roles for _ in range(batch)]
        assert relative_error(out, joint_formula(q, k, v, HEADS, by_row, [(kv, weight)], layer)) < 1e-5


def test_cond_and_uncond_with_different_numbers_of_tokens() -> None:
    generator = torch.Generator().manual_seed(4)
    kv = random_kv("sd15", 3, generator), random_kv("sd15", 16, generator)
    model = patch_model(BareModel(0.2), [(kv, 1.0, 1.0)])
    for roles, batch in itertools.product(ROLE_LISTS, [1, 2]):
        out, (q, k, v) = call_layer(model, "sd15", 4, roles, batch)
        by_row = [role for role in roles for _ in range(batch)]
        assert relative_error(out, joint_formula(q, k, v, HEADS, by_row, [(kv, 1.0)], 4)) < 1e-5


def test_split_calls_of_one_step() -> None:
    generator = torch.Generator().manual_seed(5)
    kv = random_kv("sdxl", 16, generator), random_kv("sdxl", 16, generator)
    model = patch_model(BareModel(torch.tensor([0.3])), [(kv, 0.5, 0.6)])
    sigmas = torch.tensor([3.0])
    for roles in ([1], [0], [0]):
        for layer in range(70):
            out, (q, k, v) = call_layer(model, "sdxl", layer, roles, 1, sigmas=sigmas)
            assert relative_error(out, joint_formula(q, k, v, HEADS, roles, [(kv, 0.6)], layer)) < 1e-5


def test_tiles_repeat_the_rows() -> None:
    generator = torch.Generator().manual_seed(18)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    model = patch_model(BareModel(0.2), [(kv, 1.0, 1.0)])
    key, width = LAYERS["sd15"][0]
    q, k, v = (torch.randn(6, n, width, generator=generator) for n in (QUERIES, TEXT, TEXT))
    options = {
        "n_heads": HEADS,
        "cond_or_uncond": [1, 0],
        "sigmas": torch.tensor([3.0]),
        "original_shape": [6, 4, 8, 8],
    }
    out = model.replacements[key](q, k, v, options)
    assert relative_error(out, joint_formula(q, k, v, HEADS, [1, 0] * 3, [(kv, 1.0)], 0)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    kv = random_kv("sd15", 4, generator, dtype), random_kv("sd15", 4, generator, dtype)
    model = patch_model(BareModel(0.0), [(kv, 1.0, 0.8)])
    key, width = LAYERS["sd15"][2]
    q, k, v = (torch.randn(2, n, width, generator=generator).to(dtype) for n in (QUERIES, TEXT, TEXT))
    out = model.replacements[key](q, k, v, {"n_heads": HEADS, "cond_or_uncond": [1, 0]})
    assert out.dtype == dtype
    assert relative_error(out, joint_formula(q, k, v, HEADS, [1, 0], [(kv, 0.8)], 2)) < 0.02


def test_weights_in_another_precision_than_the_model() -> None:
    generator = torch.Generator().manual_seed(7)
    kv = random_kv("sd15", 4, generator, torch.float16), random_kv("sd15", 4, generator, torch.float16)
    model = patch_model(BareModel(0.0), [(kv, 1.0, 1.0)])
    out, (q, k, v) = call_layer(model, "sd15", 0, [1, 0], 1)
    assert out.dtype == torch.float32
    assert relative_error(out, joint_formula(q, k, v, HEADS, [1, 0], [(kv, 1.0)], 0)) < 2e-3


def test_weight_zero_is_no_task_at_all() -> None:
    generator = torch.Generator().manual_seed(8)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    assert "patches_replace" not in patch_model(BareModel(), [(kv, 1.0, 0.0)]).model_options["transformer_options"]
    with_zero = patch_model(BareModel(), [(kv, 1.0, 1.0), (kv, 1.0, 0.0)])
    without = patch_model(BareModel(), [(kv, 1.0, 1.0)])
    assert torch.equal(call_layer(with_zero, "sd15", 3, [1, 0], 1)[0], call_layer(without, "sd15", 3, [1, 0], 1)[0])


@pytest.mark.parametrize(
    ("stop", "step", "acts"),
    [(0.5, 0.0, True), (0.5, 0.499, True), (0.5, 0.5, False), (0.5, 1.0, False), (1.0, 1.0, True), (1.0, 0.99, True)],
)
def test_stop(stop: float, step: float, acts: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    model = patch_model(BareModel(step), [(kv, stop, 1.0)])
    out, (q, k, v) = call_layer(model, "sd15", 0, [1, 0], 1)
    plain = sdp(q, k, v, {"n_heads": HEADS})
    assert torch.equal(out, plain) is not acts


def test_progress_is_followed_from_step_to_step() -> None:
    generator = torch.Generator().manual_seed(10)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    original = BareModel(torch.tensor([0.1]))
    model = patch_model(original, [(kv, 0.5, 1.0)])
    early, _ = call_layer(model, "sd15", 0, [1, 0], 1)
    original.model.diffusion_model.current_step = torch.tensor([0.9])
    late, (q, k, v) = call_layer(model, "sd15", 0, [1, 0], 1)
    assert torch.equal(late, sdp(q, k, v, {"n_heads": HEADS}))
    assert not torch.equal(early, late)


@pytest.mark.parametrize(
    ("extra", "acts"),
    [
        ({"timesteps": torch.tensor([900.0, 900.0])}, True),
        ({"timesteps": torch.tensor([400.0, 400.0])}, False),
        ({"sigmas": torch.tensor([14.6])}, True),
        ({"sigmas": torch.tensor([1.7])}, True),
        ({"sigmas": torch.tensor([1.5])}, False),
        ({"sigmas": torch.tensor([0.03])}, False),
    ],
)
def test_progress_from_timesteps_or_sigmas(extra: dict[str, Any], acts: bool) -> None:
    generator = torch.Generator().manual_seed(11)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    model = patch_model(BareModel(None), [(kv, 0.5, 1.0)])
    out, (q, k, v) = call_layer(model, "sd15", 0, [1, 0], 1, **extra)
    assert torch.equal(out, sdp(q, k, v, {"n_heads": HEADS})) is not acts


def test_the_original_model_and_its_options_stay() -> None:
    generator = torch.Generator().manual_seed(12)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    model = BareModel()
    model.model_options["transformer_options"]["patches_replace"] = {"attn2": {("input", 1): "mine"}}
    before = copy.deepcopy(model.model_options)
    shared = BareModel()
    shared.clone = lambda: shared_clone  # type: ignore[method-assign]
    shared_clone = BareModel()
    shared_clone.model_options = model.model_options  # a clone() that copies nothing
    patch_model(shared, [(kv, 1.0, 1.0)])
    assert model.model_options == before


def test_a_replacement_that_is_already_there_gets_the_extended_tokens() -> None:
    generator = torch.Generator().manual_seed(13)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    seen: list[int] = []

    def previous(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        seen.append(k.shape[1])
        return sdp(q, k, v, extra_options) + 1

    for there in (("input", 1), ("input", 1, 0)):
        model = BareModel(0.0)
        model.model_options["transformer_options"]["patches_replace"] = {"attn2": {there: previous}}
        patched = patch_model(model, [(kv, 1.0, 1.0)])
        out, (q, k, v) = call_layer(patched, "sd15", 0, [1, 0], 1)
        assert relative_error(out, joint_formula(q, k, v, HEADS, [1, 0], [(kv, 1.0)], 0) + 1) < 1e-5
    assert seen == [TEXT + 4] * 2


def test_replacements_survive_a_deep_copy_without_copying_their_tensors() -> None:
    generator = torch.Generator().manual_seed(14)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    model = patch_model(BareModel(), [(kv, 1.0, 1.0)])
    for key, replacement in copy.deepcopy(model.replacements).items():
        assert replacement is model.replacements[key]
        assert inspect.isfunction(replacement)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([(([torch.zeros(1, 4, 8)] * 30, [torch.zeros(1, 4, 8)] * 30), 1.0, 1.0)], "30 tensors"),
        ([(([torch.zeros(1, 4, 8)] * 32, [torch.zeros(1, 4, 8)] * 140), 1.0, 1.0)], "70"),
        ([(([torch.zeros(1, 4, 8)] * 32, [torch.zeros(1, 4, 8)] * 32), 1.0, float("nan"))], "finite"),
        ([(([torch.zeros(1, 4, 8)] * 32, [torch.zeros(1, 4, 8)] * 32), float("nan"), 1.0)], "finite"),
    ],
)
def test_wrong_tasks_are_refused(tasks: list[Any], words: str) -> None:
    with pytest.raises(IPAdapterError, match=words):
        patch_model(BareModel(), tasks)


def test_rows_that_fit_no_chunks_are_refused() -> None:
    generator = torch.Generator().manual_seed(15)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    model = patch_model(BareModel(), [(kv, 1.0, 1.0)])
    q = torch.randn(3, QUERIES, 320)
    with pytest.raises(IPAdapterError, match="3 rows"):
        model.replacements["input", 1, 0](q, q, q, {"n_heads": HEADS, "cond_or_uncond": [1, 0]})


def meta_unet_call(model: BareModel, layout: str, roles: list[int], batch: int) -> None:
    order = sorted(LAYERS[layout], key=lambda each: (["input", "middle", "output"].index(each[0][0]), each[0][1:]))
    for key, width in order:
        q, k, v = (torch.empty(len(roles) * batch, n, width, device="meta") for n in (QUERIES, TEXT, TEXT))
        model.replacements[key](q, k, v, {"n_heads": HEADS, "cond_or_uncond": roles})


@pytest.mark.parametrize("step", [0.1, torch.tensor([0.1])])
@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_no_device_read_or_copy_in_any_layer(
    layout: str, step: float | torch.Tensor, forbidden_calls: list[str]
) -> None:
    generator = torch.Generator().manual_seed(16)
    kv = random_kv(layout, 4, generator), random_kv(layout, 4, generator)
    uneven = random_kv(layout, 4, generator), random_kv(layout, 7, generator)
    model = patch_model(BareModel(step), [(kv, 1.0, 1.0), (uneven, 0.5, 0.5)])
    cases = [([1, 0], 1), ([1, 0], 3), ([0, 1, 0], 2), ([0], 1)]
    for roles, batch in cases:  # the first call of a kind may bring K/V to the device, once
        meta_unet_call(model, layout, roles, batch)
    forbidden_calls.clear()
    for roles, batch in cases:
        meta_unet_call(model, layout, roles, batch)
    assert forbidden_calls == (["__float__"] * len(cases) if isinstance(step, torch.Tensor) else [])


def test_the_first_call_moves_all_layers_of_one_width_together(forbidden_calls: list[str]) -> None:
    generator = torch.Generator().manual_seed(17)
    kv = random_kv("sd15", 4, generator), random_kv("sd15", 4, generator)
    model = patch_model(BareModel(0.1), [(kv, 1.0, 1.0)])
    forbidden_calls.clear()
    meta_unet_call(model, "sd15", [1, 0], 1)
    # of each width, K and V of both roles together: they are weighed before
    assert forbidden_calls == ["to"] * 3

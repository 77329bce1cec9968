"""The random model files that the acceptance runner draws with: laid out as the public ones, random throughout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import checkpoints
from tests.checkpoints import SD15, SDXL, SDXL_REFINER, SMALL_SDXL, Noise, Shapes, unet


@pytest.mark.parametrize(
    ("shapes", "count"),
    [
        (unet(SD15), 859_520_964),
        (unet(SDXL), 2_567_463_684),
        (checkpoints.autoencoder(SDXL.vae_width), 83_653_863),
        (checkpoints.text_tower(768, 12), 123_060_480 + 77),
        # With the scale of the logits, which is no part of the tower's own 694 659 840.
        (checkpoints.open_text_tower(1280, 32), 694_659_840 + 1),
    ],
    ids=["SD1.5", "SDXL", "autoencoder", "CLIP-L", "bigG"],
)
def test_models_are_as_large_as_the_public_ones(shapes: Shapes, count: int) -> None:
    assert sum(map(math.prod, shapes.values())) == count


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        (checkpoints.sd15_checkpoint(), {"model": 686, "first_stage_model": 248, "cond_stage_model": 197}),
        (checkpoints.sdxl_checkpoint(), {"model": 1680, "first_stage_model": 248, "conditioner": 197 + 390}),
        (checkpoints.sdxl_refiner_checkpoint(), {"model": 1220, "first_stage_model": 248, "conditioner": 390}),
    ],
    ids=["SD1.5", "SDXL", "refiner"],
)
def test_checkpoints_have_as_many_tensors_as_the_public_ones(shapes: Shapes, sizes: dict[str, int]) -> None:
    parts = [key.split(".")[0] for key in shapes]
    assert {part: parts.count(part) for part in parts} == sizes


def test_attention_widths_are_those_of_the_unet() -> None:
    for layout in (SD15, SDXL, SDXL_REFINER, SMALL_SDXL):
        keys = {key: shape for key, shape in unet(layout).items() if key.endswith("attn2.to_k.weight")}
        order = ("input_blocks", "output_blocks", "middle_block")
        widths = [shape[0] for part in order for key, shape in keys.items() if key.startswith(part)]
        assert layout.attention_widths == widths
        assert {shape[1] for shape in keys.values()} == {layout.context}


def test_a_file_is_read_by_the_library_and_depends_on_its_seed(tmp_path: Path) -> None:
    shapes = checkpoints.sdxl_checkpoint(SMALL_SDXL)
    one, again, other = (
        checkpoints.write_random(tmp_path / "models" / f"{name}.safetensors", shapes, seed)
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    assert one.read_bytes() == again.read_bytes()
    tensors, others = load_file(one), load_file(other)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes
    indices = tensors.pop("conditioner.embedders.0.transformer.text_model.embeddings.position_ids")
    assert indices.dtype == torch.int64 and indices.tolist() == [list(range(77))]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert not any(torch.equal(tensor, others[key]) for key, tensor in tensors.items() if tensor.ndim)
    with safe_open(one, "pt") as file:
        assert set(file.keys()) == set(shapes)


def test_no_two_tensors_and_no_two_rows_are_equal() -> None:
    noise = Noise(0)
    # Larger than the block, and by far.
    large = noise.tensor((4 * Noise.LENGTH // 1280, 1280), 1.0)
    assert large.isfinite().all() and abs(large.float().mean()) < 0.01 and abs(large.float().std() - 1) < 0.01
    assert len({tuple(row) for row in large[:, :16].tolist()}) == len(large)
    # Each window starts elsewhere, as many times as there are values: the length is prime.
    assert all(Noise.LENGTH % divisor for divisor in range(2, math.isqrt(Noise.LENGTH) + 1))
    assert 0 < Noise.STEP < Noise.LENGTH
    vectors = {tuple(noise.tensor((64,), 1.0).tolist()) for _ in range(3000)}
    assert len(vectors) == 3000

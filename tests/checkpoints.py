"""Random model files of true layout, full-size or small: checkpoints of SD1.5, SDXL and its refiner, image encoders.

Keys and shapes follow the layout of the public single-file checkpoints (ldm's UNet and autoencoder, the text towers of
CLIP and OpenCLIP).
The weights say nothing; they are scaled so that activations neither vanish nor overflow in half precision.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Sizes of one family; widths may be scaled down, the block layout may not."""

    width: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    depths: tuple[int, ...] = (1, 1, 1, 0)
    """Transformer blocks of each attention, by level; 0 where a level has none."""
    middle_depth: int = 1
    context: int = 768
    vector: int = 0
    linear_projection: bool = False
    """Whether a spatial transformer's ``proj_in`` and ``proj_out`` are linear layers rather than 1 x 1 convolutions."""
    vae_width: int = 128
    text_width: int = 768
    text_layers: int = 12
    """Of CLIP's text tower; 0 where a family has none."""
    big_text_width: int = 1280
    big_text_layers: int = 0
    """Of OpenCLIP's bigG text tower, likewise."""

    @property
    def attention_widths(self) -> list[int]:
        """Width of every cross-attention layer in an adapter file's order: input, output, middle."""
        widths = [self.width * m for m in self.multipliers]
        levels = list(zip(widths, self.depths, strict=True))
        down = [w for w, depth in levels for _ in range(2 * depth)]
        up = [w for w, depth in reversed(levels) for _ in range(3 * depth)]
        return [*down, *up, *[widths[-1]] * self.middle_depth]


SD15 = Layout()
SMALL_SD15 = replace(SD15, width=64, context=64, vae_width=32, text_width=64, text_layers=2)
SDXL = Layout(
    multipliers=(1, 2, 4),
    depths=(0, 2, 10),
    middle_depth=10,
    context=2048,
    vector=2816,
    linear_projection=True,
    big_text_layers=32,
)
SDXL_REFINER = replace(
    SDXL,
    width=384,
    multipliers=(1, 2, 4, 4),
    depths=(0, 4, 4, 0),
    middle_depth=4,
    context=1280,
    vector=2560,
    text_layers=0,
)
SMALL_SDXL = replace(
    SDXL,
    width=64,
    depths=(0, 1, 2),
    middle_depth=2,
    context=128,
    vector=64 + 6 * 256,
    vae_width=32,
    text_width=64,
    text_layers=2,
    big_text_width=64,
    big_text_layers=2,
)


def unet(layout: Layout) -> Shapes:
    """``model.diffusion_model.*`` without that prefix."""
    c, embedding = layout.width, 4 * layout.width
    shapes: Shapes = {}

    def weight_and_bias(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def residual(name: str, into: int, out: int) -> None:
        weight_and_bias(f"{name}.in_layers.0", into)
        weight_and_bias(f"{name}.in_layers.2", out, into, 3, 3)
        weight_and_bias(f"{name}.emb_layers.1", out, embedding)
        weight_and_bias(f"{name}.out_layers.0", out)
        weight_and_bias(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            weight_and_bias(f"{name}.skip_connection", out, into, 1, 1)

    def transformer(name: str, width: int, depth: int) -> None:
        kernel = () if layout.linear_projection else (1, 1)
        weight_and_bias(f"{name}.norm", width)
        weight_and_bias(f"{name}.proj_in", width, width, *kernel)
        for block in (f"{name}.transformer_blocks.{d}" for d in range(depth)):
            for attention, context in (("attn1", width), ("attn2", layout.context)):
                shapes[f"{block}.{attention}.to_q.weight"] = (width, width)
                shapes[f"{block}.{attention}.to_k.weight"] = (width, context)
                shapes[f"{block}.{attention}.to_v.weight"] = (width, context)
                weight_and_bias(f"{block}.{attention}.to_out.0", width, width)
            weight_and_bias(f"{block}.ff.net.0.proj", 8 * width, width)
            weight_and_bias(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                weight_and_bias(f"{block}.{norm}", width)
        weight_and_bias(f"{name}.proj_out", width, width, *kernel)

    weight_and_bias("time_embed.0", embedding, c)
    weight_and_bias("time_embed.2", embedding, embedding)
    if layout.vector:
        weight_and_bias("label_emb.0.0", embedding, layout.vector)
        weight_and_bias("label_emb.0.2", embedding, embedding)
    weight_and_bias("input_blocks.0.0", c, 4, 3, 3)
    skips, width, number = [c], c, 1
    for level, (multiplier, depth) in enumerate(zip(layout.multipliers, layout.depths, strict=True)):
        for _ in range(2):
            residual(f"input_blocks.{number}.0", width, c * multiplier)
            width = c * multiplier
            if depth:
                transformer(f"input_blocks.{number}.1", width, depth)
            skips.append(width)
            number += 1
        if level < len(layout.multipliers) - 1:
            weight_and_bias(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    residual("middle_block.0", width, width)
    transformer("middle_block.1", width, layout.middle_depth)
    residual("middle_block.2", width, width)
    number = 0
    for level, (multiplier, depth) in reversed(list(enumerate(zip(layout.multipliers, layout.depths, strict=True)))):
        for last in (False, False, True):
            residual(f"output_blocks.{number}.0", width + skips.pop(), c * multiplier)
            width = c * multiplier
            if depth:
                transformer(f"output_blocks.{number}.1", width, depth)
            if last and level:
                weight_and_bias(f"output_blocks.{number}.{2 if depth else 1}.conv", width, width, 3, 3)
            number += 1
    weight_and_bias("out.0", width)
    weight_and_bias("out.2", 4, width, 3, 3)
    return shapes


def autoencoder(width: int) -> Shapes:
    """``first_stage_model.*`` without that prefix: ldm's AutoencoderKL, factor 8, 4 channels."""
    shapes: Shapes = {}

    def weight_and_bias(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def block(name: str, into: int, out: int) -> None:
        weight_and_bias(f"{name}.norm1", into)
        weight_and_bias(f"{name}.conv1", out, into, 3, 3)
        weight_and_bias(f"{name}.norm2", out)
        weight_and_bias(f"{name}.conv2", out, out, 3, 3)
        if into != out:
            weight_and_bias(f"{name}.nin_shortcut", out, into, 1, 1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.block_1", width, width)
        weight_and_bias(f"{name}.attn_1.norm", width)
        for projection in ("q", "k", "v", "proj_out"):
            weight_and_bias(f"{name}.attn_1.{projection}", width, width, 1, 1)
        block(f"{name}.block_2", width, width)

    widths = [width * m for m in (1, 2, 4, 4)]
    weight_and_bias("encoder.conv_in", width, 3, 3, 3)
    into = width
    for level, out in enumerate(widths):
        for n in range(2):
            block(f"encoder.down.{level}.block.{n}", into, out)
            into = out
        if level < 3:
            weight_and_bias(f"encoder.down.{level}.downsample.conv", out, out, 3, 3)
    middle("encoder.mid", into)
    weight_and_bias("encoder.norm_out", into)
    weight_and_bias("encoder.conv_out", 8, into, 3, 3)
    weight_and_bias("decoder.conv_in", into, 4, 3, 3)
    middle("decoder.mid", into)
    for level, out in reversed(list(enumerate(widths))):
        for n in range(3):
            block(f"decoder.up.{level}.block.{n}", into, out)
            into = out
        if level:
            weight_and_bias(f"decoder.up.{level}.upsample.conv", out, out, 3, 3)
    weight_and_bias("decoder.norm_out", into)
    weight_and_bias("decoder.conv_out", 3, into, 3, 3)
    weight_and_bias("quant_conv", 8, 8, 1, 1)
    weight_and_bias("post_quant_conv", 4, 4, 1, 1)
    return shapes


def clip_tower(prefix: str, width: int, layers: int, mlp: int) -> Shapes:
    """The encoder layers of a CLIP tower in the layout of Hugging Face; ``prefix`` ends in a point."""
    shapes: Shapes = {}
    for layer in (f"{prefix}encoder.layers.{n}" for n in range(layers)):
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{projection}.weight"] = (width, width)
            shapes[f"{layer}.self_attn.{projection}.bias"] = (width,)
        for name, shape in (
            ("mlp.fc1", (mlp, width)),
            ("mlp.fc2", (width, mlp)),
            *_norms("layer_norm1", "layer_norm2", width=width),
        ):
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
    return shapes


def _norms(*names: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, (width,)) for name in names)


def text_tower(width: int, layers: int) -> Shapes:
    """CLIP's text tower, ``text_model.*``."""
    shapes = clip_tower("text_model.", width, layers, 4 * width)
    shapes["text_model.embeddings.token_embedding.weight"] = (49408, width)
    shapes["text_model.embeddings.position_embedding.weight"] = (77, width)
    shapes["text_model.embeddings.position_ids"] = (1, 77)
    shapes["text_model.final_layer_norm.weight"] = shapes["text_model.final_layer_norm.bias"] = (width,)
    return shapes


def open_text_tower(width: int, layers: int) -> Shapes:
    """OpenCLIP's text tower in its own layout: query, key and value in one projection."""
    shapes: Shapes = {}
    for block in (f"transformer.resblocks.{n}" for n in range(layers)):
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        for name, shape in (
            ("attn.out_proj", (width, width)),
            ("mlp.c_fc", (4 * width, width)),
            ("mlp.c_proj", (width, 4 * width)),
            *_norms("ln_1", "ln_2", width=width),
        ):
            shapes[f"{block}.{name}.weight"] = shape
            shapes[f"{block}.{name}.bias"] = shape[:1]
    shapes["token_embedding.weight"] = (49408, width)
    shapes["positional_embedding"] = (77, width)
    shapes["ln_final.weight"] = shapes["ln_final.bias"] = (width,)
    shapes["text_projection"] = (width, width)
    shapes["logit_scale"] = ()
    return shapes


def image_encoder(width: int = 1280, layers: int = 32, mlp: int = 5120, projection: int = 1024) -> Shapes:
    """A CLIP vision tower with its projection, 224 pixels in patches of 14; ViT-H/14 by default."""
    shapes = clip_tower("vision_model.", width, layers, mlp)
    shapes["vision_model.embeddings.class_embedding"] = (width,)
    shapes["vision_model.embeddings.patch_embedding.weight"] = (width, 3, 14, 14)
    shapes["vision_model.embeddings.position_embedding.weight"] = (257, width)
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes[f"vision_model.{norm}.weight"] = shapes[f"vision_model.{norm}.bias"] = (width,)
    shapes["visual_projection.weight"] = (projection, width)
    return shapes


def sd15_checkpoint(layout: Layout = SD15) -> Shapes:
    """A whole SD1.5 checkpoint."""
    return _whole(layout, {"cond_stage_model.transformer": text_tower(layout.text_width, layout.text_layers)})


def sdxl_checkpoint(layout: Layout = SDXL) -> Shapes:
    """A whole SDXL base checkpoint."""
    towers = {
        "conditioner.embedders.0.transformer": text_tower(layout.text_width, layout.text_layers),
        "conditioner.embedders.1.model": open_text_tower(layout.big_text_width, layout.big_text_layers),
    }
    return _whole(layout, towers)


def sdxl_refiner_checkpoint(layout: Layout = SDXL_REFINER) -> Shapes:
    """A whole checkpoint of the SDXL refiner, which has the one text tower."""
    tower = open_text_tower(layout.big_text_width, layout.big_text_layers)
    return _whole(layout, {"conditioner.embedders.0.model": tower})


def _whole(layout: Layout, text_towers: dict[str, Shapes]) -> Shapes:
    parts = {
        "model.diffusion_model": unet(layout),
        "first_stage_model": autoencoder(layout.vae_width),
        **text_towers,
    }
    return {f"{part}.{key}": shape for part, shapes in parts.items() for key, shape in shapes.items()}


# Where a weight of size one over the root of its fan-in gives too little contrast, or too much.
_GAINS = {
    "to_q.": 1.6,
    "to_k.": 1.6,
    "q_proj.": 1.6,
    "k_proj.": 1.6,
    "in_proj_": 1.6,
    "to_k_ip.": 1.6,
    "out_proj.": 0.6,
    "fc2.": 0.6,
    "c_proj.": 0.6,
}


class Noise:
    """Normal values for many tensors, quickly: windows of one block, no two of which start at the same place.

    A window longer than the block repeats it; the block's length is prime, so the rows of a matrix still differ.
    """

    LENGTH = 4_194_301
    STEP = 2_592_221
    """From one window's start to the next one's, around the block."""

    def __init__(self, seed: int) -> None:
        values = torch.randn(self.LENGTH, generator=torch.Generator().manual_seed(seed))
        self._values = torch.cat((values, values))
        self._start = 0

    def tensor(self, shape: tuple[int, ...], scale: float, mean: float = 0.0) -> torch.Tensor:
        """The next window, in half precision."""
        count = math.prod(shape)
        self._start = (self._start + self.STEP) % self.LENGTH
        window = self._values[self._start : self._start + min(count, self.LENGTH)]
        window = (window * scale + mean).half()
        return window.repeat(-(-count // self.LENGTH))[:count].reshape(shape)


def random_tensor(key: str, shape: tuple[int, ...], noise: Noise) -> torch.Tensor:
    """One weight in half precision, or the one table of indices that checkpoints hold."""
    if _is_indices(key):
        return torch.arange(math.prod(shape)).reshape(shape)
    if len(shape) == 1:
        return noise.tensor(shape, 0.1, mean=1) if key.endswith("weight") else noise.tensor(shape, 0.05)
    if ("embedding.weight" in key and "patch" not in key) or key.endswith("positional_embedding"):
        return noise.tensor(shape, 0.3)
    gain = next((gain for part, gain in _GAINS.items() if part in key), 1.0)
    return noise.tensor(shape, gain / math.sqrt(math.prod(shape[1:])))


def _is_indices(key: str) -> bool:
    return key.endswith("position_ids")


def write_random(path: Path, shapes: Shapes, seed: int) -> Path:
    """Writes a safetensors file that depends on ``seed`` alone, one tensor after another: none waits in memory."""
    # Indices come first: every tensor then starts at a multiple of its element's size.
    keys = sorted(shapes, key=lambda key: (not _is_indices(key), key))
    header: dict[str, object] = {}
    end = 0
    for key in keys:
        name, size = ("I64", 8) if _is_indices(key) else ("F16", 2)
        start, end = end, end + size * math.prod(shapes[key])
        header[key] = {"dtype": name, "shape": shapes[key], "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = Noise(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            file.write(random_tensor(key, shapes[key], noise).numpy().data)
    return path

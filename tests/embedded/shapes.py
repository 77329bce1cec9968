"""The small UNets: diffusers' ``UNet2DConditionModel`` laid out as SD1.5 or SDXL, at small width, with seeded weights.

Block layout, number and order of the cross-attention layers, heads and the way SDXL's vector enters are the real
ones; only the widths are small. The random weights are scaled so that a picture isn't constant and what the
cross-attention reads has a visible share in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn

ENTRY_WIDTH = 16
"""Width of the sinusoidal embedding of each of SDXL's six size numbers."""


@dataclass(frozen=True)
class Shape:
    """Layout of one family, at our widths."""

    name: str
    is_sdxl: bool
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    """Transformer blocks per attention, by level; 0 where a level has none."""
    heads: tuple[int, ...]
    context: int
    """Width of the text context."""
    mid_depth: int
    attention_layers: int

    @property
    def vector(self) -> int:
        """Width of the vector beside the context (pooled text and six embedded numbers); 0 for SD1.5."""
        return self.context + 6 * ENTRY_WIDTH if self.is_sdxl else 0


SHAPES: dict[str, Shape] = {
    "sd15": Shape("sd15", False, (32, 64, 128, 128), (1, 1, 1, 0), (8, 8, 8, 8), 64, 1, 16),
    "sdxl": Shape("sdxl", True, (32, 64, 128), (0, 2, 10), (2, 4, 8), 128, 10, 70),
}


def make_unet(shape: Shape, seed: int) -> UNet2DConditionModel:
    """A UNet of that layout with weights that depend on ``seed`` alone; float32, eval mode, no gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=shape.channels,
            down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in shape.depths),
            up_block_types=tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(shape.depths)),
            layers_per_block=2,
            transformer_layers_per_block=(*tuple(max(d, 1) for d in shape.depths[:-1]), shape.mid_depth),
            attention_head_dim=shape.heads,
            cross_attention_dim=shape.context,
            norm_num_groups=16,
            use_linear_projection=shape.is_sdxl,
            class_embed_type="projection" if shape.is_sdxl else None,
            projection_class_embeddings_input_dim=shape.vector or None,
        )
        unet.eval().requires_grad_(False)
        _enliven(unet, shape)
    return unet


def _enliven(unet: UNet2DConditionModel, shape: Shape) -> None:
    """Scale the weights so that the text has a say and the output has unit variance."""
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            # sharper attention over the text, and a larger share of it in the stream
            _spread(module.to_q, 1.5)
            _spread(module.to_k, 1.5)
            _spread(module.to_v, 1.0)
            _spread(module.to_out[0], 1.0)
        elif name.endswith("proj_out") and isinstance(module, (nn.Linear, nn.Conv2d)):
            _spread(module, 0.7)
    sample = torch.randn(2, 4, 16, 16)
    context = torch.randn(2, 77, shape.context)
    labels = torch.randn(2, shape.vector) if shape.is_sdxl else None
    outputs = [unet(sample, t, context, class_labels=labels).sample for t in (10.0, 400.0, 990.0)]
    out = torch.cat(outputs)
    unet.conv_out.weight /= out.std()
    unet.conv_out.bias.zero_()


def _spread(module: nn.Linear | nn.Conv2d, gain: float) -> None:
    """Give the weights the standard deviation at which unit-variance input leaves with standard deviation ``gain``."""
    fan_in = module.weight[0].numel()
    nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in))

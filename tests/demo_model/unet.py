"""SD1.5's UNet at small widths, with the tensor names of LDM checkpoints (``model.diffusion_model.*``).

The layout is Rombach et al.'s (arXiv 2112.10752): four levels of two residual blocks, spatial transformers on the first
three and in the middle, sixteen cross-attention layers in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32

ImageKV = tuple[Tensor, Tensor]
"""Keys and values of image tokens for one layer, each ``[B, T, C]``."""


@dataclass(frozen=True)
class UNetSizes:
    """Widths of the UNet; what LDM's configuration calls them stands beside each."""

    channels: int = 64
    """``model_channels``."""
    multiples: tuple[int, ...] = (1, 1, 1, 1)
    """``channel_mult``; the first is 1, since LDM's last convolution takes ``model_channels``."""
    heads: int = 8
    """``num_heads``."""
    context: int = 64
    """``context_dim``."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the four levels."""
        return tuple(self.channels * m for m in self.multiples)


class GroupNorm(nn.GroupNorm):
    """LDM's group norm.

    It has 32 groups whatever the width. Groups of one channel would take from every channel its mean, and so from a
    plain picture its colour; therefore no level here is narrower than 64.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(GROUPS, channels, eps=eps)


def zeroed(module: nn.Conv2d) -> nn.Conv2d:
    """A convolution that begins by adding nothing."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class Attention(nn.Module):
    """Multi-head attention; over the input itself if ``context`` is None."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.joint = False
        """Attend to text and image tokens at once rather than apart."""
        self.heard: tuple[Tensor, Tensor] | None = None
        """Queries and what came of them, of the last call, while ``listens``: ``[B, heads, N, width // heads]``."""
        self.listens = False
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries by head over ``k`` and ``v``, ``[B, tokens, width]``."""
        return F.scaled_dot_product_attention(q, self._split(k), self._split(v))

    def forward(self, x: Tensor, context: Tensor | None = None, image: ImageKV | None = None) -> Tensor:
        """``[B, N, width]`` in and out; ``image`` is attended to apart and added, unless ``joint``."""
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        if image is not None and self.joint:
            k, v, image = torch.cat([k, image[0]], 1), torch.cat([v, image[1]], 1), None
        q = self._split(q)
        out = self.attend(q, k, v)
        if image is not None:
            out = out + self.attend(q, *image)
        if self.listens:
            self.heard = q, out
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class _Gated(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class _Block(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, width, heads)
        self.ff = _FeedForward(width)
        self.attn2 = Attention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, image: ImageKV | None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context, image) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm = GroupNorm(width, 1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([_Block(width, context, heads)])
        self.proj_out = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, context: Tensor, image: ImageKV | None) -> Tensor:
        """``[B, width, H, W]`` in and out."""
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        h = self.transformer_blocks[0](h, context, image)
        return self.proj_out(h.transpose(1, 2).reshape(x.shape)) + x


class ResBlock(nn.Module):
    """Two convolutions with the timestep's embedding between them."""

    def __init__(self, width_in: int, width: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.ModuleList(
            [GroupNorm(width_in, 1e-5), nn.Identity(), nn.Conv2d(width_in, width, 3, padding=1)]
        )
        self.emb_layers = nn.ModuleList([nn.Identity(), nn.Linear(embedding, width)])
        self.out_layers = nn.ModuleList(
            [GroupNorm(width, 1e-5), nn.Identity(), nn.Identity(), zeroed(nn.Conv2d(width, width, 3, padding=1))]
        )
        self.skip_connection = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``embedding [B, E]`` has passed its SiLU already."""
        h = self.in_layers[2](F.silu(self.in_layers[0](x)))
        h = h + self.emb_layers[1](embedding)[:, :, None, None]
        return self.out_layers[3](F.silu(self.out_layers[0](h))) + self.skip_connection(x)


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """The noise predictor."""

    def __init__(self, sizes: UNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        embedding = 4 * sizes.channels
        self.time_embed = nn.ModuleList(
            [nn.Linear(sizes.channels, embedding), nn.Identity(), nn.Linear(embedding, embedding)]
        )
        widths = sizes.widths
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, sizes.channels, 3, padding=1)])])
        skips, width = [sizes.channels], sizes.channels
        last = len(widths) - 1

        def transformer(level: int) -> list[nn.Module]:
            return [SpatialTransformer(width, sizes.context, sizes.heads)] if level < last else []

        for level, target in enumerate(widths):
            for _ in range(2):
                block = ResBlock(width, target, embedding)
                width = target
                self.input_blocks.append(nn.ModuleList([block, *transformer(level)]))
                skips.append(width)
            if level < last:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [
                ResBlock(width, width, embedding),
                SpatialTransformer(width, sizes.context, sizes.heads),
                ResBlock(width, width, embedding),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for n in range(3):
                made: list[nn.Module] = [ResBlock(width + skips.pop(), widths[level], embedding)]
                width = widths[level]
                made += transformer(level)
                if level and n == 2:
                    made.append(Upsample(width))
                self.output_blocks.append(nn.ModuleList(made))
        self.out = nn.ModuleList([GroupNorm(width, 1e-5), nn.Identity(), zeroed(nn.Conv2d(width, 4, 3, padding=1))])

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, images: Sequence[ImageKV] | None = None) -> Tensor:
        """Predicted noise.

        Args:
            x: noisy latents ``[B, 4, H, W]``.
            timesteps: ``[B]``, 0 to 999.
            context: ``[B, tokens, context]``.
            images: keys and values of image tokens of the sixteen layers, in an adapter file's order.
        """
        e = self.time_embed[0](timestep_embedding(timesteps, self.sizes.channels).to(x.dtype))
        e = F.silu(self.time_embed[2](F.silu(e)))
        # a file lists the layers of the input blocks, then of the output blocks, then of the middle
        order = None if images is None else iter([*images[:6], images[-1], *images[6:-1]])

        def run(block: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in block:
                if isinstance(layer, ResBlock):
                    h = layer(h, e)
                elif isinstance(layer, SpatialTransformer):
                    h = layer(h, context, None if order is None else next(order))
                else:
                    h = layer(h)
            return h

        h, skips = x, []
        for block in self.input_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], 1))
        return self.out[2](F.silu(self.out[0](h)))

    def set_joint(self, joint: bool) -> None:
        """Let all cross-attention layers take image tokens jointly with the text's, or apart from them."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.joint = joint

    def cross_attention(self) -> list[Attention]:
        """Its layers, in an adapter file's order."""
        blocks = [*self.input_blocks, *self.output_blocks, self.middle_block]
        layers = [layer for block in blocks for layer in block if isinstance(layer, SpatialTransformer)]
        return [layer.transformer_blocks[0].attn2 for layer in layers]

    def layer_widths(self) -> list[int]:
        """Width of each cross-attention layer, in an adapter file's order."""
        return [layer.to_q.in_features for layer in self.cross_attention()]


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Cosines, then sines, ``[B, width]``."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)

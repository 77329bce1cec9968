"""LDM's ``AutoencoderKL`` at small widths, with its tensor names (``first_stage_model.*``): factor 8, 4 channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unet import GroupNorm

LATENT_CHANNELS = 4
FACTOR = 8
SCALE = 0.18215
"""By which every host multiplies latents; those of the exported file have standard deviation 1 after it."""


@dataclass(frozen=True)
class VAESizes:
    """Widths, under the names of LDM's configuration."""

    ch: int = 64
    ch_mult: tuple[int, ...] = (1, 1, 1, 1)
    num_res_blocks: int = 1


class _Resnet(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(width_in, 1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = GroupNorm(width, 1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (to(h).flatten(2).transpose(1, 2)[:, None] for to in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


class _Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = _Resnet(width, width)
        self.attn_1 = _Attention(width)
        self.block_2 = _Resnet(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """One resolution, and the way to the next."""

    def __init__(self, width_in: int, width: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Resnet(width_in if n == 0 else width, width) for n in range(blocks))


class Encoder(nn.Module):
    """Pixels to twice the latents: means, and logarithms of variances."""

    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        widths = [sizes.ch * m for m in sizes.ch_mult]
        self.conv_in = nn.Conv2d(3, sizes.ch, 3, padding=1)
        self.down = nn.ModuleList()
        before = sizes.ch
        for n, width in enumerate(widths):
            level = _Level(before, width, sizes.num_res_blocks)
            if n < len(widths) - 1:
                level.downsample = _Down(width)
            self.down.append(level)
            before = width
        self.mid = _Middle(before)
        self.norm_out = GroupNorm(before, 1e-6)
        self.conv_out = nn.Conv2d(before, 2 * LATENT_CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        widths = [sizes.ch * m for m in sizes.ch_mult]
        before = widths[-1]
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, before, 3, padding=1)
        self.mid = _Middle(before)
        levels: list[_Level] = []
        for n, width in reversed(list(enumerate(widths))):
            level = _Level(before, width, sizes.num_res_blocks + 1)
            if n:
                level.upsample = _Up(width)
            levels.insert(0, level)
            before = width
        self.up = nn.ModuleList(levels)
        self.norm_out = GroupNorm(before, 1e-6)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """The autoencoder; pixels in -1..1."""

    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        self.encoder = Encoder(sizes)
        self.decoder = Decoder(sizes)
        self.quant_conv = nn.Conv2d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.post_quant_conv = nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 1)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, each ``[B, 4, H/8, W/8]``."""
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, pixels: Tensor) -> Tensor:
        """The mean as the UNet sees it: times ``SCALE``."""
        return self.moments(pixels)[0] * SCALE

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the UNet gives them to pixels."""
        return self.decoder(self.post_quant_conv(latents / SCALE))

    @torch.no_grad()
    def normalise(self, mean: Tensor, std: Tensor) -> None:
        """Shift and scale the latents' channels, so that ``encode`` gives mean 0 and deviation 1; pictures stay.

        Args:
            mean, std: of what :meth:`moments` gives now, ``[4]``.
        """
        factor = (1.0 / (SCALE * std)).to(self.quant_conv.weight)
        mean = mean.to(factor)
        weight, bias = self.quant_conv.weight, self.quant_conv.bias
        weight[:LATENT_CHANNELS] *= factor[:, None, None, None]
        bias[:LATENT_CHANNELS] = (bias[:LATENT_CHANNELS] - mean) * factor
        bias[LATENT_CHANNELS:] += 2 * factor.log()
        back = self.post_quant_conv
        back.bias += (back.weight[:, :, 0, 0] * mean).sum(1)
        back.weight /= factor[None, :, None, None]

"""A tiny random VAE: diffusers' ``AutoencoderKL``, scaled so that decoded latents use the range of a picture."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

LATENT_CHANNELS = 4


def make_vae(seed: int) -> AutoencoderKL:
    """An 8-fold VAE with weights that depend on ``seed`` alone; float32, eval mode, no gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=LATENT_CHANNELS,
            mid_block_add_attention=False,
        )
        vae.eval().requires_grad_(False)
        latents = torch.randn(4, LATENT_CHANNELS, 8, 8)
        pixels = vae.decode(latents).sample
        _normalise(vae.decoder.conv_out, pixels, 0.45)
        moments = vae.quant_conv(vae.encoder(torch.rand(4, 3, 64, 64) * 2 - 1))
        _normalise(vae.quant_conv, moments, 1.0)
    return vae


def _normalise(layer: torch.nn.Conv2d, output: torch.Tensor, spread: float) -> None:
    """Scale and shift a last layer so that each channel of ``output`` would have mean 0 and that spread."""
    std, mean = torch.std_mean(output, dim=(0, 2, 3))
    scale = spread / std
    assert layer.bias is not None
    layer.weight *= scale[:, None, None, None]
    layer.bias.copy_((layer.bias - mean) * scale)


class VAE:
    """What the host keeps of the VAE: pixels in -1..1 to latents and back."""

    latent_channels = LATENT_CHANNELS

    def __init__(self, module: AutoencoderKL, scale: float = 1.0) -> None:
        self.first_stage_model = module
        self.scale = scale
        """By which latents are multiplied for the UNet."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` in -1..1 -> latents ``[B, 4, H/8, W/8]`` (the mean, so requests repeat exactly)."""
        return self.first_stage_model.encode(pixels).latent_dist.mode() * self.scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents -> ``[B, 3, H, W]``, about -1..1."""
        return self.first_stage_model.decode(latents / self.scale).sample

"""The two image-prompt adapters as they are trained; their tensor names are those of the public files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lib_ipadapter.projections import DIM_HEAD, ImageProjModel, Resampler

from .clip import VisionSizes
from .unet import ImageKV, UNet

BASE_TOKENS, PLUS_TOKENS = 4, 16
PLUS_DEPTH = 4


class _LayerKV(nn.Module):
    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context, width, bias=False)
        self.to_v_ip = nn.Linear(context, width, bias=False)


class Adapter(nn.Module):
    """Image projection, and keys and values of every cross-attention layer."""

    def __init__(self, projection: nn.Module, widths: list[int], context: int) -> None:
        super().__init__()
        self.image_proj = projection
        self.ip_adapter = nn.ModuleDict({str(2 * i + 1): _LayerKV(context, w) for i, w in enumerate(widths)})

    def forward(self, features: Tensor) -> list[ImageKV]:
        """What the image encoder says to keys and values, in the file's order."""
        tokens = self.image_proj(features)
        return [(layer.to_k_ip(tokens), layer.to_v_ip(tokens)) for layer in self.ip_adapter.values()]

    @torch.no_grad()
    def begin_with(self, unet: UNet) -> None:
        """Start from the UNet's own keys and values, as the paper does (Ye et al., arXiv 2308.06721, §4.1)."""
        for own, attention in zip(self.ip_adapter.values(), unet.cross_attention(), strict=True):
            own.to_k_ip.weight.copy_(attention.to_k.weight)
            own.to_v_ip.weight.copy_(attention.to_v.weight)


def base_adapter(unet: UNet, vision: VisionSizes) -> Adapter:
    """Four tokens from the projected embedding."""
    context = unet.sizes.context
    return Adapter(ImageProjModel(context, vision.projection, BASE_TOKENS), unet.layer_widths(), context)


def plus_adapter(unet: UNet, vision: VisionSizes) -> Adapter:
    """Sixteen tokens from the penultimate states."""
    context = unet.sizes.context
    resampler = Resampler(
        dim=vision.width,
        depth=PLUS_DEPTH,
        dim_head=DIM_HEAD,
        heads=vision.width // DIM_HEAD,
        num_queries=PLUS_TOKENS,
        embedding_dim=vision.width,
        output_dim=context,
    )
    return Adapter(resampler, unet.layer_widths(), context)


def weighted(images: list[ImageKV], weight: float) -> list[ImageKV]:
    """The decoupled formulation's weight: that of what is added."""
    return [(k, v * weight) for k, v in images]

"""What other implementations do in each layer and UNet call, written from what they are known to do.

All of them are decoupled, compute K and V anew in every UNet call, and the two of the ComfyUI line read the noise level
off the device in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from tests.embedded.attention import attention_function

WIDEST_LAYER = 1280


@dataclass(frozen=True)
class Projections:
    """An adapter's K and V projection of one layer, on the device, and the image tokens ``[1, T, context]``."""

    to_k: nn.Linear
    to_v: nn.Linear
    conds: Sequence[Tensor]
    unconds: Sequence[Tensor]


def _kv(to: nn.Linear, cond: Tensor, uncond: Tensor, chunks: Sequence[int], images: int) -> Tensor:
    """Of both roles, for every row of the batch."""
    both = (to(cond).repeat(images, 1, 1), to(uncond).repeat(images, 1, 1))
    return torch.cat([both[role] for role in chunks])


@dataclass(frozen=True)
class ForgeBuiltIn:
    """Forge's own: an attention for each picture (one picture a unit), V weighted."""

    layer: Projections
    weight: float = 0.8

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        heads, chunks = extra_options["n_heads"], extra_options["cond_or_uncond"]
        images = q.shape[0] // len(chunks)
        out = attention_function(q, k, v, heads)
        for cond, uncond in zip(self.layer.conds, self.layer.unconds, strict=True):
            if extra_options["sigmas"][0].item() < 0:
                continue
            ip_k = _kv(self.layer.to_k, cond, uncond, chunks, images)
            ip_v = _kv(self.layer.to_v, cond, uncond, chunks, images)
            out = out + attention_function(q, ip_k, ip_v, heads) * self.weight
        return out


@dataclass(frozen=True)
class IPAdapterPlus:
    """ComfyUI_IPAdapter_plus: one attention over the tokens of all pictures.

    ``scales_k`` stands for its mode "K+mean(V) w/ C penalty", else it is "V only".
    """

    layer: Projections
    scales_k: bool
    weight: float = 0.8

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        heads, chunks = extra_options["n_heads"], extra_options["cond_or_uncond"]
        sigma = extra_options["sigmas"].detach().cpu()[0].item()
        out = attention_function(q, k, v, heads)
        if sigma < 0:
            return out
        cond, uncond = torch.cat(list(self.layer.conds), dim=1), torch.cat(list(self.layer.unconds), dim=1)
        images = q.shape[0] // len(chunks)
        ip_k = _kv(self.layer.to_k, cond, uncond, chunks, images)
        ip_v = _kv(self.layer.to_v, cond, uncond, chunks, images)
        if not self.scales_k:
            return out + attention_function(q, ip_k, ip_v, heads) * self.weight
        scale = self.weight * q.shape[2] / WIDEST_LAYER
        mean = torch.mean(ip_v, dim=1, keepdim=True)
        return out + attention_function(q, ip_k * scale, (ip_v - mean) + mean * scale, heads)


@contextmanager
def diffusers_adapter(unet: Any, adapter: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Any]:
    """diffusers' own IP-Adapter on its UNet, loaded; yields a context manager in which the UNet uses it.

    Outside that the UNet is as it was.
    """
    plain = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor2_0())
    unet._load_ip_adapter_weights([adapter])
    processors = {name: processor for name, processor in unet.attn_processors.items() if name in plain}
    for processor in processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.8]
            processor.to(unet.device, unet.dtype)
    projection = unet.encoder_hid_proj.to(unet.device, unet.dtype)

    def use(chosen: Mapping[str, Any], hidden: nn.Module | None) -> None:
        unet.encoder_hid_proj = None  # a resampler has attention of its own, which would be counted
        unet.set_attn_processor(dict(chosen))
        unet.encoder_hid_proj = hidden

    @contextmanager
    def used() -> Iterator[None]:
        use(processors, projection)
        try:
            yield
        finally:
            use(plain, None)

    use(plain, None)
    yield used

"""An IP-Adapter as a module: image projection, and K/V of every layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .kv import To_KV
from .projections import DIM_HEAD, ImageProjModel, MLPProjModel, Resampler, resampler_for


class IPAdapterModel(nn.Module):
    """Image projection and layer projections of one adapter, weights loaded and frozen.

    Args:
        state_dict: ``{"image_proj": {...}, "ip_adapter": {...}}``, keys without prefixes.
        plus: a Perceiver resampler over hidden states rather than a projection of the pooled embedding.
        cross_attention_dim: width of the UNet's text context.
        clip_embeddings_dim: width of the encoder output that the projection takes.
        clip_extra_context_tokens: image tokens a picture becomes.
        sdxl_plus: the resampler has SDXL's sizes (1280 wide, 20 heads) rather than the context's (12 heads).

    Where the tensors disagree with the arguments, the tensors win: depth, heads and widths of a resampler, and the
    MLP of the full-face adapter, are read from ``state_dict``.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Mapping[str, Tensor]],
        plus: bool,
        cross_attention_dim: int = 768,
        clip_embeddings_dim: int = 1024,
        clip_extra_context_tokens: int = 4,
        sdxl_plus: bool = False,
    ) -> None:
        super().__init__()
        self.plus = plus
        projection = state_dict["image_proj"]
        # On the meta device nothing is allocated or initialised; the file's own tensors take their places below.
        with torch.device("meta"):
            self.image_proj_model: nn.Module
            if "proj.3.weight" in projection:
                self.image_proj_model = MLPProjModel(cross_attention_dim, clip_embeddings_dim)
            elif not plus:
                self.image_proj_model = ImageProjModel(
                    cross_attention_dim, clip_embeddings_dim, clip_extra_context_tokens
                )
            elif "layers.0.0.to_q.weight" in projection:
                self.image_proj_model = resampler_for(projection)
            else:
                self.image_proj_model = Resampler(
                    dim=1280 if sdxl_plus else cross_attention_dim,
                    depth=4,
                    dim_head=DIM_HEAD,
                    heads=20 if sdxl_plus else 12,
                    num_queries=clip_extra_context_tokens,
                    embedding_dim=clip_embeddings_dim,
                    output_dim=cross_attention_dim,
                )
            self.ip_layers = To_KV(cross_attention_dim)
        self.image_proj_model.load_state_dict(dict(projection), assign=True)
        self.ip_layers.load_state_dict_ordered(state_dict["ip_adapter"])
        self.requires_grad_(False).eval()

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Width of every cross-attention layer, in the file's order."""
        return self.ip_layers.widths[::2]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(parameter.nbytes for parameter in self.parameters()) + self.ip_layers.nbytes

    @property
    def context_width(self) -> int:
        """Width of the image tokens."""
        return self.ip_layers.context_width

"""Image projections: from what the image encoder says of a picture to image tokens in the UNet's context width."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ImageProjModel(nn.Module):
    """The projection of the base adapters: one linear layer and a norm (Ye et al. 2023, arXiv 2308.06721, §3.2).

    Args:
        cross_attention_dim: width of the UNet's text context.
        clip_embeddings_dim: width of the pooled image embedding.
        clip_extra_context_tokens: image tokens a picture becomes.
    """

    def __init__(
        self, cross_attention_dim: int = 1024, clip_embeddings_dim: int = 1024, clip_extra_context_tokens: int = 4
    ) -> None:
        super().__init__()
        self.cross_attention_dim = cross_attention_dim
        self.clip_extra_context_tokens = clip_extra_context_tokens
        self.proj = nn.Linear(clip_embeddings_dim, clip_extra_context_tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """``[B, clip_embeddings_dim]`` to image tokens ``[B, tokens, cross_attention_dim]``."""
        tokens = self.proj(image_embeds)
        return self.norm(tokens.reshape(-1, self.clip_extra_context_tokens, self.cross_attention_dim))


class MLPProjModel(nn.Module):
    """The projection of the full-face adapter: every token of the penultimate states through one small MLP."""

    def __init__(self, cross_attention_dim: int = 768, clip_embeddings_dim: int = 1280) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(clip_embeddings_dim, clip_embeddings_dim),
            nn.GELU(),
            nn.Linear(clip_embeddings_dim, cross_attention_dim),
            nn.LayerNorm(cross_attention_dim),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[B, N, clip_embeddings_dim]`` to image tokens ``[B, N, cross_attention_dim]``."""
        return self.proj(hidden_states)


class _PerceiverAttention(nn.Module):
    """Latents attend to the picture's tokens and to themselves (Alayrac et al. 2022, arXiv 2204.14198, §3.1)."""

    def __init__(self, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = dim_head * heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(latents), k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """The projection of the plus adapters: a Perceiver resampler (arXiv 2204.14198) over the penultimate states.

    Args:
        dim: width of the latents.
        depth: number of attention and feed-forward pairs.
        dim_head, heads: of the attention.
        num_queries: latents, that is, image tokens.
        embedding_dim: width of the image encoder's hidden states.
        output_dim: width of the UNet's text context.
        ff_mult: widening of the feed-forward.
    """

    def __init__(
        self,
        dim: int = 1024,
        depth: int = 8,
        dim_head: int = 64,
        heads: int = 16,
        num_queries: int = 8,
        embedding_dim: int = 768,
        output_dim: int = 1024,
        ff_mult: int = 4,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    _PerceiverAttention(dim, dim_head, heads),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, dim * ff_mult, bias=False),
                        nn.GELU(),
                        nn.Linear(dim * ff_mult, dim, bias=False),
                    ),
                )
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, embedding_dim]`` to image tokens ``[B, num_queries, output_dim]``."""
        latents = self.latents.expand(x.shape[0], -1, -1)
        x = self.proj_in(x)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            latents = attention(x, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm_out(self.proj_out(latents))


DIM_HEAD = 64
"""Width of one head in every public plus adapter."""


def resampler_for(state_dict: Mapping[str, Tensor]) -> Resampler:
    """A resampler of exactly the sizes that ``state_dict`` holds (no prefix on the keys); weights not loaded."""
    _, queries, dim = state_dict["latents"].shape
    return Resampler(
        dim=dim,
        depth=sum(key.endswith(".0.to_q.weight") for key in state_dict),
        dim_head=DIM_HEAD,
        heads=state_dict["layers.0.0.to_q.weight"].shape[0] // DIM_HEAD,
        num_queries=queries,
        embedding_dim=state_dict["proj_in.weight"].shape[1],
        output_dim=state_dict["proj_out.weight"].shape[0],
        ff_mult=state_dict["layers.0.1.1.weight"].shape[0] // dim,
    )

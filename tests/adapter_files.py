"""Random adapters in the public layout, at any width: nested as in a ``.bin``, flat as in a ``.safetensors`` file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Nested = dict[str, dict[str, Tensor]]


def layer_weights(widths: Sequence[int], context: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``1.to_k_ip.weight``, ``1.to_v_ip.weight``, ``3.…``: one pair for each cross-attention layer."""
    return {
        f"{2 * n + 1}.to_{kind}_ip.weight": torch.randn(width, context, generator=generator) / context**0.5
        for n, width in enumerate(widths)
        for kind in "kv"
    }


def base_adapter(widths: Sequence[int], context: int, embedding: int = 128, tokens: int = 4, seed: int = 0) -> Nested:
    """A linear projection of the pooled embedding."""
    generator = torch.Generator().manual_seed(seed)
    projection = {
        "proj.weight": torch.randn(tokens * context, embedding, generator=generator) / embedding**0.5,
        "proj.bias": torch.randn(tokens * context, generator=generator) / 10,
        "norm.weight": 1 + torch.randn(context, generator=generator) / 10,
        "norm.bias": torch.randn(context, generator=generator) / 10,
    }
    return {"image_proj": projection, "ip_adapter": layer_weights(widths, context, generator)}


def plus_adapter(
    widths: Sequence[int],
    context: int,
    embedding: int = 128,
    dim: int = 128,
    heads: int = 2,
    depth: int = 4,
    tokens: int = 16,
    seed: int = 0,
) -> Nested:
    """A Perceiver resampler over the hidden states."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {
            f"{name}.weight": 1 + torch.randn(width, generator=generator) / 10,
            f"{name}.bias": torch.randn(width, generator=generator) / 10,
        }

    projection = {
        "latents": torch.randn(1, tokens, dim, generator=generator) / dim**0.5,
        "proj_in.weight": matrix(dim, embedding),
        "proj_in.bias": torch.randn(dim, generator=generator) / 10,
        "proj_out.weight": matrix(context, dim),
        "proj_out.bias": torch.randn(context, generator=generator) / 10,
        **norm("norm_out", context),
    }
    for layer in range(depth):
        projection |= {
            **norm(f"layers.{layer}.0.norm1", dim),
            **norm(f"layers.{layer}.0.norm2", dim),
            f"layers.{layer}.0.to_q.weight": matrix(64 * heads, dim),
            f"layers.{layer}.0.to_kv.weight": matrix(128 * heads, dim),
            f"layers.{layer}.0.to_out.weight": matrix(dim, 64 * heads),
            **norm(f"layers.{layer}.1.0", dim),
            f"layers.{layer}.1.1.weight": matrix(4 * dim, dim),
            f"layers.{layer}.1.3.weight": matrix(dim, 4 * dim),
        }
    return {"image_proj": projection, "ip_adapter": layer_weights(widths, context, generator)}


def full_face_adapter(widths: Sequence[int], context: int, embedding: int = 128, seed: int = 0) -> Nested:
    """An MLP over every hidden state."""
    generator = torch.Generator().manual_seed(seed)
    projection = {
        "proj.0.weight": torch.randn(embedding, embedding, generator=generator) / embedding**0.5,
        "proj.0.bias": torch.randn(embedding, generator=generator) / 10,
        "proj.2.weight": torch.randn(context, embedding, generator=generator) / embedding**0.5,
        "proj.2.bias": torch.randn(context, generator=generator) / 10,
        "proj.3.weight": 1 + torch.randn(context, generator=generator) / 10,
        "proj.3.bias": torch.randn(context, generator=generator) / 10,
    }
    return {"image_proj": projection, "ip_adapter": layer_weights(widths, context, generator)}


def save(adapter: Nested, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a flat safetensors file."""
    flat = {f"{group}.{key}": t.to(dtype).contiguous() for group, keys in adapter.items() for key, t in keys.items()}
    save_file(flat, path)
    return path

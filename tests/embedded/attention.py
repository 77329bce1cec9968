"""The attention of the small UNets: diffusers' default one, opened up where a Forge-like host lets extensions in.

diffusers hands each attention layer to an *attention processor*. Ours knows which place of the UNet its layer sits
in and applies, in the host's order, ``patches`` (before the projections), ``patches_replace`` (instead of the
attention itself, between ``to_q/to_k/to_v`` and ``to_out``) and the output patches. Without any of them it computes
bit for bit what diffusers' ``AttnProcessor2_0`` computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F

Patch = Callable[..., Any]
Options = dict[str, Any]

PATCH_LISTS = frozenset({"attn1_patch", "attn1_output_patch", "attn2_patch", "attn2_output_patch"})
"""Names in ``transformer_options["patches"]`` that these UNets act upon."""


def attention_function(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
) -> torch.Tensor:
    """The host's attention, ``[B, tokens, heads * dim]`` in and out.

    With ``skip_reshape`` the inputs are ``[B, heads, tokens, dim]``.
    """
    if skip_reshape:
        batch, _, _, dim = q.shape
    else:
        batch, _, inner = q.shape
        dim = inner // heads
        q, k, v = (t.view(batch, -1, heads, dim).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
    return out.transpose(1, 2).reshape(batch, -1, heads * dim)


@dataclass(frozen=True)
class Place:
    """Where one transformer block sits, in the host's way of counting."""

    block: tuple[str, int]
    """``("input" | "middle" | "output", id)``."""
    block_index: int
    """Number of the transformer block inside its spatial transformer."""
    transformer_index: int
    """Number of the spatial transformer, in the order in which the UNet runs them."""

    @property
    def key(self) -> tuple[str, int, int]:
        return (*self.block, self.block_index)


@dataclass
class PatchedCall:
    """What one call of the UNet carries to its attention layers: the host's ``transformer_options``."""

    options: Options
    _by_block: dict[Place, Options] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.patches) - PATCH_LISTS
        if unknown:
            raise ValueError(f"these UNets apply {sorted(PATCH_LISTS)} only, not the patches {sorted(unknown)}")

    @property
    def patches(self) -> dict[str, list[Patch]]:
        return dict(self.options.get("patches", {}))

    def extra_options(self, place: Place, heads: int, dim_head: int) -> Options:
        """The ``extra_options`` of one block: the same dict for all of its patches, as on the hosts."""
        if place not in self._by_block:
            extra = {k: v for k, v in self.options.items() if k not in ("patches", "patches_replace")}
            extra["block"] = place.block
            extra["block_index"] = place.block_index
            extra["transformer_index"] = place.transformer_index
            extra["n_heads"] = heads
            extra["dim_head"] = dim_head
            self._by_block[place] = extra
        return self._by_block[place]

    def replacement(self, kind: str, place: Place) -> Patch | None:
        """The callable that takes the attention's place; a 3-tuple key wins over a 2-tuple key."""
        registered = self.options.get("patches_replace", {}).get(kind, {})
        return registered.get(place.key) or registered.get(place.block)


class PatchableAttention:
    """Attention processor of one layer (``attn1`` or ``attn2``) of one transformer block."""

    def __init__(self, kind: Literal["attn1", "attn2"], place: Place) -> None:
        self.kind = kind
        self.place = place

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        patched: PatchedCall | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None:
            raise ValueError("the hosts pass no attention mask to the UNet, neither does this one")
        n = hidden_states
        context = n if encoder_hidden_states is None else encoder_hidden_states
        value = context
        extra: Options = {}
        if patched is not None:
            extra = patched.extra_options(self.place, attn.heads, attn.inner_dim // attn.heads)
            for patch in patched.patches.get(f"{self.kind}_patch", []):
                n, context, value = patch(n, context, value, extra)
        q, k, v = attn.to_q(n), attn.to_k(context), attn.to_v(value)
        replacement = patched.replacement(self.kind, self.place) if patched is not None else None
        out = replacement(q, k, v, extra) if replacement is not None else attention_function(q, k, v, attn.heads)
        for module in attn.to_out:
            out = module(out)
        if patched is not None:
            for patch in patched.patches.get(f"{self.kind}_output_patch", []):
                out = patch(out, extra)
        return out

"""A model object of the ComfyUI line with nothing in it: what ``patch_model`` needs, and the formula."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

# (block, number, depth) and width of every cross-attention layer in the order of an adapter file: down, up, mid.
SD15_LAYERS = [
    *((("input", n, 0), w) for n, w in ((1, 320), (2, 320), (4, 640), (5, 640), (7, 1280), (8, 1280))),
    *((("output", n, 0), w) for n, w in zip(range(3, 12), [1280] * 3 + [640] * 3 + [320] * 3, strict=True)),
    (("middle", 0, 0), 1280),
]
SDXL_LAYERS = [
    *((("input", n, d), 640) for n in (4, 5) for d in range(2)),
    *((("input", n, d), 1280) for n in (7, 8) for d in range(10)),
    *((("output", n, d), 1280) for n in (0, 1, 2) for d in range(10)),
    *((("output", n, d), 640) for n in (3, 4, 5) for d in range(2)),
    *((("middle", 0, d), 1280) for d in range(10)),
]
LAYERS = {"sd15": SD15_LAYERS, "sdxl": SDXL_LAYERS}


class BareModel:
    """Has ``clone()``, ``model_options`` and ``model.diffusion_model.current_step``, and no more."""

    def __init__(self, current_step: Any = 0.0) -> None:
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.model = SimpleNamespace(diffusion_model=SimpleNamespace(current_step=current_step))

    def clone(self) -> BareModel:
        other = BareModel()
        other.model = self.model
        other.model_options = copy.deepcopy(self.model_options)
        return other

    @property
    def replacements(self) -> dict[tuple[Any, ...], Any]:
        return self.model_options["transformer_options"]["patches_replace"]["attn2"]


def random_kv(
    layout: str, tokens: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """``[K_0, V_0, …]`` of one picture."""
    return [
        torch.randn(1, tokens, width, generator=generator).to(dtype) for _, width in LAYERS[layout] for _ in range(2)
    ]


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> np.ndarray:
    """One row, float64: ``q [N, C]``, ``k`` and ``v`` ``[M, C]``."""
    outs = []
    for qh, kh, vh in zip(*(np.split(t, heads, axis=1) for t in (q, k, v)), strict=True):
        logits = qh @ kh.T / np.sqrt(qh.shape[1])
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        outs.append(weights / weights.sum(axis=1, keepdims=True) @ vh)
    return np.concatenate(outs, axis=1)


def joint_formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    roles: Sequence[int],
    tasks: Sequence[tuple[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]], float]],
    layer: int,
    widest: int = 1280,
) -> np.ndarray:
    """The joint formulation of one layer in float64, row by row; ``roles`` has one entry for each row."""
    rows = []
    for row, role in enumerate(roles):
        keys, values = [k[row].double().numpy()], [v[row].double().numpy()]
        for kv, weight in tasks:
            scale = weight * q.shape[-1] / widest
            ip_k, ip_v = (kv[role][2 * layer + i][0].double().numpy() for i in range(2))
            mean = ip_v.mean(axis=0, keepdims=True)
            keys.append(ip_k * scale)
            values.append((ip_v - mean) + mean * scale)
        rows.append(softmax_attention(q[row].double().numpy(), np.concatenate(keys), np.concatenate(values), heads))
    return np.stack(rows)

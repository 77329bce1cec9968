"""Mixtures: several pictures of a unit become one, on what the image encoder says of them.

e_i is the encoder's output for picture i (pooled embedding ``[E]``, or hidden states ``[N, E]``) and w_i that picture's
weight; all of them are mixed before the image projection, as ComfyUI_IPAdapter_plus does. A mixture acts with the
unit's weight, and has as many image tokens as one picture. "concat" isn't a mixture: there each picture keeps its own
image tokens, and w_i multiplies the unit's weight for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Mix = Callable[[Tensor, Tensor], Tensor]
"""``(e [n, …, E], w [n, 1, …]) -> [1, …, E]``, in float64."""

TINY = 1e-12
"""Lengths below this count as this one, so that nothing is divided by zero."""


def _average(e: Tensor, w: Tensor) -> Tensor:
    return (w * e).sum(0, keepdim=True) / w.abs().sum(0, keepdim=True)


def _length(e: Tensor, axis: int) -> Tensor:
    return torch.linalg.vector_norm(e, dim=axis, keepdim=True).clamp_min(TINY)


def _normalised_average(e: Tensor, w: Tensor) -> Tensor:
    length = _length(e, -1)
    return _average(e / length, w) * length.mean(0, keepdim=True)


def _subtract(e: Tensor, w: Tensor) -> Tensor:
    weighted = w * e
    return weighted[:1] - weighted[1:].mean(0, keepdim=True) if len(e) > 1 else weighted


@dataclass(frozen=True)
class Mixture:
    """One way of making one picture of several."""

    name: str
    """As units and infotexts spell it."""
    help: str
    """One line for the page."""
    mix: Mix | None
    """None: every picture stays for itself."""
    of_negatives: str = ""
    """The mixture of the negative pictures beside it; '': the same."""


_ALL = (
    Mixture("concat", "every picture has its own image tokens, side by side", None),
    Mixture("average", "the weighted mean: sum of w e, over the sum of |w|", _average),
    Mixture(
        "normalised average",
        "the weighted mean of the directions, every e as long as all are on average (length over the features)",
        _normalised_average,
    ),
    Mixture(
        "norm average",
        "as ComfyUI_IPAdapter_plus has it: the weighted mean of e over its length along the pictures",
        lambda e, w: _average(e / _length(e, 0), w),
    ),
    Mixture("add", "the sum of w e", lambda e, w: (w * e).sum(0, keepdim=True)),
    Mixture("subtract", "w e of the first picture less the mean of w e of the others", _subtract, "average"),
    Mixture("max", "the largest w e, number by number", lambda e, w: (w * e).amax(0, keepdim=True)),
    Mixture("min", "the smallest w e, number by number", lambda e, w: (w * e).amin(0, keepdim=True)),
)

MIXTURES: Mapping[str, Mixture] = {each.name: each for each in _ALL}


def mixed(name: str, features: Tensor, weights: Sequence[float]) -> Tensor:
    """One picture of several.

    Args:
        name: one of :data:`MIXTURES` that mixes.
        features: what the image encoder says of the pictures, ``[n, …, E]``.
        weights: of each picture, none of them 0.

    Returns:
        ``[1, …, E]`` in the features' dtype, computed in float64.
    """
    mix = MIXTURES[name].mix
    if mix is None:
        raise ValueError(f"{name} leaves the pictures as they are")
    e = features.double()
    w = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * (e.ndim - 1))
    return mix(e, w).to(features.dtype)

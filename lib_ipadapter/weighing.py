"""A unit's K and V with its weight in them, ready to be brought to where a UNet computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import IPAdapterError
from .formulations import Formulation
from .plan import ImageKV

Prompts = Mapping[int, tuple[ImageKV, ...]]
"""What the rows of each role (``COND``, ``UNCOND``) get: one entry a picture; an absent role gets no image tokens."""


@dataclass(frozen=True)
class Weighed:
    """K and V of a unit's pictures, weighed; a picture that appears several times is there once."""

    layers: tuple[tuple[int, ...], ...]
    """Numbers of the layers of each width."""
    stacks: tuple[Tensor, ...]
    """K and V of these layers, ``[layers, 2, tokens of all pictures, C]``."""
    tokens: tuple[int, ...]
    """Of each picture."""
    places: Mapping[int, tuple[int, ...]]
    """By role, which picture each of its entries is."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(stack.nbytes for stack in self.stacks)

    def on(self, device: torch.device, dtype: torch.dtype) -> Prompts:
        """All of it there, as views of a few tensors; where it is there already, nothing is copied."""
        count = sum(map(len, self.layers))
        keys, values = ([[torch.empty(0)] * count for _ in self.tokens] for _ in "kv")
        for numbers, stack in zip(self.layers, self.stacks, strict=True):
            there = stack.to(device=device, dtype=dtype).unsqueeze(2)
            for picture, part in enumerate(torch.split(there, list(self.tokens), dim=3)):
                for kind, target in zip(part.unbind(1), (keys, values), strict=True):
                    for n, tensor in zip(numbers, kind.unbind(), strict=True):
                        target[picture][n] = tensor
        pictures = [ImageKV(tuple(k), tuple(v)) for k, v in zip(keys, values, strict=True)]
        return {role: tuple(pictures[n] for n in places) for role, places in self.places.items()}


def weigh(
    prompts: Prompts,
    formulation: Formulation,
    weight: float,
    shares: Sequence[float] | Mapping[int, Sequence[float]],
    widest: int,
    first: int,
) -> Weighed:
    """Weighs a unit's pictures, each for itself, all layers of one width as one tensor.

    Args:
        prompts: raw K and V.
        formulation: which says how a weight changes them.
        weight: the unit's.
        shares: each picture's own part of it, the same in every role, or by role; empty: all are 1.
        widest: width of the UNet's widest cross-attention layer.
        first: the role whose pictures lie ahead. Rows of both roles, in this order, get their image tokens as views.

    Raises:
        IPAdapterError: if the pictures have K and V for different numbers of layers.
    """
    roles = sorted((role for role, images in prompts.items() if images), key=lambda role: role != first)
    given = {role: shares[role] if isinstance(shares, Mapping) else shares for role in roles}
    if weight == 0 or any(0 in each for each in given.values()):
        raise ValueError("A unit or picture of weight 0 does nothing, and isn't weighed.")
    shared = {role: list(zip(prompts[role], given[role] or (1.0,) * len(prompts[role]), strict=True)) for role in roles}
    distinct = {(id(image), share): (image, share) for role in roles for image, share in shared[role]}
    number = {key: n for n, key in enumerate(distinct)}
    places = {role: tuple(number[id(image), share] for image, share in shared[role]) for role in roles}
    images = [image for image, _ in distinct.values()]
    counts = sorted({len(kind) for image in images for kind in (image.keys, image.values)})
    if len(counts) > 1:
        raise IPAdapterError(
            f"The image prompt has K and V for {' and '.join(map(str, counts))} cross-attention layers; they must be "
            "equally many for picture and uncond: take both from one adapter."
        )
    layers: list[tuple[int, ...]] = []
    stacks = []
    for same_width in zip(*(image.stacks for image in images), strict=True):
        layers.append(tuple(same_width[0].layers))
        width = same_width[0].keys.shape[2]
        both = torch.empty(
            (len(layers[-1]), 2, sum(image.tokens for image in images), width),
            dtype=same_width[0].keys.dtype,
            device=same_width[0].keys.device,
        )
        start = 0
        for stack, (image, share) in zip(same_width, distinct.values(), strict=True):
            pair = formulation.weigh(stack.keys, stack.values, weight * share, width / widest)
            for kind, tensor in enumerate(pair):
                both[:, kind, start : start + image.tokens] = tensor
            start += image.tokens
        stacks.append(both)
    return Weighed(tuple(layers), tuple(stacks), tuple(image.tokens for image in images), places)

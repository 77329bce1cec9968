"""A unit's K and V with its weight in them, ready to be brought to where a UNet computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import IPAdapterError
from .formulations import Formulation
from .layer_weights import LayerWeights, Section
from .plan import ImageKV
from .rows import COND, UNCOND

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
    sections: tuple[Section, ...] = ()
    """Layers in which they act in different ways; empty: in all of them alike."""

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


def in_section(prompts: Prompts, section: Section) -> Prompts:
    """What of a unit's pictures acts on which rows in a section's layers."""
    if section.swapped:
        # the picture on the uncond rows; a role without an entry gets no image tokens
        prompts = {UNCOND: prompts[COND]}
    if section.picture is not None:
        n = section.picture
        prompts = {role: images[n : n + 1] for role, images in prompts.items()}
    return prompts


@dataclass(frozen=True)
class Pictures:
    """The pictures of a unit in the order in which they lie in memory."""

    images: tuple[ImageKV, ...]
    shares: tuple[float, ...]
    """Each picture's part of the unit's weight."""
    places: Mapping[int, tuple[int, ...]]
    """By role, which of them each of its entries is."""


Shares = Sequence[float] | Mapping[int, Sequence[float]]
"""Each picture's own part of the unit's weight, the same in every role, or by role; empty: all are 1."""


def arrange(prompts: Prompts, shares: Shares, first: int) -> Pictures:
    """Lays out a unit's pictures so that those of a role are evenly spaced: a view can hold them.

    Pictures of a role that are all the same are there once, and so are those that several roles share.

    Args:
        prompts: raw K and V.
        shares: of each picture.
        first: the role whose pictures lie ahead. Rows of both roles, in this order, get their image tokens as views.

    Raises:
        IPAdapterError: if the pictures have K and V for different numbers of layers.
    """
    roles = sorted((role for role, images in prompts.items() if images), key=lambda role: role != first)
    found: dict[tuple[tuple[int, float], ...], int] = {}
    """Where each sequence of pictures begins."""
    images: list[ImageKV] = []
    parts: list[float] = []
    places: dict[int, tuple[int, ...]] = {}
    for role in roles:
        given = shares[role] if isinstance(shares, Mapping) else shares
        shared = list(zip(prompts[role], given or (1.0,) * len(prompts[role]), strict=True))
        same = len({(id(image), share) for image, share in shared}) == 1
        sequence = shared[:1] if same else shared
        key = tuple((id(image), share) for image, share in sequence)
        if key not in found:
            found[key] = len(images)
            images += [image for image, _ in sequence]
            parts += [share for _, share in sequence]
        places[role] = tuple(found[key] + (0 if same else n) for n in range(len(shared)))
    counts = sorted({len(kind) for image in images for kind in (image.keys, image.values)})
    if len(counts) > 1:
        raise IPAdapterError(
            f"The image prompt has K and V for {' and '.join(map(str, counts))} cross-attention layers; they must be "
            "equally many for picture and uncond: take both from one adapter."
        )
    return Pictures(tuple(images), tuple(parts), places)


def of_layers(weight: float, layer_weights: LayerWeights | None, layers: Sequence[int]) -> float | Tensor:
    """A weight as some layers have it: a number, or ``[layers, 1, 1]``."""
    if layer_weights is None:
        return weight
    return torch.tensor([weight * layer_weights.factors[n] for n in layers]).view(-1, 1, 1)


def weigh(
    prompts: Prompts,
    formulation: Formulation,
    weight: float,
    shares: Shares,
    widest: int,
    first: int,
    layer_weights: LayerWeights | None = None,
) -> Weighed:
    """Weighs a unit's pictures, each for itself, all layers of one width as one tensor.

    Args:
        prompts, shares, first: as in :func:`arrange`.
        formulation: which says how a weight changes them.
        weight: the unit's.
        widest: width of the UNet's widest cross-attention layer.
        layer_weights: how much of it each layer gets.

    Raises:
        IPAdapterError: as :func:`arrange`.
    """
    pictures = arrange(prompts, shares, first)
    images = pictures.images
    if weight == 0 or 0 in pictures.shares:
        raise ValueError("A unit or picture of weight 0 does nothing, and isn't weighed.")
    layers: list[tuple[int, ...]] = []
    stacks = []
    for same_width in zip(*(image.stacks for image in images), strict=True):
        layers.append(tuple(same_width[0].layers))
        width = int(same_width[0].keys.shape[2])
        both = torch.empty(
            (len(layers[-1]), 2, sum(image.tokens for image in images), width),
            dtype=same_width[0].keys.dtype,
            device=same_width[0].keys.device,
        )
        start = 0
        for stack, image, share in zip(same_width, images, pictures.shares, strict=True):
            at = of_layers(weight * share, layer_weights, stack.layers)
            pair = formulation.weigh(stack.keys, stack.values, at, width / widest)
            for kind, tensor in enumerate(pair):
                both[:, kind, start : start + image.tokens] = tensor
            start += image.tokens
        stacks.append(both)
    sections = () if layer_weights is None else layer_weights.sections
    return Weighed(tuple(layers), tuple(stacks), tuple(image.tokens for image in images), pictures.places, sections)

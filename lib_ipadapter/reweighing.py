"""A unit's K and V whose weight changes while sampling: weighed again where they are, when it does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .formulations import Formulation
from .layer_weights import LayerWeights
from .weighing import Pictures, Weighed, of_layers


@dataclass(frozen=True)
class Unweighed:
    """K and V of a unit's pictures whose weight changes while sampling, so that it is brought in there."""

    pictures: Pictures
    formulation: Formulation
    weight: float
    """The unit's; what changes is a factor of it."""
    widest: int
    layer_weights: LayerWeights | None = None
    """How much of it each layer gets."""

    @property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the layers of each width."""
        return tuple(tuple(stack.layers) for stack in self.pictures.images[0].stacks)

    @property
    def places(self) -> Mapping[int, tuple[int, ...]]:
        """By role, which of the pictures each of its entries is."""
        return self.pictures.places

    def on(self, device: torch.device, dtype: torch.dtype) -> Adjustable:
        """All of it there, without a weight yet."""
        # In-place changes must go on being possible, inside inference mode and out of it.
        with torch.inference_mode(False), torch.no_grad():
            return Adjustable(self, device, dtype)


class Adjustable:
    """Weighed K and V where a UNet computes, whose weight can be changed in place: views of them see the change.

    All layers of one width and all neighbouring pictures of one share are weighed at once, from the raw ones beside
    them. So a change takes a few large operations, as many for one picture as for twenty, and no transfer.
    """

    def __init__(self, of: Unweighed, device: torch.device, dtype: torch.dtype) -> None:
        self._of = of
        images, shares = of.pictures.images, of.pictures.shares
        tokens = tuple(image.tokens for image in images)
        sizes = [(len(stack.layers), 2, sum(tokens), int(stack.keys.shape[2])) for stack in images[0].stacks]
        self.weighed = Weighed(
            of.layers,
            tuple(torch.empty(size, device=device, dtype=dtype) for size in sizes),
            tokens,
            of.pictures.places,
            () if of.layer_weights is None else of.layer_weights.sections,
        )
        self._runs: list[_Run] = []
        kinds = itertools.groupby(range(len(images)), lambda n: (shares[n], tokens[n]))
        for (share, length), numbers in kinds:
            run = list(numbers)
            place = slice(sum(tokens[: run[0]]), sum(tokens[: run[-1] + 1]))
            of_width = zip(*(images[n].stacks for n in run), strict=True)
            for target, stacks in zip(self.weighed.stacks, of_width, strict=True):
                layers, _, _, width = target.shape
                shares_of_layers = of_layers(share, of.layer_weights, stacks[0].layers)
                if isinstance(shares_of_layers, Tensor):
                    shares_of_layers = shares_of_layers.repeat_interleave(len(run), 0).to(device)
                to = target[:, :, place].view(layers, 2, len(run), length, width)
                keys = _together([stack.keys for stack in stacks]).to(device)
                values = _together([stack.values for stack in stacks]).to(device)
                self._runs.append(_Run(shares_of_layers, keys, values, to[:, 0], to[:, 1], width / of.widest))
        self._is_filled = False

    def set(self, factor: float) -> None:
        """Gives them the unit's weight times ``factor``, which isn't 0."""
        weight = self._of.weight * factor
        for run in self._runs:
            weighed = self._of.formulation.weigh(run.keys, run.values, weight * run.share, run.width_share)
            for raw, made, target in zip((run.keys, run.values), weighed, (run.to_keys, run.to_values), strict=True):
                if made is not raw or not self._is_filled:  # what doesn't depend on the weight is there already
                    target.copy_(made.reshape(target.shape))
        self._is_filled = True


class _Run(NamedTuple):
    """Neighbouring pictures of one share in all layers of one width."""

    share: float | Tensor
    """Of the unit's weight; a tensor where layers have different ones, ``[layers * pictures, 1, 1]``."""
    keys: Tensor
    values: Tensor
    """Raw, ``[layers * pictures, T, C]``."""
    to_keys: Tensor
    to_values: Tensor
    """Where they go when weighed, ``[layers, pictures, T, C]``."""
    width_share: float


def _together(stacks: Sequence[Tensor]) -> Tensor:
    """Several ``[layers, T, C]`` as ``[layers * pictures, T, C]``."""
    return stacks[0] if len(stacks) == 1 else torch.stack(tuple(stacks), dim=1).flatten(0, 1)

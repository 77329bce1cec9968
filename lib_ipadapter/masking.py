"""Masks where the UNet computes: what every layer of one kind of UNet call multiplies with, or adds to its logits.

In a joint softmax the logits of a masked picture's tokens get log m, m its factor for the query: with m = 0 the query
has none of the picture, with 1 all of it, and two pictures whose masks add up to 1 weigh together as one picture
without a mask does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .errors import IPAdapterError
from .masks import PIXELS, Canvas, Values, Where

Run = tuple[Where, int]
"""Image tokens one after another that have one mask: it, and how many they are."""


def runs(tokens: Sequence[Run]) -> tuple[Run, ...]:
    """Neighbours of one mask together."""
    found: list[Run] = []
    for where, count in tokens:
        if found and found[-1][0] == where:
            count += found.pop()[1]
        found.append((where, count))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Masking:
    """The masks of a pass. Each tensor is made when a layer first asks for it, and then used in every UNet call."""

    canvas: Canvas
    device: torch.device
    dtype: torch.dtype
    _factors: dict[Where, Mapping[int, Tensor]] = field(default_factory=dict, repr=False)
    _logs: dict[Where, Mapping[int, Tensor]] = field(default_factory=dict, repr=False)
    _biases: dict[tuple[tuple[Run, ...], int, int], Tensor] = field(default_factory=dict, repr=False)

    def factor(self, where: Where, queries: int) -> Tensor:
        """A picture's factor for every query, ``[N, 1]``."""
        if where not in self._factors:
            self._factors[where] = self._on_device(self.canvas.at_every_depth(where), self.dtype)
        return self._of(self._factors[where], queries)

    def log(self, where: Where, queries: int) -> Tensor:
        """Its logarithm in float32, ``[N, 1]``; -inf where the factor is 0."""
        if where not in self._logs:
            with np.errstate(divide="ignore"):
                logs = [np.log(factors) for factors in self.canvas.at_every_depth(where)]
            self._logs[where] = self._on_device(logs, torch.float32)
        return self._of(self._logs[where], queries)

    def bias(self, image: tuple[Run, ...], text_tokens: int, queries: int) -> Tensor:
        """What is added to the logits of all tokens, text first, ``[N, text + image]``; text has no mask."""
        key = (image, text_tokens, queries)
        if key not in self._biases:
            parts = [torch.zeros(queries, text_tokens, device=self.device)]
            for where, tokens in image:
                part = self.log(where, queries) if where else torch.zeros(queries, 1, device=self.device)
                parts.append(part.expand(-1, tokens))
            self._biases[key] = torch.cat(parts, dim=1).to(self.dtype)
        return self._biases[key]

    def _on_device(self, depths: Sequence[Values], dtype: torch.dtype) -> Mapping[int, Tensor]:
        """The values of all depths there, by their numbers of queries: views of one tensor, since it is one copy."""
        whole = torch.from_numpy(np.concatenate(depths)).to(dtype).to(self.device)
        parts = torch.split(whole.unsqueeze(1), [len(each) for each in depths])
        return {part.shape[0]: part for part in parts}

    def _of(self, depths: Mapping[int, Tensor], queries: int) -> Tensor:
        if queries not in depths:
            height, width = self.canvas.latent
            raise IPAdapterError(
                f"A cross-attention layer has {queries} queries, which no layer of a canvas of {PIXELS * width} x "
                f"{PIXELS * height} pixels has, so a mask can't be put there: switch off the extension that changes "
                "sizes inside the UNet (Kohya HRFix, say), or take out the unit's masks."
            )
        return depths[queries]

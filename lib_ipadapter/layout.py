"""Text and image tokens of all rows of a batch, laid out for the attention of one layer by one copy.

Whole pieces of memory are copied: a device does that several times faster than with views expanded to a batch, and in
a small batch, where launches are what takes time, there is one. What goes where is worked out before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEYS, VALUES, BOTH = slice(0, 1), slice(1, 2), slice(0, 2)
"""Which of K and V is meant, where they stand in this order."""


@dataclass(frozen=True)
class Rows:
    """Rows of a batch that get equally many text and image tokens."""

    numbers: tuple[int, ...]
    """Where they stand in the batch."""
    roles: tuple[int, ...]
    """Of each of them."""
    text_tokens: int
    """Those to attend to; the host may have more that repeat them."""
    image_tokens: int
    """Those of all pictures, as often as they stand there."""
    text_repeats: int
    """How often the text stands there; see ``balance``."""

    @property
    def all_text_tokens(self) -> int:
        """With all repeats."""
        return self.text_tokens * self.text_repeats


class Layout:
    """The copy for one layer.

    Args:
        groups: all rows of the batch, each once.
        images: by role, of each unit that acts on it, K and V of its pictures: ``[2, pictures, T, C]``. The pictures'
            distance in memory may be 0: one that stands for several.
        which: ``KEYS``, ``VALUES`` or ``BOTH``.
        text_tokens: text tokens that the host computed; 0 leaves the text out.
    """

    def __init__(
        self, groups: Sequence[Rows], images: Mapping[int, Sequence[Tensor]], which: slice, text_tokens: int
    ) -> None:
        kinds = range(which.stop - which.start)
        units = {(role, n): t[which] for role, each in images.items() for n, t in enumerate(each)}
        ready = {unit: t for unit, t in units.items() if t[0].is_contiguous()}
        repeated = {unit: t for unit, t in units.items() if unit not in ready}
        lengths = sorted({group.text_tokens for group in groups}) if text_tokens else []
        rows = sorted(number for group in groups for number in group.numbers)

        self._cuts = [(kind, None if n == text_tokens else n) for kind in kinds for n in lengths]
        self._repeated = list(repeated.values())
        self._ready = [piece for t in ready.values() for piece in t.flatten(1, 2)]
        # The same order as in __call__:
        pool = [("text", kind, n, row) for kind in kinds for n in lengths for row in rows]
        pool += [("image", kind, *unit) for unit in (*repeated, *ready) for kind in kinds]
        place = {piece: n for n, piece in enumerate(pool)}
        self._order: list[int] = []
        for group in groups:
            for kind in kinds:
                for row, role in zip(group.numbers, group.roles, strict=True):
                    if text_tokens:
                        self._order += [place["text", kind, group.text_tokens, row]] * group.text_repeats
                    self._order += [place["image", kind, role, n] for n in range(len(images.get(role, ())))]
        self._shapes = [
            (len(kinds), len(group.numbers), bool(text_tokens) * group.all_text_tokens + group.image_tokens)
            for group in groups
        ]
        self._sizes = [kind * row * token for kind, row, token in self._shapes]

    def __call__(self, *texts: Tensor) -> list[tuple[Tensor, ...]]:
        """What is attended to: for each group ``[R, M + T, C]`` of K, V or both.

        Args:
            texts: of what is laid out, ``[R of the batch, M, C]``.
        """
        pool: list[Tensor] = []
        for kind, length in self._cuts:
            text = texts[kind]
            pool += (text if length is None else text[:, :length]).unbind()
        for images in self._repeated:
            pool += images.flatten(1, 2).unbind()
        pool += self._ready
        whole = torch.cat([pool[n] for n in self._order])
        if len(self._shapes) == 1:
            return [whole.view(*self._shapes[0], whole.shape[1]).unbind()]
        return [
            part.view(*shape, whole.shape[1]).unbind()
            for part, shape in zip(torch.split(whole, self._sizes), self._shapes, strict=True)
        ]

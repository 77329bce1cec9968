"""Token balance: the pictures of a unit together get the share of a joint softmax that one of them would get.

In one softmax over text and image tokens every token takes its part, so four pictures dilute the text four times as
much as one. Balanced, each image token of n pictures counts 1/n: its exponential is divided by n, which is log n off
its logit. No scaling of K does that, since a logit is q K; a bias would, but hosts' attention functions take none. What
counts in a softmax are ratios, though: to divide the image tokens by n is to multiply the text tokens by n, and a token
counts n times if it stands there n times. So the text is repeated, exactly and with any attention. With several units
the text is repeated by the least common multiple of their numbers of pictures, and each unit by what is left over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .errors import IPAdapterError

T = TypeVar("T", bound=Mapping[int, Any])

MAX_REPEATS = 64
"""How often a text may be repeated: 77 tokens are then as many keys as self-attention has at 64 x 64 latent pixels."""


@dataclass(frozen=True)
class Counted(Generic[T]):
    """Pictures of a unit, and by how many they are divided."""

    images: T
    """By role."""
    counts: Mapping[int, int] = field(default_factory=dict)
    """By role; roles that are absent aren't divided."""

    def copies(self, role: int, repeats: int) -> int:
        """How often its tokens stand beside a text that is repeated so often."""
        return repeats // self.counts.get(role, 1)


def text_repeats(units: Iterable[Counted[T]], role: int) -> int:
    """How often the text of a role stands beside units."""
    return math.lcm(*(unit.counts.get(role, 1) for unit in units))


def check_counts(units: Sequence[Counted[T]]) -> None:
    """Raises :class:`IPAdapterError` if the text would have to be repeated too often."""
    for role in {role for unit in units for role in unit.counts}:
        if text_repeats(units, role) > MAX_REPEATS:
            counts = sorted({unit.counts[role] for unit in units if role in unit.counts})
            raise IPAdapterError(
                f"Units with {' and '.join(map(str, counts))} pictures are balanced in one softmax, for which the text "
                f"would be repeated {text_repeats(units, role)} times, and {MAX_REPEATS} are allowed: use fewer "
                "pictures, equally many in each unit, a mixture, or switch the balance off."
            )

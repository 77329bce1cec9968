"""What is kept between generations: models, features and K/V, in host memory, up to a limit in bytes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, TypeVar

from .errors import IPAdapterError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

DEFAULT_GB = 4.0
"""A ViT-H and two adapters of SDXL in half precision, and the K/V of some hundred pictures."""


def limit_bytes(gigabytes: object) -> int:
    """A setting's value in bytes.

    Raises:
        IPAdapterError: if it is no number, or below zero.
    """
    if isinstance(gigabytes, bool) or not isinstance(gigabytes, (int, float)) or not 0 <= gigabytes < math.inf:
        raise IPAdapterError(
            f"The setting for the memory of loaded models (IP-Adapter) is {gigabytes!r}; it can be a number of "
            "gigabytes from 0: correct it in Settings."
        )
    return int(gigabytes * 2**30)


class Kept:
    """Values by key; those used least recently go first when all together take more than the limit.

    What is just made always comes out and stays until something else is made, or until :meth:`trim`. One that alone is
    above the limit puts out no others: it goes itself.

    Args:
        limit: bytes, asked every time, since it is a setting.
        weigh: bytes that a value takes; asked again in :meth:`trim`, since a module that ran may have another dtype.
    """

    def __init__(self, limit: Callable[[], int], weigh: Callable[[Any], int]) -> None:
        self._limit, self._weigh = limit, weigh
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._bytes: dict[Hashable, int] = {}
        self._made = False

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of ``key``, made when it isn't there."""
        return self.get_all([key], lambda _: [make()])[0]

    def get_all(self, keys: Sequence[K], make: Callable[[Sequence[K]], Sequence[V]]) -> list[V]:
        """The values of ``keys``; those that aren't there are made in one go, each once."""
        found: dict[K, V] = {key: self._values[key] for key in keys if key in self._values}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        for key in found:
            self._values.move_to_end(key)
        if missing:
            made = dict(zip(missing, make(missing), strict=True))
            found.update(made)
            for key, value in made.items():
                self._values[key], self._bytes[key] = value, self._weigh(value)
            self._made = True
            self._shrink(set(made))
        return [found[key] for key in keys]

    def trim(self) -> None:
        """Nothing stays above the limit."""
        if self._made:
            self._bytes = {key: self._weigh(value) for key, value in self._values.items()}
            self._made = False
        self._shrink(set())

    def clear(self) -> None:
        """Forgets everything."""
        self._values.clear()
        self._bytes.clear()

    def _shrink(self, stay: Collection[Hashable]) -> None:
        limit = self._limit()
        for key in [key for key, size in self._bytes.items() if size > limit and key not in stay]:
            self._forget(key)
        total = sum(size for size in self._bytes.values() if size <= limit)
        for key in list(self._values):
            if total <= limit:
                break
            if key not in stay:
                total -= self._bytes[key]
                self._forget(key)

    def _forget(self, key: Hashable) -> None:
        del self._values[key], self._bytes[key]

"""Noise that makes a picture into its own negative: as bright, of the same colours, and nothing to be seen in it.

It is laid over the square that the image encoder will see, so that what can be recognised there doesn't depend on the
picture's size, and depends on nothing but the picture's content, the kind and the strength: the same job has the same
noise again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Values = NDArray[np.float64]
"""``[H, W, 3]`` in 0…1."""


def _gaussian(x: Values, strength: float, random: np.random.Generator) -> Values:
    return x + strength * random.standard_normal(x.shape)


def _fade(x: Values, strength: float, random: np.random.Generator) -> Values:
    return (1 - strength) * x + strength * random.random(x.shape)


def _shuffle(x: Values, strength: float, random: np.random.Generator) -> Values:
    pixels = x.reshape(-1, x.shape[2]).copy()
    chosen = random.permutation(len(pixels))[: round(strength * len(pixels))]
    pixels[chosen] = pixels[random.permutation(chosen)]
    return pixels.reshape(x.shape)


@dataclass(frozen=True)
class Noise:
    """One kind of noise."""

    name: str
    """As units and infotexts spell it."""
    help: str
    """One line for the page."""
    add: Callable[[Values, float, np.random.Generator], Values]


_ALL = (
    Noise("gaussian", "normally distributed noise, its standard deviation the strength, is added", _gaussian),
    Noise("shuffle", "that share of the pixels change places among themselves", _shuffle),
    Noise("fade", "the picture fades into even noise", _fade),
)

NOISES: Mapping[str, Noise] = {each.name: each for each in _ALL}


def noised(picture: Image.Image, name: str, strength: float, sha256: str) -> Image.Image:
    """A picture under noise.

    Args:
        picture: RGB.
        name: one of :data:`NOISES`.
        strength: 0 (as it is) to 1.
        sha256: of the picture's content, from which the noise is drawn.
    """
    seed = hashlib.sha256(f"{name} {sha256}".encode()).digest()
    random = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "little")))
    x = np.asarray(picture, dtype=np.float64) / 255
    values = NOISES[name].add(x, strength, random).clip(0, 1)
    return Image.fromarray((values * 255).round().astype(np.uint8))

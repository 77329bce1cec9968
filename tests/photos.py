"""Photographs for the tests, as pictures and as the API takes them."""

from __future__ import annotations

import base64
import io
from functools import lru_cache

import skimage.data
from PIL import Image


@lru_cache
def photo(name: str = "astronaut") -> Image.Image:
    """One of the photographs that scikit-image ships: astronaut, chelsea, coffee."""
    return Image.fromarray(getattr(skimage.data, name)())


@lru_cache
def base64_photo(name: str = "astronaut", size: int = 96) -> str:
    """The same, small, as base64 of a PNG."""
    buffer = io.BytesIO()
    picture = photo(name).copy()
    picture.thumbnail((size, size))
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()

"""Pictures in and out: base64, PNG text, resizing, grids."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import torch
from fastapi import HTTPException
from PIL import Image, ImageOps, PngImagePlugin


def decode_base64_to_image(encoding: str) -> Image.Image:
    """A picture from base64 or a data URI; HTTPException 500 'Invalid encoded image' for anything else, as hosts do."""
    if encoding.startswith(("http://", "https://")):
        raise HTTPException(status_code=500, detail="Requests not allowed")
    if encoding.startswith("data:image/"):
        encoding = encoding.split(";")[1].split(",")[1]
    try:
        image = Image.open(io.BytesIO(base64.b64decode(encoding)))
        image.load()
    except Exception as error:
        raise HTTPException(status_code=500, detail="Invalid encoded image") from error
    turned = ImageOps.exif_transpose(image)
    return image if turned is None else turned


def encode_pil_to_base64(image: Image.Image) -> bytes:
    """PNG bytes in base64, with the picture's text entries (the infotext) in it."""
    text = PngImagePlugin.PngInfo()
    for key, value in image.info.items():
        if isinstance(key, str) and isinstance(value, str):
            text.add_text(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=text)
    return base64.b64encode(buffer.getvalue())


def to_pixels(image: Image.Image) -> torch.Tensor:
    """PIL -> ``[3, H, W]`` in -1..1."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1.0


def to_image(pixels: torch.Tensor) -> Image.Image:
    """``[3, H, W]`` in 0..1 -> PIL."""
    array = (255.0 * pixels.float().cpu().clamp(0, 1)).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).numpy())


def resize(image: Image.Image, mode: int, width: int, height: int) -> Image.Image:
    """The hosts' resize modes: 0 just resize, 1 crop and resize, 2 resize and fill (here with black)."""
    image = image.convert("RGB")
    if mode == 1:
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if mode == 2:
        return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def image_grid(images: list[Any], batch_size: int = 1) -> Image.Image:
    """All pictures on one sheet, about as many rows as columns."""
    rows = max(1, math.floor(math.sqrt(len(images))))
    columns = math.ceil(len(images) / rows)
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, rows * height), "black")
    for i, image in enumerate(images):
        grid.paste(image.convert("RGB"), (i % columns * width, i // columns * height))
    return grid

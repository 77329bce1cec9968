"""Pictures: from whatever a caller has to 8-bit RGB, to the exact input of an image encoder, to its pixels.

:func:`read_picture` takes every kind of source and mode; what it returns is plain RGB without metadata, and everything
after it knows only that.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from .errors import IPAdapterError
from .refs import MIDDLE, Crop

LIMIT_PIXELS = 178_956_970
"""Pixels of the largest picture that is read: Pillow's own limit against decompression bombs, half a GiB as RGB."""

FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "ICO"),
    # With newer Pillows or plug-ins that a host has loaded.
    *("AVIF", "HEIF", "JXL", "QOI"),
)
"""Formats that are read, where this Pillow knows them. Not among them are those that start other programs (EPS starts
Ghostscript) or that almost any bytes pass for."""

# --- Reading ----------------------------------------------------------------------------------------------------------

_USE = "give a picture as base64 or a data URI"
_SIZE_IN_ERROR = re.compile(r"\((\d+) pixels\)")
_NO_BASE64 = re.compile(r"[^A-Za-z0-9+/]")

# EXIF's orientation to what undoes it.
_UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)


def read_picture(
    source: str | bytes | Image.Image | NDArray[np.generic] | os.PathLike[str], background: Colour = WHITE
) -> Image.Image:
    """A picture as upright 8-bit RGB without metadata.

    EXIF orientation is applied, transparency is laid over the background, of an animation the first frame is taken (of
    an animated ``Image``, the frame it stands at), 16-bit grey is scaled to 8 bits, and CMYK, palettes, bilevel, LAB
    and so on become RGB as Pillow converts them.

    Args:
        source: text is base64 (line breaks and missing padding are fine) or a base64 data URI, and never a path or an
            address; bytes are a picture file's content; an array is ``[H, W]`` or ``[H, W, 1 | 2 | 3 | 4]`` (grey, grey
            and alpha, RGB, RGBA) of bool, uint8, uint16 or floats in 0…1; only a path object is opened as a file.
        background: what transparency is laid over. White is what a cut-out looks like on a page, and what cut-outs in
            the encoder's training data stand on; of a mask, black, since what isn't there doesn't act.

    Raises:
        IPAdapterError: if there is no picture in it, or it is broken or too large.
    """
    if isinstance(source, Image.Image):
        with _quiet(), _sentences():
            return _upright_rgb(source, background)
    if isinstance(source, np.ndarray):
        return _from_array(source, background)
    if isinstance(source, str):
        return _from_file(BytesIO(_decode_text(source)), background)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(BytesIO(source), background)
    if isinstance(source, os.PathLike):
        return _from_path(Path(source), background)
    raise IPAdapterError(f"The picture is a {type(source).__name__}, which isn't one: {_USE}.")


def _decode_text(text: str) -> bytes:
    """The bytes in base64 or a base64 data URI."""
    text = text.strip()
    if text[:5].lower() == "data:":
        head, comma, text = text[5:].partition(",")
        mime, *options = (part.strip().lower() for part in head.split(";"))
        if not comma or "base64" not in options:
            raise IPAdapterError(f"The picture's data URI begins with \"data:{_clip(head)}\" and isn't base64: {_USE}.")
        # Which image format it says doesn't matter, since browsers and tools often say it wrong: the content decides.
        if mime and not mime.startswith("image/") and mime != "application/octet-stream":
            raise IPAdapterError(
                f'The picture\'s data URI is of the type "{_clip(mime)}"; it must be image/png, image/jpeg or another '
                f"image type: {_USE}."
            )
        text = urllib.parse.unquote(text)
    elif "://" in text[:20]:
        raise IPAdapterError(f'The picture is the address "{_clip(text)}", and addresses aren\'t fetched: {_USE}.')
    digits = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    if not digits:
        raise IPAdapterError(f"The picture is an empty text: {_USE}.")
    wrong = _NO_BASE64.search(digits)
    try:
        if wrong:
            raise ValueError
        return base64.b64decode(digits + "=" * (-len(digits) % 4))
    except ValueError as error:
        found = f'the character "{wrong[0]}"' if wrong else f"{len(digits)} characters, which is cut off"
        raise IPAdapterError(
            f'The picture "{_clip(text)}" isn\'t base64, for it has {found}: {_USE}, never a path.'
        ) from error


def _from_path(path: Path, background: Colour) -> Image.Image:
    try:
        if not path.is_file():  # a pipe or device would be read without end
            raise FileNotFoundError(2, "no such file")
        with path.open("rb") as file:
            return _from_file(file, background)
    except OSError as error:
        raise IPAdapterError(
            f"The picture file {path.name} can't be read ({error.strerror or error}): check that it is there."
        ) from error


def _from_file(file: BinaryIO, background: Colour) -> Image.Image:
    with _quiet(), _sentences():
        Image.init()
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as picture:
            return _upright_rgb(picture, background)


# Warning filters and Pillow's switch for truncated files belong to the whole process; two threads that set and restore
# them in turns would leave them changed for good.
_process_wide = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, and no picture whose end is missing.

    Pillow warns of large pictures, which have their own limit here, and of broken metadata, which isn't used. Hosts may
    have told it to fill up truncated files with grey; a picture that is part grey is not what anyone asked for.
    """
    with _process_wide, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _sentences() -> Iterator[None]:
    """Whatever a decoder raises, as one sentence; decoders raise nearly everything on broken files."""
    try:
        yield
    except IPAdapterError:
        raise
    except Image.DecompressionBombError as error:
        found = _SIZE_IN_ERROR.search(str(error))
        raise _too_large(f"{int(found[1]) / 1e6:.0f} megapixels" if found else "too many pixels") from error
    except UnidentifiedImageError as error:
        raise IPAdapterError(
            "The picture is in no known image format, or its beginning is missing: give a PNG, JPEG or WebP picture."
        ) from error
    except MemoryError as error:
        raise IPAdapterError("There isn't enough memory to read the picture: give a smaller one.") from error
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise IPAdapterError(
            f"The picture is damaged or incomplete ({reason[:200]}): save it again as PNG or JPEG."
        ) from error


def _too_large(found: str) -> IPAdapterError:
    return IPAdapterError(
        f"The picture is too large ({found}): allowed are {LIMIT_PIXELS / 1e6:.0f} megapixels, make it smaller first."
    )


def _upright_rgb(picture: Image.Image, background: Colour) -> Image.Image:
    width, height = picture.size
    if width * height > LIMIT_PIXELS:  # before anything is decoded; hosts may have switched Pillow's own check off
        raise _too_large(f"{width} x {height} pixels")
    if width == 0 or height == 0:
        raise IPAdapterError(f"The picture is empty ({width} x {height} pixels): give one with at least one pixel.")
    picture.load()
    # Asked for after loading: some formats store metadata behind the pixels, and some decoders turn the picture.
    turn = _UPRIGHT.get(_orientation(picture))
    rgb = _rgb(picture, background)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}
    return rgb


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation of a loaded picture, as far as it is still to be undone."""
    if picture.format == "TIFF":
        return 1  # turned by Pillow itself on loading, and older ones still tell the old orientation
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata raises anything, and viewers then show what is stored
        return 1


def _rgb(picture: Image.Image, background: Colour) -> Image.Image:
    """A new RGB picture of ``picture``'s pixels."""
    mode = picture.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _from_wide(picture, background)
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        if mode in ("RGBa", "La"):  # colours multiplied by alpha; each converts to its own plain form only
            picture = picture.convert("RGBA" if mode == "RGBa" else "LA")
        return _over(background, picture.convert("RGBA"))
    return picture.copy() if mode == "RGB" else picture.convert("RGB")


def _over(background: Colour, rgba: Image.Image) -> Image.Image:
    """Transparent areas become the background.

    What colour lies under full transparency is an accident of the tool that saved the picture, mostly black, and
    dropping alpha would show it.
    """
    below = Image.new("RGB", rgba.size, background)
    below.paste(rgba, mask=rgba.getchannel("A"))
    return below


def _from_wide(picture: Image.Image, background: Colour) -> Image.Image:
    """Grey with more than 8 bits, which Pillow itself would clip at 255."""
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    top = 65535.0  # "I" too is how Pillow holds files of 16 bits
    if picture.mode == "F":  # float files hold 0…1 or 0…255, and nothing in them says which
        top = 1.0 if high <= 1 else 255.0
    if not (low >= 0 and high <= top):  # NaN fails as well
        allowed = "0 to 1 or 0 to 255" if picture.mode == "F" else "0 to 65535"
        raise IPAdapterError(
            f"The picture's values go from {low:g} to {high:g}, and allowed are {allowed}: save it with 8 or 16 bits."
        )
    grey = _to_bytes(values, top)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = background[0]
    return Image.fromarray(grey).convert("RGB")


def _to_bytes(values: NDArray[np.generic], top: float) -> NDArray[np.uint8]:
    """``values`` in 0…``top`` rounded to 0…255."""
    scaled: NDArray[np.float32] = values.astype(np.float32) * np.float32(255 / top)
    return np.rint(scaled).astype(np.uint8)


# Channels of an array to the mode of a picture.
_CHANNELS: Mapping[int, str] = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def _from_array(array: NDArray[np.generic], background: Colour) -> Image.Image:
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in _CHANNELS or 0 in array.shape:
        raise IPAdapterError(
            f"The picture is an array of the shape {list(shape)}; it must be [height, width] or [height, width, 1 to 4 "
            "channels], none of them 0."
        )
    if array.shape[0] * array.shape[1] > LIMIT_PIXELS:
        raise _too_large(f"{array.shape[1]} x {array.shape[0]} pixels")
    if array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint8:
        pixels = array.astype(np.uint8)
    elif array.dtype == np.uint16:
        pixels = _to_bytes(array, 65535.0)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise IPAdapterError(
                f"The picture is an array of floats from {low:g} to {high:g}; they must lie in 0 to 1, or be uint8."
            )
        pixels = _to_bytes(array, 1.0)
    else:
        raise IPAdapterError(f"The picture is an array of {array.dtype}; it must be uint8, uint16, bool or float.")
    mode = _CHANNELS[pixels.shape[2]]
    size = (pixels.shape[1], pixels.shape[0])
    return _rgb(Image.frombytes(mode, size, np.ascontiguousarray(pixels).tobytes()), background)


def _clip(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


# --- Preparation: what the encoder sees of a picture that isn't square ------------------------------------------------


def _crop(picture: Image.Image, size: int, crop: Crop) -> Image.Image:
    """A square of the picture becomes ``size``; see :class:`.refs.ImageRef` for which.

    By default the shorter side becomes ``size``, and the middle of the longer one is kept.
    This is CLIP's own preparation: resize, then crop. Resizing all of a very long picture would need a huge one in
    between, so only the box that the crop keeps is resized. Pillow's filter still reads the pixels beside the box, and
    the box is the one that CLIP's whole numbers give, so the result is the same.
    """
    width, height = picture.size
    long, short = max(width, height), min(width, height)
    if crop != MIDDLE:
        x, y, zoom = crop
        side = max(1.0, short / zoom)
        left, top = x * (width - side), y * (height - side)
        square = (left, top, min(left + side, width), min(top + side, height))
        return picture.resize((size, size), Image.Resampling.BICUBIC, box=square)
    resized = int(size * long / short)
    start = (resized - size) // 2
    low = start * long / resized
    high = min((start + size) * long / resized, long)
    box = (low, 0, high, height) if width >= height else (0, low, width, high)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _squash(picture: Image.Image, size: int, _: Crop) -> Image.Image:
    """The whole picture, out of proportion."""
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def _pad(picture: Image.Image, size: int, _: Crop) -> Image.Image:
    """The whole picture in proportion, in the middle, its outermost rows or columns repeated beside it.

    The longer side becomes ``size`` and the shorter one its share, at least one pixel; with an odd rest the band to the
    right or below is one pixel wider. Repeated edges continue a plain background, where bars of one colour would be
    content that the encoder sees.
    """
    width, height = picture.size
    scale = size / max(width, height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    array = np.asarray(picture.resize(inner, Image.Resampling.BICUBIC))
    left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
    bands = ((top, size - inner[1] - top), (left, size - inner[0] - left), (0, 0))
    return Image.fromarray(np.pad(array, bands, mode="edge"))


PREPARATIONS: Mapping[str, Callable[[Image.Image, int, Crop], Image.Image]] = {
    "crop": _crop,
    "squash": _squash,
    "pad": _pad,
}
"""From an RGB picture to the encoder's square, by the name that units use. All resize with antialiased bicubic."""


def prepare(picture: Image.Image, preparation: str, size: int = 224, crop: Crop = MIDDLE) -> Image.Image:
    """The exact input of an image encoder, as an RGB picture of ``size`` × ``size`` pixels.

    Args:
        picture: of :func:`read_picture`; one that isn't RGB goes through it first.
        preparation: a key of :data:`PREPARATIONS`.
        size: the encoder's ``image_size``.
        crop: which square the preparation "crop" takes; see :class:`.refs.ImageRef`.

    Raises:
        IPAdapterError: for an unknown preparation.
    """
    if preparation not in PREPARATIONS:
        raise IPAdapterError(f"The preparation is {preparation!r}; it can be {', '.join(PREPARATIONS)}.")
    return PREPARATIONS[preparation](picture if picture.mode == "RGB" else read_picture(picture), size, crop)


# --- Pixels -----------------------------------------------------------------------------------------------------------

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of each channel in CLIP's training data (Radford et al. 2021, arXiv 2103.00020, and its public code)."""


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to float32 ``[B, H, W, 3]`` in 0…1.

    Raises:
        IPAdapterError: for no pictures, several sizes, or another mode.
    """
    kinds = sorted({f"{p.mode} {p.width} x {p.height}" for p in pictures})
    if len(kinds) != 1 or not kinds[0].startswith("RGB "):
        raise IPAdapterError(
            f"The pictures to encode are {', '.join(kinds) or 'none'}; they must be RGB of one size: prepare them."
        )
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).float() / 255


def clip_preprocess(image: Tensor, size: int = 224) -> Tensor:
    """Normalises pixels for CLIP.

    Args:
        image: ``[B, H, W, C]`` in 0…1 with C = 3 and H = W = ``size``.
        size: the encoder's ``image_size``.

    Returns:
        ``[B, C, H, W]`` on the same device in the same dtype.

    Raises:
        AssertionError: if H or W isn't ``size``; prepare the picture first.
    """
    mean = torch.tensor(MEAN, device=image.device, dtype=image.dtype).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=image.device, dtype=image.dtype).view(1, 3, 1, 1)
    image = image.movedim(-1, 1)
    height, width = image.shape[2:]
    assert (height, width) == (size, size), (
        f"The image is {width} x {height} pixels; the encoder takes {size} x {size}."
    )
    return (image - mean) / std


def picture_hash(picture: Image.Image) -> str:
    """The sha256 of a picture's size and RGB pixels, 64 hexadecimal digits: one for a picture in any file."""
    rgb = picture if picture.mode == "RGB" else read_picture(picture)
    digest = hashlib.sha256(f"RGB {rgb.width} x {rgb.height}\n".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()

"""Reading, preparing and normalising pictures, against Pillow, transformers and torch where they do the same."""

from __future__ import annotations

import base64
import os
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from torch.nn import functional as F
from transformers import CLIPImageProcessor

from lib_ipadapter import pictures
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.pictures import (
    PREPARATIONS,
    clip_preprocess,
    picture_hash,
    prepare,
    read_picture,
    to_pixels,
)
from lib_ipadapter.refs import MIDDLE


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(width: int, height: int) -> Image.Image:
    """Smooth colour with some detail: an ordinary picture."""
    coarse = Image.fromarray(noise(7, 5)).resize((width, height), Image.Resampling.BICUBIC)
    fine = Image.fromarray(noise(width // 3 + 1, height // 3 + 1)).resize((width, height), Image.Resampling.BILINEAR)
    return Image.blend(coarse, fine, 0.25)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def array(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def over_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    return colour * alpha + 255 * (1 - alpha)


# Sources

PIXELS = noise(5, 4)
PNG = encoded(Image.fromarray(PIXELS))
BASE64 = base64.b64encode(PNG).decode()
SOURCES = {
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "base64": BASE64,
    "base64 in lines": "\n" + "\r\n".join(BASE64[i : i + 20] for i in range(0, len(BASE64), 20)) + " \n",
    "base64 without padding": BASE64.rstrip("="),
    "base64 for addresses": base64.urlsafe_b64encode(PNG).decode(),
    "data URI": f"data:image/png;base64,{BASE64}",
    "data URI, another image type": f"data:image/jpeg;base64,{BASE64}",
    "data URI, parameters": f"DATA:image/png;name=a.png;base64,\n{BASE64}",
    "data URI, no type": f"data:;base64,{BASE64}",
    "data URI, quoted": f"data:image/png;base64,{quote(BASE64, safe='')}",
    "picture": Image.fromarray(PIXELS),
    "array": PIXELS,
    "array view": PIXELS[::-1][::-1],
    "float array": PIXELS.astype(np.float64) / 255,
    "half array": PIXELS.astype(np.float16) / np.float16(255),
    "16-bit array": PIXELS.astype(np.uint16) * 257,
    "opaque array": np.dstack([PIXELS, np.full((4, 5, 1), 255, np.uint8)]),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_gives_the_same_picture(source: Any) -> None:
    picture = read_picture(source)
    assert picture.mode == "RGB"
    assert picture.info == {}
    assert np.array_equal(np.asarray(picture), PIXELS)


def test_a_path_object_is_opened_and_a_text_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("abcd").write_bytes(PNG)  # a name that is also base64
    assert np.array_equal(np.asarray(read_picture(Path("abcd"))), PIXELS)
    for text in ("abcd", "./abcd", str(tmp_path / "abcd"), f"file://{tmp_path}/abcd"):
        with pytest.raises(IPAdapterError):
            read_picture(text)


@pytest.mark.parametrize("name", ["absent.png", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IPAdapterError, match=f"{name} can't be read"):
        read_picture(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IPAdapterError, match="pipe can't be read"):
        read_picture(tmp_path / "pipe")


TEXTS = {
    "": "empty",
    " \n\t": "empty",
    "====": "empty",
    "data:image/png;base64,": "empty",
    "data:image/png;base64": "isn't base64",
    "data:image/svg+xml,<svg/>": "isn't base64",
    f"data:text/html;base64,{BASE64}": "text/html",
    "https://example.com/a.png": "address",
    "C:\\pictures\\a.png": "never a path",
    "holiday.png": "never a path",
    "Ünï": "never a path",
    BASE64 + "!": "isn't base64",
    "abcde": "isn't base64",
    base64.b64encode(b"no picture at all").decode(): "image format",
    base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(): "",
}


@pytest.mark.parametrize(("text", "says"), TEXTS.items())
def test_a_text_that_is_no_picture_says_why(text: str, says: str) -> None:
    with pytest.raises(IPAdapterError) as caught:
        read_picture(text)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("source", [None, 3, {"image": PNG}, [PNG], torch.zeros(4, 4, 3)])
def test_another_type_is_named(source: Any) -> None:
    with pytest.raises(IPAdapterError, match=type(source).__name__):
        read_picture(source)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.zeros((4, 4, 5), np.uint8), r"\[4, 4, 5\]"),
        (np.zeros(4, np.uint8), r"\[4\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.full((4, 4, 3), 128.0), "128"),
        (np.full((4, 4), -0.1), "-0.1"),
        (np.full((4, 4), np.nan), "nan"),
    ],
)
def test_an_array_that_is_no_picture_says_why(values: np.ndarray, says: str) -> None:
    with pytest.raises(IPAdapterError, match=says):
        read_picture(values)


# Orientation


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    file = encoded(photo(24, 16), form, exif=exif, **options)
    # Older Pillows turn a TIFF twice: once when it is loaded, and once more here.
    with Image.open(BytesIO(encoded(photo(24, 16), exif=exif) if form == "TIFF" else file)) as opened:
        wanted = ImageOps.exif_transpose(opened)
    assert wanted.size == ((24, 16) if orientation < 5 else (16, 24))
    assert np.array_equal(array(read_picture(file)), array(wanted))
    for before in (lambda it: it.load(), lambda it: it.getexif(), lambda it: None):
        opened = Image.open(BytesIO(file))
        before(opened)
        assert np.array_equal(array(read_picture(opened)), array(wanted))


def test_orientation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    first = read_picture(encoded(photo(24, 16), exif=exif))
    assert np.array_equal(array(read_picture(first)), array(first))


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"nonsense"])
def test_broken_exif_is_passed_over(exif: bytes) -> None:
    picture = photo(8, 6)
    assert np.array_equal(array(read_picture(encoded(picture, exif=exif))), array(picture))


# Transparency


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "array", "picture"])
def test_alpha_is_laid_over_white(form: str) -> None:
    rgba = noise(16, 12, 4)
    rgba[:4, :, 3], rgba[4:8, :, 3] = 0, 255
    picture = Image.fromarray(rgba)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    source = {"array": rgba, "picture": picture}.get(form)
    out = array(read_picture(encoded(picture, form, **options) if source is None else source))
    assert (out[:4] == 255).all()
    assert np.array_equal(out[4:8], rgba[4:8, :, :3])
    assert np.abs(out - over_white(rgba)).max() <= 1


def test_grey_with_alpha_is_laid_over_white() -> None:
    la = noise(8, 6, 2)
    wanted = over_white(la[..., [0, 0, 0, 1]])
    for source in (la, encoded(Image.fromarray(la))):
        assert np.abs(array(read_picture(source)) - wanted).max() <= 1


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha_is_laid_over_white(mode: str) -> None:
    rgba = np.full((2, 2, 4), (200, 100, 50, 255), np.uint8)
    rgba[0, :, 3] = 0
    plain = Image.fromarray(rgba).convert("LA" if mode == "La" else "RGBA")
    out = array(read_picture(plain.convert(mode)))
    assert (out[0] == 255).all()
    assert np.array_equal(out[1], array(plain.convert("RGB"))[1])


@pytest.mark.parametrize(("form", "transparency"), [("PNG", 2), ("PNG", bytes([255, 128, 0, 255])), ("GIF", 2)])
def test_a_transparent_palette_colour_becomes_white(form: str, transparency: int | bytes) -> None:
    picture = Image.new("P", (4, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    picture.putdata([0, 1, 2, 3])
    out = array(read_picture(encoded(picture, form, transparency=transparency)))
    half = [40 * 128 / 255 + 127, 50 * 128 / 255 + 127, 60 * 128 / 255 + 127]
    second = half if isinstance(transparency, bytes) else [40, 50, 60]
    assert np.abs(out[0] - [[10, 20, 30], second, [255, 255, 255], [100, 110, 120]]).max() <= 1


@pytest.mark.parametrize(
    ("mode", "colours", "transparency"),
    [
        ("L", [7, 99], 7),
        ("RGB", [(1, 2, 3), (4, 5, 6)], (1, 2, 3)),
        ("1", [0, 1], 0),
        ("I;16", [257 * 7, 257 * 99], 257 * 7),
    ],
)
def test_a_transparent_colour_becomes_white(mode: str, colours: list[Any], transparency: Any) -> None:
    picture = Image.new(mode, (2, 1))
    for x, colour in enumerate(colours):
        picture.putpixel((x, 0), colour)
    source: Any = picture
    if mode == "I;16":  # which older Pillows can't write with a transparent colour
        picture.info["transparency"] = transparency
    else:
        source = encoded(picture, transparency=transparency)
    left, right = array(read_picture(source))[0]
    assert left.tolist() == [255, 255, 255]
    opaque = {"1": [255] * 3, "L": [99] * 3, "I;16": [99] * 3, "RGB": [4, 5, 6]}[mode]
    assert right.tolist() == opaque


# Frames and modes


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if form == "WEBP" else {}
    file = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    with Image.open(BytesIO(file)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    assert array(read_picture(file))[0, 0].tolist() == [200, 0, 0]


def test_a_callers_picture_stays_as_it_is() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
    picture = Image.open(BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    picture.seek(1)
    before = (picture.mode, dict(picture.info), picture.tell(), picture.tobytes())
    read_picture(picture)
    assert (picture.mode, dict(picture.info), picture.tell(), picture.tobytes()) == before
    rgb = Image.new("RGB", (2, 2))
    rgb.info["dpi"] = (72, 72)
    read_picture(rgb).putpixel((0, 0), (9, 9, 9))
    assert rgb.getpixel((0, 0)) == (0, 0, 0)
    assert rgb.info == {"dpi": (72, 72)}


SIXTEEN = np.array([[0, 1, 128, 129, 257], [32767, 32768, 64379, 65534, 65535]], np.uint16)
EIGHT = (SIXTEEN.astype(int) + 128) // 257


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG2000", "PPM", "array", "I;16", "I;16B", "I"])
def test_sixteen_bit_grey_is_scaled(form: str) -> None:
    picture = Image.fromarray(SIXTEEN)
    sources: dict[str, Any] = {
        "array": SIXTEEN,
        "I;16": picture,
        "I;16B": Image.frombytes("I;16B", picture.size, SIXTEEN.astype(">u2").tobytes()),
        "I": Image.fromarray(SIXTEEN.astype(np.int32)),
    }
    if form not in sources:
        sources[form] = encoded(sources["I"] if form == "PPM" else picture, form)
    out = array(read_picture(sources[form]))
    assert np.array_equal(out, np.repeat(EIGHT[..., None], 3, axis=2))


def test_grey_of_more_than_sixteen_bits_is_refused() -> None:
    for values in (np.array([[0, 70000]], np.int32), np.array([[-1, 5]], np.int32)):
        with pytest.raises(IPAdapterError, match=f"from {values.min()} to {values.max()}.*0 to 65535"):
            read_picture(Image.fromarray(values))


@pytest.mark.parametrize("top", [1, 255])
def test_float_grey_is_scaled(top: int) -> None:
    values = np.array([[0, 0.25, 0.5, 1]], np.float32) * top
    out = array(read_picture(encoded(Image.fromarray(values), "TIFF")))
    assert out[0, :, 0].tolist() == [0, 64, 128, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 256.0])
def test_floats_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(IPAdapterError, match="0 to 1 or 0 to 255"):
        read_picture(Image.fromarray(np.array([[0, value]], np.float32)))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_modes_become_what_pillow_makes_of_them(mode: str) -> None:
    lab = Image.frombytes("LAB", (16, 12), noise(16, 12).tobytes())
    picture = lab if mode == "LAB" else photo(16, 12).convert(mode)
    assert np.array_equal(array(read_picture(picture)), array(picture.convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "form"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("1", "PNG"), ("1", "TIFF"), ("P", "BMP")]
)
def test_files_of_other_modes(mode: str, form: str) -> None:
    picture = photo(16, 16).convert(mode)
    file = encoded(picture, form, **({"quality": 100, "subsampling": 0} if form == "JPEG" else {}))
    assert np.abs(array(read_picture(file)) - array(picture.convert("RGB"))).max() <= (6 if form == "JPEG" else 0)


def test_bool_arrays_are_black_and_white() -> None:
    assert array(read_picture(np.array([[True, False]])))[0, :, 1].tolist() == [255, 0]


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(
        ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "I;16", "RGBa", "La", "I", "F"]
    ),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    preparation=st.sampled_from(sorted(PREPARATIONS)),
    size=st.sampled_from([1, 14, 37]),
)
def test_every_mode_and_size_can_be_read_and_prepared(
    mode: str, width: int, height: int, preparation: str, size: int
) -> None:
    base = Image.fromarray(noise(width, height, 4, seed=width + height))
    if mode == "I;16":
        picture = Image.fromarray(noise(width, height, 1)[..., 0].astype(np.uint16) * 256)
    elif mode in ("I", "F", "PA"):
        picture = base.convert("L").convert(mode)
    elif mode in ("LA", "La"):
        picture = base.convert("LA").convert(mode)
    else:
        picture = (base if mode == "RGBa" else base.convert("RGBA" if mode == "RGBA" else "RGB")).convert(mode)
    rgb = read_picture(picture)
    assert rgb.mode == "RGB"
    assert rgb.size == (width, height)
    prepared = prepare(rgb, preparation, size)
    assert prepared.mode == "RGB"
    assert prepared.size == (size, size)
    assert np.array_equal(array(prepare(picture, preparation, size)), array(prepared))
    assert picture_hash(picture) == picture_hash(rgb)


# Broken and hostile files


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_truncated_files_raise_a_sentence(form: str, tolerant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # as some hosts do
    file = encoded(Image.fromarray(noise(64, 48)), form)
    read_picture(file)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(IPAdapterError) as caught:
            read_picture(file[: int(len(file) * share)])
        assert "\n" not in str(caught.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO"]),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    end=st.floats(0, 1),
)
def test_damaged_files_are_a_picture_or_a_sentence(form: str, places: list[tuple[float, int]], end: float) -> None:
    file = bytearray(encoded(photo(20, 20), form))
    for place, value in places:
        file[int(place * (len(file) - 1))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = ""
        try:
            picture = read_picture(bytes(file[: 1 + int(end * len(file))]))
        except IPAdapterError as error:
            said = str(error)
    assert "\n" not in said
    assert said or picture.mode == "RGB"


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=60)))
def test_anything_else_is_a_sentence(source: bytes | str) -> None:
    with pytest.raises(IPAdapterError):
        read_picture(source)


def huge_png(width: int, height: int) -> bytes:
    """A small PNG file that says it is a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("host_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_huge_pictures_are_refused_with_their_size(host_limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", host_limit)
    with pytest.raises(IPAdapterError, match=r"too large \((900 megapixels|30000 x 30000 pixels)\).*179 megapixels"):
        read_picture(huge_png(30000, 30000))
    monkeypatch.setattr(pictures, "LIMIT_PIXELS", 100)
    for source in (np.zeros((10, 11)), Image.new("L", (11, 10)), encoded(Image.new("L", (11, 10)))):
        with pytest.raises(IPAdapterError, match="11 x 10 pixels"):
            read_picture(source)
    assert read_picture(Image.new("L", (10, 10))).size == (10, 10)


def test_large_pictures_raise_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file = encoded(Image.new("RGB", (12, 12)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(file).size == (12, 12)
        filters = list(warnings.filters)
    assert filters[0][0] == "error"


def test_formats_that_start_other_programs_are_refused() -> None:
    file = encoded(Image.new("RGB", (4, 4)), "EPS")
    with pytest.raises(IPAdapterError, match="no known image format"):
        read_picture(file)


def test_very_long_pictures_are_fine() -> None:
    for size in ((20000, 1), (1, 20000), (20000, 30)):
        picture = read_picture(encoded(Image.new("RGB", size, (10, 200, 30))))
        for preparation in PREPARATIONS:
            out = array(prepare(picture, preparation))
            assert out.shape == (224, 224, 3)
            assert (out == [10, 200, 30]).all()


# Preparation


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (1, 300)])
@pytest.mark.parametrize(
    "crop", [(0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.25, 0.75, 2.0), (0.5, 0.5, 10.0), (1.0, 0.0, 3.0)]
)
def test_a_crop_of_ones_own(size: tuple[int, int], crop: tuple[float, float, float]) -> None:
    picture = photo(*size)
    x, y, zoom = crop
    side = max(1.0, min(size) / zoom)
    left, top = x * (size[0] - side), y * (size[1] - side)
    # Enlarged forty times, every place of the box is a whole pixel, and the two ways differ by their filters alone.
    large = picture.resize((size[0] * 40, size[1] * 40), Image.Resampling.BICUBIC)
    box = tuple(round(40 * v) for v in (left, top, left + side, top + side))
    wanted = large.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
    out = array(prepare(picture, "crop", 224, crop)).astype(int)
    assert np.abs(out - array(wanted).astype(int)).mean() < 6
    for preparation in ("squash", "pad"):
        assert np.array_equal(array(prepare(picture, preparation, 224, crop)), array(prepare(picture, preparation)))


def test_the_middle_is_the_default_crop() -> None:
    picture = photo(300, 200)
    assert np.array_equal(array(prepare(picture, "crop", 224, MIDDLE)), array(prepare(picture, "crop")))
    nearly = array(prepare(picture, "crop", 224, (0.5, 0.5, 1.0 + 1e-9))).astype(int)
    assert np.abs(nearly - array(prepare(picture, "crop")).astype(int)).mean() < 1


PROCESSOR = CLIPImageProcessor(do_center_crop=True, resample=3)
SIZES = [
    (300, 200),
    (1000, 777),
    (50, 90),
    (224, 224),
    (225, 640),
    (640, 225),
    (3, 2),
    (1, 1),
    (1, 300),
    (2000, 30),
]


def assert_cropped_like_clip(picture: Image.Image, size: int) -> None:
    processor = CLIPImageProcessor(
        do_center_crop=True,
        resample=3,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
    )
    wanted = processor(
        picture,
        return_tensors="np",
        do_rescale=False,
        do_normalize=False,
        input_data_format="channels_last",  # it takes one row of pixels for one channel
    )["pixel_values"][0]
    apart = np.abs(array(prepare(picture, "crop", size)) - wanted.transpose(1, 2, 0).astype(int))
    # Pillow rounds to 8 bits between its horizontal and its vertical pass.
    assert apart.max() <= 2
    assert (apart > 0).mean() < 0.01


@pytest.mark.parametrize("size", SIZES)
def test_crop_is_clips_own_preparation(size: tuple[int, int]) -> None:
    assert_cropped_like_clip(photo(*size), 224)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.sampled_from([28, 56]))
def test_crop_is_clips_own_preparation_at_any_size(width: int, height: int, size: int) -> None:
    assert_cropped_like_clip(photo(width, height), size)


@pytest.mark.parametrize("size", [(300, 200), (500, 777), (50, 90), (224, 224), (3, 2), (700, 20)])
def test_squash_is_an_antialiased_bicubic_resize(size: tuple[int, int]) -> None:
    picture = photo(*size)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float()
    wanted = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True).round().clamp(0, 255)[0].permute(1, 2, 0)
    assert np.abs(array(prepare(picture, "squash")) - wanted.numpy()).max() <= 2


@pytest.mark.parametrize("preparation", ["crop", "squash"])
def test_downscaling_averages_instead_of_skipping(preparation: str) -> None:
    board = np.indices((896, 896)).sum(axis=0) % 2 * 255
    out = array(prepare(read_picture(board.astype(np.uint8)), preparation))[4:-4, 4:-4]
    assert out.min() > 120
    assert out.max() < 135


@pytest.mark.parametrize(
    ("size", "inner", "corner"),
    [
        ((448, 224), (224, 112), (0, 56)),
        ((100, 300), (75, 224), (74, 0)),
        ((1, 20000), (1, 224), (111, 0)),
        ((9, 9), (224, 224), (0, 0)),
    ],
)
def test_pad_keeps_the_whole_picture_and_repeats_its_edges(
    size: tuple[int, int], inner: tuple[int, int], corner: tuple[int, int]
) -> None:
    picture = photo(*size)
    out = array(prepare(picture, "pad"))
    (width, height), (left, top) = inner, corner
    right, bottom = left + width, top + height
    wanted = array(picture.resize(inner, Image.Resampling.BICUBIC))
    assert np.array_equal(out[top:bottom, left:right], wanted)
    assert (out[:top] == out[top]).all()
    assert (out[bottom:] == out[bottom - 1]).all()
    assert (out[:, :left] == out[:, left : left + 1]).all()
    assert (out[:, right:] == out[:, right - 1 : right]).all()


@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_a_picture_of_the_right_size_stays(preparation: str) -> None:
    picture = Image.fromarray(noise(224, 224))
    out = prepare(picture, preparation)
    assert out is not picture
    assert np.array_equal(array(out), array(picture))


def test_an_unknown_preparation_is_named() -> None:
    with pytest.raises(IPAdapterError, match="'stretch'; it can be crop, squash, pad"):
        prepare(photo(4, 4), "stretch")


# Pixels


def test_pixels_and_normalisation_equal_transformers() -> None:
    picture = Image.fromarray(noise(224, 224))
    wanted = PROCESSOR(picture, return_tensors="pt")["pixel_values"]
    pixels = to_pixels([picture, picture])
    assert pixels.shape == (2, 224, 224, 3)
    assert pixels.dtype == torch.float32
    assert float(pixels.min()) == 0
    assert float(pixels.max()) == 1
    out = clip_preprocess(pixels)
    assert out.shape == (2, 3, 224, 224)
    torch.testing.assert_close(out[1:], wanted, rtol=1e-6, atol=1e-6)


def test_normalisation_keeps_dtype_and_takes_another_size_by_name_only() -> None:
    assert clip_preprocess(torch.rand(1, 224, 224, 3, dtype=torch.float64)).dtype == torch.float64
    assert clip_preprocess(torch.rand(1, 336, 336, 3), size=336).shape == (1, 3, 336, 336)
    for shape in ((1, 336, 336, 3), (1, 224, 223, 3), (1, 3, 224, 224)):
        with pytest.raises(AssertionError):
            clip_preprocess(torch.rand(shape))


def test_pictures_that_do_not_fit_a_batch_are_named() -> None:
    for batch, says in (
        ([], "none"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], "RGB 4 x 4, RGB 5 x 4"),
        ([Image.new("L", (4, 4))], "L 4 x 4"),
    ):
        with pytest.raises(IPAdapterError, match=says):
            to_pixels(batch)


def test_the_hash_is_of_what_is_seen() -> None:
    picture = photo(12, 8)
    assert picture_hash(picture) == picture_hash(read_picture(encoded(picture, "TIFF")))
    changed = picture.copy()
    changed.putpixel((11, 7), (1, 2, 3))
    turned = Image.frombytes("RGB", (8, 12), picture.tobytes())  # the same bytes in another shape
    hashes = {picture_hash(each) for each in (picture, changed, turned)}
    assert len(hashes) == 3
    assert all(len(each) == 64 and int(each, 16) >= 0 for each in hashes)

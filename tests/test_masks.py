"""Masks on the grids of cross-attention layers, against convolutions as they are and averages over samples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lib_ipadapter import masks
from lib_ipadapter.hosts.job import drawn_region
from lib_ipadapter.masks import (
    TEMPLATES,
    WHOLE,
    Canvas,
    Mask,
    Region,
    grids,
    of_picture,
    of_template,
    overlap,
)
from tests.photos import photo

DEPTHS = 4
"""Of the UNets of SD1.x, SD2.x and SDXL."""
SIDES = range(256 // 8, 2048 // 8 + 1)
"""Every side of a latent, for pictures of 256 to 2048 pixels in steps of 8."""


def halved(side: int) -> list[int]:
    """What the UNets' own way down makes of a side, by running it."""
    down = nn.Conv2d(1, 1, 3, stride=2, padding=1, device="meta")
    x, found = torch.empty(1, 1, side, 1, device="meta"), [side]
    for _ in range(DEPTHS - 1):
        x = down(x)
        found.append(x.shape[2])
    return found


def test_every_size_has_the_grids_that_convolutions_make() -> None:
    by_side = {side: halved(side) for side in SIDES}
    assert len(by_side) == 225
    for height, rows in by_side.items():
        for width, columns in by_side.items():
            made = list(zip(rows, columns, strict=True))
            assert grids(height, width)[:DEPTHS] == made
            counts = [r * c for r, c in made]
            assert len(set(counts)) == DEPTHS  # so that the number of queries tells the depth


def test_both_sides_at_once() -> None:
    down = nn.Conv2d(1, 1, 3, stride=2, padding=1, device="meta")
    for height, width in ((25, 33), (135, 240), (32, 255), (1, 7), (64, 64)):
        x = torch.empty(1, 1, height, width, device="meta")
        for grid in grids(height, width):
            assert tuple(x.shape[2:]) == grid
            x = down(x)
        assert grids(height, width)[-1] == (1, 1)


def sampled(edges: np.ndarray, latent: int, depth: int, low: float, high: float, feather: float) -> np.ndarray:
    """How much of every cell lies in each stripe, by counting: samples in the cell, and in the window around each."""
    count, window = 400, 101
    rows = []
    for cell in range(-(-latent // 2**depth)):
        first, last = cell * 2**depth, min((cell + 1) * 2**depth, latent)
        x = low + (high - low) * (first + (last - first) * (np.arange(count) + 0.5) / count) / latent
        offsets = feather * ((np.arange(window) + 0.5) / window - 0.5) if feather else np.zeros(1)
        stripe = np.clip(np.searchsorted(edges, x[:, None] + offsets, "right") - 1, 0, len(edges) - 2)
        rows.append(np.bincount(stripe.ravel(), minlength=len(edges) - 1) / stripe.size)
    return np.array(rows)


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    depth=st.integers(0, 3),
    picture=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99)),
    feather=st.sampled_from([0.0, 0.03, 0.2, 1.0]),
    region=st.sampled_from([WHOLE, Region(0.3, 0.1, 0.75, 0.5, (300, 200)), Region(-0.1, 0.2, 0.9, 1.3, (90, 200))]),
)
def test_averages_over_cells(
    size: tuple[int, int], depth: int, picture: tuple[int, int, int], feather: float, region: Region
) -> None:
    height, width, seed = picture
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    mask = of_picture(Image.fromarray(pixels), feather)
    canvas = region.size or (size[1], size[0])
    soft_x, soft_y = (feather * min(canvas) / side for side in canvas)
    x = sampled(np.arange(width + 1) / width, size[1], depth, region.left, region.right, soft_x)
    y = sampled(np.arange(height + 1) / height, size[0], depth, region.top, region.bottom, soft_y)
    found = mask.on(size, depth, region)
    assert found.shape == tuple(-(-side // 2**depth) for side in size)
    assert np.abs(found - y @ (pixels / 255) @ x.T).max() < 0.02
    assert found.min() >= 0 and found.max() <= 1


def test_a_window_in_place_of_an_edge_makes_a_straight_ramp() -> None:
    row = of_template("left half", 0.5).on((8, 8))[0]
    # Falls from 1 at a quarter to 0 at three quarters of the width.
    assert row == pytest.approx([1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0], abs=1e-12)
    assert (row[:2] == 1).all() and (row[6:] == 0).all()


def test_soft_edges_are_as_wide_both_ways() -> None:
    """Feather is a share of the shorter side, so a ramp has as many pixels in x as in y."""
    upright, level = of_template("left half", 0.5), of_template("top half", 0.5)
    across, down = upright.on((20, 40))[0], level.on((20, 40))[:, 0]
    assert ((across > 0) & (across < 1)).sum() == ((down > 0) & (down < 1)).sum() == 10
    assert across[15:25] == pytest.approx(down[5:15])


SIZES = [(32, 32), (25, 33), (135, 240), (96, 57), (1, 5)]
WHOLES = [
    ("left half", "right half"),
    ("top half", "bottom half"),
    ("left third", "middle column", "right third"),
    ("top third", "middle row", "bottom third"),
    ("top left quarter", "top right quarter", "bottom left quarter", "bottom right quarter"),
    ("centre", "edges"),
]


def test_every_template_is_part_of_a_whole() -> None:
    assert sorted(name for names in WHOLES for name in names) == sorted(TEMPLATES)


@pytest.mark.parametrize("names", WHOLES)
@pytest.mark.parametrize("feather", [0.0, 0.07, 0.6])
def test_templates_of_one_kind_add_up_to_no_mask(names: tuple[str, ...], feather: float) -> None:
    for size in SIZES:
        for depth in range(DEPTHS):
            total = sum(of_template(name, feather).on(size, depth) for name in names)
            assert np.abs(total - 1).max() < 1e-8


@pytest.mark.parametrize("feather", [0.0, 0.2])
@pytest.mark.parametrize("name", [*TEMPLATES, "picture"])
def test_a_mask_and_its_inverse_add_up_to_no_mask(name: str, feather: float) -> None:
    def make(invert: bool) -> Mask:
        if name == "picture":
            return of_picture(photo("coffee"), feather, invert)
        return of_template(name, feather, invert)

    for size in SIZES:
        for depth in range(DEPTHS):
            assert np.abs(make(False).on(size, depth) + make(True).on(size, depth) - 1).max() < 1e-8


def test_where_templates_act() -> None:
    for name, (row, column) in {
        "left half": (3, 1),
        "right half": (3, 6),
        "top half": (1, 3),
        "bottom half": (6, 3),
        "left third": (3, 0),
        "right third": (3, 7),
        "top third": (0, 3),
        "bottom third": (7, 3),
        "middle column": (0, 4),
        "middle row": (4, 0),
        "top left quarter": (1, 1),
        "top right quarter": (1, 6),
        "bottom left quarter": (6, 1),
        "bottom right quarter": (6, 6),
        "centre": (4, 4),
        "edges": (1, 4),
    }.items():
        found = of_template(name).on((8, 8))
        assert found[row, column] == 1, name
        share = 1 / 3 if "third" in name or "middle" in name else 0.5
        share = {"centre": 0.25, "edges": 0.75}.get(name, 0.25 if "quarter" in name else share)
        assert found.mean() == pytest.approx(share), name


def test_outside_a_mask_there_is_nothing_at_all_at_any_size() -> None:
    """Not 1e-17 of it, whose logarithm is a number."""
    for side in SIDES:
        for depth in range(DEPTHS):
            for name in ("left half", "middle column"):
                row = of_template(name).on((8, side), depth)[0]
                inside = of_template(name, invert=True).on((8, side), depth)[0]
                cells = len(row)
                assert ((row == 0) | (row == 1)).sum() >= cells - 2
                assert ((row == 0) == (inside == 1)).all()


def test_a_photograph_is_its_own_average() -> None:
    picture = photo("astronaut").convert("L").resize((512, 384))
    whole = of_picture(picture).on((48, 64))
    blocks = np.asarray(picture, dtype=float).reshape(48, 8, 64, 8).mean(axis=(1, 3)) / 255
    assert np.abs(whole - blocks).max() < 1e-8


def test_a_large_picture_is_reduced_without_moving() -> None:
    """Blocks of 3 don't divide it: what is left at the edges counts as what it is."""
    pixels = np.zeros((2501, 2600), dtype=np.uint8)
    pixels[:, 1300:] = 255
    mask = of_picture(Image.fromarray(pixels))
    assert max(mask.values.shape) <= masks.LONGEST
    row = mask.on((4, 50))[0]
    assert np.abs(row - ([0] * 25 + [1] * 25)).max() < 0.03
    assert row.mean() == pytest.approx(0.5, abs=1e-3)


def test_colours_act_by_their_brightness() -> None:
    red = of_picture(Image.new("RGB", (4, 4), (255, 0, 0))).values
    assert red == pytest.approx(np.full((4, 4), 76 / 255))
    assert of_picture(Image.new("RGB", (4, 4))).is_black
    assert of_picture(Image.new("RGB", (4, 4)), invert=True).is_white
    assert not of_template("edges").is_black and not of_template("edges").is_white


# Parts of the canvas


@pytest.mark.parametrize("feather", [0.0, 0.15])
def test_a_region_is_cut_out_of_the_canvas(feather: float) -> None:
    mask = of_picture(photo("coffee"), feather)
    whole = mask.on((64, 80))
    part = mask.on((32, 40), 0, Region(0.25, 0.5, 0.75, 1.0, (640, 512)))
    assert np.abs(part - whole[32:64, 20:60]).max() < 1e-8
    coarse = mask.on((32, 40), 1, Region(0.25, 0.5, 0.75, 1.0, (640, 512)))
    assert np.abs(coarse - part.reshape(16, 2, 20, 2).mean(axis=(1, 3))).max() < 1e-8


def inpainting(crop: tuple[int, int, int, int], size: tuple[int, int], canvas: tuple[int, int]) -> SimpleNamespace:
    """A host's job that inpaints a crop, given as it keeps it (x, y, width, height), at ``size``."""
    picture = Image.new("RGB", canvas)
    return SimpleNamespace(
        paste_to=crop,
        init_images=[picture],
        image_mask=picture,
        inpaint_full_res=True,
        width=size[0],
        height=size[1],
    )


CROPS = [
    ((100, 60, 256, 256), (512, 512)),
    ((100, 60, 256, 192), (512, 384)),
    ((0, 0, 640, 480), (512, 512)),  # lies in the middle of the square
    ((500, 100, 140, 380), (512, 512)),
]


@pytest.mark.parametrize(("crop", "size"), CROPS)
def test_inpainting_only_masked_sees_the_mask_where_the_picture_lies(
    crop: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    """The mask as a picture, taken the way that the host takes the picture to inpaint."""
    canvas = (640, 480)
    mask = photo("astronaut").convert("L").resize(canvas)
    x, y, width, height = crop
    scale = min(size[0] / width, size[1] / height)
    inner = mask.crop((x, y, x + width, y + height)).resize((round(width * scale), round(height * scale)))
    left, top = (size[0] - inner.width) // 2, (size[1] - inner.height) // 2
    taken = np.asarray(inner, dtype=float)
    latent = (size[1] // 8, size[0] // 8)
    found = of_picture(mask).on(latent, 0, drawn_region(inpainting(crop, size, canvas)))
    rows, columns = slice(-(-top // 8), (top + inner.height) // 8), slice(-(-left // 8), (left + inner.width) // 8)
    first_row, first_column = rows.start * 8 - top, columns.start * 8 - left
    high, wide = rows.stop - rows.start, columns.stop - columns.start
    taken = taken[first_row : first_row + 8 * high, first_column : first_column + 8 * wide]
    blocks = taken.reshape(high, 8, wide, 8).mean(axis=(1, 3)) / 255
    assert np.abs(found[rows, columns] - blocks).max() < 0.06
    assert np.abs(found[rows, columns] - blocks).mean() < 0.01


def test_which_jobs_draw_a_part() -> None:
    job = inpainting((100, 60, 256, 256), (512, 512), (640, 480))
    assert drawn_region(job) == Region(100 / 640, 60 / 480, 356 / 640, 316 / 480, (640, 480))
    for name, value in {"inpaint_full_res": False, "image_mask": None, "paste_to": None}.items():
        assert drawn_region(SimpleNamespace(**{**vars(job), name: value})) is WHOLE
    assert drawn_region(SimpleNamespace(width=512, height=512)) is WHOLE


def test_a_hires_pass_of_another_shape_cuts_off_both_ends() -> None:
    job = SimpleNamespace(
        width=512, height=512, is_hr_pass=True, hr_upscale_to_x=1024, hr_upscale_to_y=1024, truncate_x=0, truncate_y=32
    )
    region = drawn_region(job)
    assert region == Region(0.0, 0.125, 1.0, 0.875, (512, 512))
    mask = of_template("top half", 0.3)
    assert np.abs(mask.on((96, 128), 0, region) - mask.on((128, 128))[16:112]).max() < 1e-8
    assert drawn_region(SimpleNamespace(**{**vars(job), "is_hr_pass": False})) is WHOLE


def test_the_canvas_tells_stretched_masks() -> None:
    square, wide = (of_picture(Image.new("L", size)) for size in ((512, 512), (768, 512)))
    assert not Canvas((64, 64)).stretches(square) and Canvas((64, 64)).stretches(wide)
    assert Canvas((64, 96)).stretches(square) and not Canvas((64, 96)).stretches(wide)
    assert not Canvas((60, 64)).stretches(square)
    assert not Canvas((64, 64), Region(0, 0, 0.5, 0.5, (1536, 1024))).stretches(wide)
    assert not Canvas((8, 80)).stretches(of_template("left half"))


def test_masks_that_are_multiplied() -> None:
    left, right, top = (of_template(name) for name in ("left half", "right half", "top half"))
    factors = Canvas((4, 4)).at_every_depth((left, top))
    assert factors[0].reshape(4, 4).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert [len(each) for each in factors] == [16, 4, 1]
    assert factors[2] == pytest.approx([0.25])
    assert overlap(()) and overlap((left,)) and overlap((left, top))
    assert not overlap((left, right))
    assert overlap((left, of_template("right half", 0.1)))

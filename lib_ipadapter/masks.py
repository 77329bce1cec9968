"""Masks: where on the canvas a picture acts, as every cross-attention layer sees it.

A mask is a picture in shades of grey that is stretched over the canvas: white acts, black doesn't. Each layer has one
query for each cell of a grid, and a query's factor is the mask's average over its cell. All of it is one formula, exact
at every size: a mask is constant in the rectangles between its edges, so its average over a cell is ``Y M X'``, with
``X[i, j]`` the part of cell i that lies in column j, and ``Y`` the same for rows. Everything in it is linear, so masks
that add up to white do so in every layer, with soft edges too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Values = NDArray[np.float64]

PIXELS = 8
"""Pixels of the canvas in a latent entry, each way."""

# --- Templates --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A mask by name: what acts in the rectangles between the edges, from left to right and top to bottom."""

    values: tuple[tuple[float, ...], ...]
    columns: tuple[float, ...]
    """Their edges, from 0 to 1."""
    rows: tuple[float, ...]


def _one_of(count: int, number: int, across: bool) -> Template:
    """One of so many equal stripes, which follow one another from left to right, or else from top to bottom."""
    edges = tuple(n / count for n in range(count + 1))
    stripes = tuple(float(n == number) for n in range(count))
    return Template((stripes,), edges, (0, 1)) if across else Template(tuple((s,) for s in stripes), (0, 1), edges)


def _quarter(right: bool, bottom: bool) -> Template:
    rows = tuple(tuple(float(y is bottom and x is right) for x in (False, True)) for y in (False, True))
    return Template(rows, (0, 0.5, 1), (0, 0.5, 1))


def _frame(inside: float) -> Template:
    """The middle half of each side, and what is around it."""
    outside = 1.0 - inside
    middle = (outside, inside, outside)
    return Template(((outside,) * 3, middle, (outside,) * 3), (0, 0.25, 0.75, 1), (0, 0.25, 0.75, 1))


TEMPLATES: Mapping[str, Template] = {
    "left half": _one_of(2, 0, True),
    "right half": _one_of(2, 1, True),
    "top half": _one_of(2, 0, False),
    "bottom half": _one_of(2, 1, False),
    "left third": _one_of(3, 0, True),
    "middle column": _one_of(3, 1, True),
    "right third": _one_of(3, 2, True),
    "top third": _one_of(3, 0, False),
    "middle row": _one_of(3, 1, False),
    "bottom third": _one_of(3, 2, False),
    "top left quarter": _quarter(False, False),
    "top right quarter": _quarter(True, False),
    "bottom left quarter": _quarter(False, True),
    "bottom right quarter": _quarter(True, True),
    "centre": _frame(1.0),
    "edges": _frame(0.0),
}
"""Masks by name, on the canvas from 0 (left, top) to 1."""

# --- The canvas and its grids -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """The part of the canvas that a pass draws, from 0 (left, top) to 1; it may reach beyond the canvas.

    ``size`` is the canvas's width and height in pixels; None: the pass's own, since it draws all of it.
    """

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    size: tuple[int, int] | None = None


WHOLE = Region()


def grids(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of queries at every depth of a UNet, for a latent of ``height`` x ``width``.

    Each way down is a convolution with stride 2 and one entry of padding, which halves a side and rounds up.
    """
    found = [(height, width)]
    while found[-1] != (1, 1):
        found.append(((found[-1][0] + 1) // 2, (found[-1][1] + 1) // 2))
    return found


def _cells(latent: int, depth: int, low: float, high: float) -> Values:
    """Edges of a grid's cells along one side of the canvas.

    A cell stands for two of the grid above it, and at the far edge for what is left there.
    """
    entries = np.minimum(np.arange(-(-latent // 2**depth) + 1) * 2**depth, latent)
    return low + (high - low) * entries / latent


def _coverage(edges: Sequence[float] | Values, cells: Values, feather: float) -> Values:
    """The part of every cell that lies between every two edges, ``[cells, edges - 1]``; rows add up to 1.

    The outermost stripes go on for ever. ``feather`` is the width of the ramp that stands in place of each edge, which
    is what averaging over so wide a window makes of it.
    """
    # Integral of the ramp, or step, that begins to rise at -feather/2.
    x = cells[:, None] - np.asarray(edges, dtype=np.float64)[None, 1:-1]
    rising = np.maximum(x, 0.0)
    if feather > 0:
        rising = np.where(np.abs(x) < feather / 2, (x + feather / 2) ** 2 / (2 * feather), rising)
    behind = np.diff(rising, axis=0) / np.diff(cells)[:, None]  # how much of a cell lies behind each inner edge
    outer = np.ones((len(cells) - 1, 1))
    return -np.diff(np.concatenate([outer, behind, 0 * outer], axis=1), axis=1)


# --- Masks ------------------------------------------------------------------------------------------------------------

LONGEST = 1024
"""Pixels of a mask's longer side beyond which neighbours are averaged; no layer's grid of a usual canvas is finer."""
_EXACT = 1e-9
"""What is nearer than that to 0 or 1 is it, so that a query outside a mask has exactly none of the picture."""


@dataclass(frozen=True, eq=False)
class Mask:
    """What acts in the rectangles between the edges, before feathering.

    Attributes:
        values: ``[rows, columns]``, 0 to 1.
        rows, columns: their edges, from 0 to 1.
        feather: width of the soft edges, a share of the canvas's shorter side.
        size: width and height of the picture that it is; None for a template.
    """

    values: Values
    rows: Values
    columns: Values
    feather: float = 0.0
    size: tuple[int, int] | None = None

    @property
    def is_black(self) -> bool:
        """Whether it acts nowhere."""
        return not self.values.any()

    @property
    def is_white(self) -> bool:
        """Whether it acts everywhere, as no mask does."""
        return bool((self.values == 1).all())

    def on(self, latent: tuple[int, int], depth: int = 0, region: Region = WHOLE) -> Values:
        """Its average over every cell of a grid, ``[rows, columns]``.

        Args:
            latent: rows and columns of the latent that a pass draws.
            depth: how many times the UNet has halved it.
            region: the part of the canvas that this is.
        """
        height, width = latent
        shape = width / height if region.size is None else region.size[0] / region.size[1]
        soft_x, soft_y = (self.feather / shape, self.feather) if shape > 1 else (self.feather, self.feather * shape)
        x = _coverage(self.columns, _cells(width, depth, region.left, region.right), soft_x)
        y = _coverage(self.rows, _cells(height, depth, region.top, region.bottom), soft_y)
        averages: Values = y @ self.values @ x.T
        averages[averages < _EXACT] = 0
        averages[averages > 1 - _EXACT] = 1
        return averages


def of_template(name: str, feather: float = 0.0, invert: bool = False) -> Mask:
    """The mask of a key of :data:`TEMPLATES`."""
    template = TEMPLATES[name]
    values = np.array(template.values, dtype=np.float64)
    rows, columns = (np.array(edges, dtype=np.float64) for edges in (template.rows, template.columns))
    return Mask(1 - values if invert else values, rows, columns, feather)


def of_picture(picture: Image.Image, feather: float = 0.0, invert: bool = False) -> Mask:
    """A picture as a mask, by its shades of grey (Rec. 601 luma of RGB)."""
    grey = picture if picture.mode == "L" else picture.convert("L")
    width, height = grey.size
    factor = -(-max(width, height) // LONGEST)
    values = np.asarray(grey.reduce(factor) if factor > 1 else grey, dtype=np.float64) / 255
    # Of the last row and column of blocks there may be less than a block.
    rows, columns = (
        np.minimum(np.arange(count + 1) * factor, side) / side
        for count, side in zip(values.shape, (height, width), strict=True)
    )
    return Mask(1 - values if invert else values, rows, columns, feather, (width, height))


Where = tuple[Mask, ...]
"""Where a picture acts: masks that are multiplied, its unit's and its own; empty: everywhere."""


@dataclass(frozen=True)
class Canvas:
    """What a pass draws.

    Attributes:
        latent: rows and columns of its latent.
        region: which part of the canvas that is.
    """

    latent: tuple[int, int]
    region: Region = WHOLE
    _made: dict[Where, tuple[Values, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole canvas in pixels."""
        return self.region.size or (PIXELS * self.latent[1], PIXELS * self.latent[0])

    def at_every_depth(self, where: Where) -> tuple[Values, ...]:
        """Factors of the queries of every depth, ``[queries]``, row by row; worked out once."""
        if where not in self._made:
            self._made[where] = tuple(
                np.prod([mask.on(self.latent, depth, self.region) for mask in where], axis=0).ravel()
                for depth in range(len(grids(*self.latent)))
            )
        return self._made[where]

    def stretches(self, mask: Mask) -> bool:
        """Whether a mask has clearly another shape than the canvas, over which it is stretched."""
        if mask.size is None:
            return False
        ratio = mask.size[0] / mask.size[1] / (self.size[0] / self.size[1])
        return max(ratio, 1 / ratio) > MISSHAPEN


MISSHAPEN = 1.1
"""How many times as wide a mask may be for its height as the canvas before that is told."""


def overlap(where: Where) -> bool:
    """Whether masks that are multiplied leave anything."""
    side = LONGEST // 2
    return len(where) < 2 or bool(np.prod([mask.on((side, side)) for mask in where], axis=0).any())


# --- For people -------------------------------------------------------------------------------------------------------

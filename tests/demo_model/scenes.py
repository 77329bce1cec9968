"""The data set: pictures of coloured shapes, described by a few numbers and drawn by signed distances.

A batch of scenes is a handful of tensors, so it is sampled, changed and drawn wherever torch computes. Lengths are in
units of the picture's side, x to the right and y downwards, 0 in the middle: -0.5 to 0.5.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart", "moon")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", "white", "black")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
PLACES = ("middle", "left", "right", "top", "bottom")
BACKGROUNDS = ("plain", "gradient", "blurry")
"""The last is a picture of its own kind: soft fields of colour without any shape."""
RELATIONS = ("alone", "on", "beside")
MAX_COUNT = 3

RGB = (
    (0.86, 0.12, 0.12),
    (0.10, 0.60, 0.20),
    (0.13, 0.26, 0.86),
    (0.97, 0.87, 0.12),
    (0.98, 0.52, 0.06),
    (0.50, 0.16, 0.66),
    (0.98, 0.58, 0.76),
    (0.12, 0.80, 0.86),
    (0.96, 0.96, 0.96),
    (0.07, 0.07, 0.07),
)
"""Of ``COLOURS``."""
SECOND_RGB = (
    (0.97, 0.80, 0.80),
    (0.80, 0.95, 0.82),
    (0.80, 0.85, 0.98),
    (0.42, 0.36, 0.02),
    (0.45, 0.20, 0.00),
    (0.90, 0.80, 0.96),
    (0.55, 0.10, 0.30),
    (0.00, 0.28, 0.36),
    (0.55, 0.55, 0.55),
    (0.50, 0.50, 0.50),
)
"""The other colour of a texture, by the first: light on dark colours, dark on light ones, grey on white and black."""

RADII = ((0.115, 0.145), (0.18, 0.22), (0.27, 0.33))
"""Of ``SIZES``; from, to."""
GROUP_RADII = ((0.075, 0.095), (0.10, 0.12), (0.135, 0.155))
"""The same where there are two or three."""
FIELD = 4
"""Cells along each side of a blurry background."""
HELD_OUT_SHARE = 8
"""One in so many combinations of shape, colour and texture is held out."""


@lru_cache(maxsize=1)
def _held_out_table() -> Tensor:
    table = torch.zeros(len(SHAPES), len(COLOURS), len(TEXTURES), dtype=torch.bool)
    for s, shape in enumerate(SHAPES):
        for c, colour in enumerate(COLOURS):
            for t, texture in enumerate(TEXTURES):
                table[s, c, t] = zlib.crc32(f"{shape} {colour} {texture}".encode()) % HELD_OUT_SHARE == 0
    return table


def held_out(shape: Tensor, colour: Tensor, texture: Tensor) -> Tensor:
    """Which combinations UNet and adapters never see in training; indices of any one shape to booleans."""
    return _held_out_table().to(shape.device)[shape, colour, texture]


def held_out_combinations() -> list[tuple[int, int, int]]:
    """All of them: indices of shape, colour and texture."""
    return [(int(s), int(c), int(t)) for s, c, t in _held_out_table().nonzero()]


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes: indices (int64 ``[B]``) of what the words name, and the numbers that no word names."""

    shape: Tensor
    colour: Tensor
    texture: Tensor
    size: Tensor
    place: Tensor
    count: Tensor
    """1 to ``MAX_COUNT``."""
    relation: Tensor
    shape_2: Tensor
    colour_2: Tensor
    texture_2: Tensor
    background: Tensor
    background_kind: Tensor
    column: Tensor
    """Whether several stand in a column rather than a row, 0 or 1."""
    radius: Tensor
    """Float ``[B]``, as all that follow."""
    shift: Tensor
    """``[B, 2]``, within the place."""
    turn: Tensor
    """Radians."""
    phase: Tensor
    """``[B, 2]`` of the texture, 0 to 1."""
    slope: Tensor
    """Radians: direction of a gradient."""
    tint: Tensor
    """``[B, 3, 3]``: what is added to the colours of the first shape, the second and the background."""
    cells: Tensor
    """``[B, 3, FIELD, FIELD]``: colours of a blurry background."""

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __getitem__(self, which: Tensor | slice) -> Scenes:
        """Some of them."""
        return Scenes(*(getattr(self, f.name)[which] for f in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        """The same elsewhere."""
        return Scenes(*(getattr(self, f.name).to(device) for f in fields(self)))

    @property
    def is_held_out(self) -> Tensor:
        """Whether one of its shapes is of a held-out combination."""
        second = (self.relation > 0) & held_out(self.shape_2, self.colour_2, self.texture_2)
        main = held_out(self.shape, self.colour, self.texture) | second
        return main & (self.background_kind != 2)


def sample(count: int, generator: torch.Generator, *, allow_held_out: bool = False, simple: bool = False) -> Scenes:
    """Random scenes, on the generator's device.

    Args:
        count: how many.
        generator: all depends on its state alone.
        allow_held_out: take any combination, else only those for training.
        simple: one shape alone on a plain or graded background.
    """
    scenes = _draw(count, generator, simple)
    if allow_held_out:
        return scenes
    while bool((seen := scenes.is_held_out).any()):
        scenes = choose(seen, _draw(count, generator, simple), scenes)
    return scenes


def choose(mask: Tensor, one: Scenes, other: Scenes) -> Scenes:
    """Row by row ``one`` where ``mask [B]`` holds, else ``other``."""
    chosen = []
    for f in fields(Scenes):
        a, b = getattr(one, f.name), getattr(other, f.name)
        chosen.append(torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b))
    return Scenes(*chosen)


def _draw(n: int, generator: torch.Generator, simple: bool) -> Scenes:
    device = generator.device

    def index(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator, device=device)

    def number(*shape: int) -> Tensor:
        return torch.rand((n, *shape), generator=generator, device=device)

    def weighted(*shares: float) -> Tensor:
        edges = torch.tensor(shares, device=device).cumsum(0)
        return torch.bucketize(number(), edges[:-1], right=True)

    def another(taken: Tensor) -> Tensor:
        """A colour other than ``taken``."""
        return (taken + 1 + index(len(COLOURS) - 1)) % len(COLOURS)

    colour = index(len(COLOURS))
    background = another(colour)
    colour_2 = another(colour)
    # neither the first nor the background: one of the eight others
    while_same = colour_2 == background
    colour_2 = torch.where(while_same, (background + 1) % len(COLOURS), colour_2)
    colour_2 = torch.where(colour_2 == colour, (colour_2 + 1) % len(COLOURS), colour_2)
    kind = weighted(0.7, 0.3) if simple else weighted(0.62, 0.26, 0.12)
    relation = torch.zeros_like(colour) if simple else weighted(0.66, 0.16, 0.18)
    count_ = torch.ones_like(colour) if simple else 1 + weighted(0.7, 0.17, 0.13)
    count_ = torch.where(relation > 0, 1, count_)
    size = index(len(SIZES))
    size = torch.where(relation == 1, 2, torch.where(relation == 2, size.clamp(max=1), size))
    place = weighted(0.44, 0.14, 0.14, 0.14, 0.14)
    place = torch.where((count_ > 1) | (relation > 0), 0, place)
    texture = weighted(0.34, 0.22, 0.22, 0.22)
    texture = torch.where(relation == 1, 0, texture)
    texture_2 = torch.where(relation == 1, 0, weighted(0.55, 0.15, 0.15, 0.15))
    few = 2 + torch.zeros_like(colour)
    cell_colours = torch.stack([colour, background, torch.where(number() < 0.5, colour, colour_2)], 1)
    cell_pick = torch.randint(3, (n, FIELD, FIELD), generator=generator, device=device)
    rgb = torch.tensor(RGB, device=device)
    cells = rgb[cell_colours.gather(1, cell_pick.flatten(1))].view(n, FIELD, FIELD, 3).permute(0, 3, 1, 2)
    cells = (cells + 0.16 * (number(3, FIELD, FIELD) - 0.5)).clamp(0, 1)
    scenes = Scenes(
        shape=index(len(SHAPES)),
        colour=colour,
        texture=texture,
        size=size,
        place=place,
        count=torch.minimum(count_, few + 1),
        relation=relation,
        shape_2=index(len(SHAPES)),
        colour_2=colour_2,
        texture_2=texture_2,
        background=background,
        background_kind=kind,
        column=index(2),
        radius=number(),
        shift=number(2) - 0.5,
        turn=(number() - 0.5) * 0.35,
        phase=number(2),
        slope=number() * 2 * math.pi,
        tint=(number(3, 3) - 0.5) * 0.08,
        cells=cells,
    )
    return replace(scenes, radius=_radius(scenes, scenes.radius))


def _radius(scenes: Scenes, share: Tensor) -> Tensor:
    """A radius of the size's range, ``share`` of the way through it."""
    single = torch.tensor(RADII, device=share.device)[scenes.size]
    group = torch.tensor(GROUP_RADII, device=share.device)[scenes.size]
    span = torch.where((scenes.count > 1)[:, None], group, single)
    beside = torch.tensor(((0.10, 0.125), (0.15, 0.175), (0.15, 0.175)), device=share.device)[scenes.size]
    span = torch.where((scenes.relation == 2)[:, None], beside, span)
    return span[:, 0] + share * (span[:, 1] - span[:, 0])


def rearranged(scenes: Scenes, generator: torch.Generator, move: float, other_background: float) -> Scenes:
    """The same things otherwise placed: what a reference may differ in from the picture that it stands for.

    Args:
        scenes: of blurry ones nothing changes, for their layout is all they have.
        generator: all depends on its state alone.
        move: share of scenes that get another place, size and turn; the others move a little.
        other_background: share of scenes that get another background.
    """
    n, device = len(scenes), generator.device
    fresh = _draw(n, generator, False)
    moved = torch.rand(n, generator=generator, device=device) < move
    free = moved & (scenes.relation == 0)
    place = torch.where(free & (scenes.count == 1), fresh.place, scenes.place)
    size = torch.where(free, fresh.size, scenes.size)
    out = replace(
        scenes,
        place=place,
        size=size,
        column=torch.where(free, fresh.column, scenes.column),
        shift=fresh.shift,
        turn=fresh.turn,
        phase=fresh.phase,
        tint=scenes.tint,
    )
    out = replace(out, radius=_radius(out, torch.rand(n, generator=generator, device=device)))
    changed = torch.rand(n, generator=generator, device=device) < other_background
    # a background that neither shape would vanish in
    good = (fresh.background != scenes.colour) & ((fresh.background != scenes.colour_2) | (scenes.relation == 0))
    changed = changed & good & (fresh.background_kind != 2)
    tint = torch.where(changed[:, None, None], torch.cat([out.tint[:, :2], fresh.tint[:, 2:]], 1), out.tint)
    out = replace(
        out,
        background=torch.where(changed, fresh.background, out.background),
        background_kind=torch.where(changed, fresh.background_kind, out.background_kind),
        slope=torch.where(changed, fresh.slope, out.slope),
        tint=tint,
    )
    return choose(scenes.background_kind == 2, scenes, out)


# --- drawing ----------------------------------------------------------------------------------------------------------


def render(scenes: Scenes, size: int) -> Tensor:
    """Pictures ``[B, 3, size, size]`` in 0..1, edges smoothed over one pixel; float32 on the scenes' device."""
    device = scenes.shape.device
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size - 0.5
    y, x = axis[:, None], axis[None, :]
    rgb, second = torch.tensor(RGB, device=device), torch.tensor(SECOND_RGB, device=device)
    picture = _background(scenes, x, y, rgb)
    for number in range(MAX_COUNT):
        rows = ((scenes.count > number) & (scenes.background_kind != 2)).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        s = scenes[rows]
        colours = (rgb[s.colour] + s.tint[:, 0]).clamp(0, 1), (second[s.colour] + s.tint[:, 0]).clamp(0, 1)
        centre = _centre(s, number)
        picture[rows] = _paint(picture[rows], x, y, centre, s.radius, s.turn, s.phase, s.shape, s.texture, colours)
    rows = ((scenes.relation > 0) & (scenes.background_kind != 2)).nonzero()[:, 0]
    if len(rows):
        s = scenes[rows]
        colours = (rgb[s.colour_2] + s.tint[:, 1]).clamp(0, 1), (second[s.colour_2] + s.tint[:, 1]).clamp(0, 1)
        on = s.relation == 1
        centre = torch.where(on[:, None], _centre(s, 0), _centre(s, 1))
        radius = torch.where(on, s.radius * 0.38, s.radius)
        picture[rows] = _paint(picture[rows], x, y, centre, radius, -s.turn, s.phase, s.shape_2, s.texture_2, colours)
    return picture


def _background(scenes: Scenes, x: Tensor, y: Tensor, rgb: Tensor) -> Tensor:
    plain = (rgb[scenes.background] + scenes.tint[:, 2]).clamp(0, 1)
    bright = plain.mean(1, keepdim=True) > 0.3
    end = torch.where(bright, plain * 0.45, 0.5 + plain * 0.5)
    along = scenes.slope.cos()[:, None, None] * x + scenes.slope.sin()[:, None, None] * y
    share = (along * 0.9 + 0.5).clamp(0, 1) * (scenes.background_kind == 1)[:, None, None]
    picture = torch.lerp(plain[:, :, None, None], end[:, :, None, None], share[:, None])
    blurry = (scenes.background_kind == 2).nonzero()[:, 0]
    if len(blurry):
        field = torch.nn.functional.interpolate(
            scenes.cells[blurry], size=(y.shape[0], x.shape[1]), mode="bicubic", align_corners=False
        )
        picture[blurry] = field.clamp(0, 1)
    return picture


def _centre(s: Scenes, number: int) -> Tensor:
    """Where the number-th of them stands, ``[B, 2]``; of a pair beside each other 1 is the second."""
    directions = torch.tensor(((0.0, 0.0), (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)), device=s.shape.device)
    alone = directions[s.place] * (0.47 - s.radius)[:, None] + s.shift * torch.where(s.place > 0, 0.04, 0.08)[:, None]
    alone = alone.clamp(-0.5, 0.5)
    amount = torch.where(s.relation == 2, 2, s.count)
    step = torch.where(amount == 2, 0.44, 0.32)
    offset = (number - (amount - 1) / 2) * step
    in_column = (s.column == 1) & (s.relation == 0)
    zero = torch.zeros_like(offset)
    row = torch.stack([torch.where(in_column, zero, offset), torch.where(in_column, offset, zero)], 1) + s.shift * 0.05
    return torch.where((amount > 1)[:, None], row, alone)


def _paint(
    picture: Tensor,
    x: Tensor,
    y: Tensor,
    centre: Tensor,
    radius: Tensor,
    turn: Tensor,
    phase: Tensor,
    shape: Tensor,
    texture: Tensor,
    colours: tuple[Tensor, Tensor],
) -> Tensor:
    """One shape of every row over the picture. Coordinates of a shape are in units of its radius."""
    pixel = 1.0 / picture.shape[-1]
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    cos, sin = (f(turn)[:, None, None] for f in (torch.cos, torch.sin))
    scale = 1.0 / radius[:, None, None]
    u, v = (cos * dx + sin * dy) * scale, (cos * dy - sin * dx) * scale
    distance = torch.empty_like(u)
    for n, measure in enumerate(DISTANCES):
        rows = (shape == n).nonzero()[:, 0]
        if len(rows):
            distance[rows] = measure(u[rows], v[rows])
    edge = pixel * scale
    cover = (0.5 - distance / edge).clamp(0, 1)
    share = torch.zeros_like(u)
    for n, pattern in enumerate(PATTERNS):
        rows = (texture == n + 1).nonzero()[:, 0]
        if len(rows):
            p, q = u[rows] + phase[rows, 0, None, None] * 0.5, v[rows] + phase[rows, 1, None, None] * 0.5
            share[rows] = (0.5 - pattern(p, q) / edge[rows]).clamp(0, 1)
    first, other = (c[:, :, None, None] for c in colours)
    return torch.lerp(picture, torch.lerp(first, other, share[:, None]), cover[:, None])


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.95


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.82


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v - 0.72, u.abs() * 0.88 - v * 0.475 - 0.475)


def _star(u: Tensor, v: Tensor) -> Tensor:
    # fold the plane into half a point of five
    sector = 2 * math.pi / 5
    angle = torch.atan2(u, -v)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    r = torch.hypot(u, v)
    a, b = r * angle.cos(), r * angle.sin()
    # the edge from the tip (1.05, 0) to the inner corner at half a sector
    inner = 0.45
    cx, cy = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    ex, ey = cx - 1.05, cy
    length = math.hypot(ex, ey)
    return (b * -ex + (a - 1.05) * ey) / length


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.72).abs() - 0.24


def _cross(u: Tensor, v: Tensor) -> Tensor:
    a, b = u.abs(), v.abs()
    return torch.maximum(torch.maximum(a, b) - 0.95, torch.minimum(a, b) - 0.32)


def _diamond(u: Tensor, v: Tensor) -> Tensor:
    return (u.abs() * 1.35 + v.abs() - 1.0) / 1.68


def _heart(u: Tensor, v: Tensor) -> Tensor:
    a, b = u.abs(), 0.12 - v
    lobes = torch.hypot(a - 0.46, b - 0.32) - 0.5
    # below the lobes a square that stands on its corner, its sides tangent to them
    inside = torch.maximum((a - b) * 0.7071 - 0.599, (a + b) * 0.7071 - 0.5515)
    return torch.minimum(lobes, inside)


def _moon(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(u, v) - 0.98, 0.78 - torch.hypot(u - 0.48, v))


DISTANCES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _circle,
    _square,
    _triangle,
    _star,
    _ring,
    _cross,
    _diamond,
    _heart,
    _moon,
)
"""Of ``SHAPES``: the signed distance to the edge, negative inside."""

PERIOD = 0.5
"""Of a texture, in radii."""


def _wave(u: Tensor) -> Tensor:
    """Distance to the nearest edge of bands half a period wide, negative inside."""
    return (u / PERIOD - torch.round(u / PERIOD)).abs() * PERIOD - PERIOD / 4


def _stripes(u: Tensor, v: Tensor) -> Tensor:
    return _wave((u + v) * 0.7071)


def _dots(u: Tensor, v: Tensor) -> Tensor:
    p, q = (w / PERIOD - torch.round(w / PERIOD) for w in (u, v))
    return torch.hypot(p, q) * PERIOD - PERIOD * 0.3


def _checks(u: Tensor, v: Tensor) -> Tensor:
    # twice the period, or the cells would be a few pixels
    a, b = _wave(u * 0.6) / 0.6, _wave(v * 0.6) / 0.6
    return torch.where((a < 0) ^ (b < 0), 1.0, -1.0) * torch.minimum(a.abs(), b.abs())


PATTERNS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_stripes, _dots, _checks)
"""Of ``TEXTURES`` after the first: negative where the second colour is."""

"""Layer weights: how much of a unit's weight each cross-attention layer gets, by name or by custom text.

A layer group is one spatial transformer of the UNet; groups are numbered in the order in which the UNet runs them
(SD1.x and SD2.x: 16 groups of one layer, SDXL: 11 groups, 70 layers). A weight type is a table with an entry for each
group. A group that has no weight is skipped: the host's own attention runs there as if there were no image prompt.

The names and factors are those that ComfyUI_IPAdapter_plus made common, so that its users find what they know. Two of
them are another thing in InvokeAI, on SD1.x. Style there means groups 7 to 9 alone, the first output blocks, which
stand where SDXL has its style group; here it means all but groups 4 to 8, the coarse ones. The latter is the default:
what the finer layers attend to can hardly move things about, so it takes colours and textures and leaves the layout to
the text. InvokeAI's are "style narrow" and "composition wide".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import IPAdapterError
from .layers import LayerKey, forward_order

ALL = "all"
"""The type that changes nothing."""
SD, XL = 16, 11
"""Layer groups of SD1.x and SD2.x, and of SDXL."""
FACTOR_RANGE = (-5.0, 5.0)
EXAMPLE = "0:1, 3:0.5"


@dataclass(frozen=True)
class Group:
    """What one layer group gets: ``weight`` times the unit's weight plus ``composition`` times its composition weight.

    ``swapped``: the picture acts on the uncond rows, and cond rows get no image tokens, which pushes away from it.
    ``picture``: only this one of the unit's pictures acts there, counted from 0; None: all do.
    """

    weight: float = 0.0
    composition: float = 0.0
    swapped: bool = False
    picture: int | None = None


@dataclass(frozen=True)
class WeightType:
    """A named way of weighing layers.

    Attributes:
        help: one line for people.
        tables: the groups by their number, :data:`SD` or :data:`XL`.
        pictures: how many pictures it needs; 0: any number.
    """

    help: str
    tables: Mapping[int, tuple[Group, ...]] = field(repr=False)
    pictures: int = 0


Factor = Callable[[int, int], float]
"""Group and number of groups to a factor."""


def _by_formula(formula: Factor) -> dict[int, tuple[Group, ...]]:
    return {count: tuple(Group(formula(t, count)) for t in range(count)) for count in (SD, XL)}


def _table(count: int, given: Mapping[int, Group], rest: Group | None = None) -> tuple[Group, ...]:
    return tuple(given.get(t, rest or Group()) for t in range(count))


def _by_block(input_: float, middle: float, output: float) -> dict[int, tuple[Group, ...]]:
    """The same factor in all groups of the input blocks, of the middle and of the output blocks."""
    middles = {SD: 6, XL: 4}
    return {
        count: tuple(Group(input_ if t < at else middle if t == at else output) for t in range(count))
        for count, at in middles.items()
    }


def _ease(share: float) -> float:
    return 0.05 + 0.95 * share


_STYLE = (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15)
"""The groups of SD1.x that carry style: those of the finer levels."""
_ONE, _COMPOSITION, _QUARTER = Group(1.0), Group(composition=1.0), Group(composition=0.25)


def _styles(group: Group) -> dict[int, Group]:
    return dict.fromkeys(_STYLE, group)


_SWAPPED, _SWAPPED_QUARTER = Group(composition=1.0, swapped=True), Group(composition=0.25, swapped=True)
_SWAPPED_TENTH = Group(composition=0.1, swapped=True)
_FIRST, _SECOND = Group(1.0, picture=0), Group(composition=1.0, picture=1)

TYPES: Mapping[str, WeightType] = {
    ALL: WeightType("every layer alike", _by_formula(lambda t, n: 1.0)),
    "ease in": WeightType("most in the first layers", _by_formula(lambda t, n: _ease(1 - t / n))),
    "ease out": WeightType("most in the last layers: the prompt counts more", _by_formula(lambda t, n: _ease(t / n))),
    "ease in-out": WeightType(
        "most in the middle layers", _by_formula(lambda t, n: _ease(1 - abs(t - n / 2) / (n / 2)))
    ),
    "reverse in-out": WeightType(
        "most in the first and last layers", _by_formula(lambda t, n: _ease(abs(t - n / 2) / (n / 2)))
    ),
    "weak input": WeightType("a fifth in the input blocks", _by_block(0.2, 1.0, 1.0)),
    "weak middle": WeightType("a fifth in the middle block", _by_block(1.0, 0.2, 1.0)),
    "weak output": WeightType("a fifth in the output blocks", _by_block(1.0, 1.0, 0.2)),
    "strong middle": WeightType("a fifth everywhere but in the middle block", _by_block(0.2, 1.0, 0.2)),
    "style": WeightType(
        "colours and textures, the layout left to the prompt",
        {SD: _table(SD, _styles(_ONE)), XL: _table(XL, {6: _ONE})},
    ),
    "composition": WeightType(
        "the layout, colours and textures left to the prompt",
        {SD: _table(SD, {4: Group(0.25), 5: _ONE}), XL: _table(XL, {3: _ONE})},
    ),
    "strong style": WeightType(
        "everything but the layout",
        {SD: _table(SD, {4: Group(), 5: Group()}, _ONE), XL: _table(XL, {3: Group()}, _ONE)},
    ),
    "strong composition": WeightType(
        "everything but the style",
        {SD: _table(SD, _styles(Group()), _ONE), XL: _table(XL, {6: Group()}, _ONE)},
    ),
    "style and composition": WeightType(
        "both, the layout with the composition weight",
        {
            SD: _table(SD, {**_styles(_ONE), 4: _QUARTER, 5: _COMPOSITION}),
            XL: _table(XL, {3: _COMPOSITION, 6: _ONE}),
        },
    ),
    "strong style and composition": WeightType(
        "everything, the layout with the composition weight",
        {SD: _table(SD, {4: _COMPOSITION, 5: _COMPOSITION}, _ONE), XL: _table(XL, {3: _COMPOSITION}, _ONE)},
    ),
    "style precise": WeightType(
        "style, pushed away from the picture's layout with the composition weight",
        {
            SD: _table(SD, {**_styles(_ONE), 4: _SWAPPED_QUARTER, 5: _SWAPPED}),
            XL: _table(XL, {3: _SWAPPED, 6: _ONE}),
        },
    ),
    "composition precise": WeightType(
        "layout, pushed away from the picture's style with the composition weight",
        {
            SD: _table(SD, {**_styles(_SWAPPED), 4: Group(0.25), 5: _ONE}, _SWAPPED_TENTH),
            XL: _table(XL, {3: _ONE, 6: _SWAPPED}, _SWAPPED_TENTH),
        },
    ),
    "style narrow": WeightType(
        "style as InvokeAI has it: on SD1.x the first output blocks alone",
        {SD: _table(SD, dict.fromkeys((7, 8, 9), _ONE)), XL: _table(XL, {6: _ONE})},
    ),
    "composition wide": WeightType(
        "layout as InvokeAI has it: on SD1.x all coarse layers before the output blocks",
        {SD: _table(SD, dict.fromkeys((4, 5, 6), _ONE)), XL: _table(XL, {3: _ONE})},
    ),
    "style image and composition image": WeightType(
        "the style of the first picture, the layout of the second with the composition weight",
        {
            SD: _table(SD, {**_styles(_FIRST), 4: Group(composition=0.25, picture=1), 5: _SECOND}),
            XL: _table(XL, {3: _SECOND, 6: _FIRST}),
        },
        pictures=2,
    ),
}


# --- Custom text ------------------------------------------------------------------------------------------------------

_ENTRY = re.compile(r"[^,;\r\n]+")
_PAIR = re.compile(r"(\d{1,3})\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)", re.ASCII | re.IGNORECASE)


def read(text: str) -> str:
    """A type's name, or custom text as :func:`write` writes it, so that equal ones are equal texts.

    Raises:
        IPAdapterError: if it is neither; the sentence points at the place.
    """
    name = " ".join(text.split()).lower() or ALL
    return name if name in TYPES else write(_parse(text))


def write(factors: Mapping[int, float]) -> str:
    """Factors by group as custom text."""
    return ", ".join(f"{t}:{repr(float(factor)).removesuffix('.0')}" for t, factor in sorted(factors.items()))


def _parse(text: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for entry in _ENTRY.finditer(text):
        pair = entry[0].strip()
        if not pair:
            continue
        place = entry.start() + len(entry[0]) - len(entry[0].lstrip()) + 1

        def wrong(why: str, at: int = place, what: str = pair) -> IPAdapterError:
            return IPAdapterError(
                f'The field "layers" at character {at} has {json.dumps(what[:40], ensure_ascii=False)}, {why}; allowed '
                f"are {', '.join(TYPES)}, or numbers of layer groups with factors such as {EXAMPLE}."
            )

        match = _PAIR.fullmatch(pair)
        if match is None:
            raise wrong("which is neither a type nor a group with its factor")
        group, factor = int(match[1]), float(match[2]) + 0.0
        if group >= SD:
            raise wrong(f"and the last layer group is {SD - 1} on SD1.x, {XL - 1} on SDXL")
        if group in found:
            raise wrong(f"and group {group} has a factor already")
        if not FACTOR_RANGE[0] <= factor <= FACTOR_RANGE[1]:
            raise wrong(f"and a factor lies between {FACTOR_RANGE[0]:g} and {FACTOR_RANGE[1]:g}")
        found[group] = factor
    if not any(found.values()):
        raise IPAdapterError(
            f'The field "layers" is {json.dumps(text[:40], ensure_ascii=False)}, by which no layer acts; allowed are '
            f"{', '.join(TYPES)}, or numbers of layer groups with factors such as {EXAMPLE}."
        )
    return found


def pictures_of(layers: str) -> int:
    """How many pictures a unit's field ``layers`` is over; 0: any number."""
    return TYPES[layers].pictures if layers in TYPES else 0


# --- What it means on a UNet ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """Layers in which the same pictures act on the same rows."""

    layers: tuple[int, ...]
    """In the file's order."""
    swapped: bool = False
    picture: int | None = None


@dataclass(frozen=True)
class LayerWeights:
    """What a unit's layers get on one UNet.

    Attributes:
        factors: of the unit's weight, for every layer in the file's order.
        sections: all layers whose factor isn't 0, each in one of them.
    """

    factors: tuple[float, ...]
    sections: tuple[Section, ...]


def groups(keys: Sequence[LayerKey]) -> list[list[int]]:
    """The layers of each group, as indices into ``keys``; groups in the order in which the UNet runs them."""
    found: dict[tuple[str, int], list[int]] = {}
    for n in forward_order(keys):
        found.setdefault((keys[n].block, keys[n].number), []).append(n)
    return list(found.values())


def of_groups(layers: str, count: int) -> tuple[Group, ...]:
    """What each of ``count`` layer groups gets by a unit's field ``layers``.

    Raises:
        IPAdapterError: if it names a group that there isn't.
    """
    if layers in TYPES:
        return TYPES[layers].tables[count]
    factors = _parse(layers)
    if max(factors) >= count:
        raise IPAdapterError(
            f'The field "layers" names layer group {max(factors)}, and the loaded checkpoint has groups 0 to '
            f"{count - 1}: leave out what is beyond."
        )
    return tuple(Group(factors.get(t, 0.0)) for t in range(count))


def on_unet(
    layers: str, keys: Sequence[LayerKey], weight: float, composition_weight: float | None, pictures: int
) -> LayerWeights | None:
    """What a unit's layers get on the UNet with these cross-attention layers; None: all of them its weight.

    Args:
        layers: the unit's field.
        keys: the UNet's layers in the file's order.
        weight, composition_weight: the unit's; the former isn't 0, and None for the latter means the same.
        pictures: how many pictures act.

    Raises:
        IPAdapterError: if they don't fit the UNet or the pictures, or no layer gets any weight.
    """
    if layers == ALL:
        return None
    wanted = pictures_of(layers)
    if wanted and pictures != wanted:
        raise IPAdapterError(
            f'The field "layers" is "{layers}", which needs {wanted} pictures that act, and the unit has {pictures}: '
            "give it the picture for the style first and the one for the composition second."
        )
    by_group = groups(keys)
    ratio = 1.0 if composition_weight is None else composition_weight / weight
    factors = [0.0] * len(keys)
    sections: dict[tuple[bool, int | None], list[int]] = {}
    for group, numbers in zip(of_groups(layers, len(by_group)), by_group, strict=True):
        factor = group.weight + group.composition * ratio
        if factor == 0:
            continue
        sections.setdefault((group.swapped, group.picture), []).extend(numbers)
        for n in numbers:
            factors[n] = factor
    if not sections:
        raise IPAdapterError(
            f'The field "layers" is "{layers}" and "composition_weight" is {composition_weight:g}, by which no layer '
            "acts: give it another one."
        )
    return LayerWeights(
        tuple(factors),
        tuple(Section(tuple(sorted(each)), swapped, picture) for (swapped, picture), each in sections.items()),
    )


def effective(
    layers: str, weight: float, composition_weight: float | None, count: int
) -> list[dict[str, float | int | str]]:
    """For a chart: each layer group's own weight, the block it is in, and the rows that it acts on.

    Args:
        layers, weight, composition_weight: the unit's fields.
        count: layer groups of the UNet, :data:`SD` or :data:`XL`.
    """
    other = weight if composition_weight is None else composition_weight
    inputs, middle = {SD: (6, 6), XL: (4, 4)}[count]
    shown: list[dict[str, float | int | str]] = []
    for t, group in enumerate(of_groups(layers, count)):
        block = "input" if t < inputs else "middle" if t == middle else "output"
        value = math.fsum((group.weight * weight, group.composition * other))
        entry: dict[str, float | int | str] = {"group": t, "block": block, "weight": value}
        if group.swapped:
            entry["acts on"] = "uncond"
        if group.picture is not None:
            entry["picture"] = group.picture + 1
        shown.append(entry)
    return shown

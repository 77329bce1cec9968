"""The influence map: where each picture acted, seen beside what the layers do and without changing it.

In each layer and UNet call it looks at one cond row, the first. Of a joint unit it takes the share of the softmax that
falls on a picture's image tokens, the mean over the heads. Of a decoupled one, the length of what the picture adds to a
query's output, as a part of the lengths of all that is added there: what a softmax gave, and each picture's part. Both
are 0…1 for each query. The attention is computed a second time for that, and nothing is read from the device before the
end. Hosts install what calls this only where a job asks for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .layer_weights import groups
from .layers import LayerKey
from .masks import WHOLE, Region, grids

Share = NDArray[np.float64]
Key = tuple[int, int]
"""A term's number and a picture's in it."""


@dataclass(frozen=True)
class Seen:
    """One picture on one row in one layer: K and V ``[T, C]``, with its term's number and its own."""

    key: Key
    keys: Tensor
    values: Tensor
    factor: Tensor | None = None
    """Of its mask, ``[N]``; None: 1."""
    part: float = 1.0
    """What each of its tokens counts in a joint softmax."""
    joins: bool = True
    """Whether it joins the text's softmax; else those of one mask and term share one of their own."""
    place: int = 0
    """Tells masks of a decoupled term apart."""


def shares(q: Tensor, k: Tensor, v: Tensor, heads: int, pictures: Sequence[Seen]) -> dict[Key, Tensor]:
    """Each picture's share for every query, ``[N]``, in float32.

    Args:
        q, k, v: ``[N, C]``, and twice ``[M, C]``, the text's.
        heads: attention heads.
        pictures: what acts on this row.
    """

    def split(t: Tensor) -> Tensor:
        return t.float().view(t.shape[0], heads, -1).transpose(0, 1)

    def length(t: Tensor) -> Tensor:
        return t.transpose(0, 1).flatten(1).norm(dim=1)

    q = split(q)
    scale = q.shape[2] ** -0.5
    joined = [each for each in pictures if each.joins]
    logits = [q @ split(k).transpose(1, 2) * scale]
    for each in joined:
        found = q @ split(each.keys).transpose(1, 2) * scale + math.log(each.part)
        logits.append(found if each.factor is None else found + each.factor.float().log()[None, :, None])
    weights = torch.split(torch.cat(logits, dim=2).softmax(dim=2), [each.shape[2] for each in logits], dim=2)
    made = {each.key: found.sum(2).mean(0) for each, found in zip(joined, weights[1:], strict=True)}

    apart: dict[tuple[int, int], list[Seen]] = {}
    for each in pictures:
        if not each.joins:
            apart.setdefault((each.key[0], each.place), []).append(each)
    added = {}
    for together in apart.values():
        own = torch.cat([q @ split(each.keys).transpose(1, 2) * scale for each in together], dim=2).softmax(dim=2)
        counts = [each.keys.shape[0] for each in together]
        for each, found in zip(together, torch.split(own, counts, dim=2), strict=True):
            part = length(found @ split(each.values))
            added[each.key] = part if each.factor is None else part * each.factor.float()
    if added:
        values = [split(v), *(split(each.values) for each in joined)]
        base = torch.stack([found @ each for found, each in zip(weights, values, strict=True)]).sum(0)
        whole = length(base) + torch.stack(list(added.values())).sum(0)
        made |= {key: part / whole.clamp_min(1e-12) for key, part in added.items()}
    return made


@dataclass
class Influence:
    """What was seen in one pass.

    Attributes:
        latent: rows and columns of what the pass draws.
        names: of each of the injection's terms, its unit; '' where no map of it is wanted.
        keys: the UNet's layers.
        region: which part of the result the pass draws.
    """

    latent: tuple[int, int]
    names: Sequence[str]
    keys: Sequence[LayerKey]
    region: Region = WHOLE
    _steps: int = 0
    _sums: dict[tuple[Key, int], Tensor] = field(default_factory=dict)
    """By picture and number of queries."""
    _counts: dict[tuple[Key, int], int] = field(default_factory=dict)
    _means: dict[Key, list[tuple[int, int, Tensor]]] = field(default_factory=dict)
    """By picture: step, layer, mean share."""

    def begin(self) -> None:
        """A UNet call begins."""
        self._steps += 1

    def add(self, layer: int, found: Mapping[Key, Tensor]) -> None:
        """Takes what :func:`shares` found in a layer."""
        for key, share in found.items():
            of = (key, share.shape[0])
            self._sums[of] = self._sums[of] + share if of in self._sums else share
            self._counts[of] = self._counts.get(of, 0) + 1
            self._means.setdefault(key, []).append((self._steps - 1, layer, share.mean()))

    def maps(self) -> dict[str, Share]:
        """By picture, its mean share at every place, on the finest grid that it acted on."""
        shapes = {height * width: (height, width) for height, width in grids(*self.latent)}
        made = {}
        for key in self._means:
            sizes = sorted((n for each, n in self._sums if each == key and n in shapes), reverse=True)
            if not sizes or not self.names[key[0]]:  # an extension may change sizes inside the UNet
                continue
            height, width = shapes[sizes[0]]
            whole = np.zeros((height, width))
            for n in sizes:
                grid = self._sums[key, n].double().cpu().numpy().reshape(shapes[n]).astype(np.float32)
                fine = Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR)
                whole += np.asarray(fine, dtype=np.float64)
            made[self._name(key)] = whole / sum(self._counts[key, n] for n in sizes)
        return made

    def tables(self) -> dict[str, dict[str, object]]:
        """By picture, ready for JSON: its mean share in all, by layer group and by UNet call; None where it is 0."""
        of_layer = {layer: n for n, group in enumerate(groups(self.keys)) for layer in group}
        made: dict[str, dict[str, object]] = {}
        for key, entries in self._means.items():
            values = torch.stack([mean for _, _, mean in entries]).double().cpu().tolist()
            by_group: list[list[float]] = [[] for _ in range(max(of_layer.values()) + 1)]
            by_step: list[list[float]] = [[] for _ in range(self._steps)]
            for (step, layer, _), value in zip(entries, values, strict=True):
                by_group[of_layer[layer]].append(value)
                by_step[step].append(value)
            made[self._name(key)] = {
                "share": round(sum(values) / len(values), 4),
                "by layer group": [_mean(each) for each in by_group],
                "by step": [_mean(each) for each in by_step],
            }
        return made

    def _name(self, key: Key) -> str:
        alone = sum(each[0] == key[0] for each in self._means) == 1
        return self.names[key[0]] if alone else f"{self.names[key[0]]}, picture {key[1] + 1}"


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def overlay(result: Image.Image, share: Share, top: float, region: Region = WHOLE) -> Image.Image:
    """The result in grey, with a picture's share over it from black over red and yellow to white at ``top``."""
    width, height = result.size
    edges = (region.left * width, region.top * height, region.right * width, region.bottom * height)
    left, upper, right, bottom = map(round, edges)
    grid = Image.fromarray((share / max(top, 1e-12)).clip(0, 1).astype(np.float32))
    there = grid.resize((max(1, right - left), max(1, bottom - upper)), Image.Resampling.BILINEAR)
    whole = Image.new("F", result.size)
    whole.paste(there, (left, upper))
    heat = np.asarray(whole, dtype=np.float64)[..., None]
    grey = np.asarray(result.convert("L"), dtype=np.float64)[..., None]
    colour = 255 * (3 * heat - np.array([0.0, 1.0, 2.0])).clip(0, 1)
    return Image.fromarray((0.4 * grey + 0.6 * colour).round().astype(np.uint8))


def shown(influence: Influence, result: Image.Image) -> list[tuple[Image.Image, str]]:
    """The result under each picture's map, and the table as a line of JSON. Colours are the same in all of them."""
    maps, tables = influence.maps(), influence.tables()
    top = max((float(share.max()) for share in maps.values()), default=0.0)
    return [
        (
            overlay(result, share, top, influence.region),
            f"IP-Adapter influence of {name}, white is {top:.3f}: {json.dumps(tables[name])}",
        )
        for name, share in maps.items()
    ]

"""What every layer does in one kind of UNet call.

A plan is made when a kind of call (its rows, its text, its active units) is first seen. It holds every layer's image
tokens as views, and the layout of each layer for the rows of the batch, so that a layer copies once and attends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .balance import Counted, text_repeats
from .errors import IPAdapterError
from .layout import BOTH, Layout, Rows
from .masking import Masking, Run, runs
from .masks import Where
from .packing import as_one, by_width, evenly, row
from .rows import Call

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(q [B, N, C], k [B, M, C], v [B, M, C], heads) -> [B, N, C]``."""


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head attention: ``q [B, N, C]``, ``k`` and ``v`` ``[B, M, C]``, ``bias [N, M]`` to ``[B, N, C]``.

    ``bias`` is added to the scaled logits.
    """
    q, k, v = (_split_heads(t, heads) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


def _split_heads(t: Tensor, heads: int) -> Tensor:
    return t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2)


class Stack(NamedTuple):
    """K and V of all layers of one width, ``[layers, T, C]`` each, and the layers' numbers."""

    layers: list[int]
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class ImageKV:
    """One picture in one role: K and V of every layer, each ``[1, T, C of the layer]``."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    where: Where = ()
    """Where it acts; empty: everywhere."""

    @staticmethod
    def from_pairs(pairs: Sequence[Tensor]) -> ImageKV:
        """From ``[K_0, V_0, K_1, V_1, …]``."""
        return ImageKV(tuple(pairs[::2]), tuple(pairs[1::2]))

    @property
    def tokens(self) -> int:
        """Image tokens T."""
        return int(self.keys[0].shape[1])

    @cached_property
    def stacks(self) -> list[Stack]:
        """K and V as few large tensors: views, if memory has those of one width side by side."""
        return [
            Stack(layers, *(as_one([kind[n][0] for n in layers]) for kind in (self.keys, self.values)))
            for layers in by_width(self.keys).values()
        ]


Images = Mapping[int, tuple[ImageKV, ...]]
"""The pictures of one unit, by role."""


def _index(rows: Sequence[int], total: int, device: torch.device) -> slice | Tensor | None:
    """How to pick ``rows`` of a batch of ``total``; None: they are all of it."""
    if list(rows) == list(range(total)):
        return None
    if list(rows) == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


@dataclass(frozen=True)
class _Group(Rows):
    """Rows that can share one attention."""

    index: slice | Tensor | None
    """The same as ``numbers``; None: they are the whole batch."""
    runs: tuple[Run, ...] = ()
    """Their image tokens by masks; empty if none has a mask."""

    def pick(self, t: Tensor) -> Tensor:
        """These rows of a whole batch."""
        return t if self.index is None else t[self.index]


def _alike(unit: Images, balanced: bool) -> list[Counted[Images]]:
    """A unit itself where its pictures have equally many tokens, as those of one adapter do; else each for itself."""
    counts = {role: len(images) for role, images in unit.items() if images} if balanced else {}
    if all(len({image.tokens for image in images}) <= 1 for images in unit.values()):
        return [Counted(unit, counts)]
    return [
        Counted({role: images[n : n + 1] for role, images in unit.items()}, counts)
        for n in range(max(map(len, unit.values())))
    ]


def _groups(
    roles: Sequence[int], text_tokens: Mapping[int, int], units: Sequence[Counted[Images]], device: torch.device
) -> list[_Group]:
    """All rows, grouped by their numbers of text and image tokens, in the order of each group's first row."""
    repeats = {role: text_repeats(units, role) for role in set(roles)}
    image_tokens = {
        role: sum(image.tokens * unit.copies(role, n) for unit in units for image in unit.images.get(role, ()))
        for role, n in repeats.items()
    }
    by_mask = {role: _runs(role, units, n) for role, n in repeats.items()}
    kinds = [(text_tokens[role], image_tokens[role], repeats[role], by_mask[role]) for role in roles]
    groups = []
    for kind in dict.fromkeys(kinds):
        rows = tuple(row for row, each in enumerate(kinds) if each == kind)
        text, image, repeated, masked = kind
        index = _index(rows, len(roles), device)
        groups.append(_Group(rows, tuple(roles[row] for row in rows), text, image, repeated, index, masked))
    return groups


def _runs(role: int, units: Sequence[Counted[Images]], repeats: int) -> tuple[Run, ...]:
    """A role's image tokens by masks, in the order in which they are laid out; empty if none has a mask."""
    found = runs(
        [
            (image.where, image.tokens)
            for unit in units
            for image in unit.images.get(role, ()) * unit.copies(role, repeats)
        ]
    )
    return found if any(where for where, _ in found) else ()


def _images(role: int, units: Sequence[Counted[Images]], layer: int) -> list[Tensor]:
    """K and V in one layer of each unit with pictures for a role: ``[2, pictures, T, C]``, views."""
    repeats = text_repeats(units, role)
    made = []
    for unit in units:
        images = unit.images.get(role)
        if images:
            both = as_one([as_one([kind[layer][0] for kind in kinds]) for kinds in _kinds(images)])
            made += [both] * unit.copies(role, repeats)
    return made


def _kinds(images: Sequence[ImageKV]) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    return [image.keys for image in images], [image.values for image in images]


@dataclass(frozen=True)
class _Addition:
    """An attention of its own for rows of one unit: the rows of the batch it serves, and their image tokens."""

    index: slice | Tensor | None
    images: ImageKV
    """``[n, T, C]`` each, one for each role: the batch's rows are folded into as many, their queries side by side."""
    where: Where = ()
    """Where it acts."""

    def attend(self, layer: int, q: Tensor, heads: int) -> Tensor:
        """What is added to these rows, ``[R, N, C]``."""
        rows = q if self.index is None else q[self.index]
        keys, values = self.images.keys[layer], self.images.values[layer]
        folded = rows.reshape(keys.shape[0], -1, rows.shape[-1])
        return scaled_dot_product(folded, keys, values, heads).view(rows.shape)


def _once(images: tuple[ImageKV, ...]) -> tuple[ImageKV, ...]:
    """One of them, if all are the same."""
    return images[:1] if all(image is images[0] for image in images) else images


def _additions(roles: Sequence[int], images: Images, device: torch.device) -> list[_Addition]:
    """The attentions of a unit: one for all pictures that act in the same place, in each role or in both."""
    found = dict.fromkeys(image.where for role in roles for image in images.get(role, ()))
    if len(found) < 2:
        return _additions_in(next(iter(found), ()), roles, images, device)
    return [addition for where in found for addition in _additions_in(where, roles, _only_in(where, images), device)]


def _only_in(where: Where, images: Images) -> Images:
    return {role: tuple(image for image in given if image.where == where) for role, given in images.items()}


def _additions_in(where: Where, roles: Sequence[int], images: Images, device: torch.device) -> list[_Addition]:
    # To attend to nothing but copies of the same tokens is to attend to them once: so with the uncond of all pictures.
    distinct = {role: _once(images.get(role, ())) for role in dict.fromkeys(roles)}
    whole = {
        role: ImageKV(
            tuple(row(layer) for layer in zip(*(i.keys for i in given), strict=True)),
            tuple(row(layer) for layer in zip(*(i.values for i in given), strict=True)),
        )
        for role, given in distinct.items()
        if given
    }
    rows = {role: [row for row, each in enumerate(roles) if each == role] for role in whole}
    if len(whole) > 1:
        together, index = list(whole.values()), _index([row for each in rows.values() for row in each], -1, device)
        if isinstance(index, slice) and len({len(each) for each in rows.values()}) == 1:
            keys = [evenly([t[0] for t in layer]) for layer in zip(*(image.keys for image in together), strict=True)]
            values = [evenly([t[0] for t in layer]) for layer in zip(*(i.values for i in together), strict=True)]
            if not any(t is None for t in (*keys, *values)):
                folded = ImageKV(tuple(keys), tuple(values))  # type: ignore[arg-type]
                return [_Addition(None if index == slice(0, len(roles)) else index, folded, where)]
    return [_Addition(_index(rows[role], len(roles), device), image, where) for role, image in whole.items()]


@dataclass(frozen=True)
class Plan:
    """What every layer does in one kind of UNet call."""

    joined: tuple[_Group, ...]
    """Every row of the batch once; empty when no joint unit acts."""
    images: Mapping[int, Mapping[int, Sequence[Tensor]]]
    """For each layer, by role, K and V of each unit in ``joined``: ``[2, pictures, T, C]``."""
    text_tokens: int
    """Text tokens of the K that the host computes."""
    added: tuple[_Addition, ...]
    """What decoupled units add."""
    masking: Masking | None = None
    """The masks; None if there are none."""
    layouts: dict[tuple[object, ...], Layout] = field(default_factory=dict)
    """Those made so far: each is used in many UNet calls."""

    @property
    def idle(self) -> bool:
        """Nothing acts: the host's own attention is all there is to do."""
        return not self.joined and not self.added

    def at(self, layer: int) -> Plan:
        """What is done in one layer: the same in all of them."""
        return self

    @property
    def memory(self) -> set[int]:
        """The pieces of memory in which its image tokens are, as :meth:`torch.Tensor.untyped_storage` knows them."""
        joined = [tensor for roles in self.images.values() for units in roles.values() for tensor in units]
        added = [tensor for each in self.added for tensor in (*each.images.keys, *each.images.values)]
        return {tensor.untyped_storage()._cdata for tensor in (*joined, *added)}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: int, attention: Attention, replaced: Attention | None
    ) -> Tensor:
        """The layer's output before ``to_out``, ``[R, N, C]``.

        Args:
            layer: index of the layer in the adapter file's order.
            q, k, v: ``[R, N, C]`` and twice ``[R, M, C]``, projected, heads side by side.
            heads: attention heads.
            attention: the host's attention.
            replaced: another extension's replacement of this layer, which takes whole batches only.
        """
        base = replaced or attention
        if not self.joined:
            out = base(q, k, v, heads)
        elif self.uniform:
            keys, values = self.extended(layer, BOTH, k, v)[0]
            out = base(q, keys, values, heads)
        elif replaced is None:
            extended = zip(self.joined, self.extended(layer, BOTH, k, v), strict=True)
            out = self._together(
                [
                    self._attend_group(each, each.pick(q), keys, values, heads, attention)
                    for each, (keys, values) in extended
                ]
            )
        elif any(group.runs for group in self.joined):
            raise IPAdapterError(
                "Something else replaces this cross-attention layer (another extension, or an earlier patch_model), "
                "and a mask in one softmax with the text has to be inside of it: choose the formulation decoupled, "
                "take out the unit's masks, or switch off the other extension."
            )
        else:
            raise IPAdapterError(
                "Something else replaces this cross-attention layer (another extension, or an earlier patch_model) "
                "while the rows of the batch differ in their number of text or image tokens: choose the formulation "
                "decoupled, prompts of the same number of 75-token chunks, or give all pictures to one patch_model."
            )
        return self.add(layer, q, out, heads)

    @property
    def uniform(self) -> bool:
        """All rows get equally many tokens, so that text and image tokens can stand in one tensor, and none a mask."""
        return len(self.joined) == 1 and not self.joined[0].runs

    def _attend_group(
        self, group: _Group, q: Tensor, keys: Tensor, values: Tensor, heads: int, attention: Attention
    ) -> Tensor:
        """One softmax over text and image, for which hosts take no masks."""
        if not group.runs or self.masking is None:
            return attention(q, keys, values, heads)
        bias = self.masking.bias(group.runs, group.all_text_tokens, q.shape[1])
        return scaled_dot_product(q, keys, values, heads, bias)

    def extended(self, layer: int, which: slice, *texts: Tensor) -> list[tuple[Tensor, ...]]:
        """For each group ``[R, M + T, C]``: its rows' image tokens behind their text; without ``texts`` alone.

        Args:
            layer: index of the layer.
            which: ``KEYS``, ``VALUES`` or ``BOTH``; so many are the tensors of a group.
            texts: of these the text, ``[R, M, C]`` of the whole batch.
        """
        key = (layer, which.start, which.stop, bool(texts))
        layout = self.layouts.get(key)
        if layout is None:
            layout = Layout(self.joined, self.images[layer], which, self.text_tokens if texts else 0)
            self.layouts[key] = layout
        return layout(*texts)

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        """The groups' rows as a batch."""
        if len(parts) == 1:
            return parts[0]
        if all(isinstance(group.index, slice) for group in self.joined):
            return torch.cat(tuple(parts))  # they are in order
        out = parts[0].new_empty(sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        for group, part in zip(self.joined, parts, strict=True):
            out[group.index] = part
        return out

    def add(self, layer: int, q: Tensor, out: Tensor, heads: int) -> Tensor:
        """``out``, the layer's output before ``to_out``, with what the decoupled units add."""
        for addition in self.added:
            part = addition.attend(layer, q, heads)
            rows = out if addition.index is None else out[addition.index]
            if addition.where and self.masking is not None:
                rows = torch.addcmul(rows, part, self.masking.factor(addition.where, q.shape[1]))
            else:
                rows = rows + part
            out = rows if addition.index is None else _changed(out, addition.index, rows)
        return out

    def gate(self, layer: int, q: Tensor, k: Tensor, out: Tensor, heads: int) -> Tensor:
        """What one softmax over text and image gives, from the output ``out`` of the text's alone.

        For hosts that let nobody between ``q, k, v`` and the output. With lse the log-sum-exp of a query's scaled
        logits, one softmax over both is ``(1 - g) out + g out_image``, ``g = sigmoid(lse_image - lse_text)``. The
        text's logits are computed a second time. Of image tokens with several masks m, each run is an attention of its
        own, and all are mixed by a softmax over ``lse + log m``; that of the text has no mask.
        """
        if not self.joined:
            return out
        for group, (keys, values) in zip(self.joined, self.extended(layer, BOTH), strict=True):
            if not group.image_tokens:
                continue
            rows = group.pick(out)
            if group.runs and self.masking is not None:
                joined = _mixed(group, rows, group.pick(q), group.pick(k), keys, values, heads, self.masking)
                out = joined if group.index is None else _changed(out, group.index, joined)
                continue
            image = scaled_dot_product(group.pick(q), keys, values, heads)
            text_lse = _log_sum_exp(group.pick(q), group.pick(k)[:, : group.text_tokens], heads)
            if group.text_repeats > 1:
                text_lse = text_lse + math.log(group.text_repeats)
            share = torch.sigmoid(_log_sum_exp(group.pick(q), keys, heads) - text_lse)
            share = share.unsqueeze(-1).expand(-1, -1, -1, rows.shape[-1] // heads).flatten(2).to(rows.dtype)
            joined = rows + share * (image - rows)
            out = joined if group.index is None else _changed(out, group.index, joined)
        return out


def _mixed(
    group: _Group, out: Tensor, q: Tensor, k: Tensor, keys: Tensor, values: Tensor, heads: int, masking: Masking
) -> Tensor:
    """The masked case of :meth:`Plan.gate` for the rows of a group."""
    outs = [out]
    sums = [_log_sum_exp(q, k[:, : group.text_tokens], heads) + math.log(group.text_repeats)]
    counts = [tokens for _, tokens in group.runs]
    for (where, _), some_keys, some_values in zip(
        group.runs, torch.split(keys, counts, dim=1), torch.split(values, counts, dim=1), strict=True
    ):
        outs.append(scaled_dot_product(q, some_keys, some_values, heads))
        found = _log_sum_exp(q, some_keys, heads)
        sums.append(found + masking.log(where, q.shape[1]) if where else found)
    shares = torch.stack(sums).softmax(dim=0).to(out.dtype)  # the text's sum is finite, whatever the masks say
    parts = [share.unsqueeze(-1) * each.reshape(*share.shape, -1) for share, each in zip(shares, outs, strict=True)]
    return reduce(torch.add, parts).flatten(2)


def _changed(whole: Tensor, index: slice | Tensor, part: Tensor) -> Tensor:
    whole = whole.clone()
    whole[index] = part
    return whole


def _log_sum_exp(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Of each query's scaled logits, in float32: ``[B, N, heads]``."""
    q, k = (_split_heads(t, heads).float() for t in (q, k))
    return torch.logsumexp(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1).transpose(1, 2)


def make_plan(
    joint: Sequence[Images],
    added: Sequence[Images],
    call: Call,
    text_tokens: int,
    device: torch.device,
    layers: Sequence[int] | None = None,
    balanced: Sequence[bool] = (),
    masking: Masking | None = None,
) -> Plan:
    """The plan for one kind of call.

    Args:
        joint: the units whose pictures join the softmax.
        added: the units with an attention of their own.
        call: the rows.
        text_tokens: text tokens of the K that the host computed.
        device: where index tensors go.
        layers: those that it is for; None: all.
        balanced: of each joint unit whether all its pictures weigh as much as one; empty: none does.
        masking: the masks, if any picture has one.
    """
    pairs = zip(joint, balanced or (False,) * len(joint), strict=True)
    units = [each for unit, even in pairs for each in _alike(unit, even) if any(map(each.images.get, call.roles))]
    if layers is None:
        layers = range(len(next(iter(units[0].images.values()))[0].keys) if units else 0)
    joined = _groups(call.roles, _real_text_tokens(call, text_tokens), units, device) if units else ()
    images = (
        {layer: {role: _images(role, units, layer) for role in set(call.roles)} for layer in layers} if units else {}
    )
    additions = [addition for images in added for addition in _additions(call.roles, images, device)]
    return Plan(tuple(joined), images, text_tokens, tuple(additions), masking)


@dataclass(frozen=True)
class LayeredPlan:
    """What is done in one kind of UNet call, where that isn't the same in all layers."""

    plans: tuple[Plan, ...]
    """By layer; one that several layers have is the same object."""

    def at(self, layer: int) -> Plan:
        """What is done in one layer."""
        return self.plans[layer]

    @property
    def idle(self) -> bool:
        """Nothing acts in any layer."""
        return all(plan.idle for plan in self.plans)

    @property
    def memory(self) -> set[int]:
        """See :attr:`Plan.memory`."""
        return set().union(*(plan.memory for plan in {id(plan): plan for plan in self.plans}.values()))


def _real_text_tokens(call: Call, text_tokens: int) -> dict[int, int]:
    """The text tokens of each role in this call; the host repeats those of shorter prompts."""
    real: dict[int, int] = {}
    for role in set(call.roles):
        count = (call.text_tokens or {}).get(role, text_tokens)
        if count <= 0 or text_tokens % count:
            raise IPAdapterError(
                f"A cross-attention layer sees {text_tokens} text tokens where the prompt has {count}, which is no "
                "whole number of repeats: switch off the extension that changes the prompt's tokens, or IP-Adapter."
            )
        real[role] = count
    return real

"""What every layer does in one kind of UNet call.

A plan is made when a kind of call (its rows, its text, its active units) is first seen. It holds every layer's image
tokens as views for each row of the batch, so that a layer has nothing to do but concatenate and attend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import IPAdapterError
from .packing import merged, pair, row
from .rows import Call

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(q [B, N, C], k [B, M, C], v [B, M, C], heads) -> [B, N, C]``."""


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Plain multi-head attention: ``q [B, N, C]``, ``k`` and ``v`` ``[B, M, C]`` to ``[B, N, C]``."""
    out = F.scaled_dot_product_attention(_split_heads(q, heads), _split_heads(k, heads), _split_heads(v, heads))
    return out.transpose(1, 2).flatten(2)


def _split_heads(t: Tensor, heads: int) -> Tensor:
    return t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2)


@dataclass(frozen=True)
class ImageKV:
    """One picture in one role: K and V of every layer, each ``[1, T, C of the layer]``."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @staticmethod
    def from_pairs(pairs: Sequence[Tensor]) -> ImageKV:
        """From ``[K_0, V_0, K_1, V_1, …]``."""
        return ImageKV(tuple(pairs[::2]), tuple(pairs[1::2]))

    @property
    def tokens(self) -> int:
        """Image tokens T."""
        return int(self.keys[0].shape[1])


def _index(rows: Sequence[int], total: int, device: torch.device) -> slice | Tensor | None:
    """How to pick ``rows`` of a batch of ``total``; None: they are all of it."""
    if list(rows) == list(range(total)):
        return None
    if list(rows) == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


class _Images(NamedTuple):
    """One layer's image keys, or values, for the rows of a group. All are views; equal rows share them."""

    whole: Tensor | None
    """``[R, T, C]``, where memory holds it like this (two rows of one picture do); else ``rows`` counts."""
    rows: tuple[tuple[Tensor, ...], ...]
    """For each row one or more ``[T, C]``."""

    @staticmethod
    def of(by_role: Mapping[int, Sequence[Tensor]], roles: Sequence[int]) -> _Images:
        """From the ``[1, T, C]`` of each role's pictures."""
        tensors = [t for role in roles for t in by_role[role]] if len(roles) <= 2 else ()
        views = merged(tensors)
        if len(views) == 1:
            return _Images(views[0].view(len(roles), -1, views[0].shape[1]), ())
        parts = {role: merged(by_role[role]) for role in set(roles)}
        return _Images(None, tuple(parts[role] for role in roles))

    def behind(self, text: Tensor) -> Tensor:
        """``text [R, M, C]`` with each row's image tokens behind it, ``[R, M + T, C]``; one operation on the device.

        Row by row, because whole pieces of memory are copied several times faster than views expanded to a batch.
        """
        if self.whole is not None:
            return torch.cat((text, self.whole), dim=1)
        parts: list[Tensor] = []
        for of_row, images in zip(text.unbind(), self.rows, strict=True):
            parts.append(of_row)
            parts += images
        return torch.cat(parts).view(text.shape[0], -1, text.shape[2])

    def alone(self) -> Tensor:
        """``[R, T, C]``."""
        if self.whole is not None:
            return self.whole
        parts = [image for images in self.rows for image in images]
        return torch.cat(parts).view(len(self.rows), -1, parts[0].shape[1])


@dataclass(frozen=True)
class _Group:
    """Rows that get equally many text and image tokens, and can therefore share one attention."""

    index: slice | Tensor | None
    """Where they stand in the batch; None: they are the whole batch."""
    text_tokens: int | None
    """The text tokens to attend to, where the host has more that repeat them; None: all."""
    layers: tuple[tuple[_Images, _Images], ...]
    """Keys and values of each layer; empty where these rows get no image tokens."""

    def pick(self, t: Tensor) -> Tensor:
        """These rows of a whole batch."""
        return t if self.index is None else t[self.index]

    def keys(self, layer: int, text: Tensor) -> Tensor:
        """Text keys of these rows, ``[R, M, C]``, with each row's image keys behind them."""
        text = self.real(text)
        return self.layers[layer][0].behind(text) if self.layers else text

    def values(self, layer: int, text: Tensor) -> Tensor:
        """The same for values."""
        text = self.real(text)
        return self.layers[layer][1].behind(text) if self.layers else text

    def real(self, text: Tensor) -> Tensor:
        """``text`` without repeats."""
        return text if self.text_tokens is None else text[:, : self.text_tokens]

    def image_only(self, layer: int) -> tuple[Tensor, Tensor]:
        """Each row's image keys and values alone, ``[R, T, C]``."""
        keys, values = self.layers[layer]
        return keys.alone(), values.alone()


def _groups(
    roles: Sequence[int],
    text_tokens: Mapping[int, int | None],
    images: Mapping[int, tuple[ImageKV, ...]],
    device: torch.device,
) -> list[_Group]:
    """All rows, grouped by their numbers of text and image tokens, in the order of each group's first row."""
    kinds = {role: (text_tokens[role], sum(image.tokens for image in images.get(role, ()))) for role in set(roles)}
    groups = []
    for kind in dict.fromkeys(kinds[role] for role in roles):
        rows = [row for row, role in enumerate(roles) if kinds[role] == kind]
        of_rows = [roles[row] for row in rows]
        given = {role: images.get(role, ()) for role in set(of_rows)}
        count = max((len(image.keys) for each in given.values() for image in each), default=0)
        layers = tuple(
            (
                _Images.of({role: [image.keys[n] for image in each] for role, each in given.items()}, of_rows),
                _Images.of({role: [image.values[n] for image in each] for role, each in given.items()}, of_rows),
            )
            for n in range(count)
        )
        groups.append(_Group(_index(rows, len(roles), device), kind[0], layers))
    return groups


@dataclass(frozen=True)
class _Addition:
    """An attention of its own for rows of one unit: the rows of the batch it serves, and their image tokens."""

    index: slice | Tensor | None
    images: ImageKV
    """``[1 or 2, T, C]`` each: the batch's rows are folded into as many, their queries side by side."""

    def attend(self, layer: int, q: Tensor, heads: int) -> Tensor:
        """What is added to these rows, ``[R, N, C]``."""
        rows = q if self.index is None else q[self.index]
        keys, values = self.images.keys[layer], self.images.values[layer]
        folded = rows.reshape(keys.shape[0], -1, rows.shape[-1])
        return scaled_dot_product(folded, keys, values, heads).view(rows.shape)


def _additions(
    roles: Sequence[int], images: Mapping[int, tuple[ImageKV, ...]], device: torch.device
) -> list[_Addition]:
    # To attend to copies of the same tokens is to attend to them once: the one uncond of several pictures counts once.
    distinct = {role: tuple({id(i): i for i in given}.values()) for role, given in images.items() if given}
    whole = {
        role: ImageKV(
            tuple(row(layer) for layer in zip(*(i.keys for i in distinct[role]), strict=True)),
            tuple(row(layer) for layer in zip(*(i.values for i in distinct[role]), strict=True)),
        )
        for role in dict.fromkeys(roles)
        if role in distinct
    }
    rows = {role: [row for row, each in enumerate(roles) if each == role] for role in whole}
    if len(whole) == 2:
        (first, second), index = whole.values(), _index([row for each in rows.values() for row in each], -1, device)
        if isinstance(index, slice) and len({len(each) for each in rows.values()}) == 1:
            keys = [pair(a, b) for a, b in zip(first.keys, second.keys, strict=True)]
            values = [pair(a, b) for a, b in zip(first.values, second.values, strict=True)]
            if not any(t is None for t in (*keys, *values)):
                both = ImageKV(tuple(keys), tuple(values))  # type: ignore[arg-type]
                return [_Addition(None if index == slice(0, len(roles)) else index, both)]
    return [_Addition(_index(rows[role], len(roles), device), image) for role, image in whole.items()]


@dataclass(frozen=True)
class Plan:
    """What every layer does in one kind of UNet call."""

    joined: tuple[_Group, ...]
    """Every row of the batch once; empty when no joint unit acts."""
    added: tuple[_Addition, ...]
    """What decoupled units add."""

    @property
    def idle(self) -> bool:
        """Nothing acts: the host's own attention is all there is to do."""
        return not self.joined and not self.added

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
            out = base(q, self.joined[0].keys(layer, k), self.joined[0].values(layer, v), heads)
        elif replaced is None:
            parts = [
                attention(group.pick(q), group.keys(layer, group.pick(k)), group.values(layer, group.pick(v)), heads)
                for group in self.joined
            ]
            out = self._together(parts)
        else:
            raise IPAdapterError(
                "Something else replaces this cross-attention layer (another extension, or an earlier patch_model) "
                "while the rows of the batch differ in their number of text or image tokens: choose the formulation "
                "decoupled, prompts of the same number of 75-token chunks, or give all pictures to one patch_model."
            )
        return self.add(layer, q, out, heads)

    @property
    def uniform(self) -> bool:
        """All rows get equally many tokens, so that text and image tokens can stand in one tensor."""
        return len(self.joined) == 1

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        """The groups' rows as a batch."""
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
            out = out + part if addition.index is None else _changed(out, addition.index, out[addition.index] + part)
        return out

    def gate(self, layer: int, q: Tensor, k: Tensor, out: Tensor, heads: int) -> Tensor:
        """What one softmax over text and image gives, from the output ``out`` of the text's alone.

        For hosts that let nobody between ``q, k, v`` and the output. With lse the log-sum-exp of a query's scaled
        logits, one softmax over both is ``(1 - g) out + g out_image``, ``g = sigmoid(lse_image - lse_text)``. The
        text's logits are computed a second time.
        """
        for group in self.joined:
            if not group.layers:
                continue
            rows, keys_values = group.pick(out), group.image_only(layer)
            image = scaled_dot_product(group.pick(q), *keys_values, heads)
            text_lse = _log_sum_exp(group.pick(q), group.real(group.pick(k)), heads)
            share = torch.sigmoid(_log_sum_exp(group.pick(q), keys_values[0], heads) - text_lse)
            share = share.unsqueeze(-1).expand(-1, -1, -1, rows.shape[-1] // heads).flatten(2).to(rows.dtype)
            joined = rows + share * (image - rows)
            out = joined if group.index is None else _changed(out, group.index, joined)
        return out


def _changed(whole: Tensor, index: slice | Tensor, part: Tensor) -> Tensor:
    whole = whole.clone()
    whole[index] = part
    return whole


def _log_sum_exp(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Of each query's scaled logits, in float32: ``[B, N, heads]``."""
    q, k = (_split_heads(t, heads).float() for t in (q, k))
    return torch.logsumexp(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1).transpose(1, 2)


def make_plan(
    joint: Mapping[int, tuple[ImageKV, ...]],
    added: Sequence[Mapping[int, tuple[ImageKV, ...]]],
    call: Call,
    text_tokens: int,
    device: torch.device,
) -> Plan:
    """The plan for one kind of call.

    Args:
        joint: the pictures that join the softmax, by role.
        added: the pictures of each unit with an attention of its own, by role.
        call: the rows.
        text_tokens: text tokens of the K that the host computed.
        device: where index tensors go.
    """
    joined: list[_Group] = []
    if any(joint.get(role) for role in call.roles):
        joined = _groups(call.roles, _real_text_tokens(call, text_tokens), joint, device)
    additions = [addition for images in added for addition in _additions(call.roles, images, device)]
    return Plan(tuple(joined), tuple(additions))


def _real_text_tokens(call: Call, text_tokens: int) -> dict[int, int | None]:
    """The text tokens of each role in this call where the host repeats them; None: all are real."""
    real: dict[int, int | None] = {}
    for role in set(call.roles):
        count = (call.text_tokens or {}).get(role, text_tokens)
        if count <= 0 or text_tokens % count:
            raise IPAdapterError(
                f"A cross-attention layer sees {text_tokens} text tokens where the prompt has {count}, which is no "
                "whole number of repeats: switch off the extension that changes the prompt's tokens, or IP-Adapter."
            )
        real[role] = None if count == text_tokens else count
    return real

"""What every layer does in one kind of UNet call.

A plan is made when a kind of call (its rows, its text, its active units) is first seen. It holds every layer's image
tokens as views laid out for the rows of the batch, so that a layer has nothing to do but concatenate and attend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import IPAdapterError
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


class _Run(NamedTuple):
    """Neighbouring rows of one role, counted inside their group."""

    first: int
    last: int
    """One past the last."""
    images: tuple[ImageKV, ...]


class _Views(NamedTuple):
    """One layer's image tokens for all rows of a group, one tensor a picture."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def _pair(first: Tensor, second: Tensor) -> Tensor | None:
    """Two ``[1, T, C]`` as one view ``[2, T, C]``, if they lie in this order in one piece of memory."""
    distance = second.storage_offset() - first.storage_offset()
    same = first.shape == second.shape and first.stride()[1:] == second.stride()[1:]
    if not same or distance < 0 or not _share_memory(first, second):
        return None
    return first.as_strided((2, *first.shape[1:]), (distance, *first.stride()[1:]))


def _share_memory(first: Tensor, second: Tensor) -> bool:
    # The storage itself, since tensors made in inference mode don't know what they are views of.
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def _row(tensors: Sequence[Tensor]) -> Tensor:
    """Several ``[1, T, C]`` as one ``[1, sum of T, C]``: a view where they lie one after another, else a copy."""
    first, end = tensors[0], tensors[0].storage_offset()
    for t in tensors:
        if t.storage_offset() != end or not _share_memory(first, t):
            return torch.cat(tuple(tensors), dim=1)
        end += t.shape[1] * t.shape[2]
    tokens = sum(t.shape[1] for t in tensors)
    return first if len(tensors) == 1 else first.as_strided((1, tokens, first.shape[2]), first.stride())


def _views(runs: Sequence[_Run], rows: Callable[[Tensor, Tensor | None], Tensor | None]) -> list[_Views] | None:
    """Every layer's tokens, ``rows(first run's, second run's)`` for each picture; None where one can't be had."""
    partners = [(image, None) for image in runs[0].images]
    if len(runs) == 2:
        if len(runs[0].images) != len(runs[1].images):
            return None
        partners = list(zip(runs[0].images, runs[1].images, strict=True))  # type: ignore[arg-type]
    views = []
    for layer in range(len(partners[0][0].keys) if partners else 0):
        keys = [rows(a.keys[layer], b.keys[layer] if b else None) for a, b in partners]
        values = [rows(a.values[layer], b.values[layer] if b else None) for a, b in partners]
        if any(t is None for t in (*keys, *values)):
            return None
        views.append(_Views(tuple(keys), tuple(values)))  # type: ignore[arg-type]
    return views or None


@dataclass(frozen=True)
class _Group:
    """Rows that get equally many text and image tokens, and can therefore share one attention."""

    index: slice | Tensor | None
    """Where they stand in the batch; None: they are the whole batch."""
    text_tokens: int | None
    """The text tokens to attend to, where the host has more that repeat them; None: all."""
    runs: tuple[_Run, ...]
    fold: int
    """Rows of each run where there are two equal ones, with views ``[2, fold, T, C]``; 1: views are ``[R, T, C]``."""
    views: list[_Views] | None
    """None where the rows need their own arrangement: more runs, or image tokens from different places."""

    def pick(self, t: Tensor) -> Tensor:
        """These rows of a whole batch."""
        return t if self.index is None else t[self.index]

    def keys(self, layer: int, text: Tensor) -> Tensor:
        """Text keys of these rows, ``[R, M, C]``, with each row's image keys behind them."""
        if self.views is not None:
            return self._behind(text, self.views[layer].keys)
        return self._run_by_run(text, [[image.keys[layer] for image in run.images] for run in self.runs])

    def values(self, layer: int, text: Tensor) -> Tensor:
        """The same for values."""
        if self.views is not None:
            return self._behind(text, self.views[layer].values)
        return self._run_by_run(text, [[image.values[layer] for image in run.images] for run in self.runs])

    def image_only(self, layer: int) -> tuple[Tensor, Tensor]:
        """Each row's image keys and values alone, ``[R, T, C]``."""
        keys = [_row([i.keys[layer] for i in run.images]).expand(run.last - run.first, -1, -1) for run in self.runs]
        values = [_row([i.values[layer] for i in run.images]).expand(run.last - run.first, -1, -1) for run in self.runs]
        return torch.cat(keys), torch.cat(values)

    def _behind(self, text: Tensor, images: tuple[Tensor, ...]) -> Tensor:
        if self.text_tokens is not None:
            text = text[:, : self.text_tokens]
        if self.fold == 1:
            return torch.cat((text, *images), dim=1)
        return torch.cat((text.view(2, self.fold, *text.shape[1:]), *images), dim=2).flatten(0, 1)

    def _run_by_run(self, text: Tensor, images: list[list[Tensor]]) -> Tensor:
        if self.text_tokens is not None:
            text = text[:, : self.text_tokens]
        parts = []
        for run, tokens in zip(self.runs, images, strict=True):
            rows = run.last - run.first
            parts.append(torch.cat((text[run.first : run.last], *(t.expand(rows, -1, -1) for t in tokens)), dim=1))
        return torch.cat(parts)


def _group(
    roles: Sequence[int],
    text_tokens: Mapping[int, int | None],
    images: Mapping[int, tuple[ImageKV, ...]],
    device: torch.device,
) -> list[_Group]:
    """The rows whose role is in ``text_tokens``, grouped by their numbers of text and image tokens."""
    kinds = {role: (count, sum(image.tokens for image in images.get(role, ()))) for role, count in text_tokens.items()}
    groups = []
    for kind in dict.fromkeys(kinds[role] for role in roles if role in kinds):
        rows = [row for row, role in enumerate(roles) if kinds.get(role) == kind]
        runs, first = [], 0
        for role, members in groupby(roles[row] for row in rows):
            last = first + sum(1 for _ in members)
            runs.append(_Run(first, last, images.get(role, ())))
            first = last
        index: slice | Tensor | None = None
        if len(rows) < len(roles):
            together = rows[-1] - rows[0] + 1 == len(rows)
            index = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, device=device)
        fold, views = 1, None
        if len(runs) == 1:
            views = _views(runs, lambda t, _, n=first: t.expand(n, -1, -1))  # type: ignore[misc]
        elif len(runs) == 2 and 2 * runs[0].last == first:
            fold = runs[0].last
            views = _views(runs, lambda a, b, n=fold: _folded(a, b, n))  # type: ignore[misc]
        groups.append(_Group(index, kind[0], tuple(runs), fold, views))
    return groups


def _folded(first: Tensor, second: Tensor | None, rows: int) -> Tensor | None:
    pair = None if second is None else _pair(first, second)
    if pair is None or rows == 1:
        return pair
    return pair.unsqueeze(1).expand(-1, rows, -1, -1)


@dataclass(frozen=True)
class _Addition:
    """An attention of its own for rows of one unit: ``[rows of K, T, C]`` and the rows of the batch it serves."""

    index: slice | Tensor | None
    views: list[_Views]
    """One tensor each, ``[1 or 2, T, C]``: the batch's rows are folded into as many, their queries side by side."""

    def attend(self, layer: int, q: Tensor, heads: int) -> Tensor:
        """What is added to these rows, ``[R, N, C]``."""
        rows = q if self.index is None else q[self.index]
        (keys,), (values,) = self.views[layer]
        folded = rows.reshape(keys.shape[0], -1, rows.shape[-1])
        return scaled_dot_product(folded, keys, values, heads).view(rows.shape)


def _additions(
    roles: Sequence[int], images: Mapping[int, tuple[ImageKV, ...]], device: torch.device
) -> list[_Addition]:
    # To attend to copies of the same tokens is to attend to them once: the one uncond of several pictures counts once.
    distinct = {role: tuple({id(i): i for i in given}.values()) for role, given in images.items() if given}
    whole = {
        role: ImageKV(
            tuple(_row(layer) for layer in zip(*(i.keys for i in given), strict=True)),
            tuple(_row(layer) for layer in zip(*(i.values for i in given), strict=True)),
        )
        for role, given in distinct.items()
    }
    groups = _group(roles, dict.fromkeys(whole), {role: (image,) for role, image in whole.items()}, device)
    additions = []
    for group in groups:
        pairs = _views(group.runs, _pair_or_one) if len(group.runs) == 1 or group.views is not None else None
        if pairs is not None:
            additions.append(_Addition(group.index, pairs))
            continue
        for role, image in whole.items():
            rows = [row for row, each in enumerate(roles) if each == role]
            if rows:
                index = torch.tensor(rows, device=device)
                one = [_Views((k,), (v,)) for k, v in zip(image.keys, image.values, strict=True)]
                additions.append(_Addition(index, one))
        break
    return additions


def _pair_or_one(first: Tensor, second: Tensor | None) -> Tensor | None:
    return first if second is None else _pair(first, second)


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
            out = torch.empty_like(q)
            for group in self.joined:
                keys, values = group.keys(layer, group.pick(k)), group.values(layer, group.pick(v))
                out[group.index] = attention(group.pick(q), keys, values, heads)
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
            if not any(run.images for run in group.runs):
                continue
            rows, keys_values = group.pick(out), group.image_only(layer)
            image = scaled_dot_product(group.pick(q), *keys_values, heads)
            text_lse = _log_sum_exp(group.pick(q), group.pick(k)[:, : group.text_tokens], heads)
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
        joined = _group(call.roles, _real_text_tokens(call, text_tokens), joint, device)
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

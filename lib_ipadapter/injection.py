"""Everything that lives during sampling: weighed K/V of every unit, and what each layer does with them.

An :class:`Injection` is built before sampling. For each UNet call it decides once, from the call's row roles and
progress, what is active (:meth:`Injection.plan`); the :class:`Plan` it returns is remembered, so that a step like an
earlier one costs nothing. A layer then does nothing but concatenate views and call attention: no device transfer, no
device read, no arithmetic on K/V.
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
from .formulations import Formulation
from .progress import Window
from .rows import COND, UNCOND, Call

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(q [B, N, C], k [B, M, C], v [B, M, C], heads) -> [B, N, C]``."""


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Plain multi-head attention: ``q [B, N, C]``, ``k`` and ``v`` ``[B, M, C]`` to ``[B, N, C]``."""
    q, k, v = (_split_heads(t, heads) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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

    def map(self, function: Callable[[Tensor], Tensor]) -> ImageKV:
        """The same with every tensor changed by ``function``."""
        return ImageKV(tuple(map(function, self.keys)), tuple(map(function, self.values)))


Prompts = Mapping[int, tuple[ImageKV, ...]]
"""What the rows of each role (``COND``, ``UNCOND``) get: one entry a picture; an absent role gets no image tokens."""


@dataclass(frozen=True)
class Term:
    """One unit, ready: weighed K/V by role, how they enter, and when."""

    formulation: Formulation
    window: Window
    prompts: Prompts

    @staticmethod
    def weighed(formulation: Formulation, window: Window, prompts: Prompts, weight: float, widest: int) -> Term | None:
        """A term at ``weight``; None at weight 0, which is no term at all.

        Args:
            formulation, window: the unit's.
            prompts: K/V as the adapter makes them.
            weight: the unit's, any finite number.
            widest: width of the UNet's widest cross-attention layer.

        A picture that appears several times (the one uncond of several pictures, say) is weighed and kept once.
        """
        if weight == 0:
            return None
        done: dict[int, ImageKV] = {}

        def weigh(image: ImageKV) -> ImageKV:
            if id(image) not in done:
                pairs = (
                    formulation.weigh(k, v, weight, k.shape[-1] / widest)
                    for k, v in zip(image.keys, image.values, strict=True)
                )
                done[id(image)] = ImageKV(*zip(*pairs, strict=True))
            return done[id(image)]

        return Term(formulation, window, {role: tuple(map(weigh, images)) for role, images in prompts.items()})

    def map(self, function: Callable[[Tensor], Tensor]) -> Term:
        """The same with every K and V changed by ``function``, shared ones once."""
        images = {id(image): image for role in self.prompts.values() for image in role}
        changed = {key: image.map(function) for key, image in images.items()}
        prompts = {
            role: tuple(changed[id(image)] for image in role_images) for role, role_images in self.prompts.items()
        }
        return Term(self.formulation, self.window, prompts)


class _Run(NamedTuple):
    """Neighbouring rows of one role, counted inside their group."""

    first: int
    last: int
    """One past the last."""
    images: tuple[ImageKV, ...]

    def keys(self, layer: int) -> list[Tensor]:
        return [image.keys[layer].expand(self.last - self.first, -1, -1) for image in self.images]

    def values(self, layer: int) -> list[Tensor]:
        return [image.values[layer].expand(self.last - self.first, -1, -1) for image in self.images]


def _concat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@dataclass(frozen=True)
class _Group:
    """Rows that get equally many text and image tokens, and can therefore share one attention."""

    index: slice | Tensor | None
    """Where they stand in the batch; None: they are the whole batch."""
    text_tokens: int
    """The text tokens to attend to; what the host has beyond them repeats them."""
    runs: tuple[_Run, ...]

    def pick(self, t: Tensor) -> Tensor:
        """These rows of a whole batch."""
        return t if self.index is None else t[self.index]

    def keys(self, layer: int, text: Tensor) -> Tensor:
        """Text keys of these rows, ``[R, M, C]``, with each row's image keys behind them."""
        return self._behind(text, [run.keys(layer) for run in self.runs])

    def values(self, layer: int, text: Tensor) -> Tensor:
        """The same for values."""
        return self._behind(text, [run.values(layer) for run in self.runs])

    def image_only(self, layer: int) -> tuple[Tensor, Tensor]:
        """Each row's image keys and values alone, ``[R, T, C]``."""
        keys = [_concat(run.keys(layer), 1) for run in self.runs]
        values = [_concat(run.values(layer), 1) for run in self.runs]
        return _concat(keys, 0), _concat(values, 0)

    def _behind(self, text: Tensor, images: list[list[Tensor]]) -> Tensor:
        text = text[:, : self.text_tokens]
        parts = zip(self.runs, images, strict=True)
        return _concat([_concat([text[run.first : run.last], *image], 1) for run, image in parts], 0)


def _group(
    roles: Sequence[int],
    text_tokens: Mapping[int, int],
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
        groups.append(_Group(index, kind[0], tuple(runs)))
    return groups


@dataclass(frozen=True)
class Plan:
    """What every layer does in one kind of UNet call."""

    joined: tuple[_Group, ...]
    """Every row of the batch once; empty when no joint unit acts."""
    added: tuple[_Group, ...]
    """For every decoupled unit that acts, the rows that it acts on."""

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
                "Another extension replaces this cross-attention layer while the rows of the batch differ in their "
                "number of text or image tokens: choose the formulation decoupled, or a prompt and a negative prompt "
                "of the same number of 75-token chunks."
            )
        return self.add(layer, q, out, heads)

    @property
    def uniform(self) -> bool:
        """All rows get equally many tokens, so that text and image tokens can stand in one tensor."""
        return len(self.joined) == 1

    def add(self, layer: int, q: Tensor, out: Tensor, heads: int) -> Tensor:
        """``out``, the layer's output before ``to_out``, with what the decoupled units add."""
        for group in self.added:
            addition = scaled_dot_product(group.pick(q), *group.image_only(layer), heads)
            out = out + addition if group.index is None else _changed(out, group.index, out[group.index] + addition)
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


MAX_PLANS = 64
"""Kinds of UNet calls remembered; a generation has two or three."""


class Injection:
    """All units of a generation on one UNet.

    Args:
        terms: the units, weighed.
        layers: number of cross-attention layers.
        on_first_call: told the progress of the first UNet call; what it raises ends the sampling.
    """

    def __init__(
        self, terms: Sequence[Term], layers: int, on_first_call: Callable[[float], None] | None = None
    ) -> None:
        for term in terms:
            for images in term.prompts.values():
                for image in images:
                    if len(image.keys) != layers or len(image.values) != layers:
                        raise IPAdapterError(
                            f"The image prompt has K and V for {len(image.keys)} cross-attention layers and the UNet "
                            f"has {layers}: use an adapter made for this model family."
                        )
        self.terms = tuple(terms)
        self.layers = layers
        self._on_first_call = on_first_call
        self.acted = [False] * len(self.terms)
        """Whether each term was active in a UNet call yet."""
        self.progress_seen: tuple[float, float] | None = None
        """Progress of the first and of the furthest UNet call; None before there was one."""
        self._plans: dict[tuple[object, ...], Plan] = {}

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Brings K/V where the UNet computes. Called once, before sampling or in its first call, never per layer."""
        tensors = [t for term in self.terms for images in term.prompts.values() for i in images for t in i.keys]
        if any(t.device != device or t.dtype != dtype for t in tensors):
            self.terms = tuple(term.map(lambda t: t.to(device=device, dtype=dtype)) for term in self.terms)
            self._plans.clear()

    def plan(self, call: Call, text_tokens: int, device: torch.device, dtype: torch.dtype) -> Plan:
        """What to do in a UNet call.

        Args:
            call: its rows and progress.
            text_tokens: text tokens of the K that the host computed.
            device, dtype: of that K.

        Raises:
            IPAdapterError: if the number of text tokens doesn't fit what the rows' roles really have.
        """
        active = tuple(term.window.contains(call.progress) for term in self.terms)
        if self.progress_seen is None and self._on_first_call is not None:
            self._on_first_call(call.progress)
        first, last = self.progress_seen or (call.progress, call.progress)
        self.progress_seen = (first, max(last, call.progress))
        self.acted = [done or acts for done, acts in zip(self.acted, active, strict=True)]
        real = tuple(sorted(call.text_tokens.items())) if call.text_tokens else ()
        key = (active, call.roles, text_tokens, real, device, dtype)
        plan = self._plans.get(key)
        if plan is None:
            self.to(device, dtype)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            terms = [term for term, acts in zip(self.terms, active, strict=True) if acts]
            plan = self._plans[key] = _make_plan(terms, call, text_tokens, device)
        return plan


def _make_plan(terms: Sequence[Term], call: Call, text_tokens: int, device: torch.device) -> Plan:
    joint = [term for term in terms if term.formulation.joins_softmax]
    joined: list[_Group] = []
    images = {role: tuple(i for term in joint for i in term.prompts.get(role, ())) for role in (COND, UNCOND)}
    if any(images.get(role) for role in call.roles):
        joined = _group(call.roles, _real_text_tokens(call, text_tokens), images, device)
    added: list[_Group] = []
    for term in terms:
        if not term.formulation.joins_softmax:
            roles = {role: text_tokens for role, images in term.prompts.items() if images}
            added += _group(call.roles, roles, term.prompts, device)
    return Plan(tuple(joined), tuple(added))


def _real_text_tokens(call: Call, text_tokens: int) -> dict[int, int]:
    """The text tokens of each role in this call, without the host's repeats."""
    real = {}
    for role in set(call.roles):
        count = (call.text_tokens or {}).get(role, text_tokens)
        if count <= 0 or text_tokens % count:
            raise IPAdapterError(
                f"A cross-attention layer sees {text_tokens} text tokens where the prompt has {count}, which is no "
                "whole number of repeats: switch off the extension that changes the prompt's tokens, or IP-Adapter."
            )
        real[role] = count
    return real

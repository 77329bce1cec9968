"""Everything that lives during sampling: weighed K/V of every unit, and what each layer does with them.

An :class:`Injection` is built before sampling. For each UNet call it decides once, from the call's row roles and
progress, what is active (:meth:`Injection.plan`); the :class:`Plan` it returns is remembered, so that a step like an
earlier one costs nothing. A layer then does nothing but one copy and the attention: no device transfer, no device read,
no arithmetic on K/V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import IPAdapterError
from .formulations import Formulation
from .plan import ImageKV, Plan, make_plan
from .progress import Progress, Window, known
from .rows import UNCOND, Call

Prompts = Mapping[int, tuple[ImageKV, ...]]
"""What the rows of each role (``COND``, ``UNCOND``) get: one entry a picture; an absent role gets no image tokens."""


@dataclass(frozen=True)
class Term:
    """One unit: K/V by role, how they enter, how much, and when."""

    formulation: Formulation
    window: Window
    prompts: Prompts
    weight: float | None = None
    """What K and V are still to be weighed with, any finite number but 0; None: they are weighed."""
    widest: int = 1
    """Width of the UNet's widest cross-attention layer."""
    shares: tuple[float, ...] = ()
    """Each picture's own part of the weight, the same in every role, none of them 0; empty: all are 1."""

    def __post_init__(self) -> None:
        if self.weight == 0 or 0 in self.shares:
            raise ValueError("A unit or picture of weight 0 does nothing, and is none of a term's.")

    def on(self, device: torch.device, dtype: torch.dtype, first: int) -> Term:
        """The same, weighed, with all K and V of a layer side by side in memory there, ``first``'s role ahead.

        Rows of both roles, in this order, then get their image tokens as views of it. A picture that appears several
        times (the one uncond of several pictures, say) is weighed and kept once.
        """
        roles = sorted(self.prompts, key=lambda role: role != first)
        shared = {
            role: list(zip(images, self.shares or (1.0,) * len(images), strict=True))
            for role, images in self.prompts.items()
        }
        distinct = {(id(image), share): (image, share) for role in roles for image, share in shared[role]}
        packed = dict(zip(distinct, self._packed(list(distinct.values()), device, dtype), strict=True))
        prompts = {role: tuple(packed[id(image), share] for image, share in pairs) for role, pairs in shared.items()}
        return Term(self.formulation, self.window, prompts)

    def _packed(
        self, pictures: Sequence[tuple[ImageKV, float]], device: torch.device, dtype: torch.dtype
    ) -> list[ImageKV]:
        """Weighed copies whose tensors of one layer lie one after another, in the order of ``pictures``.

        All layers of one width are handled as one tensor, so that there are few transfers and few operations.

        Args:
            pictures: each with its share of the weight.
        """
        if not pictures:
            return []
        images, shares = zip(*pictures, strict=True)
        counts = [image.tokens for image in images]
        keys, values = ([list(getattr(image, kind)) for image in images] for kind in ("keys", "values"))
        for stacks in zip(*(image.stacks for image in images), strict=True):
            numbers = stacks[0].layers
            k = torch.cat([stack.keys.to(device) for stack in stacks], dim=1)
            v = torch.cat([stack.values.to(device) for stack in stacks], dim=1)
            if self.weight is not None:
                k, v = self._weighed(k, v, counts, shares)
            both = torch.stack((k, v), dim=1).to(dtype)  # [layers, 2, tokens of all pictures, C]
            for image, part in enumerate(torch.split(both.unsqueeze(2), counts, dim=3)):
                for n, (key, value) in zip(numbers, part.unbind(), strict=True):
                    keys[image][n], values[image][n] = key, value
        return [ImageKV(tuple(k), tuple(v)) for k, v in zip(keys, values, strict=True)]

    def _weighed(self, k: Tensor, v: Tensor, counts: list[int], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """``k`` and ``v`` ``[layers, tokens of all pictures, C]``, each picture weighed for itself."""
        assert self.weight is not None
        width_share = k.shape[2] / self.widest
        if len(set(counts)) == 1 and len(set(shares)) == 1:
            by_picture = (-1, counts[0], k.shape[2])
            weight = self.weight * shares[0]
            weighed = self.formulation.weigh(k.view(by_picture), v.view(by_picture), weight, width_share)
            return weighed[0].view(k.shape), weighed[1].view(v.shape)
        parts = zip(torch.split(k, counts, dim=1), torch.split(v, counts, dim=1), shares, strict=True)
        pairs = [
            self.formulation.weigh(one_k, one_v, self.weight * share, width_share) for one_k, one_v, share in parts
        ]
        return torch.cat([one_k for one_k, _ in pairs], dim=1), torch.cat([one_v for _, one_v in pairs], dim=1)


MAX_PLANS = 64
"""Kinds of UNet calls remembered; a generation has two or three."""


class Injection:
    """All units of a generation on one UNet.

    Args:
        terms: the units.
        layers: number of cross-attention layers.
        first: the role whose rows the host puts first when both are in one batch.
        on_first_call: told the progress of the first UNet call, if a unit doesn't act in all; what it raises ends the
            sampling.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        layers: int,
        first: int = UNCOND,
        on_first_call: Callable[[float], None] | None = None,
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
        self.asks_progress = not all(term.window.is_whole for term in self.terms)
        """Whether what is done depends on a UNet call's progress, so that it has to be known."""
        self._seen: tuple[Progress, Progress] | None = None
        self._first = first
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._plans: dict[tuple[object, ...], Plan] = {}

    @property
    def progress_seen(self) -> tuple[float, float] | None:
        """Progress of the first and of the furthest UNet call; None before there was one."""
        if self._seen is None:
            return None
        first, last = map(known, self._seen)
        return first, max(first, last)

    def continue_from(self, before: Injection) -> None:
        """Takes over what was seen so far of a pass that ``before`` began, on another UNet."""
        self.acted, self._seen = before.acted, before.progress_seen

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Brings K/V, weighed, where the UNet computes. Called once, before sampling or in its first call."""
        device = torch.empty(0, device=device).device  # "cuda" is some host's name for what tensors call "cuda:0"
        if self._place != (device, dtype):
            self.terms = tuple(term.on(device, dtype, self._first) for term in self.terms)
            self._place = (device, dtype)
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
        active = self._active(call.progress)
        self.acted = [done or acts for done, acts in zip(self.acted, active, strict=True)]
        real = tuple(sorted(call.text_tokens.items())) if call.text_tokens else ()
        key = (active, call.roles, text_tokens, real, device, dtype)
        plan = self._plans.get(key)
        if plan is None:
            self.to(device, dtype)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            terms = [term for term, acts in zip(self.terms, active, strict=True) if acts]
            joint = [term.prompts for term in terms if term.formulation.joins_softmax]
            added = [term.prompts for term in terms if not term.formulation.joins_softmax]
            plan = self._plans[key] = make_plan(joint, added, call, text_tokens, device)
        return plan

    def _active(self, progress: Progress) -> tuple[bool, ...]:
        """Which terms act in the UNet call that begins. Its progress isn't found out where that decides nothing."""
        first, furthest = self._seen or (progress, progress)
        if not self.asks_progress:
            self._seen = (first, progress)  # the latest is the furthest, as samplers go
            return (True,) * len(self.terms)
        now = known(progress)
        if self._seen is None and self._on_first_call is not None:
            self._on_first_call(now)
        self._seen = (known(first), max(known(furthest), now))
        return tuple(term.window.contains(now) for term in self.terms)

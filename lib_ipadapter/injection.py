"""Everything that lives during sampling: weighed K/V of every unit, and what each layer does with them.

An :class:`Injection` is built before sampling. For each UNet call it decides once, from the call's row roles and
progress, what is active (:meth:`Injection.plan`); the :class:`Plan` it returns is remembered, so that a step like an
earlier one costs nothing. A layer then does nothing but concatenate views and call attention: no device transfer, no
device read, no arithmetic on K/V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .errors import IPAdapterError
from .formulations import Formulation
from .plan import ImageKV, Plan, make_plan
from .progress import Window
from .rows import COND, UNCOND, Call

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

    def on(self, device: torch.device, dtype: torch.dtype, first: int) -> Term:
        """The same with all K and V of a layer side by side in one piece of memory there, ``first``'s role ahead.

        Rows of both roles, in this order, then get their image tokens as views of it.
        """
        roles = sorted(self.prompts, key=lambda role: role != first)
        distinct = {id(image): image for role in roles for image in self.prompts[role]}
        packed = dict(zip(distinct, _packed(list(distinct.values()), device, dtype), strict=True))
        prompts = {role: tuple(packed[id(image)] for image in images) for role, images in self.prompts.items()}
        return Term(self.formulation, self.window, prompts)


def _packed(images: Sequence[ImageKV], device: torch.device, dtype: torch.dtype) -> list[ImageKV]:
    """Copies whose tensors of one layer lie one after another, in the order of ``images``."""

    def side_by_side(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        tokens, width = sum(t.shape[1] for t in tensors), tensors[0].shape[2]
        memory = torch.empty(1, tokens, width, device=device, dtype=dtype)
        parts = list(torch.split(memory, [t.shape[1] for t in tensors], dim=1))
        for part, tensor in zip(parts, tensors, strict=True):
            part.copy_(tensor)
        return parts

    if not images:
        return []
    keys = [side_by_side(layer) for layer in zip(*(image.keys for image in images), strict=True)]
    values = [side_by_side(layer) for layer in zip(*(image.values for image in images), strict=True)]
    return [ImageKV(tuple(k[n] for k in keys), tuple(v[n] for v in values)) for n in range(len(images))]


MAX_PLANS = 64
"""Kinds of UNet calls remembered; a generation has two or three."""


class Injection:
    """All units of a generation on one UNet.

    Args:
        terms: the units, weighed.
        layers: number of cross-attention layers.
        first: the role whose rows the host puts first when both are in one batch.
        on_first_call: told the progress of the first UNet call; what it raises ends the sampling.
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
        self.progress_seen: tuple[float, float] | None = None
        """Progress of the first and of the furthest UNet call; None before there was one."""
        self._first = first
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._plans: dict[tuple[object, ...], Plan] = {}

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Brings K/V where the UNet computes. Called once, before sampling or in its first call, never per layer."""
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
            plan = self._plans[key] = make_plan(_joint(terms), _added(terms), call, text_tokens, device)
        return plan


Images = Mapping[int, tuple[ImageKV, ...]]


def _joint(terms: Sequence[Term]) -> Images:
    """The pictures of all units that join the softmax, by role."""
    joint = [term for term in terms if term.formulation.joins_softmax]
    return {role: tuple(image for term in joint for image in term.prompts.get(role, ())) for role in (COND, UNCOND)}


def _added(terms: Sequence[Term]) -> list[Images]:
    """The pictures of each unit with an attention of its own, by role."""
    return [term.prompts for term in terms if not term.formulation.joins_softmax]

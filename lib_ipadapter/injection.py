"""Everything that lives during sampling: weighed K/V of every unit, and what each layer does with them.

An :class:`Injection` is built before sampling. For each UNet call it decides once, from the call's row roles and
progress, what is active (:meth:`Injection.plan`); the :class:`Plan` it returns is remembered, so that a step like an
earlier one costs nothing. A layer then does nothing but one copy and the attention: no device transfer, no device read,
no arithmetic on K/V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .balance import Counted, check_counts
from .errors import IPAdapterError
from .formulations import Formulation
from .items import by_item
from .places import Items
from .plan import Plan, make_plan
from .progress import NOISE, STEPS, Progress, Window, known
from .rows import Call
from .weighing import Prompts, Weighed


@dataclass(frozen=True)
class Term:
    """One unit: K/V by role, how they enter, and when."""

    formulation: Formulation
    window: Window
    weighed: Weighed
    items: Items = None
    """The items of the batch it acts on."""
    balance: bool = False
    """Whether its pictures weigh together as much as one, in a joint softmax."""


MAX_PLANS = 64
"""Kinds of UNet calls remembered; a generation has two or three."""


class Injection:
    """All units of a generation on one UNet.

    Args:
        terms: the units.
        layers: number of cross-attention layers.
        on_first_call: told the progress of the first UNet call, if a unit doesn't act in all; what it raises ends the
            sampling.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        layers: int,
        on_first_call: Callable[[float], None] | None = None,
    ) -> None:
        for term in terms:
            found = sum(map(len, term.weighed.layers))
            if found != layers:
                raise IPAdapterError(
                    f"The image prompt has K and V for {found} cross-attention layers and the UNet has {layers}: use "
                    "an adapter made for this model family."
                )
        check_counts(
            [
                Counted(term.weighed.places, {role: len(places) for role, places in term.weighed.places.items()})
                for term in terms
                if term.balance and term.formulation.joins_softmax
            ]
        )
        self.terms = tuple(terms)
        self.layers = layers
        self._on_first_call = on_first_call
        self.acted = [False] * len(self.terms)
        """Whether each term was active in a UNet call yet."""
        partial = {term.window.timing for term in self.terms if not term.window.is_whole}
        self.asks_progress = NOISE in partial
        """Whether what is done depends on a UNet call's place in the noise schedule, so that it has to be known."""
        self._counts_calls = STEPS in partial
        self.asks_items = any(term.items is not None for term in self.terms)
        """Whether what is done depends on which item of the batch a row belongs to, so that it has to be known."""
        self._seen: dict[str, tuple[Progress, Progress]] = {}
        """Progress of the first and of the furthest UNet call, by each timing."""
        self._prompts: list[Prompts] = []
        """Of each term, where the UNet computes."""
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._plans: dict[tuple[object, ...], Plan] = {}

    def progress_seen(self, timing: str = NOISE) -> tuple[float, float] | None:
        """Progress of the first and of the furthest UNet call by a timing; None before there was one."""
        if timing not in self._seen:
            return None
        first, last = map(known, self._seen[timing])
        return first, max(first, last)

    def continue_from(self, before: Injection) -> None:
        """Takes over what was seen so far of a pass that ``before`` began, on another UNet."""
        self.acted, self._seen = before.acted, dict(before._seen)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Brings K/V where the UNet computes. Called once, before sampling or in its first call."""
        device = torch.empty(0, device=device).device  # "cuda" is some host's name for what tensors call "cuda:0"
        if self._place != (device, dtype):
            self._prompts = [term.weighed.on(device, dtype) for term in self.terms]
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
        active = self._active(call)
        self.acted = [done or acts for done, acts in zip(self.acted, active, strict=True)]
        real = tuple(sorted(call.text_tokens.items())) if call.text_tokens else ()
        key = (active, call.roles, call.items, text_tokens, real, device, dtype)
        plan = self._plans.get(key)
        if plan is None:
            self.to(device, dtype)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            acting = [
                pair for pair, acts in zip(zip(self.terms, self._prompts, strict=True), active, strict=True) if acts
            ]
            if any(term.items is not None for term, _ in acting):
                call, given = by_item(call, [(term.items, prompts) for term, prompts in acting])
                acting = [(term, prompts) for (term, _), prompts in zip(acting, given, strict=True)]
            joint = [prompts for term, prompts in acting if term.formulation.joins_softmax]
            added = [prompts for term, prompts in acting if not term.formulation.joins_softmax]
            balanced = [term.balance for term, _ in acting if term.formulation.joins_softmax]
            plan = self._plans[key] = make_plan(joint, added, call, text_tokens, device, balanced)
        return plan

    def _active(self, call: Call) -> tuple[bool, ...]:
        """Which terms act in the UNet call that begins. Its progress isn't found out where that decides nothing."""
        now: dict[str, Progress] = {NOISE: known(call.progress) if self.asks_progress else call.progress}
        if call.executed is not None:
            now[STEPS] = call.executed
        elif self._counts_calls:
            raise IPAdapterError(
                "The WebUI doesn't say how many steps are done, and the unit's start and stop are parts of them: set "
                "its timing to noise."
            )
        if self.asks_progress and NOISE not in self._seen and self._on_first_call is not None:
            self._on_first_call(known(now[NOISE]))
        for timing, progress in now.items():
            first, furthest = self._seen.get(timing, (progress, progress))
            if timing == STEPS or self.asks_progress:
                progress = max(known(furthest), known(progress))
            self._seen[timing] = (first, progress)  # else the latest is the furthest, as samplers go
        return tuple(
            term.window.is_whole or term.window.contains(known(now[term.window.timing])) for term in self.terms
        )

"""Everything that lives during sampling: weighed K/V of every unit, and what each layer does with them.

An :class:`Injection` is built before sampling. For each UNet call it decides once, from the call's row roles and
progress, what is active (:meth:`Injection.plan`); the :class:`Plan` it returns is remembered, so that a step like an
earlier one costs nothing. A layer then does nothing but one copy and the attention: no device transfer, no device read,
no arithmetic on K/V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .errors import IPAdapterError
from .formulations import Formulation
from .masking import Masking
from .masks import PIXELS, Canvas, Place
from .plan import ImageKV, Plan, make_plan
from .progress import NOISE, STEPS, Progress, Window, known
from .rows import Call
from .weighing import Prompts, Weighed


@dataclass(frozen=True)
class Term:
    """One unit: K/V by role, how they enter, and when."""

    formulation: Formulation
    window: Window
    weighed: Weighed
    places: Mapping[int, tuple[Place, ...]] = field(default_factory=dict)
    """By role, where each entry of ``weighed`` acts; empty: everywhere."""

    @property
    def is_masked(self) -> bool:
        """Whether a picture of it acts in a part of the canvas alone."""
        return any(map(any, self.places.values()))


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
        self.terms = tuple(terms)
        self.layers = layers
        self._on_first_call = on_first_call
        self.acted = [False] * len(self.terms)
        """Whether each term was active in a UNet call yet."""
        partial = {term.window.timing for term in self.terms if not term.window.is_whole}
        self.asks_progress = NOISE in partial
        """Whether what is done depends on a UNet call's place in the noise schedule, so that it has to be known."""
        self._counts_calls = STEPS in partial
        self._seen: dict[str, tuple[Progress, Progress]] = {}
        """Progress of the first and of the furthest UNet call, by each timing."""
        self._prompts: list[Prompts] = []
        """Of each term, where the UNet computes."""
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._is_masked = any(term.is_masked for term in self.terms)
        self.canvas: Canvas | None = None
        """What the pass draws; None: what its first UNet call has."""

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
            self._prompts = [_placed(term.weighed.on(device, dtype), term.places) for term in self.terms]
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
        where = (call.latent, call.tiles) if self._is_masked else None
        key = (active, call.roles, text_tokens, real, where, device, dtype)
        plan = self._plans.get(key)
        if plan is None:
            self.to(device, dtype)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            acting = [
                pair for pair, acts in zip(zip(self.terms, self._prompts, strict=True), active, strict=True) if acts
            ]
            joint = [prompts for term, prompts in acting if term.formulation.joins_softmax]
            added = [prompts for term, prompts in acting if not term.formulation.joins_softmax]
            masked = any(term.is_masked for term, _ in acting)
            masking = self._masking(call, device, dtype) if masked else None
            plan = self._plans[key] = make_plan(joint, added, call, text_tokens, device, masking)
        return plan

    def _masking(self, call: Call, device: torch.device, dtype: torch.dtype) -> Masking:
        """The masks where a UNet call draws the whole canvas.

        Raises:
            IPAdapterError: if it draws a part of it, and nothing says which.
        """
        if call.latent is None:
            raise IPAdapterError(
                "The WebUI doesn't say how large the latent of a UNet call is, so a mask can't be put on it: take out "
                "the units' masks."
            )
        if self.canvas is None:
            self.canvas = Canvas(call.latent)
        if call.tiles > 1 or call.latent != self.canvas.latent:
            (rows, columns), (height, width) = call.latent, self.canvas.latent
            raise IPAdapterError(
                f"The picture is drawn in tiles ({call.tiles} at once, of {PIXELS * columns} x {PIXELS * rows} pixels "
                f"where all of it has {PIXELS * width} x {PIXELS * height}), and nothing says where each of them lies, "
                "so a mask can't be put there: switch the tiling off (MultiDiffusion, Tiled Diffusion), or take out "
                "the units' masks."
            )
        return Masking(self.canvas, device, dtype)

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


def _placed(prompts: Prompts, places: Mapping[int, tuple[Place, ...]]) -> Prompts:
    """The pictures with the places where they act; one that several entries share stays one where it has one place."""
    made: dict[tuple[int, Place], ImageKV] = {}

    def placed(image: ImageKV, place: Place) -> ImageKV:
        return made.setdefault((id(image), place), replace(image, place=place) if place else image)

    return {
        role: tuple(map(placed, images, places[role])) if any(places.get(role, ())) else images
        for role, images in prompts.items()
    }

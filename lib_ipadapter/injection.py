"""Everything that lives during sampling: weighed K/V of every unit, and what each layer does with them.

An :class:`Injection` is built before sampling. For each UNet call it decides once, from the call's row roles and
progress, what is active (:meth:`Injection.plan`); the :class:`Plan` it returns is remembered, so that a step like an
earlier one costs nothing. A layer then does nothing but one copy and the attention: no device transfer, no device read,
no arithmetic on K/V. Where a unit's weight changes from call to call, all its K/V are weighed again before the first
layer, in the memory that the plans look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .balance import Counted, check_counts
from .curves import ALWAYS, Curve
from .errors import IPAdapterError
from .formulations import Formulation
from .influence import Influence, Seen, shares
from .items import by_item
from .layer_weights import Section
from .masking import Masking
from .masks import PIXELS, Canvas, Where
from .places import Items
from .plan import ImageKV, LayeredPlan, Plan, make_plan
from .progress import NOISE, STEPS, Progress, Window, known
from .reweighing import Adjustable, Unweighed
from .rows import UNCOND, Call
from .weighing import Prompts, Weighed, in_section


@dataclass(frozen=True)
class Term:
    """One unit: K/V by role, how they enter, and when."""

    formulation: Formulation
    window: Window
    weighed: Weighed | Unweighed
    """The latter where the curve changes the weight."""
    curve: Curve = ALWAYS
    """Factor of the weight; where it is 0, the unit takes no part. A weighed unit's has its other value in K/V."""

    items: Items = None
    """The items of the batch it acts on."""
    balance: bool = False
    """Whether its pictures weigh together as much as one, in a joint softmax."""

    where: Mapping[int, tuple[Where, ...]] = field(default_factory=dict)
    """By role, where each entry of ``weighed`` acts; empty: everywhere."""

    @property
    def is_masked(self) -> bool:
        """Whether a picture of it acts in a part of the canvas alone."""
        return any(map(any, self.where.values()))

    @property
    def sections(self) -> tuple[Section, ...]:
        """Layers in which the unit's pictures act in different ways; empty: in all alike."""
        if isinstance(self.weighed, Weighed):
            return self.weighed.sections
        return () if self.weighed.layer_weights is None else self.weighed.layer_weights.sections

    @property
    def is_whole(self) -> bool:
        """Whether it does the same in every UNet call."""
        return self.window.is_whole and self.curve.is_whole

    def factor(self, progress: float) -> float:
        """Of the unit's weight at ``progress`` by the window's timing; 0: it takes no part."""
        return self.curve.at(progress) if self.window.contains(progress) else 0.0


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
        partial = {term.window.timing for term in self.terms if not term.is_whole}
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
        self._plans: dict[tuple[object, ...], Plan | LayeredPlan] = {}
        self._whole = [term.curve.at(0.0) if term.is_whole else None for term in self.terms]
        """Each term's factor, if it has but one."""
        self._varying = {n: t.weighed for n, t in enumerate(self.terms) if isinstance(t.weighed, Unweighed)}
        self._adjustable: dict[int, Adjustable] = {}
        """Of each of these, where the UNet computes."""
        self._factors: dict[int, float] = {}
        """What they are weighed with now."""
        self._copies: set[tuple[object, ...]] = set()
        """Keys of the plans that hold copies of K and V, and not views alone: these don't see a change."""
        self._is_masked = any(term.is_masked for term in self.terms)
        self.influence: Influence | None = None
        """Takes what each picture's share is in every layer; None: nobody asked, and nothing looks."""
        self._now: tuple[Call, tuple[bool, ...]] | None = None
        """The UNet call that is running and the terms that act in it, for that."""
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
            self._adjustable = {n: each.on(device, dtype) for n, each in self._varying.items()}
            self._factors.clear()
            prompts = [
                (self._adjustable[n].weighed if isinstance(term.weighed, Unweighed) else term.weighed).on(device, dtype)
                for n, term in enumerate(self.terms)
            ]
            self._prompts = [_placed(each, term.where) for each, term in zip(prompts, self.terms, strict=True)]
            self._place = (device, dtype)
            self._plans.clear()

    def plan(self, call: Call, text_tokens: int, device: torch.device, dtype: torch.dtype) -> Plan | LayeredPlan:
        """What to do in a UNet call.

        Args:
            call: its rows and progress.
            text_tokens: text tokens of the K that the host computed.
            device, dtype: of that K.

        Raises:
            IPAdapterError: if the number of text tokens doesn't fit what the rows' roles really have.
        """
        factors = self._find_factors(call)
        active = tuple(factor != 0 for factor in factors)
        if self._varying:
            self._weigh(factors, device, dtype)
        self.acted = [done or acts for done, acts in zip(self.acted, active, strict=True)]
        if self.influence is not None:
            self.influence.begin()
            self._now = call, active
        real = tuple(sorted(call.text_tokens.items())) if call.text_tokens else ()
        where = (call.latent, call.tiles) if self._is_masked else None
        key = (active, call.roles, call.items, text_tokens, real, where, device, dtype)
        plan = self._plans.get(key)
        if plan is None:
            self.to(device, dtype)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            acting = [n for n, acts in enumerate(active) if acts]
            masked = any(self.terms[n].is_masked for n in acting)
            masking = self._masking(call, device, dtype) if masked else None
            plan = self._plans[key] = self._make_plan(acting, call, text_tokens, device, masking)
            if self._varying and not plan.memory <= self._memory():
                self._copies.add(key)
        return plan

    def see(self, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
        """Looks, for the influence map, at what pictures do on the first cond row in a layer.

        Args:
            layer: in the file's order.
            q, k, v: projected, of the whole batch, ``[R, N, C]`` and twice ``[R, M, C]``, the text's.
            heads: attention heads.
        """
        if self.influence is None or self._now is None:
            return
        call, active = self._now
        row = next((n for n, role in enumerate(call.roles) if role != UNCOND), None)
        if row is None:
            return
        text = (call.text_tokens or {}).get(call.roles[row], k.shape[1])
        pictures = self._on_row(layer, row, q.shape[1], call, active, k.device, k.dtype)
        if pictures:
            self.influence.add(layer, shares(q[row], k[row, :text], v[row, :text], heads, pictures))

    def _on_row(
        self,
        layer: int,
        row: int,
        queries: int,
        call: Call,
        active: Sequence[bool],
        device: torch.device,
        dtype: torch.dtype,
    ) -> list[Seen]:
        """The pictures that act on a row in a layer."""
        parts: list[tuple[int, int, Prompts]] = []  # term, the number of its first picture there, and what it has
        for n, (term, prompts) in enumerate(zip(self.terms, self._prompts, strict=True)):
            section = next((each for each in term.sections if layer in each.layers), None)
            if active[n] and section is not None:
                parts.append((n, section.picture or 0, in_section(prompts, section)))
            elif active[n] and not term.sections:
                parts.append((n, 0, prompts))
        role = call.roles[row]
        if any(self.terms[n].items is not None for n, _, _ in parts):
            rows, given = by_item(call, [(self.terms[n].items, prompts) for n, _, prompts in parts])
            role = rows.roles[row]
            parts = [(n, first, prompts) for (n, first, _), prompts in zip(parts, given, strict=True)]
        found = []
        for n, first, prompts in parts:
            images = prompts.get(role, ())
            places = list(dict.fromkeys(image.where for image in images))
            for number, image in enumerate(images, first):
                factor = None
                if image.where:
                    masking = self._masking(call, device, dtype)
                    factor = masking.factor(image.where, queries)[:, 0]
                part = 1 / len(images) if self.terms[n].balance else 1.0
                found.append(
                    Seen(
                        (n, number),
                        image.keys[layer][0],
                        image.values[layer][0],
                        factor,
                        part,
                        self.terms[n].formulation.joins_softmax,
                        places.index(image.where),
                    )
                )
        return found

    def _make_plan(
        self, acting: Sequence[int], call: Call, text_tokens: int, device: torch.device, masking: Masking | None
    ) -> Plan | LayeredPlan:
        """A plan for the terms of these numbers."""

        def make(parts: Sequence[tuple[Term, Prompts]], layers: Sequence[int] | None) -> Plan:
            rows = call
            if any(term.items is not None for term, _ in parts):
                rows, given = by_item(call, [(term.items, prompts) for term, prompts in parts])
                parts = [(term, prompts) for (term, _), prompts in zip(parts, given, strict=True)]
            joint = [prompts for term, prompts in parts if term.formulation.joins_softmax]
            added = [prompts for term, prompts in parts if not term.formulation.joins_softmax]
            balanced = [term.balance for term, _ in parts if term.formulation.joins_softmax]
            return make_plan(joint, added, rows, text_tokens, device, layers, balanced, masking)

        parts = [(self.terms[n], self._prompts[n]) for n in acting]
        if not any(term.sections for term, _ in parts):
            return make(parts, None)
        # The layers in which the same sections act are planned together.
        by_term: list[list[int | None]] = []
        for term, _ in parts:
            section_of = {layer: n for n, section in enumerate(term.sections) for layer in section.layers}
            by_term.append([section_of.get(layer) if term.sections else -1 for layer in range(self.layers)])
        ways = list(zip(*by_term, strict=True))
        plans: dict[tuple[int | None, ...], Plan] = {}
        for way in dict.fromkeys(ways):
            there = [
                (term, prompts if n == -1 else in_section(prompts, term.sections[n]))
                for (term, prompts), n in zip(parts, way, strict=True)
                if n is not None
            ]
            plans[way] = make(there, [layer for layer, each in enumerate(ways) if each == way])
        return LayeredPlan(tuple(plans[way] for way in ways))

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

    def _weigh(self, factors: Sequence[float], device: torch.device, dtype: torch.dtype) -> None:
        """Brings the factors of a UNet call into K and V, where they aren't yet."""
        if self._place != (device, dtype):
            self.to(device, dtype)
        changed = [n for n in self._varying if factors[n] and factors[n] != self._factors.get(n)]
        for n in changed:
            self._adjustable[n].set(factors[n])
            self._factors[n] = factors[n]
        if changed and self._copies:  # else the plans see the change
            for key in self._copies:
                self._plans.pop(key, None)
            self._copies.clear()

    def _memory(self) -> set[int]:
        """The pieces of memory in which K and V are."""
        return {
            tensor.untyped_storage()._cdata
            for prompts in self._prompts
            for images in prompts.values()
            for image in images
            for tensor in (*image.keys, *image.values)
        }

    def _find_factors(self, call: Call) -> tuple[float, ...]:
        """Each term's factor in the UNet call that begins. Its progress isn't found out where that decides nothing."""
        now: dict[str, Progress] = {NOISE: known(call.progress) if self.asks_progress else call.progress}
        if call.executed is not None:
            now[STEPS] = call.executed
        elif self._counts_calls:
            raise IPAdapterError(
                "The WebUI doesn't say how many steps are done, and the unit's start, stop and curve are parts of "
                "them: set its timing to noise."
            )
        if self.asks_progress and NOISE not in self._seen and self._on_first_call is not None:
            self._on_first_call(known(now[NOISE]))
        for timing, progress in now.items():
            first, furthest = self._seen.get(timing, (progress, progress))
            if timing == STEPS or self.asks_progress:
                progress = max(known(furthest), known(progress))
            self._seen[timing] = (first, progress)  # else the latest is the furthest, as samplers go
        return tuple(
            term.factor(known(now[term.window.timing])) if whole is None else whole
            for term, whole in zip(self.terms, self._whole, strict=True)
        )


def _placed(prompts: Prompts, where: Mapping[int, tuple[Where, ...]]) -> Prompts:
    """The pictures with where they act; one that several entries share stays one where it acts in one place."""
    made: dict[tuple[int, Where], ImageKV] = {}

    def placed(image: ImageKV, place: Where) -> ImageKV:
        return made.setdefault((id(image), place), replace(image, where=place) if place else image)

    return {
        role: tuple(map(placed, images, where[role])) if any(where.get(role, ())) else images
        for role, images in prompts.items()
    }

"""Prompts and their conditionings in the hosts' containers: AND with weights, one list of schedules per picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Cond = torch.Tensor | dict[str, torch.Tensor]
"""One prompt: context ``[tokens, width]``, or SDXL's ``{"crossattn": [tokens, width], "vector": [width]}``."""

_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"^(?P<text>.*?)(?:\s*:\s*(?P<weight>[-+]?(?:\d+\.?|\d*\.\d+)))?\s*$", re.DOTALL)


class SdConditioning(list[str]):
    """Prompts together with what SDXL wants to know about the picture."""

    def __init__(
        self,
        prompts: Sequence[str],
        is_negative_prompt: bool = False,
        width: int | None = None,
        height: int | None = None,
        copy_from: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(prompts)
        source = prompts if copy_from is None else copy_from
        self.is_negative_prompt = is_negative_prompt or getattr(source, "is_negative_prompt", False)
        self.width = width or getattr(source, "width", None)
        self.height = height or getattr(source, "height", None)


class ScheduledPromptConditioning(NamedTuple):
    end_at_step: int
    cond: Cond


class ComposableScheduledPromptConditioning:
    """One AND part of one picture's prompt."""

    def __init__(self, schedules: list[ScheduledPromptConditioning], weight: float = 1.0) -> None:
        self.schedules = schedules
        self.weight = weight


class MulticondLearnedConditioning:
    """All AND parts of all pictures' prompts."""

    def __init__(self, shape: tuple[int, ...], batch: list[list[ComposableScheduledPromptConditioning]]) -> None:
        self.shape = shape
        self.batch = batch


class DictWithShape(dict[str, torch.Tensor]):
    """SDXL's conditioning of several rows, with the shape of its context."""

    @property
    def shape(self) -> torch.Size:
        return self["crossattn"].shape


def split_and(prompt: str) -> list[tuple[str, float]]:
    """``"a AND b:0.7"`` -> ``[("a", 1.0), ("b", 0.7)]``."""
    parts = []
    for part in _AND.split(prompt):
        match = _WEIGHT.match(part)
        text, weight = (match["text"], match["weight"]) if match else (part, None)
        parts.append((text, 1.0 if weight is None else float(weight)))
    return parts


def get_learned_conditioning(
    model: Any, prompts: SdConditioning, steps: int, *args: Any, **kwargs: Any
) -> list[list[ScheduledPromptConditioning]]:
    """Encode each prompt whole (AND isn't split here), each at its own length."""
    encoded: dict[str, list[ScheduledPromptConditioning]] = {}
    for text in prompts:
        if text not in encoded:
            cond = model.get_learned_conditioning(SdConditioning([text], copy_from=prompts))
            first = {k: v[0] for k, v in cond.items()} if isinstance(cond, dict) else cond[0]
            encoded[text] = [ScheduledPromptConditioning(steps, first)]
    return [encoded[text] for text in prompts]


def get_multicond_learned_conditioning(
    model: Any, prompts: SdConditioning, steps: int, *args: Any, **kwargs: Any
) -> MulticondLearnedConditioning:
    """Encode the AND parts of each prompt."""
    batch = []
    for prompt in prompts:
        parts = split_and(prompt)
        texts = SdConditioning([text for text, _ in parts], copy_from=prompts)
        schedules = get_learned_conditioning(model, texts, steps)
        batch.append(
            [
                ComposableScheduledPromptConditioning(schedule, weight)
                for schedule, (_, weight) in zip(schedules, parts, strict=True)
            ]
        )
    return MulticondLearnedConditioning((len(prompts),), batch)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Stack rows; a shorter context is brought to the longest by repeating its last token, as the hosts do."""
    if tensors[0].ndim == 1:
        return torch.stack(tensors)
    longest = max(t.shape[0] for t in tensors)
    return torch.stack([torch.cat([t, t[-1:].expand(longest - t.shape[0], -1)]) for t in tensors])


def _stack_conds(conds: Sequence[Cond]) -> torch.Tensor | DictWithShape:
    first = conds[0]
    if isinstance(first, dict):
        return DictWithShape({k: _stack([c[k] for c in conds if isinstance(c, dict)]) for k in first})
    return _stack([c for c in conds if isinstance(c, torch.Tensor)])


Composition = list[list[tuple[int, float]]]
"""Per picture, the rows of its AND parts and their weights."""


def reconstruct_multicond_batch(
    c: MulticondLearnedConditioning, current_step: int
) -> tuple[Composition, torch.Tensor | DictWithShape]:
    """Rows of all AND parts, picture by picture, and which rows belong to which picture."""
    conds: list[Cond] = []
    composition: Composition = []
    for parts in c.batch:
        composition.append([(len(conds) + i, part.weight) for i, part in enumerate(parts)])
        conds += [part.schedules[0].cond for part in parts]
    return composition, _stack_conds(conds)


def reconstruct_cond_batch(
    c: list[list[ScheduledPromptConditioning]], current_step: int
) -> torch.Tensor | DictWithShape:
    """One row per picture."""
    return _stack_conds([schedules[0].cond for schedules in c])

"""Telling cond from uncond by the text itself, for UNet calls that a step's own list of rows doesn't account for.

Self-attention guidance sends the uncond text through the UNet once more and calls it cond; other extensions send
parts of a step again. Only calls that may be such are compared, since each comparison costs one read of the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import IPAdapterError
from .rows import COND, UNCOND

TOLERANCE = 1e-2
"""Share of a token's largest value by which equal texts may differ: the host may have cast them to half precision."""


def step_texts(params: Any) -> dict[int, Tensor]:
    """The texts that a host's denoiser callback tells, by role: ``[rows, M, C]``. SDXL's come in dictionaries."""
    given = {COND: params.text_cond, UNCOND: params.text_uncond}
    return {
        role: text["crossattn"] if isinstance(text, dict) else text for role, text in given.items() if text is not None
    }


def _sampler(params: Any) -> Any:
    return getattr(getattr(params, "denoiser", None), "sampler", None)


def known_parts(params: Any) -> tuple[int, ...]:
    """Of each item of the batch, how many parts its prompt has (AND); empty where a sampler doesn't say."""
    cond: Any = getattr(_sampler(params), "sampler_extra_args", {}).get("cond")
    return tuple(len(parts) for parts in cond.batch) if hasattr(cond, "batch") else ()


def parts_of_items(params: Any) -> tuple[int, ...]:
    """The same; where a sampler doesn't say, as many for each as the step's texts make it."""
    known = known_parts(params)
    if known:
        return known
    texts = {role: int(text.shape[0]) for role, text in step_texts(params).items()}
    items = texts.get(UNCOND, texts[COND])
    return (texts[COND] // items,) * items


def roles_by_text(given: Tensor, texts: Mapping[int, Tensor], labels: Sequence[int] = ()) -> tuple[int, ...]:
    """The role of every row of a UNet call.

    Args:
        given: ``[R, M, C]``, the call's text, or what one projection makes of it.
        texts: the step's texts by role, ``[rows, m, C]``, treated the same. Where the lengths differ, what they have
            in common is compared: hosts repeat or pad at the end.
        labels: what to believe of each row where prompt and negative prompt are the same.

    Raises:
        IPAdapterError: if a row has neither text, or both and no label.
    """
    same = torch.stack([_has_one_of(given, text) for text in texts.values()]).tolist() if texts else []
    found = []
    for row in range(given.shape[0]):
        of_row = [role for role, matches in zip(texts, same, strict=True) if matches[row]]
        if len(of_row) > 1 and not labels:
            raise IPAdapterError(
                "The UNet is called beyond the step's own calls, and prompt and negative prompt are the same, so it "
                "can't be told whether it is cond: write something else into one of them, or switch off the extension "
                "that does so, or IP-Adapter."
            )
        if not of_row:
            raise IPAdapterError(
                "The UNet is called beyond the step's own calls, with a text that is neither the prompt nor the "
                "negative prompt, so it can't be told whether it is cond: switch off the extension that does so, or "
                "IP-Adapter."
            )
        found.append(labels[row] if len(of_row) > 1 else of_row[0])
    return tuple(found)


def _has_one_of(given: Tensor, known: Tensor) -> Tensor:
    """For every row of ``given`` whether it is one of ``known``'s, ``[R]``."""
    tokens = min(given.shape[1], known.shape[1])
    a, b = given[:, :tokens].float(), known[:, :tokens].to(given.device).float()
    distance = (a[:, None] - b[None]).abs().amax(dim=3)
    return (distance <= TOLERANCE * b.abs().amax(dim=2)).all(dim=2).any(dim=1)

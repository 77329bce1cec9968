"""How the rows of cond and uncond become calls of the UNet, by the rules of the Forge line and of A1111."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .prompts import Composition, DictWithShape

COND, UNCOND = 0, 1
LONGEST_REPEAT = 4
"""Contexts are brought to one length by repeating, unless the shorter would repeat more often than this."""

Conds = torch.Tensor | DictWithShape
Denoise = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Chunk:
    """One row per picture of the batch, all of one role."""

    role: int
    strength: float
    context: torch.Tensor
    vector: torch.Tensor | None


def _rows(conds: Conds, index: Sequence[int] | slice) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(conds, DictWithShape):
        return conds["crossattn"][index], conds["vector"][index]
    assert isinstance(conds, torch.Tensor)
    return conds[index], None


def cond_chunks(cond: Conds, composition: Composition) -> list[Chunk]:
    """One chunk per AND part. Pictures with fewer parts cut the others' lists short, as on the hosts."""
    chunks = []
    for parts in zip(*composition, strict=False):
        context, vector = _rows(cond, [row for row, _ in parts])
        chunks.append(Chunk(COND, parts[-1][1], context, vector))
    return chunks


def uncond_chunk(uncond: Conds) -> Chunk:
    return Chunk(UNCOND, 1.0, *_rows(uncond, slice(None)))


def can_join(a: Chunk, b: Chunk) -> bool:
    """Whether two chunks may share a call: their contexts have, or can be repeated to, one length."""
    shorter, length = sorted((a.context.shape[1], b.context.shape[1]))
    return math.lcm(shorter, length) // shorter <= LONGEST_REPEAT


def forge_calls(chunks: Sequence[Chunk], split: bool) -> list[list[Chunk]]:
    """Group chunks (cond first, then uncond) into calls; within a call they stand in reverse. ``split``: one each."""
    waiting = list(chunks)
    calls = []
    while waiting:
        call = [c for c in waiting if can_join(c, waiting[0])][::-1]
        if split:
            call = call[:1]
        waiting = [c for c in waiting if all(c is not taken for taken in call)]
        calls.append(call)
    return calls


def join_contexts(contexts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack contexts ``[rows, tokens, width]``, each repeated whole to the least common multiple of the lengths."""
    length = math.lcm(*(c.shape[1] for c in contexts))
    return torch.cat([c.repeat(1, length // c.shape[1], 1) for c in contexts])


def _transformer_options(model_options: dict[str, Any], roles: list[int], timestep: torch.Tensor) -> dict[str, Any]:
    """The host's per-call options: one entry of ``cond_or_uncond`` per chunk of ``len(timestep)`` rows."""
    size = timestep.shape[0]
    rows = [role for role in roles for _ in range(size)]
    options = dict(model_options.get("transformer_options", {}))
    options["cond_or_uncond"] = list(roles)
    options["sigmas"] = timestep
    options["cond_mark"] = torch.tensor(rows, dtype=timestep.dtype, device=timestep.device)
    options["cond_indices"] = [i for i, role in enumerate(rows) if role == COND]
    options["uncond_indices"] = [i for i, role in enumerate(rows) if role == UNCOND]
    return options


def _call(
    model: Any,
    model_options: dict[str, Any],
    x: torch.Tensor,
    sigma: torch.Tensor,
    context: torch.Tensor,
    vector: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    c: dict[str, Any] = {"c_crossattn": context, "transformer_options": options}
    if vector is not None:
        c["y"] = vector
    wrapper = model_options.get("model_function_wrapper")
    if wrapper is not None:
        args = {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": options["cond_or_uncond"]}
        wrapped: torch.Tensor = wrapper(model.apply_model, args)
        return wrapped
    out: torch.Tensor = model.apply_model(x, sigma, **c)
    return out


def denoise_forge(
    model: Any,
    x: torch.Tensor,
    sigma: torch.Tensor,
    chunks: Sequence[Chunk],
    model_options: dict[str, Any],
    split: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Denoised latents by cond (weighted mean of the AND parts) and by uncond (zeros without any), Forge's way."""
    sums = [torch.zeros_like(x), torch.zeros_like(x)]
    weights = [0.0, 0.0]
    for call in forge_calls(chunks, split):
        context = join_contexts([c.context for c in call])
        vectors = [c.vector for c in call if c.vector is not None]
        out = _call(
            model,
            model_options,
            torch.cat([x] * len(call)),
            torch.cat([sigma] * len(call)),
            context,
            torch.cat(vectors) if vectors else None,
            _transformer_options(model_options, [c.role for c in call], sigma),
        )
        for chunk, part in zip(call, out.chunk(len(call)), strict=True):
            sums[chunk.role] += part * chunk.strength
            weights[chunk.role] += chunk.strength
    cond, uncond = (total / (weight or 1.0) for total, weight in zip(sums, weights, strict=True))
    return cond, uncond


def a1111_spans(n_cond: int, n_uncond: int, batch: int, same_length: bool, split: bool) -> list[tuple[int, int]]:
    """Rows of each call, A1111's way: rows are ``c.. u..`` and are used up in that order.

    One call for all; with ``split`` calls of ``batch`` rows; contexts of unequal length: cond in calls of
    ``2 * batch`` rows (``batch`` with ``split``), then all uncond rows in one.
    """
    total = n_cond + n_uncond
    if same_length:
        step = batch if split else total
        return [(a, min(a + step, total)) for a in range(0, total, step)]
    step = batch if split else 2 * batch
    spans = [(a, min(a + step, n_cond)) for a in range(0, n_cond, step)]
    return spans + ([(n_cond, total)] if n_uncond else [])


def denoise_a1111(
    model: Any,
    x: torch.Tensor,
    sigma: torch.Tensor,
    cond: Conds,
    uncond: Conds | None,
    model_options: dict[str, Any],
    split: bool,
) -> torch.Tensor:
    """Denoised latents of every row, cond rows first. ``x`` and ``sigma`` have one entry per row already.

    A call whose rows aren't whole chunks of the batch is described row by row: ``sigmas`` of length 1 and one
    entry of ``cond_or_uncond`` per row.
    """
    c, c_vector = _rows(cond, slice(None))
    n_cond = c.shape[0]
    u, u_vector = (c[:0], None) if uncond is None else _rows(uncond, slice(None))
    n_uncond = u.shape[0]
    batch = x.shape[0] - n_cond or n_cond
    outputs = []
    same_length = not n_uncond or c.shape[1] == u.shape[1]
    for a, b in a1111_spans(n_cond, n_uncond, batch, same_length, split):
        contexts = [t for t in (c[a:b], u[max(a - n_cond, 0) : max(b - n_cond, 0)]) if t.shape[0]]
        vectors = None
        if c_vector is not None:
            vectors = c_vector if u_vector is None else torch.cat([c_vector, u_vector])
            vectors = vectors[a:b]
        options = _transformer_options(
            model_options, [COND if i < n_cond else UNCOND for i in range(a, b)], sigma[a : a + 1]
        )
        outputs.append(_call(model, model_options, x[a:b], sigma[a:b], torch.cat(contexts), vectors, options))
    return torch.cat(outputs)

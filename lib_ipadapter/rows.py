"""Which rows of a UNet call are cond, which uncond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import IPAdapterError
from .progress import Progress

COND, UNCOND = 0, 1
OTHER = 2
"""A row that another extension added as padding: it gets no image tokens."""


@dataclass(frozen=True)
class Call:
    """What the host knows of one UNet call."""

    roles: tuple[int, ...]
    """``COND``, ``UNCOND`` or ``OTHER`` for every row of the batch."""
    progress: Progress
    """0…1 along the noise schedule."""
    text_tokens: Mapping[int, int] | None = None
    """Text tokens that a role really has, where the host repeats shorter prompts; None: nothing is repeated."""
    executed: float | None = None
    """The share of the pass's UNet calls made before, 0…1; None: the host doesn't say."""
    items: tuple[int, ...] | None = None
    """Which item of the batch every row belongs to; None: nobody asked, or it can't be told."""
    latent: tuple[int, int] | None = None
    """Rows and columns of the latent that the UNet was called with; None: the host doesn't say."""
    tiles: int = 1
    """How many times the rows of the sampler's chunks there are; more than once in tiled calls."""


def roles_of_rows(
    cond_or_uncond: Sequence[int], images: int, rows: int, unet_rows: int | None = None
) -> tuple[int, ...]:
    """The role of every row on hosts that lay rows out chunk by chunk.

    Args:
        cond_or_uncond: the role of each chunk (0 cond, 1 uncond).
        images: rows in a chunk.
        rows: rows that the layer sees.
        unet_rows: rows that the UNet was called with; None: the same.

    Returns:
        ``rows`` roles. A UNet call with several times the rows of the chunks is a tiled one, which repeats them all.
        A layer with more rows than its UNet call has cond chunks that a regional-prompt extension expanded by one
        factor, and at most one padding row at the end.

    Raises:
        IPAdapterError: when neither explains the number of rows.
    """
    base = tuple(role for role in cond_or_uncond for _ in range(images))
    unet_rows = rows if unet_rows is None else unet_rows
    if base and rows == unet_rows and rows % len(base) == 0:
        return base * (rows // len(base))
    cond = base.count(COND)
    uncond = len(base) - cond
    if cond and unet_rows == len(base) < rows:
        factor, padding = divmod(rows - uncond, cond)
        if padding <= min(1, cond + uncond - 1):
            expanded = (role for role in cond_or_uncond for _ in range(images * (factor if role == COND else 1)))
            return (*expanded, *(OTHER,) * padding)
    raise IPAdapterError(
        f"A cross-attention layer sees {rows} rows where the sampler sent {len(base)} "
        f"({list(cond_or_uncond)} x {images}), so it can't be told which of them are cond: "
        "switch off the extension that changes the batch, or IP-Adapter."
    )


def items_of_rows(
    cond_or_uncond: Sequence[int], images: int, rows: int, unet_rows: int | None = None
) -> tuple[int, ...] | None:
    """The item of the batch that every row belongs to, on hosts that lay rows out chunk by chunk.

    Args:
        cond_or_uncond, images, rows, unet_rows: see :func:`roles_of_rows`.

    Returns:
        ``rows`` items; None where another extension has put rows between them.
    """
    base = tuple(range(images)) * len(cond_or_uncond)
    if images == 1:
        return (0,) * rows
    known = bool(base) and rows == (unet_rows or rows) and rows % len(base) == 0
    return base * (rows // len(base)) if known else None


def items_in_order(roles: Sequence[int], parts: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The items of a step's rows of each role, on hosts that lay rows out picture by picture.

    Args:
        roles: those that have rows.
        parts: of each item, how many rows its prompt has (AND); its negative prompt has one.
    """
    cond = tuple(item for item, count in enumerate(parts) for _ in range(count))
    return {role: cond if role == COND else tuple(range(len(parts))) for role in roles}

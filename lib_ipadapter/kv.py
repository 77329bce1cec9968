"""From image tokens to the keys and values of every cross-attention layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import IPAdapterError
from .packing import as_one

MAX_INDEX = 4096
"""Layer numbers above this appear in no adapter; searching so far finds any numbering, odd or even."""


def in_order(keys: Iterable[str]) -> list[str]:
    """Those of ``keys`` that are ``{i}.to_k_ip.weight`` and ``{i}.to_v_ip.weight``, in numeric order, K first.

    Raises:
        IPAdapterError: if a layer has only one of the two.
    """
    there = set(keys)
    ordered: list[str] = []
    for i in range(MAX_INDEX):
        found = [key for key in (f"{i}.to_{kind}_ip.weight" for kind in "kv") if key in there]
        if len(found) == 1:
            raise IPAdapterError(
                f"Adapter layer {i} has only one of to_k_ip and to_v_ip; both are needed: download the file again."
            )
        ordered += found
    return ordered


CHUNK = 32 * 2**20
"""Bytes of weights that are brought to where the tokens are at once, or one matrix if that is larger."""


class To_KV(nn.Module):
    """The adapter's own ``to_k`` and ``to_v`` of every cross-attention layer: K of layer i at 2i, V at 2i + 1.

    Those of one width lie together as ``[how many, layer width, context width]``, so that a picture takes a few large
    matrix products; SDXL has 140 small ones. They stay in host memory as the file has them and go to the tokens' device
    and dtype a chunk at a time, each for one product: nowhere is a second copy of all.

    Args:
        cross_attention_dim: width of the image tokens.
    """

    def __init__(self, cross_attention_dim: int) -> None:
        super().__init__()
        self.context_width = cross_attention_dim
        self._weights: list[Tensor] = []
        self._numbers: list[list[int]] = []
        """Of each of them: which K and V it makes."""

    def load_state_dict_ordered(self, sd: Mapping[str, Tensor]) -> None:
        """Takes ``{i}.to_k_ip.weight`` and ``{i}.to_v_ip.weight`` (``[layer width, context width]``) in numeric order.

        The file decides how many layers there are and how wide each is. Weights that lie side by side in memory, as
        ``tensorfile`` reads them, aren't copied.

        Raises:
            IPAdapterError: if a layer has only one of its two weights, or there is none at all.
        """
        weights = [sd[key] for key in in_order(sd)]
        if not weights:
            raise IPAdapterError(
                "The file has no to_k_ip and to_v_ip weights, so it isn't an IP-Adapter; choose an IP-Adapter file."
            )
        numbers: dict[torch.Size, list[int]] = {}
        for number, weight in enumerate(weights):
            numbers.setdefault(weight.shape, []).append(number)
        self._numbers = list(numbers.values())
        self.context_width = int(weights[0].shape[1])
        self._weights = [as_one(_of_one_dtype([weights[n] for n in each])) for each in self._numbers]

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every K and V, in order."""
        found = {
            number: int(weight.shape[1])
            for numbers, weight in zip(self._numbers, self._weights, strict=True)
            for number in numbers
        }
        return tuple(found[number] for number in range(len(found)))

    @property
    def to_kvs(self) -> nn.ModuleList:
        """Every one of them as a layer of its own, in order; the weights are views."""
        found: dict[int, nn.Linear] = {}
        for numbers, together in zip(self._numbers, self._weights, strict=True):
            for number, weight in zip(numbers, together, strict=True):
                found[number] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                found[number].weight = nn.Parameter(weight, requires_grad=False)
        return nn.ModuleList(found[number] for number in range(len(found)))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(weight.nbytes for weight in self._weights)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """``[B, T, context width]`` to ``[K_0, V_0, K_1, V_1, …]``, each ``[B, T, layer width]``."""
        return self.each([tokens])[0]

    def each(self, pictures: Sequence[Tensor]) -> list[list[Tensor]]:
        """:meth:`forward` of several tokens, each for itself, with the weights brought once."""
        made: list[dict[int, Tensor]] = [{} for _ in pictures]
        for numbers, weight in zip(self._numbers, self._weights, strict=True):
            at_once = min(len(weight), max(1, CHUNK // weight[0].nbytes))
            # One place for all chunks: new memory costs more than what is done with it.
            place = torch.empty((at_once, *weight.shape[1:]), device=pictures[0].device, dtype=pictures[0].dtype)
            for start in range(0, len(weight), at_once):
                some = weight[start : start + at_once]
                if some.dtype == torch.float64:  # MPS has none
                    some = some.to(place.dtype)
                brought = place[: len(some)].copy_(some)
                for tokens, found in zip(pictures, made, strict=True):
                    together = nn.functional.linear(tokens, brought.flatten(0, 1))
                    parts = together.view(*together.shape[:-1], *some.shape[:2]).unbind(-2)
                    found.update(zip(numbers[start : start + at_once], parts, strict=True))
        return [[found[number] for number in range(len(found))] for found in made]


def _of_one_dtype(weights: list[Tensor]) -> list[Tensor]:
    """As they are if theirs is one; else in float32, which holds all that adapters are stored in."""
    if len({weight.dtype for weight in weights}) == 1:
        return weights
    return [weight.float() for weight in weights]

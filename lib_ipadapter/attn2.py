"""The function that stands in a cross-attention layer on hosts with ``patches_replace``.

Such a host calls ``replacement(q, k, v, extra_options)`` between the layer's projections and its ``to_out``. Ours are
plain functions: hosts deep-copy their model options with every clone, which leaves a function alone but would copy an
object together with all its K/V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import IPAdapterError
from .injection import Injection
from .plan import Attention, LayeredPlan, Plan
from .rows import Call

ExtraOptions = Mapping[str, Any]
Replacement = Callable[[Tensor, Tensor, Tensor, ExtraOptions], Tensor]

Marker = Callable[[ExtraOptions], Any]
"""The object that carries the noise level of a UNet call; a new call has a new one."""
ReadCall = Callable[[Any, ExtraOptions, int, Tensor, Tensor], Call]
"""``(marker, extra_options, layer, q, k) -> Call``; may read the device, and is called once for each UNet call."""


class CurrentPlan:
    """The plan of the UNet call that is running, found out by its first layer and used by all.

    Args:
        injection: the units.
        marker, read_call: how the host tells what a UNet call is.
        first_layer: the layer (in the file's order) that the UNet runs first.
    """

    def __init__(self, injection: Injection, marker: Marker, read_call: ReadCall, first_layer: int) -> None:
        self.injection = injection
        self._marker_of = marker
        self._read_call = read_call
        self._first_layer = first_layer
        self._marker: Any = None
        self._shape: tuple[int, int, Sequence[int] | None] | None = None
        self._plan: Plan | LayeredPlan | None = None

    def get(self, layer: int, q: Tensor, k: Tensor, extra_options: ExtraOptions) -> Plan:
        """The plan for this layer's call. Other layers of one UNet call see the same marker, rows and text."""
        marker = self._marker_of(extra_options)
        shape = (q.shape[0], k.shape[1], extra_options.get("cond_or_uncond"))
        if self._plan is None or layer == self._first_layer or marker is not self._marker or shape != self._shape:
            call = self._read_call(marker, extra_options, layer, q, k)
            self._plan = self.injection.plan(call, k.shape[1], k.device, k.dtype)
            self._marker, self._shape = marker, shape
        return self._plan.at(layer)


def heads_of(extra_options: ExtraOptions) -> int:
    """Attention heads of the layer."""
    if "n_heads" not in extra_options:
        raise IPAdapterError(
            "The host doesn't say how many heads a cross-attention layer has (extra_options has no n_heads): "
            "use a WebUI of the supported versions."
        )
    return int(extra_options["n_heads"])


def make_replacement(
    layer: int, current: CurrentPlan, attention: Attention, previous: Replacement | None
) -> Replacement:
    """The replacement for one layer.

    Args:
        layer: index of the layer in the adapter file's order.
        current: shared by all layers.
        attention: the host's own attention.
        previous: what stood in this layer before; it is called in place of the host's attention.
    """

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra_options: ExtraOptions) -> Tensor:
        plan = current.get(layer, q, k, extra_options)
        replaced: Attention | None = None
        if previous is not None:
            replaced = lambda q, k, v, heads: previous(q, k, v, extra_options)  # noqa: E731
        heads = heads_of(extra_options)
        if plan.idle:
            return (replaced or attention)(q, k, v, heads)
        return plan.attend(layer, q, k, v, heads, attention, replaced)

    def watched(q: Tensor, k: Tensor, v: Tensor, extra_options: ExtraOptions) -> Tensor:
        out = replacement(q, k, v, extra_options)
        current.injection.see(layer, q, k, v, heads_of(extra_options))
        return out

    return replacement if current.injection.influence is None else watched

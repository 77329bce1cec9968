"""From image tokens to the keys and values of every cross-attention layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .errors import IPAdapterError
from .layers import SD_V12_CHANNELS, SD_XL_CHANNELS

MAX_INDEX = 4096
"""Layer numbers above this appear in no adapter; searching so far finds any numbering, odd or even."""


class To_KV(nn.Module):
    """The adapter's own ``to_k`` and ``to_v`` of every cross-attention layer: K of layer i at 2i, V at 2i + 1.

    Args:
        cross_attention_dim: width of the image tokens; 2048 makes SDXL's 70 layers, anything else SD1.x's 16.
    """

    def __init__(self, cross_attention_dim: int) -> None:
        super().__init__()
        channels = SD_XL_CHANNELS if cross_attention_dim == 2048 else SD_V12_CHANNELS
        self.to_kvs = nn.ModuleList(nn.Linear(cross_attention_dim, channel, bias=False) for channel in channels)

    def load_state_dict_ordered(self, sd: Mapping[str, Tensor]) -> None:
        """Takes ``{i}.to_k_ip.weight`` and ``{i}.to_v_ip.weight`` (``[layer width, context width]``) in numeric order.

        The file decides how many layers there are and how wide each is; the weights are not copied and not trained.

        Raises:
            IPAdapterError: if a layer has only one of its two weights, or there is none at all.
        """
        weights: list[Tensor] = []
        for i in range(MAX_INDEX):
            pair = [sd.get(f"{i}.to_{kind}_ip.weight") for kind in "kv"]
            found = [weight for weight in pair if weight is not None]
            if len(found) == 1:
                raise IPAdapterError(
                    f"Adapter layer {i} has only one of to_k_ip and to_v_ip; both are needed: download the file again."
                )
            weights += found
        if not weights:
            raise IPAdapterError(
                "The file has no to_k_ip and to_v_ip weights, so it isn't an IP-Adapter; choose an IP-Adapter file."
            )
        self.to_kvs = nn.ModuleList(_linear(weight) for weight in weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every K and V, in order."""
        return tuple(to.out_features for to in self.to_kvs if isinstance(to, nn.Linear))

    @property
    def context_width(self) -> int:
        """Width of the image tokens."""
        return next(to.in_features for to in self.to_kvs if isinstance(to, nn.Linear))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """``[B, T, context width]`` to ``[K_0, V_0, K_1, V_1, …]``, each ``[B, T, layer width]``."""
        return [to(tokens) for to in self.to_kvs]


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear

"""The functional core under its own names: load an adapter, turn a picture into K/V.

State lives in an :class:`Engine`; the module's functions use one default instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .clip_vision import CLIPVision, load_clip_vision
from .encoding import (
    LoadedAdapter,
    Runner,
    encode,
    image_kv,
    load_adapter,
    load_negative,
    resolve_uncond,
    run_here,
    token_kv,
    uncond_features,
)
from .errors import IPAdapterError
from .pictures import clip_preprocess, prepare, to_pixels


@dataclass
class _Entry:
    adapter: LoadedAdapter
    encoder_path: str
    unconds: list[Tensor] | None = None
    unconds_from: str | None = None
    """The negative that ``unconds`` were made from."""


@dataclass
class Engine:
    """Adapters, encoders and negatives by path, each read once.

    Args:
        run: where modules compute.
    """

    run: Runner = run_here
    encoders: dict[str, CLIPVision] = field(default_factory=dict)
    ip_adapters: dict[str, _Entry] = field(default_factory=dict)
    ip_negative: str | None = None
    """The negative that was named last."""

    def load_ip_adapter(
        self, clip_vision_path: str | None, ip_negative_path: str | None, ip_adapter_path: str | None
    ) -> None:
        """Loads an image encoder and an adapter that uses it; see :func:`load_ip_adapter`."""
        if clip_vision_path and clip_vision_path not in self.encoders:
            self.encoders[clip_vision_path] = load_clip_vision(clip_vision_path)
        if ip_negative_path:
            load_negative(ip_negative_path)
            self.ip_negative = ip_negative_path
        if not ip_adapter_path or ip_adapter_path in self.ip_adapters:
            return
        adapter = load_adapter(ip_adapter_path)
        candidates = [clip_vision_path] if clip_vision_path else list(self.encoders)
        fitting = [path for path in candidates if self._fits(adapter, self.encoders[path])]
        if not fitting:
            found = ", ".join(self.encoders[path].kind.name for path in candidates) or "none"
            raise IPAdapterError(
                f"{adapter.path.name} ({adapter.kind.description}) and the loaded image encoder ({found}) don't go "
                "together: load the encoder that the adapter needs."
            )
        self.ip_adapters[ip_adapter_path] = _Entry(adapter, fitting[-1])

    @staticmethod
    def _fits(adapter: LoadedAdapter, encoder: CLIPVision) -> bool:
        has = {"image_embeds": encoder.kind.projection, "penultimate": encoder.kind.width}
        return has[adapter.kind.output] == adapter.kind.embedding_width

    def preprocess(self, img: npt.NDArray[np.uint8], ip_adapter_path: str) -> tuple[list[Tensor], list[Tensor]]:
        """A picture's K/V and those of no picture; see :func:`preprocess`."""
        if ip_adapter_path not in self.ip_adapters:
            raise IPAdapterError(f"The adapter {ip_adapter_path} isn't loaded: call load_ip_adapter first.")
        if img.ndim != 3 or img.shape[2] != 3 or img.dtype != np.uint8:
            raise IPAdapterError(
                f"The picture has shape {img.shape} and type {img.dtype}; it must be [height, width, 3] of uint8."
            )
        entry = self.ip_adapters[ip_adapter_path]
        kind, encoder = entry.adapter.kind, self.encoders[entry.encoder_path]
        size = encoder.kind.image_size
        pixels = clip_preprocess(to_pixels([prepare(Image.fromarray(img), "squash", size)]), size)
        features = encode(self.run, encoder, kind.output, [pixels])
        (conds,) = image_kv(self.run, entry.adapter.model, features)
        if entry.unconds is None or entry.unconds_from != self.ip_negative:
            entry.unconds, entry.unconds_from = self._unconds(entry, encoder), self.ip_negative
        return conds, list(entry.unconds)

    def _unconds(self, entry: _Entry, encoder: CLIPVision) -> list[Tensor]:
        kind, model = entry.adapter.kind, entry.adapter.model
        if self.ip_negative is not None:
            return token_kv(self.run, model, load_negative(self.ip_negative, kind.context_width))
        source = resolve_uncond("auto", kind.variant)
        return image_kv(self.run, model, [uncond_features(self.run, source, kind, encoder)])[0]


_default = Engine()


def load_ip_adapter(clip_vision_path: str | None, ip_negative_path: str | None, ip_adapter_path: str | None) -> None:
    """Loads an image encoder, a negative and an adapter for :func:`preprocess`; what is loaded stays.

    Args:
        clip_vision_path: file of the image encoder; None: one loaded before.
        ip_negative_path: file with the image tokens of no picture, for every adapter from now on; None: the one named
            before, or what the adapter was trained with.
        ip_adapter_path: file of the adapter; None: only the encoder is loaded.

    Raises:
        IPAdapterError: for a file that is missing, broken or something else, or an encoder that doesn't fit.
    """
    _default.load_ip_adapter(clip_vision_path, ip_negative_path, ip_adapter_path)


def preprocess(img: npt.NDArray[np.uint8], ip_adapter_path: str) -> tuple[list[Tensor], list[Tensor]]:
    """A picture's K/V for every cross-attention layer, and those of no picture.

    Args:
        img: ``[height, width, 3]`` of uint8; anything but a square of the encoder's size is squashed to it.
        ip_adapter_path: as given to :func:`load_ip_adapter`.

    Returns:
        ``(ip_conds, ip_unconds)``, K of layer i at 2i and V at 2i + 1, ``[1, T, layer width]`` each, on the compute
        device.
    """
    with torch.no_grad():
        return _default.preprocess(img, ip_adapter_path)

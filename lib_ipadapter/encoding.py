"""The walk from pictures to K/V: image encoder, image projection, layer projections; and the same for uncond.

Nothing here runs during sampling. A :data:`Runner` decides where and in which precision a module computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from .adapter import IPAdapterModel
from .clip_vision import CLIPVision
from .errors import IPAdapterError
from .kv import in_order
from .pictures import clip_preprocess
from .recognise import AdapterKind, EncoderKind, recognise_adapter
from .tensorfile import TensorFile, TensorInfo, open_tensors

T = TypeVar("T")


class Runner(Protocol):
    """Runs something with a module on the compute device, under the host's memory rules."""

    def __call__(self, module: nn.Module, function: Callable[[torch.device, torch.dtype], T]) -> T:
        """Calls ``function(device, dtype)`` while ``module`` lies there; a host's frees the device again."""


def run_here(module: nn.Module, function: Callable[[torch.device, torch.dtype], T]) -> T:
    """The runner without a host: half precision on a GPU where there is one, float32 on the CPU."""
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.float16 if cuda else torch.float32
    module.to(device=device, dtype=dtype)
    with torch.no_grad():
        return function(device, dtype)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter file, read."""

    path: Path
    kind: AdapterKind
    model: IPAdapterModel


def load_adapter(path: str | os.PathLike[str]) -> LoadedAdapter:
    """Reads an adapter file into host memory.

    Raises:
        IPAdapterError: if the file can't be read or is no image-prompt adapter.
    """
    file = open_tensors(path)
    kind = recognise_adapter(file.tensors, file.path.name)
    groups: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    prefixes = {kind.image_proj_prefix: "image_proj", kind.ip_adapter_prefix: "ip_adapter"}
    wanted = [key for key in file.tensors if key.startswith(tuple(prefixes))]
    together = _by_shape(file, [kind.ip_adapter_prefix + key for key in in_order(_without(wanted, kind))])
    for key, tensor in file.read(wanted, together).items():
        prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
        groups[prefixes[prefix]][key.removeprefix(prefix)] = tensor
    try:
        model = IPAdapterModel(
            groups,
            plus=kind.variant == "plus",
            cross_attention_dim=kind.context_width,
            clip_embeddings_dim=kind.embedding_width,
            clip_extra_context_tokens=kind.tokens,
            sdxl_plus=kind.variant == "plus" and kind.family == "sdxl",
        )
    except RuntimeError as error:  # what load_state_dict raises; its text lists every key on lines of their own
        reason = " ".join(str(error).split())
        raise IPAdapterError(
            f"{file.path.name} looks like {kind.description}, but its image projection doesn't load ({reason[:300]}): "
            "download the file again."
        ) from error
    return LoadedAdapter(file.path, kind, model)


def _without(keys: Iterable[str], kind: AdapterKind) -> list[str]:
    """Keys of the layers' projections, without the group's prefix."""
    prefix = kind.ip_adapter_prefix
    return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]


def _by_shape(file: TensorFile, keys: Iterable[str]) -> list[list[str]]:
    found: dict[TensorInfo, list[str]] = {}
    for key in keys:
        found.setdefault(file.tensors[key], []).append(key)
    return list(found.values())


PENULTIMATE = "penultimate"
"""The encoder's output that some adapters take; the others take ``image_embeds``."""


def encode(run: Runner, encoder: CLIPVision, output: str, pictures: Sequence[Tensor]) -> list[Tensor]:
    """What the encoder says of batches of pictures, each one forward; in float32 in host memory.

    Args:
        output: ``image_embeds`` (results ``[B, projection]``) or ``penultimate`` (``[B, tokens, width]``).
        pictures: normalised pixels, ``[B, 3, S, S]`` each.
    """

    def see(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        there = [pixels.to(device=device, dtype=dtype) for pixels in pictures]
        if output == PENULTIMATE:
            made = encoder.penultimates(there)
        else:
            made = [each.image_embeds for each in encoder.each(there)]
        return [each.float().cpu() for each in made]

    return _finite(run, encoder, see) if pictures else []


def image_kv(run: Runner, adapter: IPAdapterModel, features: Sequence[Tensor]) -> list[list[Tensor]]:
    """Features of batches of pictures to ``[K_0, V_0, …]`` each, ``[B, T, layer width]``, on the compute device."""

    def project(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        tokens = [adapter.image_proj_model(one.to(device=device, dtype=dtype)) for one in features]
        return [pair for pairs in adapter.ip_layers.each(tokens) for pair in pairs]

    made = _finite(run, adapter, project)
    layers = len(adapter.ip_layers.widths)
    return [made[n : n + layers] for n in range(0, len(made), layers)]


HALF_MAX = torch.finfo(torch.float16).max


def _finite(
    run: Runner, module: nn.Module, function: Callable[[torch.device, torch.dtype], list[Tensor]]
) -> list[Tensor]:
    """``function`` in the host's precision; in float32 if something in it is too large for that one.

    Raises:
        IPAdapterError: if it isn't a number even then.
    """

    def safely(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        made = function(device, dtype)
        if _all_finite(made):
            return made
        if dtype != torch.float32:
            module.float()
            # What the UNet can't hold either becomes the largest that it can.
            made = [t.clamp(-HALF_MAX, HALF_MAX) for t in function(device, torch.float32)]
        if not _all_finite(made):
            what = "image encoder" if isinstance(module, CLIPVision) else "adapter"
            raise IPAdapterError(
                f"The {what} makes numbers of the picture that are infinite or none, and must be finite: its file is "
                "damaged, download it again."
            )
        return made

    return run(module, safely)


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())  # one wait for the device


def token_kv(run: Runner, adapter: IPAdapterModel, tokens: Tensor) -> list[Tensor]:
    """Ready image tokens ``[1, T, context width]`` to K/V, as a negative file has them."""
    return run(adapter, lambda device, dtype: list(adapter.ip_layers(tokens.to(dtype).to(device))))


UNCOND_BY_VARIANT: Mapping[str, str] = {"base": "zero embeds", "plus": "zero pixels", "full-face": "zero pixels"}
"""What ``auto`` means: what each adapter was trained with (arXiv 2308.06721 and its public code)."""


def resolve_uncond(source: str, variant: str) -> str:
    """The uncond source that ``auto`` means for an adapter variant, or the one named.

    "auto black" is ``auto`` with a black picture in place of zero pixels, which is what ComfyUI and Forge give.
    """
    if source not in ("auto", AUTO_BLACK):
        return source
    trained = UNCOND_BY_VARIANT[variant]
    return "black picture" if source == AUTO_BLACK and trained == "zero pixels" else trained


def uncond_features(run: Runner, source: str, kind: AdapterKind, encoder: CLIPVision) -> Tensor:
    """The features that stand for no picture, one row; see :data:`UNCOND_BY_VARIANT` and ``units``.

    Args:
        source: ``zero embeds``, ``zero pixels`` or ``black picture``.
    """
    if source == ZERO_EMBEDS:
        return zero_embeds(kind, encoder.kind)
    return encode(run, encoder, kind.output, [uncond_pixels(source, encoder.kind.image_size)])[0]


AUTO_BLACK = "auto black"
ZERO_EMBEDS = "zero embeds"
"""The uncond source that isn't a picture."""


def zero_embeds(kind: AdapterKind, encoder: EncoderKind) -> Tensor:
    """Features of zeros, one row."""
    patches = (encoder.image_size // encoder.patch) ** 2 + 1
    return torch.zeros(
        (1, kind.embedding_width) if kind.output == "image_embeds" else (1, patches, kind.embedding_width)
    )


def uncond_pixels(source: str, size: int) -> Tensor:
    """The picture that stands for none, ``[1, 3, size, size]``.

    Args:
        source: ``zero pixels`` (zeros after normalisation, a mean grey) or ``black picture``.
    """
    if source == "zero pixels":
        return torch.zeros(1, 3, size, size)
    if source == "black picture":
        return clip_preprocess(torch.zeros(1, size, size, 3), size)
    raise IPAdapterError(
        f"The uncond source is {source!r}; it can be auto, auto black, zero pixels, zero embeds, black picture, none "
        "or file."
    )


NEGATIVE_KEY = "data"


def load_negative(path: str | os.PathLike[str], context_width: int | None = None) -> Tensor:
    """The image tokens ``[1, T, context width]`` of a negative file (one tensor named ``data``).

    Raises:
        IPAdapterError: if the file isn't one, or is made for another context width than the one given.
    """
    file = open_tensors(path)
    info = file.tensors.get(NEGATIVE_KEY)
    if info is None or len(info.shape) != 3 or info.shape[0] != 1 or info.shape[1] < 1:
        raise IPAdapterError(
            f"{file.path.name} is no negative file: it must hold one tensor named 'data' of shape [1, tokens, width]."
        )
    if context_width is not None and info.shape[2] != context_width:
        raise IPAdapterError(
            f"The negative file {file.path.name} has image tokens {info.shape[2]} wide and the adapter takes "
            f"{context_width}: use it with an adapter of that width, or choose another uncond source."
        )
    return file.read([NEGATIVE_KEY])[NEGATIVE_KEY]

"""The image encoder: CLIP's vision transformer in plain torch, from the files that the public encoders come in.

The model is Radford et al. 2021 (arXiv 2103.00020, §2.4), a ViT (Dosovitskiy et al. 2020, arXiv 2010.11929) with a norm
before its blocks. Adapters use one of two outputs: the projected embedding, or the states that enter the last block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import IPAdapterError
from .recognise import EncoderKind, recognise_encoder
from .resident import Resident
from .tensorfile import open_tensors

NORM_EPS = 1e-5


class VisionOutput(NamedTuple):
    """What the encoder says of B pictures."""

    image_embeds: Tensor
    """``[B, projection]``: the class token after the last block, normed and projected; not scaled to length 1."""
    penultimate: Tensor
    """``[B, 1 + patches, width]``: all tokens as they enter the last block, without the final norm."""


def _quick_gelu(x: Tensor) -> Tensor:
    """The approximation that OpenAI's CLIP was trained with; other towers were trained with the exact GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": _quick_gelu}
"""Activation of the feed-forward by its name in ``EncoderKind``."""


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, kind: EncoderKind) -> None:
        super().__init__()
        self.heads = kind.heads
        self.activation = ACTIVATIONS[kind.activation]
        self.norm_1 = nn.LayerNorm(kind.width, eps=NORM_EPS)
        self.q = nn.Linear(kind.width, kind.width)
        self.k = nn.Linear(kind.width, kind.width)
        self.v = nn.Linear(kind.width, kind.width)
        self.out = nn.Linear(kind.width, kind.width)
        self.norm_2 = nn.LayerNorm(kind.width, eps=NORM_EPS)
        self.fc_1 = nn.Linear(kind.width, kind.mlp_width)
        self.fc_2 = nn.Linear(kind.mlp_width, kind.width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_1(x)
        q, k, v = (to(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.fc_2(self.activation(self.fc_1(self.norm_2(x))))
        return out


class CLIPVision(nn.Module):
    """A vision tower with its projection.

    Its blocks stay in host memory as their file has them, and come one by one to where the rest of it is, in its dtype.

    Args:
        kind: sizes and activation. Weights come from :meth:`from_tensors` or :func:`load_clip_vision`.
    """

    def __init__(self, kind: EncoderKind) -> None:
        super().__init__()
        self.kind = kind
        patches = (kind.image_size // kind.patch) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(kind.width))
        self.patch_embedding = nn.Conv2d(3, kind.width, kernel_size=kind.patch, stride=kind.patch, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1 + patches, kind.width))
        self.norm_in = nn.LayerNorm(kind.width, eps=NORM_EPS)
        self.blocks = Resident(_Block(kind) for _ in range(kind.layers))
        self.norm_out = nn.LayerNorm(kind.width, eps=NORM_EPS)
        self.projection = nn.Linear(kind.width, kind.projection, bias=False)

    @classmethod
    def from_tensors(cls, kind: EncoderKind, tensors: Mapping[str, Tensor], name: str) -> CLIPVision:
        """A tower with the weights of ``tensors``, which it shares; in evaluation mode and frozen.

        Args:
            kind: sizes, and the layout and prefix of the keys. Keys that the tower doesn't need are passed over.
            tensors: weights under the names of their file. If their dtypes differ, the widest is taken.
            name: of the file, for errors.

        Raises:
            IPAdapterError: for a tensor that is missing or has another shape or type than a tower of this kind.
        """
        return _filled(*_empty(kind, tensors, name), tensors)

    def forward(self, pixels: Tensor) -> VisionOutput:
        """Normalised pixels ``[B, 3, S, S]`` to both outputs, in the dtype of the weights.

        Raises:
            IPAdapterError: if S isn't the tower's ``image_size``.
        """
        return self.each([pixels])[0]

    def each(self, batches: Sequence[Tensor]) -> list[VisionOutput]:
        """:meth:`forward` of several batches, each for itself, with the blocks brought once."""
        return [
            VisionOutput(self.projection(self.norm_out(last[:, 0])), penultimate)
            for penultimate, last in self._states(batches, self.kind.layers)
        ]

    def penultimates(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The second output alone, which needs no last block, of several batches as in :meth:`each`."""
        return [state for state, _ in self._states(batches, self.kind.layers - 1)]

    def _states(self, batches: Sequence[Tensor], blocks: int) -> list[tuple[Tensor, Tensor]]:
        """Of each batch the states that enter the last block, and those that leave the last of ``blocks``."""
        size = self.kind.image_size
        for pixels in batches:
            if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
                raise IPAdapterError(
                    f"The pixels for {self.kind.name} have the shape {list(pixels.shape)}; it takes [pictures, 3, "
                    f"{size}, {size}]: prepare the picture for this image encoder."
                )
        states = penultimate = [self._embedded(pixels) for pixels in batches]
        weight = self.patch_embedding.weight
        for n, block in enumerate(self.blocks.brought(blocks, weight.device, weight.dtype), 1):
            states = [block(x) for x in states]
            if n == self.kind.layers - 1:
                penultimate = states
        return list(zip(penultimate, states, strict=True))

    def _embedded(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(x.shape[0], 1, -1), x), dim=1)
        embedded: Tensor = self.norm_in(x + self.position_embedding)
        return embedded


def load_clip_vision(path: str | os.PathLike[str]) -> CLIPVision:
    """Reads an image encoder into host memory, in the dtype of its file; a text tower beside it isn't read.

    Raises:
        IPAdapterError: if the file can't be read, is no CLIP image encoder, or is damaged.
    """
    file = open_tensors(path)
    kind = recognise_encoder(file.tensors, file.path.name)
    tower, sources = _empty(kind, file.tensors, file.path.name)  # what is wrong shows before gigabytes are read
    return _filled(tower, sources, file.read({source.key for source in sources.values()}))


# From a file's names to ours


@dataclass(frozen=True)
class _Source:
    """Where a parameter is in a file.

    ``part``: which third of the rows, in a tensor that holds query, key and value; ``transposed``: as stored.
    """

    key: str
    part: int | None = None
    transposed: bool = False

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the file's tensor for a parameter of this ``shape``."""
        if self.part is not None:
            return (3 * shape[0], *shape[1:])
        return shape[::-1] if self.transposed else shape

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter in the file's ``tensor``."""
        if self.part is not None:
            return tensor.chunk(3)[self.part]
        return tensor.t().contiguous() if self.transposed else tensor


@dataclass(frozen=True)
class _Layout:
    """Names of one file layout by ours; ``{p}`` is weight and bias, ``{n}`` the number of the block."""

    tower: Mapping[str, _Source]
    block: Mapping[str, _Source]


LAYOUTS: Mapping[str, _Layout] = {
    "hf": _Layout(
        tower={
            "class_embedding": _Source("vision_model.embeddings.class_embedding"),
            "patch_embedding.weight": _Source("vision_model.embeddings.patch_embedding.weight"),
            "position_embedding": _Source("vision_model.embeddings.position_embedding.weight"),
            "norm_in.{p}": _Source("vision_model.pre_layrnorm.{p}"),  # spelt like this in every file
            "norm_out.{p}": _Source("vision_model.post_layernorm.{p}"),
            "projection.weight": _Source("visual_projection.weight"),
        },
        block={
            "norm_1.{p}": _Source("vision_model.encoder.layers.{n}.layer_norm1.{p}"),
            "q.{p}": _Source("vision_model.encoder.layers.{n}.self_attn.q_proj.{p}"),
            "k.{p}": _Source("vision_model.encoder.layers.{n}.self_attn.k_proj.{p}"),
            "v.{p}": _Source("vision_model.encoder.layers.{n}.self_attn.v_proj.{p}"),
            "out.{p}": _Source("vision_model.encoder.layers.{n}.self_attn.out_proj.{p}"),
            "norm_2.{p}": _Source("vision_model.encoder.layers.{n}.layer_norm2.{p}"),
            "fc_1.{p}": _Source("vision_model.encoder.layers.{n}.mlp.fc1.{p}"),
            "fc_2.{p}": _Source("vision_model.encoder.layers.{n}.mlp.fc2.{p}"),
        },
    ),
    "openclip": _Layout(
        tower={
            "class_embedding": _Source("visual.class_embedding"),
            "patch_embedding.weight": _Source("visual.conv1.weight"),
            "position_embedding": _Source("visual.positional_embedding"),
            "norm_in.{p}": _Source("visual.ln_pre.{p}"),
            "norm_out.{p}": _Source("visual.ln_post.{p}"),
            "projection.weight": _Source("visual.proj", transposed=True),
        },
        block={
            "norm_1.{p}": _Source("visual.transformer.resblocks.{n}.ln_1.{p}"),
            "q.{p}": _Source("visual.transformer.resblocks.{n}.attn.in_proj_{p}", part=0),
            "k.{p}": _Source("visual.transformer.resblocks.{n}.attn.in_proj_{p}", part=1),
            "v.{p}": _Source("visual.transformer.resblocks.{n}.attn.in_proj_{p}", part=2),
            "out.{p}": _Source("visual.transformer.resblocks.{n}.attn.out_proj.{p}"),
            "norm_2.{p}": _Source("visual.transformer.resblocks.{n}.ln_2.{p}"),
            "fc_1.{p}": _Source("visual.transformer.resblocks.{n}.mlp.c_fc.{p}"),
            "fc_2.{p}": _Source("visual.transformer.resblocks.{n}.mlp.c_proj.{p}"),
        },
    ),
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What weights may be stored as."""


class _Stored(Protocol):
    """What a tensor and its entry in a file's header have in common."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...


def _sources(kind: EncoderKind) -> dict[str, _Source]:
    """Where every parameter of a tower of this kind is in its file, by our name."""
    layout = LAYOUTS[kind.layout]
    rows = dict(layout.tower)
    for n in range(kind.layers):
        for own, source in layout.block.items():
            rows[f"blocks.{n}.{own}"] = replace(source, key=source.key.replace("{n}", str(n)))
    return {
        own.replace("{p}", p): replace(source, key=kind.prefix + source.key.replace("{p}", p))
        for own, source in rows.items()
        for p in (("weight", "bias") if "{p}" in own else ("",))
    }


def _empty(kind: EncoderKind, stored: Mapping[str, _Stored], name: str) -> tuple[CLIPVision, dict[str, _Source]]:
    """A tower without weights, and where they are in a file that holds ``stored``, all of which fit."""
    # On the meta device nothing is allocated or initialised: the largest tower has 1.8 billion weights.
    with torch.device("meta"):
        tower = CLIPVision(kind)
    sources = _sources(kind)
    missing = sorted({source.key for source in sources.values()} - set(stored))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise IPAdapterError(
            f"The image encoder {name} ({kind.name}) lacks the tensor {missing[0]}{more}: the file is incomplete, "
            "download it again."
        )
    for own, parameter in tower.named_parameters():
        source = sources[own]
        found, needed = stored[source.key], source.stored(tuple(parameter.shape))
        if tuple(found.shape) != needed:
            raise IPAdapterError(
                f"The tensor {source.key} of the image encoder {name} has the shape {list(found.shape)}, and "
                f"{kind.name} needs {list(needed)}: the file is damaged or another encoder, download it again."
            )
        if found.dtype not in DTYPES:
            allowed = ", ".join(_dtype_name(dtype) for dtype in DTYPES)
            raise IPAdapterError(
                f"The tensor {source.key} of the image encoder {name} is stored as {_dtype_name(found.dtype)}, and "
                f"allowed are {allowed}: get the encoder in one of these."
            )
    return tower, sources


def _filled(tower: CLIPVision, sources: Mapping[str, _Source], tensors: Mapping[str, Tensor]) -> CLIPVision:
    """A tower of :func:`_empty` with its weights."""
    dtype = reduce(torch.promote_types, {tensors[source.key].dtype for source in sources.values()})
    state = {own: source.of(tensors[source.key]).to(dtype) for own, source in sources.items()}
    tower.load_state_dict(state, assign=True)
    return tower.requires_grad_(False).eval()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""What a model file is, told by the names and shapes of its tensors and by nothing else.

Public names: :func:`recognise_adapter`, :func:`recognise_encoder`, :func:`encoder_needed`, :data:`ENCODERS`,
:data:`ENCODER_FILES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .errors import IPAdapterError
from .foreign import (
    ADAPTER,
    ADVICE,
    FACE_ADVICE,
    IMAGE_ENCODER,
    OTHER_ADAPTERS,
    OTHER_FILES,
    TEXT_ENCODER,
    Foreign,
    first_match,
)
from .tensorfile import TensorInfo

Tensors = Mapping[str, TensorInfo]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class EncoderKind:
    """An image encoder: a CLIP vision tower.

    Attributes:
        name: as in :data:`ENCODERS`.
        width, layers, heads, patch, image_size, mlp_width: of the tower; ``image_size`` and ``patch`` in pixels.
        projection: width of the pooled image embedding.
        activation: ``gelu`` or ``quick_gelu``. No tensor tells, so it is the one that the public file of this size has.
        layout: ``hf`` (``vision_model.*`` and ``visual_projection.weight``) or ``openclip`` (``visual.*``).
        prefix: what stands before ``vision_model.``, ``visual_projection.`` or ``visual.`` in every tensor name, with
            its dot; mostly empty.
    """

    name: str
    width: int
    layers: int
    heads: int
    patch: int
    image_size: int
    projection: int
    activation: str
    mlp_width: int
    layout: str = "hf"
    prefix: str = ""

    @property
    def positions(self) -> int:
        """Tokens that the tower sees: one for every patch, and the class token."""
        return (self.image_size // self.patch) ** 2 + 1


DEMO = "demo ViT/14"

ENCODERS = (
    EncoderKind("ViT-H/14", 1280, 32, 16, 14, 224, 1024, "gelu", 5120),
    EncoderKind("ViT-bigG/14", 1664, 48, 16, 14, 224, 1280, "gelu", 8192),
    EncoderKind("ViT-L/14", 1024, 24, 16, 14, 224, 768, "quick_gelu", 4096),
    EncoderKind("ViT-L/14-336", 1024, 24, 16, 14, 336, 768, "quick_gelu", 4096),
    # The tiny tower of tests and demos; any number of layers and any MLP.
    EncoderKind(DEMO, 128, 3, 2, 14, 224, 128, "gelu", 512),
)
"""The image encoders that public adapters were trained with (and a tiny one)."""


@dataclass(frozen=True)
class EncoderFile:
    """Where the public file of an image encoder is on the hub, and how large it is, in words."""

    repository: str
    file: str
    size: str


ENCODER_FILES = {
    "ViT-H/14": EncoderFile("h94/IP-Adapter", "models/image_encoder/model.safetensors", "2.5 GB"),
    "ViT-bigG/14": EncoderFile("h94/IP-Adapter", "sdxl_models/image_encoder/model.safetensors", "3.7 GB"),
    "ViT-L/14": EncoderFile("openai/clip-vit-large-patch14", "model.safetensors", "about 1.7 GB"),
    "ViT-L/14-336": EncoderFile("openai/clip-vit-large-patch14-336", "pytorch_model.bin", "about 1.7 GB"),
}
"""The file to get for each encoder by name; the last two have a text tower as well, which isn't read."""

_NEEDED = {
    ("image_embeds", 1024): "ViT-H/14",
    ("image_embeds", 1280): "ViT-bigG/14",
    ("image_embeds", 768): "ViT-L/14",
    ("image_embeds", 128): DEMO,
    ("penultimate", 1280): "ViT-H/14",
    ("penultimate", 1664): "ViT-bigG/14",
    ("penultimate", 1024): "ViT-L/14-336",
    ("penultimate", 128): DEMO,
}
"""Encoder by which of its outputs an adapter takes and how wide that is."""

_OUTPUT_WORDS = {"image_embeds": "pooled image embeddings", "penultimate": "hidden states"}


@dataclass(frozen=True)
class AdapterKind:
    """An image-prompt adapter.

    Attributes:
        family: ``sd15``, ``sd2``, ``sdxl`` or ``kolors`` (whose UNet has SDXL's layers): what it was trained for.
        variant: ``base`` (light too), ``plus`` (plus-face and composition too) or ``full-face``. Those that share a
            name here have the same tensors and the same computation, so nothing depends on which of them a file is.
        tokens: image tokens that a picture becomes.
        context_width: width of an image token, which is the UNet's text context width.
        layer_widths: width of every cross-attention layer, in the file's order.
        embedding_width: width of the encoder output that the image projection takes.
        output: which output that is, ``image_embeds`` or ``penultimate``.
        heads: of the resampler; 0 without one.
        depth: layers of the resampler; 0 without one.
        image_proj_prefix, ip_adapter_prefix: what stands before ``proj.weight`` or ``1.to_k_ip.weight``, with its dot.
    """

    family: str
    variant: str
    tokens: int
    context_width: int
    layer_widths: tuple[int, ...]
    embedding_width: int
    output: str
    heads: int
    depth: int
    image_proj_prefix: str
    ip_adapter_prefix: str

    @property
    def description(self) -> str:
        """For people: ``SDXL · plus · 16 tokens · needs CLIP ViT-H``."""
        encoder = encoder_needed(self).replace("/14", "")
        return f"{_FAMILY_WORDS[self.family]} · {self.variant} · {self.tokens} tokens · needs CLIP {encoder}"


_FAMILY_WORDS = {"sd15": "SD1.5", "sd2": "SD2", "sdxl": "SDXL", "kolors": "Kolors"}

_UNSUPPORTED = "which doesn't work here"

_PREFIXES = ("", "module.")
_PROJECTION_PREFIXES = ("image_proj.", "image_proj_model.", "ip_adapter_proj_model.")
_LAYER_PREFIXES = ("ip_adapter.", "adapter_modules.")
_LAYER = re.compile(r"(\d{1,4})\.to_([kv])_ip\.weight")

FACE_EMBEDDING = 512
"""Width of what the face recognisers of FaceID, portrait and InstantID adapters give."""
FLUX_CONTEXT = 4096
"""Width of the text context of Flux."""
DIM_HEAD = 64
"""Width of one head in every public resampler."""


def encoder_needed(kind: AdapterKind) -> str:
    """Name (see :data:`ENCODERS`) of the image encoder that an adapter takes.

    Raises:
        IPAdapterError: if the width fits no known encoder.
    """
    return _encoder_by_width("The adapter", kind.output, kind.embedding_width)


def _encoder_by_width(name: str, output: str, width: int) -> str:
    if (output, width) not in _NEEDED:
        known = ", ".join(f"{known} ({encoder})" for (of, known), encoder in _NEEDED.items() if of == output)
        raise IPAdapterError(
            f"{name} takes {_OUTPUT_WORDS[output]} {width} wide, which no known image encoder gives (known are "
            f"{known}): "
            "choose an adapter made for one of these."
        )
    return _NEEDED[output, width]


# --- adapters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Projection:
    """Sizes of an image projection, and the tensors that it must then have."""

    tokens: int
    context_width: int
    embedding_width: int
    shapes: Shapes
    heads: int = 0
    depth: int = 0


def _base(group: _Group) -> _Projection:
    out, embedding = group.shape("proj.weight", 2)
    (context,) = group.shape("norm.weight", 1)
    if out % context:
        raise IPAdapterError(
            f"{group.name} has an image projection {out} wide, which is no multiple of its token width {context}: "
            "download it again."
        )
    shapes = {
        "proj.weight": (out, embedding),
        "proj.bias": (out,),
        "norm.weight": (context,),
        "norm.bias": (context,),
    }
    return _Projection(out // context, context, embedding, shapes)


def _full_face(group: _Group) -> _Projection:
    context, embedding = group.shape("proj.2.weight", 2)
    shapes = {
        "proj.0.weight": (embedding, embedding),
        "proj.0.bias": (embedding,),
        "proj.2.weight": (context, embedding),
        "proj.2.bias": (context,),
        "proj.3.weight": (context,),
        "proj.3.bias": (context,),
    }
    encoder = _encoder_by_width(group.name, "penultimate", embedding)
    tokens = next(row.positions for row in ENCODERS if row.name == encoder)
    return _Projection(tokens, context, embedding, shapes)


def _plus(group: _Group) -> _Projection:
    batch, tokens, dim = group.shape("latents", 3)
    embedding = group.shape("proj_in.weight", 2)[1]
    context = group.shape("proj_out.weight", 2)[0]
    inner = group.shape("layers.0.0.to_q.weight", 2)[0]
    hidden = group.shape("layers.0.1.1.weight", 2)[0]
    depth = sum(key.startswith("layers.") and key.endswith(".0.to_q.weight") for key in group.shapes)
    if batch != 1 or inner % DIM_HEAD or hidden % dim:
        raise IPAdapterError(
            f"{group.name} has a resampler with latents {[batch, tokens, dim]}, attention {inner} wide and "
            "feed-forward "
            f"{hidden} wide; it must be one row of latents, attention in heads of {DIM_HEAD} and a feed-forward "
            "that is "
            "a multiple of the latents: choose another file."
        )
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, tokens, dim),
        "proj_in.weight": (dim, embedding),
        "proj_in.bias": (dim,),
        "proj_out.weight": (context, dim),
        "proj_out.bias": (context,),
        "norm_out.weight": (context,),
        "norm_out.bias": (context,),
    }
    for i in range(depth):
        attention, feed_forward = f"layers.{i}.0.", f"layers.{i}.1."
        for norm in ("norm1", "norm2"):
            shapes[f"{attention}{norm}.weight"] = shapes[f"{attention}{norm}.bias"] = (dim,)
        shapes[attention + "to_q.weight"] = (inner, dim)
        shapes[attention + "to_kv.weight"] = (2 * inner, dim)
        shapes[attention + "to_out.weight"] = (dim, inner)
        shapes[feed_forward + "0.weight"] = shapes[feed_forward + "0.bias"] = (dim,)
        shapes[feed_forward + "1.weight"] = (hidden, dim)
        shapes[feed_forward + "3.weight"] = (dim, hidden)
    return _Projection(tokens, context, embedding, shapes, inner // DIM_HEAD, depth)


@dataclass(frozen=True)
class _ProjectionRow:
    marker: str
    """A tensor that only this projection has."""
    variant: str
    output: str
    measure: Callable[[_Group], _Projection]


_PROJECTIONS = (
    _ProjectionRow("latents", "plus", "penultimate", _plus),
    _ProjectionRow("proj.3.weight", "full-face", "penultimate", _full_face),
    _ProjectionRow("proj.weight", "base", "image_embeds", _base),
)


@dataclass(frozen=True)
class _Refusal:
    """An adapter that only sizes tell from a supported one."""

    applies: Callable[[_Projection, str, int], bool]
    """Called with the projection, the variant and the number of layers."""
    what: str
    advice: str


_REFUSALS = (
    _Refusal(
        lambda p, variant, layers: layers == 57 or p.context_width == FLUX_CONTEXT,
        "an IP-Adapter for Flux",
        ADVICE,
    ),
    _Refusal(
        lambda p, variant, layers: variant == "plus" and p.embedding_width == FACE_EMBEDDING,
        "an InstantID or FaceID-portrait adapter",
        FACE_ADVICE,
    ),
)

_LAYER_COUNTS = {16: "sd15", 70: "sdxl"}
_SD2_CONTEXT = 1024
_KOLORS_EMBEDDING, _KOLORS_LATENTS = 1024, 2048
"""Only Kolors' plus adapter, among those with SDXL's layers, has a resampler of these widths."""


@dataclass(frozen=True)
class _Group:
    """The tensors under one prefix, for reading shapes with a sentence when they are wrong."""

    name: str
    prefix: str
    shapes: Shapes

    @classmethod
    def of(cls, name: str, prefix: str, tensors: Tensors) -> _Group:
        found = {key[len(prefix) :]: info.shape for key, info in tensors.items() if key.startswith(prefix)}
        return cls(name, prefix, found)

    def shape(self, key: str, rank: int) -> tuple[int, ...]:
        """Shape of a tensor of so many dimensions, none of them empty."""
        shape = self.shapes.get(key)
        if shape is None:
            raise IPAdapterError(f"{self.name} lacks the tensor {self.prefix}{key}: download it again.")
        if len(shape) != rank or not all(shape):
            raise IPAdapterError(
                f"The tensor {self.prefix}{key} of {_mid(self.name)} has the shape {list(shape)}; "
                f"{rank} dimension{'s' * (rank > 1)} and none of size 0 are expected: download it again."
            )
        return shape

    def require(self, expected: Shapes, what: str) -> None:
        """Every tensor of ``expected`` must be there in its shape."""
        for key, shape in expected.items():
            if self.shape(key, len(shape)) != shape:
                raise IPAdapterError(
                    f"{self.name} looks like {what}, but its tensor {self.prefix}{key} has the shape "
                    f"{list(self.shapes[key])} instead of {list(shape)}: download it again."
                )

    def forbid_others(self, known: Shapes, what: str) -> None:
        """Nothing may be there but ``known``: an unknown tensor means an unknown computation."""
        extra = next((key for key in self.shapes if key not in known), None)
        if extra is not None:
            raise IPAdapterError(
                f"{self.name} looks like {what}, but has the tensor {self.prefix}{extra[:100]}, which belongs to "
                "some other "
                "kind of adapter: choose a base, plus, plus-face or full-face adapter."
            )


def recognise_adapter(tensors: Tensors, name: str = "This file") -> AdapterKind:
    """What kind of image-prompt adapter a file is.

    Args:
        tensors: names and shapes, as :func:`~.tensorfile.open_tensors` gives them.
        name: what to call the file in a sentence.

    Raises:
        IPAdapterError: if it is something else (the sentence says what, and where it belongs) or is damaged.
    """
    _refuse(first_match(OTHER_ADAPTERS, tensors), name, _UNSUPPORTED)
    prefixes = _adapter_prefixes(tensors)
    if prefixes is None:
        raise _no_adapter(tensors, name)
    projection_group, layers = (_Group.of(name, prefix, tensors) for prefix in prefixes)

    row = next((row for row in _PROJECTIONS if row.marker in projection_group.shapes), None)
    if row is None:
        if "proj.2.weight" in projection_group.shapes:
            embedding = projection_group.shape("proj.0.weight", 2)[1]
            face = embedding == FACE_EMBEDDING
            flux = projection_group.shapes.get("norm.weight") == (FLUX_CONTEXT,)
            other = "an IP-Adapter for Flux" if flux else f"an IP-Adapter for embeddings {embedding} wide"
            what = "a FaceID-portrait adapter" if face else other
            raise _refused(name, what, _UNSUPPORTED, FACE_ADVICE if face else ADVICE)
        sample = ", ".join(list(projection_group.shapes)[:3])[:150]
        raise IPAdapterError(
            f"{name} has an image projection of an unknown kind (its tensors begin with {sample}): {ADVICE}."
        )
    projection = row.measure(projection_group)
    widths = _layer_widths(layers)
    for refusal in _REFUSALS:
        if refusal.applies(projection, row.variant, len(widths)):
            raise _refused(name, refusal.what, _UNSUPPORTED, refusal.advice)

    what = f"an IP-Adapter ({row.variant})"
    projection_group.require(projection.shapes, what)
    projection_group.forbid_others(projection.shapes, what)
    _check_layers(layers, widths, projection.context_width, what)
    _encoder_by_width(name, row.output, projection.embedding_width)
    _check_dtypes(name, prefixes, tensors)
    return AdapterKind(
        family=_family(projection, len(widths)),
        variant=row.variant,
        tokens=projection.tokens,
        context_width=projection.context_width,
        layer_widths=tuple(widths.values()),
        embedding_width=projection.embedding_width,
        output=row.output,
        heads=projection.heads,
        depth=projection.depth,
        image_proj_prefix=prefixes[0],
        ip_adapter_prefix=prefixes[1],
    )


def _family(projection: _Projection, layers: int) -> str:
    family = _LAYER_COUNTS[layers]
    if family == "sd15" and projection.context_width == _SD2_CONTEXT:
        return "sd2"
    latents = projection.shapes.get("latents", (0,))[-1]
    if family == "sdxl" and (projection.embedding_width, latents) == (_KOLORS_EMBEDDING, _KOLORS_LATENTS):
        return "kolors"
    return family


def _check_dtypes(name: str, prefixes: tuple[str, str], tensors: Tensors) -> None:
    for key, info in tensors.items():
        if key.startswith(prefixes) and not info.dtype.is_floating_point:
            raise IPAdapterError(
                f"{name} holds the tensor {key} as {str(info.dtype).removeprefix('torch.')}, where weights are "
                "floating-point numbers: download it again."
            )


def _adapter_prefixes(tensors: Tensors) -> tuple[str, str] | None:
    """The first pair of prefixes that both occur; some files carry everything twice, under two pairs."""
    for outer in _PREFIXES:
        found = [
            next(
                (outer + inner for inner in inners if any(key.startswith(outer + inner) for key in tensors)),
                None,
            )
            for inners in (_PROJECTION_PREFIXES, _LAYER_PREFIXES)
        ]
        if found[0] and found[1]:
            return found[0], found[1]
    return None


def _layer_widths(group: _Group) -> dict[int, int]:
    """Width of every layer that has a ``to_k_ip`` or ``to_v_ip``, by its number, in numeric order."""
    numbers = sorted({int(match[1]) for key in group.shapes if (match := _LAYER.fullmatch(key))})
    if not numbers:
        raise IPAdapterError(f"{group.name} has no to_k_ip and to_v_ip weights under {group.prefix}: {ADVICE}.")
    for number in numbers:
        for one, other in (("k", "v"), ("v", "k")):
            if f"{number}.to_{one}_ip.weight" not in group.shapes:
                raise IPAdapterError(
                    f"{group.name} has {group.prefix}{number}.to_{other}_ip.weight but no to_{one}_ip.weight "
                    "beside it; "
                    "every layer needs both: download it again."
                )
    return {number: group.shape(f"{number}.to_k_ip.weight", 2)[0] for number in numbers}


def _check_layers(group: _Group, widths: Mapping[int, int], context: int, what: str) -> None:
    expected = {f"{i}.to_{kind}_ip.weight": (width, context) for i, width in widths.items() for kind in "kv"}
    for key in expected:
        columns = group.shape(key, 2)[1]
        if columns != context:
            raise IPAdapterError(
                f"{group.name} makes image tokens {context} wide, but {group.prefix}{key} takes {columns}: "
                "download it again."
            )
    group.require(expected, what)
    group.forbid_others(expected, what)
    if len(widths) not in _LAYER_COUNTS:
        raise IPAdapterError(
            f"{group.name} has {len(widths)} cross-attention layers; adapters for SD1.5 and SD2 have 16 and "
            "those for SDXL "
            "70: choose an adapter for one of these."
        )


def _no_adapter(tensors: Tensors, name: str) -> IPAdapterError:
    row = first_match((*OTHER_FILES, IMAGE_ENCODER, TEXT_ENCODER), tensors)
    if row is not None:
        return _refused(name, row.what, "not an IP-Adapter", row.advice)
    if first_match((ADAPTER,), tensors):
        return IPAdapterError(
            f"{name} has only one half of an IP-Adapter; it needs an image projection ({_PROJECTION_PREFIXES[0]}*) and "
            f"layers ({_LAYER_PREFIXES[0]}*): download the whole file."
        )
    return IPAdapterError(
        f"{name} is no IP-Adapter: it holds {_sample(tensors)}, where an image projection and to_k_ip and "
        "to_v_ip weights "
        f"are expected: {ADVICE}."
    )


# --- image encoders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How one library names the tensors of a vision tower; ``@`` stands for a layer's number."""

    layout: str
    patch: str
    position: str
    projection: str
    layer_query: str
    """The one tensor of a layer that is counted."""
    mlp: str
    shapes: Callable[[EncoderKind], dict[str, tuple[int, ...]]]


def _hf_shapes(kind: EncoderKind) -> dict[str, tuple[int, ...]]:
    w, mlp = kind.width, kind.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (w,),
        "vision_model.embeddings.patch_embedding.weight": (w, 3, kind.patch, kind.patch),
        "vision_model.embeddings.position_embedding.weight": (kind.positions, w),
        "visual_projection.weight": (kind.projection, w),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= _affine(f"vision_model.{norm}", w)
    for i in range(kind.layers):
        layer = f"vision_model.encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= _affine(layer + norm, w)
        for part in "qkv":
            shapes |= _affine(f"{layer}self_attn.{part}_proj", w, w)
        shapes |= _affine(layer + "self_attn.out_proj", w, w)
        shapes |= _affine(layer + "mlp.fc1", mlp, w) | _affine(layer + "mlp.fc2", w, mlp)
    return shapes


def _openclip_shapes(kind: EncoderKind) -> dict[str, tuple[int, ...]]:
    w, mlp = kind.width, kind.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (w,),
        "visual.conv1.weight": (w, 3, kind.patch, kind.patch),
        "visual.positional_embedding": (kind.positions, w),
        "visual.proj": (w, kind.projection),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= _affine(f"visual.{norm}", w)
    for i in range(kind.layers):
        layer = f"visual.transformer.resblocks.{i}."
        for norm in ("ln_1", "ln_2"):
            shapes |= _affine(layer + norm, w)
        shapes |= {layer + "attn.in_proj_weight": (3 * w, w), layer + "attn.in_proj_bias": (3 * w,)}
        shapes |= _affine(layer + "attn.out_proj", w, w)
        shapes |= _affine(layer + "mlp.c_fc", mlp, w) | _affine(layer + "mlp.c_proj", w, mlp)
    return shapes


def _affine(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


_LAYOUTS = (
    _Layout(
        "hf",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        "visual_projection.weight",
        "vision_model.encoder.layers.@.self_attn.q_proj.weight",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        _hf_shapes,
    ),
    _Layout(
        "openclip",
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.proj",
        "visual.transformer.resblocks.@.attn.in_proj_weight",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        _openclip_shapes,
    ),
)


def recognise_encoder(tensors: Tensors, name: str = "This file") -> EncoderKind:
    """What kind of image encoder a file is; text towers beside it don't matter.

    Args:
        tensors, name: as for :func:`recognise_adapter`.

    Raises:
        IPAdapterError: if it is something else, a tower that no adapter here takes, or damaged.
    """
    _refuse(first_match((*OTHER_ADAPTERS, ADAPTER, *OTHER_FILES), tensors), name, "not an image encoder")
    found = [(layout, key) for layout in _LAYOUTS for key in tensors if ("." + key).endswith("." + layout.patch)]
    if not found:
        _refuse(first_match((TEXT_ENCODER,), tensors), name, "not an image encoder")
        raise IPAdapterError(
            f"{name} is no CLIP image encoder: it holds {_sample(tensors)}, where vision_model.* or visual.* is "
            "expected: "
            f"choose {_known_encoders()}."
        )
    layout, key = min(found, key=lambda pair: len(pair[1]))
    prefix = key.removesuffix(layout.patch)
    group = _Group.of(name, prefix, tensors)
    if any(key.startswith("vision_model.head.") for key in group.shapes):
        raise _refused(
            name,
            f"a SigLIP image encoder ({group.shape(layout.patch, 4)[0]} wide)",
            "not a CLIP image encoder",
            f"adapters for SD1.5, SD2 and SDXL take {_known_encoders()}",
        )
    measured = _measure_tower(group, layout, prefix)
    row = next((row for row in ENCODERS if _same_tower(row, measured)), None)
    if row is None:
        raise IPAdapterError(
            f"{name} is a vision tower {measured.width} wide with {measured.layers} layers, patches of "
            f"{measured.patch} "
            f"pixels, pictures of {measured.image_size} and embeddings {measured.projection} wide, which no "
            "adapter here "
            f"takes: choose {_known_encoders()}."
        )
    kind = replace(measured, name=row.name, heads=row.heads, activation=row.activation)
    group.require(layout.shapes(kind), f"the image encoder {kind.name}")
    return kind


def _measure_tower(group: _Group, layout: _Layout, prefix: str) -> EncoderKind:
    width, _, _, patch = group.shape(layout.patch, 4)
    positions = group.shape(layout.position, 2)[0]
    if layout.projection not in group.shapes:
        raise IPAdapterError(
            f"{group.name} is a vision tower {width} wide without its projection ({prefix}{layout.projection}), "
            "which base "
            "adapters need: use the file of the whole image encoder (CLIPVisionModelWithProjection)."
        )
    projection = group.shape(layout.projection, 2)[0 if layout.layout == "hf" else 1]
    counted = re.compile(re.escape(layout.layer_query).replace("@", r"\d{1,4}"))
    layers = sum(counted.fullmatch(key) is not None for key in group.shapes)
    mlp = group.shape(layout.mlp, 2)[0]
    side = math.isqrt(max(positions - 1, 0))
    return EncoderKind("", width, layers, 0, patch, side * patch, projection, "", mlp, layout.layout, prefix)


def _same_tower(row: EncoderKind, found: EncoderKind) -> bool:
    same = (row.width, row.patch, row.image_size, row.projection) == (
        found.width,
        found.patch,
        found.image_size,
        found.projection,
    )
    return (
        same
        and found.layers > 0
        and (row.name == DEMO or (row.layers, row.mlp_width) == (found.layers, found.mlp_width))
    )


def _known_encoders() -> str:
    names = [row.name for row in ENCODERS if row.name != DEMO]
    return f"{', '.join(names[:-1])} or {names[-1]} of CLIP"


# --- sentences --------------------------------------------------------------------------------------------------------


def _refuse(row: Foreign | None, name: str, verdict: str) -> None:
    if row is not None:
        raise _refused(name, row.what, verdict, row.advice)


def _refused(name: str, what: str, verdict: str, advice: str) -> IPAdapterError:
    return IPAdapterError(f"{name} is {what}, {verdict}: {advice}.")


def _mid(name: str) -> str:
    return "this file" if name == "This file" else name


def _sample(tensors: Tensors) -> str:
    if not tensors:
        return "no tensors"
    names = ", ".join(key[:60] for key in list(tensors)[:2])
    return f"{len(tensors)} tensor{'s' * (len(tensors) > 1)} such as {names}"

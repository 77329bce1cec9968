"""CLIP's two towers at small widths, with the tensor names of their public files (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_ipadapter.pictures import MEAN, STD

from .bpe import CONTEXT
from .scenes import BACKGROUNDS, COLOURS, MAX_COUNT, PLACES, SHAPES, SIZES, TEXTURES, Scenes

IMAGE_SIZE = 224


@dataclass(frozen=True)
class TextSizes:
    """Of the text tower."""

    vocabulary: int = 1000
    width: int = 64
    layers: int = 3
    heads: int = 4
    mlp: int = 128


@dataclass(frozen=True)
class VisionSizes:
    """Of the image tower: the small row of the extension's table of encoders."""

    width: int = 128
    layers: int = 5
    heads: int = 2
    mlp: int = 512
    patch: int = 14
    projection: int = 128


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int, quick: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = _quick_gelu if quick else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, quick: bool) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = _SelfAttention(width, heads)
        self.mlp = _MLP(width, inner, quick)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class _Layers(nn.Module):
    def __init__(self, count: int, width: int, heads: int, inner: int, quick: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads, inner, quick) for _ in range(count))


class _TextEmbeddings(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.position_embedding = nn.Embedding(CONTEXT, sizes.width)
        nn.init.normal_(self.token_embedding.weight, std=0.05)
        nn.init.normal_(self.position_embedding.weight, std=0.02)


class _TextModel(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.embeddings = _TextEmbeddings(sizes)
        self.encoder = _Layers(sizes.layers, sizes.width, sizes.heads, sizes.mlp, quick=True)
        self.final_layer_norm = nn.LayerNorm(sizes.width)


class TextTower(nn.Module):
    """``text_model.*`` as in SD1's checkpoints."""

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.text_model = _TextModel(sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, 77]`` to the states after the final norm, ``[B, 77, width]``."""
        m = self.text_model
        x = self._embedded(tokens) + m.embeddings.position_embedding.weight
        for layer in m.encoder.layers:
            x = layer(x, True)
        return m.final_layer_norm(x)

    def _embedded(self, tokens: Tensor) -> Tensor:
        embedding = self.text_model.embeddings.token_embedding
        if not self.training:
            return embedding(tokens)
        # the same as a matrix product, whose gradient takes no sorting of tokens on a device
        which = torch.arange(embedding.num_embeddings, device=tokens.device)
        return (tokens[..., None] == which).to(embedding.weight.dtype) @ embedding.weight


def at_end(states: Tensor, tokens: Tensor, end: int) -> Tensor:
    """The states at the first end token, ``[B, width]``."""
    ends = tokens == end
    first = ends & (ends.cumsum(1) == 1)
    return (states * first[..., None].to(states.dtype)).sum(1)


class _VisionEmbeddings(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(sizes.width) * 0.02)
        self.patch_embedding = nn.Conv2d(3, sizes.width, sizes.patch, stride=sizes.patch, bias=False)
        self.position_embedding = nn.Embedding((IMAGE_SIZE // sizes.patch) ** 2 + 1, sizes.width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)


class _VisionModel(nn.Module):
    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.embeddings = _VisionEmbeddings(sizes)
        self.pre_layrnorm = nn.LayerNorm(sizes.width)
        self.encoder = _Layers(sizes.layers, sizes.width, sizes.heads, sizes.mlp, quick=False)
        self.post_layernorm = nn.LayerNorm(sizes.width)


class VisionTower(nn.Module):
    """``vision_model.*`` and ``visual_projection.weight``."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.vision_model = _VisionModel(sizes)
        self.visual_projection = nn.Linear(sizes.width, sizes.projection, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels to the projected embedding and the states that enter the last layer."""
        m = self.vision_model
        x = m.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([m.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
        x = m.pre_layrnorm(x + m.embeddings.position_embedding.weight)
        for layer in m.encoder.layers[:-1]:
            x = layer(x, False)
        penultimate = x
        x = m.encoder.layers[-1](x, False)
        return self.visual_projection(m.post_layernorm(x[:, 0])), penultimate


def normalised(pictures: Tensor) -> Tensor:
    """Pixels 0..1 as the image tower takes them."""
    mean, std = (torch.tensor(v, device=pictures.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pictures - mean) / std


# --- attributes -------------------------------------------------------------------------------------------------------

ATTRIBUTES: dict[str, int] = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "texture": len(TEXTURES),
    "size": len(SIZES),
    "place": len(PLACES),
    "count": MAX_COUNT,
    "background": len(COLOURS),
    "background_kind": len(BACKGROUNDS),
    "relation": 3,
    "shape_2": len(SHAPES),
    "colour_2": len(COLOURS),
}
"""What heads and judge tell of a picture, and how many answers there are."""


def attribute_labels(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Right answers and whether the question makes sense, each ``[B, attributes]``."""
    there = scenes.background_kind != 2
    second = there & (scenes.relation > 0)
    labels, asked = [], []
    for name in ATTRIBUTES:
        value = getattr(scenes, name)
        labels.append(value - 1 if name == "count" else value)
        asked.append(
            torch.ones_like(there)
            if name == "background_kind"
            else second
            if name.endswith("_2")
            else there & (scenes.relation == 0)
            if name == "place"
            else there
        )
    return torch.stack(labels, 1), torch.stack(asked, 1)


class AttributeHeads(nn.Module):
    """One linear layer for all attributes; logits by attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.all = nn.Linear(width, sum(ATTRIBUTES.values()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.all(x).float().split(list(ATTRIBUTES.values()), dim=-1)


def attribute_loss(logits: tuple[Tensor, ...], labels: Tensor, asked: Tensor) -> Tensor:
    """Mean cross entropy over the questions that make sense."""
    total = torch.zeros((), device=labels.device)
    for n, scores in enumerate(logits):
        each = F.cross_entropy(scores, labels[:, n], reduction="none")
        total = total + (each * asked[:, n]).sum() / asked[:, n].sum().clamp(min=1)
    return total / len(logits)


class Judge(nn.Module):
    """A small classifier of pictures' attributes by pixels alone; it never sees a drawn picture while it learns."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        widths = [width, width * 2, width * 3, width * 4]
        layers: list[nn.Module] = []
        before = 3
        for w in widths:
            layers += [
                nn.Conv2d(before, w, 3, padding=1, stride=2 if before == 3 else 1),
                nn.GroupNorm(8, w),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            before = w
        self.features = nn.Sequential(*layers, nn.Conv2d(before, before, 3, padding=1), nn.ReLU())
        self.hidden = nn.Linear(before * 16, 256)
        self.heads = AttributeHeads(256)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Pixels 0..1, ``[B, 3, 128, 128]``, to logits by attribute."""
        x = self.features(pictures * 2 - 1)
        return self.heads(F.relu(self.hidden(x.flatten(1))))

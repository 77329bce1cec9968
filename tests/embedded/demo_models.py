"""Small random model files in the public layouts: image-prompt adapters for both UNets and an image encoder.

Everything depends on ``seed`` alone. The weights are scaled so that pictures lead to different image tokens and the
tokens visibly steer the picture; what they steer it to has no meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from .ldm import DiffusionModel
from .shapes import SHAPES, make_unet

EMBEDDING = 128
"""Width of the encoder, of its pooled embedding and of its hidden states."""
BASE_TOKENS, PLUS_TOKENS = 4, 16
RESAMPLER_DEPTH, RESAMPLER_HEADS, DIM_HEAD = 4, 2, 64


@dataclass(frozen=True)
class DemoModels:
    """Where the files are; adapters by UNet shape."""

    models_path: Path
    base: dict[str, Path]
    plus: dict[str, Path]
    encoder: Path


def make_demo_models(models_path: str | Path, seed: int = 0) -> DemoModels:
    """Write ``ipadapter/demo-*.safetensors`` and ``clip_vision/demo-vit.safetensors`` (fp16) under a folder."""
    folder = Path(models_path)
    (folder / "ipadapter").mkdir(parents=True, exist_ok=True)
    (folder / "clip_vision").mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    base, plus = {}, {}
    for name in SHAPES:
        base[name] = folder / "ipadapter" / f"demo-base-{name}.safetensors"
        plus[name] = folder / "ipadapter" / f"demo-plus-{name}.safetensors"
        layers = _layers(name, generator)
        _save({**_linear_projection(SHAPES[name].context, generator), **layers}, base[name])
        _save({**_resampler(SHAPES[name].context, generator), **layers}, plus[name])
    encoder = folder / "clip_vision" / "demo-vit.safetensors"
    _save(_encoder(seed), encoder)
    return DemoModels(folder, base, plus, encoder)


def layer_widths(shape_name: str) -> list[int]:
    """Width of each cross-attention layer in an adapter file's order: input blocks, output blocks, middle block."""
    model = DiffusionModel(make_unet(SHAPES[shape_name], 0))
    blocks = [*model.input_blocks, *model.output_blocks, model.middle_block]
    transformers = [m for block in blocks for m in block if hasattr(m, "transformer_blocks")]
    return [b.attn2.to_k.out_features for t in transformers for b in t.transformer_blocks]


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: t.to(torch.float16).contiguous() for name, t in tensors.items()}, path)


def _random(shape: tuple[int, ...], gain: float, generator: torch.Generator) -> torch.Tensor:
    """Weights at which unit-variance input leaves with standard deviation ``gain``."""
    return torch.randn(shape, generator=generator) * (gain / math.sqrt(math.prod(shape[1:])))


def _layers(shape_name: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    context = SHAPES[shape_name].context
    tensors = {}
    for i, width in enumerate(layer_widths(shape_name)):
        tensors[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = _random((width, context), 1.5, generator)
        tensors[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = _random((width, context), 1.0, generator)
    return tensors


def _linear_projection(context: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    width = BASE_TOKENS * context
    return {
        "image_proj.proj.weight": _random((width, EMBEDDING), 1.0, generator),
        "image_proj.proj.bias": 0.1 * torch.randn(width, generator=generator),
        "image_proj.norm.weight": torch.ones(context),
        "image_proj.norm.bias": torch.zeros(context),
    }


def _resampler(context: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    dim, inner = EMBEDDING, RESAMPLER_HEADS * DIM_HEAD
    tensors = {
        "latents": torch.randn((1, PLUS_TOKENS, dim), generator=generator) / math.sqrt(dim),
        "proj_in.weight": _random((dim, EMBEDDING), 1.0, generator),
        "proj_in.bias": torch.zeros(dim),
        "proj_out.weight": _random((context, dim), 1.0, generator),
        "proj_out.bias": torch.zeros(context),
        "norm_out.weight": torch.ones(context),
        "norm_out.bias": torch.zeros(context),
    }
    for i in range(RESAMPLER_DEPTH):
        for norm in (f"layers.{i}.0.norm1", f"layers.{i}.0.norm2", f"layers.{i}.1.0"):
            tensors[f"{norm}.weight"] = torch.ones(dim)
            tensors[f"{norm}.bias"] = torch.zeros(dim)
        tensors[f"layers.{i}.0.to_q.weight"] = _random((inner, dim), 1.5, generator)
        tensors[f"layers.{i}.0.to_kv.weight"] = _random((2 * inner, dim), 1.5, generator)
        tensors[f"layers.{i}.0.to_out.weight"] = _random((dim, inner), 1.0, generator)
        tensors[f"layers.{i}.1.1.weight"] = _random((4 * dim, dim), 1.0, generator)
        tensors[f"layers.{i}.1.3.weight"] = _random((dim, 4 * dim), 0.5, generator)
    return {f"image_proj.{name}": t for name, t in tensors.items()}


def encoder_model(seed: int) -> CLIPVisionModelWithProjection:
    """The demo encoder: CLIP's vision tower, width 128, 3 layers, patch 14, 224 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=EMBEDDING,
                intermediate_size=4 * EMBEDDING,
                num_hidden_layers=3,
                num_attention_heads=2,
                patch_size=14,
                image_size=224,
                projection_dim=EMBEDDING,
                hidden_act="gelu",
            )
        )
        model.eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "position_embedding" not in name:
                # sharp attention, so that the class token sees the picture rather than its mean
                gain = 2.5 if "q_proj" in name or "k_proj" in name else 1.0
                torch.nn.init.normal_(weight, std=gain / math.sqrt(weight[0].numel()))
    return model


def _encoder(seed: int) -> dict[str, torch.Tensor]:
    return {name: t for name, t in encoder_model(seed).state_dict().items() if t.is_floating_point()}

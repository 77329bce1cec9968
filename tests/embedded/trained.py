"""A trained checkpoint in SD1.5's LDM layout as the networks of this host.

Names differ between LDM and diffusers, numbers don't: each tensor goes to one place of a diffusers module of the same
layout, whose widths are read from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from tests.demo_model.bpe import Tokenizer
from tests.demo_model.vae import SCALE

from .shapes import SHAPES, Shape

GROUPS = 32
HEADS = 8
"""Of every attention of the UNet; no tensor tells."""
TEXT_HEADS = 4
"""Of the text tower; no tensor tells."""

Rules = tuple[tuple[str, str], ...]

_RESIDUAL: Rules = (
    (r"in_layers\.0\.", "norm1."),
    (r"in_layers\.2\.", "conv1."),
    (r"emb_layers\.1\.", "time_emb_proj."),
    (r"out_layers\.0\.", "norm2."),
    (r"out_layers\.3\.", "conv2."),
    (r"skip_connection\.", "conv_shortcut."),
)
_VAE: Rules = (
    (r"^encoder\.down\.(\d)\.block\.(\d)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


@dataclass(frozen=True)
class TrainedNetworks:
    """What a checkpoint holds, and the tokeniser that belongs to it."""

    shape: Shape
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel
    tokenizer: Tokenizer
    scale: float
    """By which latents are multiplied."""


def load_trained(checkpoint: Path) -> TrainedNetworks:
    """Read a checkpoint; the folder ``tokenizer`` lies beside it.

    Raises:
        RuntimeError: if a tensor is missing, too many, or of another shape than its place.
    """
    tensors = {name: tensor.float() for name, tensor in load_file(checkpoint).items()}
    unet = _under("model.diffusion_model.", tensors)
    vae = _under("first_stage_model.", tensors)
    text = _under("cond_stage_model.transformer.", tensors)
    widths = tuple(len(unet[f"input_blocks.{n}.0.out_layers.3.bias"]) for n in (1, 4, 7, 10))
    context = unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    shape = replace(SHAPES["sd15"], channels=widths, heads=(HEADS,) * 4, context=context)
    return TrainedNetworks(
        shape,
        _filled(_empty_unet(shape), {_unet_name(n): t for n, t in unet.items()}),
        _filled(_empty_vae(vae), {_vae_name(n): _flat(n, t) for n, t in vae.items()}),
        _filled(_empty_text(text), text),
        Tokenizer.load(checkpoint.parent / "tokenizer"),
        SCALE,
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _filled(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> torch.nn.Module:
    module.load_state_dict(dict(tensors), strict=True)
    return module.eval().requires_grad_(False)


# --- the UNet ---------------------------------------------------------------------------------------------------------


def _empty_unet(shape: Shape) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=shape.channels,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        layers_per_block=2,
        attention_head_dim=shape.heads,
        cross_attention_dim=shape.context,
        norm_num_groups=GROUPS,
    )


def _unet_name(name: str) -> str:
    for pattern, put in _RESIDUAL:
        name = re.sub(pattern, put, name)
    fixed = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    for ldm, diffusers in fixed.items():
        if name.startswith(ldm + "."):
            return diffusers + name[len(ldm) :]
    side, number, part, rest = name.split(".", 3)
    if side == "input_blocks":
        # each level: two blocks, then the way down
        level, n = divmod(int(number) - 1, 3)
        if n == 2:
            return f"down_blocks.{level}.downsamplers.0.{rest.replace('op.', 'conv.')}"
        return f"down_blocks.{level}.{('resnets', 'attentions')[int(part)]}.{n}.{rest}"
    level, n = divmod(int(number), 3)
    if rest.startswith("conv."):
        return f"up_blocks.{level}.upsamplers.0.{rest}"
    return f"up_blocks.{level}.{('resnets', 'attentions')[int(part)]}.{n}.{rest}"


# --- the VAE ----------------------------------------------------------------------------------------------------------


def _levels(names: Iterable[str]) -> int:
    return 1 + max(int(name.split(".")[2]) for name in names if name.startswith("encoder.down."))


def _empty_vae(tensors: Mapping[str, Tensor]) -> AutoencoderKL:
    levels = _levels(tensors)
    widths = tuple(len(tensors[f"encoder.down.{n}.block.0.conv2.bias"]) for n in range(levels))
    blocks = [name for name in tensors if re.fullmatch(r"encoder\.down\.0\.block\.\d\.conv2\.bias", name)]
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=len(blocks),
        norm_num_groups=GROUPS,
        latent_channels=4,
    )


def _vae_name(name: str) -> str:
    # LDM counts the decoder's levels from the finest, diffusers from the coarsest
    up = re.match(r"decoder\.up\.(\d)\.(block\.(\d)|upsample)\.", name)
    if up:
        place = "upsamplers.0" if up[3] is None else f"resnets.{up[3]}"
        name = f"decoder.up_blocks.{3 - int(up[1])}.{place}.{name[up.end() :]}"
    for pattern, put in _VAE:
        name = re.sub(pattern, put, name)
    return name


def _flat(name: str, tensor: Tensor) -> Tensor:
    """LDM's attention projects by convolutions of one pixel, diffusers' by linear layers."""
    return tensor[:, :, 0, 0] if ".attn_1." in name and tensor.ndim == 4 else tensor


# --- the text tower ---------------------------------------------------------------------------------------------------


def text_config(tensors: Mapping[str, Tensor]) -> CLIPTextConfig:
    """What transformers must know of a text tower, from its tensors."""
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(tensors["text_model.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(name.endswith("mlp.fc1.bias") for name in tensors),
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=len(tensors["text_model.embeddings.position_embedding.weight"]),
        hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def _empty_text(tensors: Mapping[str, Tensor]) -> CLIPTextModel:
    return CLIPTextModel(text_config(tensors))

"""The decoupled formulation against diffusers' own IP-Adapter: one UNet, one adapter, whole outputs compared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lib_ipadapter import IPAdapterModel
from lib_ipadapter.attn2 import CurrentPlan, make_replacement
from lib_ipadapter.formulations import DECOUPLED
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.layers import LAYOUTS, first_in_forward_order
from lib_ipadapter.plan import ImageKV, scaled_dot_product
from lib_ipadapter.progress import Window
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.weighing import weigh
from tests.adapter_files import Nested, base_adapter, plus_adapter
from tests.embedded.ldm import DiffusionModel
from tests.embedded.shapes import SHAPES, make_unet

WEIGHT = 0.7


def cross_attention_widths(unet: Any) -> list[int]:
    return [
        module.to_k.out_features
        for block in (*unet.down_blocks, *unet.up_blocks, unet.mid_block)
        for name, module in block.named_modules()
        if name.endswith("attn2")
    ]


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
@pytest.mark.parametrize("variant", ["base", "plus"])
@pytest.mark.parametrize("pictures", [1, 2])
@torch.no_grad()
def test_whole_unet_output(shape: str, variant: str, pictures: int) -> None:
    unet = make_unet(SHAPES[shape], 0)
    widths, context = cross_attention_widths(unet), unet.config.cross_attention_dim
    adapter: Nested = (base_adapter if variant == "base" else plus_adapter)(widths, context)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(pictures, *((128,) if variant == "base" else (257, 128)), generator=generator)
    x = torch.randn(2, 4, 16, 24, generator=generator)
    timesteps = torch.tensor([500, 500])
    text = torch.randn(2, 77, context, generator=generator)
    y = torch.randn(2, SHAPES[shape].vector, generator=generator) if SHAPES[shape].is_sdxl else None

    model = IPAdapterModel(
        copy.deepcopy(adapter), plus=variant == "plus", cross_attention_dim=context, clip_embeddings_dim=128
    )
    no_picture = torch.zeros_like(features[:1])

    def kv(one: torch.Tensor) -> ImageKV:
        return ImageKV.from_pairs(model.ip_layers(model.image_proj_model(one)))

    prompts = {
        COND: tuple(kv(features[n : n + 1]) for n in range(pictures)),
        UNCOND: (kv(no_picture),) * pictures,
    }
    term = Term(DECOUPLED, Window(), weigh(prompts, DECOUPLED, WEIGHT, (), max(widths), UNCOND))
    keys = LAYOUTS[len(widths)]
    current = CurrentPlan(
        Injection([term], len(keys)), lambda _: None, lambda *_: Call((UNCOND, COND), 0.5), first_in_forward_order(keys)
    )
    replacements = {tuple(key): make_replacement(n, current, scaled_dot_product, None) for n, key in enumerate(keys)}
    ours_model = DiffusionModel(copy.deepcopy(unet))
    plain = ours_model(x, timesteps, text, y, transformer_options={})
    ours = ours_model(x, timesteps, text, y, transformer_options={"patches_replace": {"attn2": replacements}})

    unet._load_ip_adapter_weights([copy.deepcopy(adapter)])
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [WEIGHT]
    embeds = torch.stack([no_picture.expand_as(features), features])  # [rows, pictures, ...]
    theirs = unet(x, timesteps, text, class_labels=y, added_cond_kwargs={"image_embeds": [embeds]}, return_dict=False)[
        0
    ]

    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) / scale < 1e-4
    assert float((ours - plain).abs().max()) / scale > 1e-2

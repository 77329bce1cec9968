"""Files that people drop into the folders of adapters and image encoders, and that are neither: how to tell them.

Each row is a pattern over tensor names (one name a line), what the file is, and where it belongs. First match wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """A kind of file that isn't wanted here."""

    pattern: re.Pattern[str]
    what: str
    advice: str


def _row(pattern: str, what: str, advice: str) -> Foreign:
    return Foreign(re.compile(pattern, re.MULTILINE), what, advice)


ADVICE = "choose a base, plus, plus-face or full-face adapter for SD1.5, SD2 or SDXL"
FACE_ADVICE = f"it takes a face recogniser's numbers instead of an image encoder's, so {ADVICE}"

OTHER_ADAPTERS = (
    _row(r"double_blocks\.\d+\.processor\.ip_adapter_", "an IP-Adapter for Flux", ADVICE),
    _row(r"\d\.norm_ip\.linear\.", "an IP-Adapter for Stable Diffusion 3.5", ADVICE),
    _row(
        r"(^|\.)mapping_(patch_)?\d\.\d\.|(^|\.)id_adapter(_attn_layers)?\.|^pulid_",
        "a PuLID adapter",
        FACE_ADVICE,
    ),
    _row(r"^id_encoder\.", "a PhotoMaker adapter", ADVICE),
    _row(r"^redux_(up|down)\.", "a Redux adapter for Flux", ADVICE),
    _row(r"(^|\.)perceiver_resampler\.", "a FaceID-plus adapter", FACE_ADVICE),
    _row(r"^(ip_adapter|adapter_modules)\.\d+\.to_(q|k|v|out)_lora\.", "a FaceID adapter", FACE_ADVICE),
)
"""Adapters of a kind that isn't supported, told by tensor names alone."""

OTHER_FILES = (
    _row(
        r"^data$",
        "a file of ready image tokens",
        "choose it as the negative of a unit whose uncond is 'file'",
    ),
    _row(
        r"^control_model\.|^controlnet_(cond_embedding|down_blocks|mid_block|blocks)\.|^input_hint_block\.|"
        r"^zero_convs\.|^lllite_",
        "a ControlNet",
        "put it into models/ControlNet and use it in ControlNet",
    ),
    _row(
        r"(^|\.)motion_modules\.\d+\.",
        "a motion module",
        "put it into the folder of the AnimateDiff extension",
    ),
    _row(
        r"^(adapter\.)?body\.\d+\.(resnets|block\d)\.|^style_embedding$",
        "a T2I-Adapter",
        "put it into models/ControlNet",
    ),
    _row(
        r"\A(lora_unet_\w+_attn[12]_to_(q|k|v|out_0)\.(lora_(up|down)\.weight|alpha)(\n|\Z))+\Z",
        "a LoRA of attention layers alone, such as that of a FaceID adapter",
        "put it into models/Lora and call it from the prompt",
    ),
    _row(
        r"^lora_(unet|te\d?|transformer|prior)_|\.lora_(up|down|A|B)\.|_lora\.(up|down)\.weight|"
        r"\.lora\.(up|down)\.|\.(hada_w1_a|lokr_w1|oft_blocks)$",
        "a LoRA",
        "put it into models/Lora and call it from the prompt",
    ),
    _row(
        r"^model\.diffusion_model\.(double_blocks|joint_blocks|layers|transformer_blocks)\.|^double_blocks\.|^joint_blocks\.",
        "a checkpoint of a transformer model such as Flux or SD3",
        "put it into models/Stable-diffusion",
    ),
    _row(r"^model\.diffusion_model\.", "a Stable Diffusion checkpoint", "put it into models/Stable-diffusion"),
    _row(
        r"^(unet\.)?down_blocks\.\d+\.(attentions|resnets)\.",
        "a UNet in the layout of diffusers",
        "convert it to a checkpoint first",
    ),
    _row(
        r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv_in|down_blocks|up_blocks)\b",
        "a VAE",
        "put it into models/VAE",
    ),
    _row(
        r"(^|\.)string_to_param\.|^emb_params$|^clip_[lg]$",
        "a textual inversion",
        "put it into the embeddings folder",
    ),
    _row(
        r"^(model\.\d+\.sub\.|RRDB_trunk\.|conv_first\.|body\.\d+\.rdb\d|layers\.\d+\.residual_group\.)",
        "an upscaler",
        "put it into the folder of its kind under models",
    ),
)
"""Files that are no adapters at all."""

IMAGE_ENCODER = _row(
    r"(^|\.)vision_model\.|(^|\.)visual\.(conv1|transformer|trunk)\.",
    "an image encoder",
    "put it into models/clip_vision, where it is found by itself",
)
TEXT_ENCODER = _row(
    r"(^|\.)text_model\.|^encoder\.block\.\d+\.layer\.|^(transformer\.)?resblocks\.|^token_embedding\.|(^|\.)embed_tokens\.weight$",
    "a text encoder",
    "put it into models/text_encoder",
)
ADAPTER = _row(
    r"\.\d+\.to_[kv]_ip\.|^(image_proj|image_proj_model)\.",
    "an IP-Adapter",
    "put it into models/ipadapter and choose it there",
)


def first_match(rows: Iterable[Foreign], names: Iterable[str]) -> Foreign | None:
    """The first row whose pattern occurs in any of the tensor names, if there is one."""
    text = "\n".join(names)
    return next((row for row in rows if row.pattern.search(text)), None)

"""Recognition: every public file's names and shapes, small UNets, damaged files, and what belongs elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_ipadapter.adapter import IPAdapterModel
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.layers import SD_V12_CHANNELS, SD_XL_CHANNELS
from lib_ipadapter.recognise import ENCODERS, encoder_needed, recognise_adapter, recognise_encoder
from lib_ipadapter.tensorfile import TensorInfo

Tensors = dict[str, TensorInfo]

ZOO = json.loads((Path(__file__).parent / "data" / "zoo_shapes.json").read_text())

H, G, L, L336 = "ViT-H/14", "ViT-bigG/14", "ViT-L/14", "ViT-L/14-336"

SUPPORTED = {
    "ip-adapter_sd15": ("sd15", "base", 4, 768, H, "SD1.5 · base · 4 tokens · needs CLIP ViT-H"),
    "ip-adapter_sd15_light": ("sd15", "base", 4, 768, H, "SD1.5 · base · 4 tokens · needs CLIP ViT-H"),
    "ip-adapter_sd15_light_v11": ("sd15", "base", 4, 768, H, "SD1.5 · base · 4 tokens · needs CLIP ViT-H"),
    "ip-adapter_sd15_vit-G": ("sd15", "base", 4, 768, G, "SD1.5 · base · 4 tokens · needs CLIP ViT-bigG"),
    "ip-adapter-plus_sd15": ("sd15", "plus", 16, 768, H, "SD1.5 · plus · 16 tokens · needs CLIP ViT-H"),
    "ip-adapter-plus-face_sd15": ("sd15", "plus", 16, 768, H, "SD1.5 · plus · 16 tokens · needs CLIP ViT-H"),
    "ip-adapter-full-face_sd15": (
        "sd15",
        "full-face",
        257,
        768,
        H,
        "SD1.5 · full-face · 257 tokens · needs CLIP ViT-H",
    ),
    "ip-adapter_sdxl": ("sdxl", "base", 4, 2048, G, "SDXL · base · 4 tokens · needs CLIP ViT-bigG"),
    "ip-adapter_sdxl_vit-h": ("sdxl", "base", 4, 2048, H, "SDXL · base · 4 tokens · needs CLIP ViT-H"),
    "ip-adapter-plus_sdxl_vit-h": ("sdxl", "plus", 16, 2048, H, "SDXL · plus · 16 tokens · needs CLIP ViT-H"),
    "ip-adapter-plus-face_sdxl_vit-h": (
        "sdxl",
        "plus",
        16,
        2048,
        H,
        "SDXL · plus · 16 tokens · needs CLIP ViT-H",
    ),
    "ip_plus_composition_sd15": ("sd15", "plus", 16, 768, H, "SD1.5 · plus · 16 tokens · needs CLIP ViT-H"),
    "ip_plus_composition_sdxl": ("sdxl", "plus", 16, 2048, H, "SDXL · plus · 16 tokens · needs CLIP ViT-H"),
    "Kolors-IP-Adapter-Plus": ("kolors", "plus", 16, 2048, L336, "Kolors · plus · 16 tokens · needs CLIP ViT-L-336"),
    "noobIPAMARK1_mark1": ("sdxl", "base", 4, 2048, G, "SDXL · base · 4 tokens · needs CLIP ViT-bigG"),
    "kataragi_ip_adapter_Noobtest_800000": (
        "sdxl",
        "base",
        4,
        2048,
        H,
        "SDXL · base · 4 tokens · needs CLIP ViT-H",
    ),
    "styleIpadapterFor_v10": ("sdxl", "base", 4, 2048, G, "SDXL · base · 4 tokens · needs CLIP ViT-bigG"),
}

REFUSED = {
    "ip-adapter-faceid_sd15": "a FaceID adapter",
    "ip-adapter-faceid-plus_sd15": "a FaceID-plus adapter",
    "ip-adapter-faceid-plusv2_sd15": "a FaceID-plus adapter",
    "ip-adapter-faceid-portrait_sd15": "a FaceID-portrait adapter",
    "ip-adapter-faceid-portrait-v11_sd15": "a FaceID-portrait adapter",
    "ip-adapter-faceid_sdxl": "a FaceID adapter",
    "ip-adapter-faceid-plusv2_sdxl": "a FaceID-plus adapter",
    "ip-adapter-faceid-portrait_sdxl": "a FaceID-portrait adapter",
    "ip-adapter-faceid-portrait_sdxl_unnorm": "an InstantID or FaceID-portrait adapter",
    "InstantID_ip-adapter": "an InstantID or FaceID-portrait adapter",
    "Kolors-IP-Adapter-FaceID-Plus": "a FaceID-plus adapter",
    "XLabs_flux-ip-adapter_v1": "an IP-Adapter for Flux",
    "XLabs_flux-ip-adapter_v2": "an IP-Adapter for Flux",
    "InstantX_FLUX.1-dev-IP-Adapter": "an IP-Adapter for Flux",
    "InstantX_SD3.5-Large-IP-Adapter": "an IP-Adapter for Stable Diffusion 3.5",
    "fooocus_ip_negative": "a file of ready image tokens",
    "sigclip_vision_patch14_384": "an image encoder",
}

ENCODER_FILES = {
    "clip_vision_vit-h": (H, 32, 16, 1024, "gelu", "hf"),
    "clip_vision_vit-bigg": (G, 48, 16, 1280, "gelu", "hf"),
    "clip-vit-large-patch14": (L, 24, 16, 768, "quick_gelu", "hf"),
    "clip-vit-large-patch14-336": (L336, 24, 16, 768, "quick_gelu", "hf"),
    "fooocus_clip_vision_vit_h": (H, 32, 16, 1024, "gelu", "openclip"),
}


def tensors_of(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {name: TensorInfo(tuple(shape), torch.float16) for name, shape in shapes.items()}


def public(name: str) -> Tensors:
    """Names and shapes of a public file."""
    found: dict[str, tuple[int, ...]] = {}
    for template, runs in ZOO["layouts"][ZOO["files"][name]].items():
        for shape, *ranges in runs:
            numbers = [i for first, last, step in ranges[0] for i in range(first, last + 1, step)] if ranges else [""]
            found |= {template.replace("#", str(number)): tuple(shape) for number in numbers}
    return tensors_of(found)


def sentence(error: pytest.ExceptionInfo[IPAdapterError]) -> str:
    """The message, which must be one sentence that ends like one."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert ". " not in text
    return text


def small(variant: str, widths: list[int], context: int = 64, embedding: int = 128) -> Tensors:
    """An adapter for a UNet of any widths, with its image projection from this project's own module."""
    layers = {
        f"{2 * i + 1}.to_{kind}_ip.weight": torch.zeros(width, context)
        for i, width in enumerate(widths)
        for kind in "kv"
    }
    projections = {
        "base": {
            "proj.weight": torch.zeros(4 * context, embedding),
            "proj.bias": torch.zeros(4 * context),
            "norm.weight": torch.zeros(context),
            "norm.bias": torch.zeros(context),
        },
        "full-face": {
            "proj.0.weight": torch.zeros(embedding, embedding),
            "proj.0.bias": torch.zeros(embedding),
            "proj.2.weight": torch.zeros(context, embedding),
            "proj.2.bias": torch.zeros(context),
            "proj.3.weight": torch.zeros(context),
            "proj.3.bias": torch.zeros(context),
        },
    }
    if variant == "plus":
        from lib_ipadapter.projections import Resampler

        module = Resampler(
            dim=96, depth=2, dim_head=64, heads=3, num_queries=8, embedding_dim=embedding, output_dim=context
        )
        projections["plus"] = module.state_dict()
    # The project's own model must accept what recognition accepts.
    IPAdapterModel({"image_proj": projections[variant], "ip_adapter": layers}, variant == "plus", context, embedding, 4)
    return tensors_of(
        {f"image_proj.{k}": tuple(v.shape) for k, v in projections[variant].items()}
        | {f"ip_adapter.{k}": tuple(v.shape) for k, v in layers.items()}
    )


@pytest.mark.parametrize("name", SUPPORTED)
def test_public_adapters(name: str) -> None:
    family, variant, tokens, context, encoder, description = SUPPORTED[name]
    kind = recognise_adapter(public(name))
    assert (kind.family, kind.variant, kind.tokens, kind.context_width) == (family, variant, tokens, context)
    assert encoder_needed(kind) == encoder
    assert kind.description == description
    channels = SD_V12_CHANNELS if family == "sd15" else SD_XL_CHANNELS
    assert list(kind.layer_widths) == channels[::2]
    assert (kind.image_proj_prefix, kind.ip_adapter_prefix) == ("image_proj.", "ip_adapter.")
    heads = {"sd15": 12, "sdxl": 20, "kolors": 12}[family] if variant == "plus" else 0
    assert (kind.heads, kind.depth) == (heads, 4 if heads else 0)
    row = next(row for row in ENCODERS if row.name == encoder)
    assert kind.output == ("image_embeds" if variant == "base" else "penultimate")
    assert kind.embedding_width == (row.projection if variant == "base" else row.width)


@pytest.mark.parametrize("name", [*REFUSED, *ENCODER_FILES])
def test_other_public_files_are_no_adapters(name: str) -> None:
    with pytest.raises(IPAdapterError) as error:
        recognise_adapter(public(name), name)
    assert sentence(error).startswith(f"{name} is {REFUSED.get(name, 'an image encoder')},")


def test_every_public_file_is_judged() -> None:
    assert set(ZOO["files"]) == set(SUPPORTED) | set(REFUSED) | set(ENCODER_FILES)


@pytest.mark.parametrize("name", ENCODER_FILES)
def test_public_encoders(name: str) -> None:
    kind = recognise_encoder(public(name))
    found = (kind.name, kind.layers, kind.heads, kind.projection, kind.activation, kind.layout)
    assert found == ENCODER_FILES[name]
    assert kind.prefix == ""
    assert kind.positions == (577 if name.endswith("336") else 257)


@pytest.mark.parametrize("name", [*SUPPORTED, *REFUSED])
def test_other_public_files_are_no_encoders(name: str) -> None:
    with pytest.raises(IPAdapterError) as error:
        recognise_encoder(public(name))
    if name.startswith("sigclip"):
        assert "a SigLIP image encoder (1152 wide)" in sentence(error)
    else:
        assert "not an image encoder" in sentence(error)


def test_prefixes() -> None:
    tensors = public("ip-adapter-plus_sd15")
    renames = {"image_proj.": "image_proj_model.", "ip_adapter.": "adapter_modules."}
    raw = {renames[key.split(".")[0] + "."] + key.split(".", 1)[1]: info for key, info in tensors.items()}
    raw |= tensors_of(
        {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight": (320, 768)}
    )
    kind = recognise_adapter(raw)
    assert (kind.image_proj_prefix, kind.ip_adapter_prefix) == ("image_proj_model.", "adapter_modules.")
    assert kind.description == SUPPORTED["ip-adapter-plus_sd15"][-1]
    wrapped = recognise_adapter({f"module.{key}": info for key, info in raw.items()})
    assert (wrapped.image_proj_prefix, wrapped.ip_adapter_prefix) == (
        "module.image_proj_model.",
        "module.adapter_modules.",
    )
    mixed = {key.replace("image_proj.", "ip_adapter_proj_model."): info for key, info in tensors.items()}
    assert recognise_adapter(mixed).image_proj_prefix == "ip_adapter_proj_model."


@pytest.mark.parametrize("variant", ["base", "plus", "full-face"])
@pytest.mark.parametrize(("layers", "family"), [(16, "sd15"), (70, "sdxl")])
def test_small_unets(variant: str, layers: int, family: str) -> None:
    widths = [8 * (i + 1) for i in range(layers)]
    kind = recognise_adapter(small(variant, widths))
    assert (kind.family, kind.variant, kind.context_width) == (family, variant, 64)
    # File order is numeric, not alphabetical: 1, 3, 5, ... 11, 13.
    assert kind.layer_widths == tuple(widths)
    assert encoder_needed(kind) == "demo ViT/14"
    assert kind.tokens == {"base": 4, "plus": 8, "full-face": 257}[variant]
    assert (kind.heads, kind.depth) == ((3, 2) if variant == "plus" else (0, 0))


def test_sd2_by_its_context_width() -> None:
    kind = recognise_adapter(small("base", [320] * 16, context=1024, embedding=1024))
    assert kind.description == "SD2 · base · 4 tokens · needs CLIP ViT-H"


def test_penultimate_widths() -> None:
    for embedding, encoder in ((1280, H), (1664, G), (1024, L336)):
        assert encoder_needed(recognise_adapter(small("plus", [320] * 16, 768, embedding))) == encoder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ip_adapter.7.to_v_ip.weight": None}, "ip_adapter.7.to_k_ip.weight but no to_v_ip.weight"),
        ({"ip_adapter.9.to_k_ip.weight": None}, "ip_adapter.9.to_v_ip.weight but no to_k_ip.weight"),
        (
            {"ip_adapter.9.to_v_ip.weight": (80, 32)},
            "image tokens 64 wide, but ip_adapter.9.to_v_ip.weight takes 32",
        ),
        ({"ip_adapter.9.to_v_ip.weight": (12, 64)}, r"shape [12, 64] instead of [40, 64]"),
        ({"ip_adapter.9.to_v_ip.weight": (40,)}, "2 dimensions"),
        ({"ip_adapter.9.to_k_ip.weight": (0, 64)}, "none of size 0"),
        (
            {"ip_adapter.31.to_k_ip.weight": None, "ip_adapter.31.to_v_ip.weight": None},
            "15 cross-attention layers",
        ),
        ({"ip_adapter.1.to_k_ip.bias": (8,)}, "ip_adapter.1.to_k_ip.bias, which belongs to some other kind"),
        ({"image_proj.extra.weight": (8,)}, "image_proj.extra.weight, which belongs to some other kind"),
        ({"image_proj.proj.bias": None}, "lacks the tensor image_proj.proj.bias"),
        ({"image_proj.proj.bias": (255,)}, "shape [255] instead of [256]"),
        ({"image_proj.norm.weight": (60,)}, "no multiple of its token width 60"),
        ({"image_proj.norm.bias": (32,)}, "shape [32] instead of [64]"),
        ({"image_proj.proj.weight": None}, "image projection of an unknown kind"),
        ({"image_proj.proj.weight": (256, 999)}, "pooled image embeddings 999 wide"),
    ],
)
def test_damaged_adapters(change: dict[str, tuple[int, ...] | None], said: str) -> None:
    tensors = small("base", [8 * (i + 1) for i in range(16)])
    for key, shape in change.items():
        tensors.pop(key, None)
        if shape is not None:
            tensors[key] = TensorInfo(shape, torch.float16)
    with pytest.raises(IPAdapterError) as error:
        recognise_adapter(tensors)
    assert said in sentence(error)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("image_proj.layers.1.0.to_kv.weight", "lacks the tensor image_proj.layers.1.0.to_kv.weight"),
        ("image_proj.layers.0.0.to_q.weight", "lacks the tensor image_proj.layers.0.0.to_q.weight"),
        ("image_proj.latents", "unknown kind"),
    ],
)
def test_resampler_without_a_tensor(name: str, said: str) -> None:
    tensors = small("plus", [8] * 16)
    del tensors[name]
    with pytest.raises(IPAdapterError) as error:
        recognise_adapter(tensors)
    assert said in sentence(error)


def test_resampler_with_odd_heads() -> None:
    tensors = small("plus", [8] * 16)
    tensors["image_proj.layers.0.0.to_q.weight"] = TensorInfo((100, 96), torch.float16)
    with pytest.raises(IPAdapterError) as error:
        recognise_adapter(tensors)
    assert "attention 100 wide" in sentence(error)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("key", ["image_proj.proj.bias", "ip_adapter.7.to_v_ip.weight"])
def test_weights_that_are_no_floating_point_numbers(key: str, dtype: torch.dtype) -> None:
    tensors = small("base", [8] * 16)
    tensors[key] = TensorInfo(tensors[key].shape, dtype)
    with pytest.raises(IPAdapterError) as error:
        recognise_adapter(tensors)
    assert f"holds the tensor {key} as {str(dtype).removeprefix('torch.')}" in sentence(error)


@pytest.mark.parametrize("half", ["image_proj.", "ip_adapter."])
def test_half_an_adapter(half: str) -> None:
    tensors = {key: info for key, info in public("ip-adapter_sd15").items() if key.startswith(half)}
    with pytest.raises(IPAdapterError) as error:
        recognise_adapter(tensors)
    assert "only one half of an IP-Adapter" in sentence(error)


ELSEWHERE = [
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA", "models/Lora"),
    (["unet.down_blocks.0.attn.to_q.lora_A.weight"], "a LoRA", "models/Lora"),
    (["lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"], "a LoRA", "models/Lora"),
    (
        [
            f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn{n}_to_{part}.{end}"
            for n in (1, 2)
            for part in ("q", "k", "v", "out_0")
            for end in ("lora_down.weight", "lora_up.weight", "alpha")
        ],
        "such as that of a FaceID adapter",
        "models/Lora",
    ),
    (
        ["lora_unet_mid_block_attn1_to_q.lora_up.weight", "lora_unet_mid_block_ff_net_2.lora_up.weight"],
        "is a LoRA, not an",
        "models/Lora",
    ),
    (
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
        "a Stable Diffusion checkpoint",
        "models/Stable-diffusion",
    ),
    (
        ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"],
        "such as Flux or SD3",
        "models/Stable-diffusion",
    ),
    (["double_blocks.0.img_attn.qkv.weight"], "such as Flux or SD3", "models/Stable-diffusion"),
    (["encoder.down.0.block.0.conv1.weight", "quant_conv.weight"], "a VAE", "models/VAE"),
    (["decoder.up_blocks.0.resnets.0.conv1.weight"], "a VAE", "models/VAE"),
    (["control_model.input_blocks.0.0.weight"], "a ControlNet", "models/ControlNet"),
    (
        ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.x"],
        "a ControlNet",
        "models/ControlNet",
    ),
    (["down_blocks.0.resnets.0.conv1.weight"], "a UNet in the layout of diffusers", "convert"),
    (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text encoder", "models/text_encoder"),
    (["string_to_param.*"], "a textual inversion", "embeddings"),
    (["model.1.sub.0.RDB1.conv1.0.weight"], "an upscaler", "folder"),
    (["image_proj.mapping_0.0.weight", "ip_adapter.1.to_k_ip.weight"], "a PuLID adapter", "face"),
    (["id_encoder.vision_model.pre_layrnorm.weight", "lora_weights.x.to_q_lora.up.weight"], "a PhotoMaker", "choose"),
    (["redux_up.weight", "redux_down.weight"], "a Redux adapter for Flux", "choose a base"),
    (["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"], "a motion module", "AnimateDiff"),
    (["id_adapter.body.0.weight"], "a PuLID adapter", "face"),
    (["data"], "a file of ready image tokens", "negative"),
]


@pytest.mark.parametrize(("names", "what", "where"), ELSEWHERE)
def test_files_that_belong_elsewhere(names: list[str], what: str, where: str) -> None:
    tensors = tensors_of(dict.fromkeys(names, (4, 4)))
    for recognise in (recognise_adapter, recognise_encoder):
        with pytest.raises(IPAdapterError) as error:
            recognise(tensors)
        assert what in sentence(error)
        assert where in sentence(error)


@pytest.mark.parametrize("recognise", [recognise_adapter, recognise_encoder])
def test_nothing_known(recognise: object) -> None:
    assert callable(recognise)
    with pytest.raises(IPAdapterError) as error:
        recognise(tensors_of({"foo": (1,), "bar": (2,)}), "x.bin")
    assert "x.bin is no" in sentence(error)
    assert "2 tensors such as foo, bar" in sentence(error)
    with pytest.raises(IPAdapterError) as error:
        recognise({})
    assert "holds no tensors" in sentence(error)


@pytest.mark.parametrize("prefix", ["clip_vision_model.", "model.", "image_encoder.image_encoder."])
@pytest.mark.parametrize("name", ["clip_vision_vit-h", "fooocus_clip_vision_vit_h"])
def test_encoders_under_a_prefix(prefix: str, name: str) -> None:
    tensors = {prefix + key: info for key, info in public(name).items()}
    kind = recognise_encoder(tensors)
    assert (kind.name, kind.prefix) == (H, prefix)


def test_full_clip_with_its_text_tower() -> None:
    text = {
        "text_model.embeddings.position_ids": (1, 77),
        "text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "text_projection.weight": (768, 768),
        "logit_scale": (),
    }
    assert recognise_encoder({**tensors_of(text), **public("clip-vit-large-patch14")}).name == L


def demo_encoder(layers: int) -> Tensors:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(  # type: ignore[no-untyped-call]
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
        projection_dim=128,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        module = CLIPVisionModelWithProjection(config)
    return tensors_of({key: tuple(value.shape) for key, value in module.state_dict().items()})


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_demo_encoder_of_any_depth(layers: int) -> None:
    kind = recognise_encoder(demo_encoder(layers))
    assert (kind.name, kind.layers, kind.heads, kind.mlp_width) == ("demo ViT/14", layers, 2, 256)


def test_the_widths_that_transformers_gives_public_towers() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    for row in ENCODERS:
        config = CLIPVisionConfig(  # type: ignore[no-untyped-call]
            hidden_size=row.width,
            intermediate_size=row.mlp_width,
            num_hidden_layers=row.layers,
            num_attention_heads=row.heads,
            image_size=row.image_size,
            patch_size=row.patch,
            projection_dim=row.projection,
        )
        with torch.device("meta"):
            module = CLIPVisionModelWithProjection(config)
        tensors = tensors_of({key: tuple(value.shape) for key, value in module.state_dict().items()})
        assert recognise_encoder(tensors) == row


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visual_projection.weight": None}, "1280 wide without its projection (visual_projection.weight)"),
        (
            {"vision_model.encoder.layers.7.mlp.fc2.bias": None},
            "lacks the tensor vision_model.encoder.layers.7.mlp.fc2.bias",
        ),
        ({"vision_model.encoder.layers.7.layer_norm1.weight": (7,)}, "shape [7] instead of [1280]"),
        ({"vision_model.encoder.layers.31.self_attn.q_proj.weight": None}, "1280 wide with 31 layers"),
        ({"vision_model.embeddings.position_embedding.weight": (197, 1280)}, "pictures of 196"),
        ({"vision_model.embeddings.patch_embedding.weight": (1280, 3, 16, 16)}, "patches of 16 pixels"),
        ({"visual_projection.weight": (512, 1280)}, "embeddings 512 wide"),
        (
            {"vision_model.embeddings.position_embedding.weight": (258, 1280)},
            "shape [258, 1280] instead of [257, 1280]",
        ),
        ({"vision_model.embeddings.position_embedding.weight": (0, 1280)}, "none of size 0"),
    ],
)
def test_damaged_and_unknown_towers(change: dict[str, tuple[int, ...] | None], said: str) -> None:
    tensors = public("clip_vision_vit-h")
    for key, shape in change.items():
        if shape is None:
            del tensors[key]
        else:
            tensors[key] = TensorInfo(shape, torch.float16)
    with pytest.raises(IPAdapterError) as error:
        recognise_encoder(tensors)
    assert said in sentence(error)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                *list(public("ip-adapter-plus_sd15"))[:60],
                *list(public("fooocus_clip_vision_vit_h"))[:40],
                *list(public("clip_vision_vit-h"))[:40],
                "image_proj.proj.weight",
                "image_proj.proj.2.weight",
                "image_proj.proj.3.weight",
                "image_proj.norm.weight",
            ]
        ),
        st.lists(st.sampled_from([0, 1, 2, 64, 128, 768, 1280]), max_size=5),
        max_size=40,
    )
)
def test_any_names_and_shapes_end_in_a_sentence(shapes: dict[str, list[int]]) -> None:
    tensors = tensors_of({key: tuple(shape) for key, shape in shapes.items()})
    for recognise in (recognise_adapter, recognise_encoder):
        with pytest.raises(IPAdapterError) as error:
            recognise(tensors)
        sentence(error)

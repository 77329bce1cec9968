"""The image encoder against transformers' CLIP on the same random weights, in every file layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from lib_ipadapter.clip_vision import CLIPVision, load_clip_vision
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.recognise import ENCODERS, EncoderKind

DEMO = EncoderKind("demo ViT/14", 128, 3, 2, 14, 224, 128, "gelu", 512, "hf", "")
SMALL = EncoderKind("small", 96, 4, 3, 7, 28, 40, "gelu", 200, "hf", "")
ONE_LAYER = replace(SMALL, layers=1)
QUICK = replace(SMALL, activation="quick_gelu", heads=4)
UNEVEN = replace(SMALL, image_size=33)  # the patches don't cover the last pixels
VIT_H = replace(next(row for row in ENCODERS if row.name == "ViT-H/14"), layers=2, layout="hf", prefix="")

State = dict[str, Tensor]


def config_of(kind: EncoderKind) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=kind.width,
        intermediate_size=kind.mlp_width,
        projection_dim=kind.projection,
        num_hidden_layers=kind.layers,
        num_attention_heads=kind.heads,
        image_size=kind.image_size,
        patch_size=kind.patch,
        hidden_act=kind.activation,
    )


def reference(kind: EncoderKind, scale: float = 1.0, seed: int = 0) -> CLIPVisionModelWithProjection:
    """transformers' tower with weights that leave nothing at its neutral value; ``scale`` is that of its states."""
    model = CLIPVisionModelWithProjection(config_of(kind)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "layrnorm" in name:
                parameter.copy_(0.3 * noise + (name.endswith("weight")))
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            if "out_proj" in name or "fc2" in name or "pre_layrnorm" in name:
                parameter *= scale
    return model


def openclip(hf: State, layers: int) -> State:
    """The tower's weights as OpenCLIP names and stores them."""
    state = {
        "visual.class_embedding": hf["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": hf["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": hf["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": hf["visual_projection.weight"].mT.clone(),
        "visual.ln_pre.weight": hf["vision_model.pre_layrnorm.weight"],
        "visual.ln_pre.bias": hf["vision_model.pre_layrnorm.bias"],
        "visual.ln_post.weight": hf["vision_model.post_layernorm.weight"],
        "visual.ln_post.bias": hf["vision_model.post_layernorm.bias"],
    }
    for i in range(layers):
        theirs, ours = f"vision_model.encoder.layers.{i}.", f"visual.transformer.resblocks.{i}."
        for p in ("weight", "bias"):
            qkv = [hf[f"{theirs}self_attn.{one}_proj.{p}"] for one in "qkv"]
            state[f"{ours}attn.in_proj_{p}"] = torch.cat(qkv)
            state[f"{ours}attn.out_proj.{p}"] = hf[f"{theirs}self_attn.out_proj.{p}"]
            state[f"{ours}ln_1.{p}"] = hf[f"{theirs}layer_norm1.{p}"]
            state[f"{ours}ln_2.{p}"] = hf[f"{theirs}layer_norm2.{p}"]
            state[f"{ours}mlp.c_fc.{p}"] = hf[f"{theirs}mlp.fc1.{p}"]
            state[f"{ours}mlp.c_proj.{p}"] = hf[f"{theirs}mlp.fc2.{p}"]
    return state


def pixels_for(kind: EncoderKind, pictures: int = 2) -> Tensor:
    return torch.randn(pictures, 3, kind.image_size, kind.image_size, generator=torch.Generator().manual_seed(7))


def assert_close(out: Tensor, wanted: Tensor, relative: float = 1e-5) -> None:
    assert out.shape == wanted.shape
    assert float((out - wanted).abs().max() / wanted.abs().max()) <= relative


@torch.no_grad()
def assert_same(tower: CLIPVision, model: CLIPVisionModelWithProjection, relative: float = 1e-5) -> None:
    pixels = pixels_for(tower.kind)
    wanted = model(pixels, output_hidden_states=True)
    out = tower(pixels)
    assert_close(out.image_embeds, wanted.image_embeds, relative)
    assert_close(out.penultimate, wanted.hidden_states[-2], relative)


def tower_of(kind: EncoderKind, state: State) -> CLIPVision:
    return CLIPVision.from_tensors(kind, state, "encoder.safetensors")


def saved(folder: Path, state: State, name: str = "encoder.safetensors") -> Path:
    path = folder / name
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
    return path


# The same numbers


@pytest.mark.parametrize("layout", ["hf", "openclip"])
@pytest.mark.parametrize("kind", [SMALL, ONE_LAYER, QUICK, UNEVEN], ids=["small", "one layer", "quick gelu", "uneven"])
def test_small_towers_equal_transformers(kind: EncoderKind, layout: str) -> None:
    model = reference(kind)
    state = model.state_dict() if layout == "hf" else openclip(model.state_dict(), kind.layers)
    assert_same(tower_of(replace(kind, layout=layout), state), model)


@pytest.mark.parametrize("layout", ["hf", "openclip"])
def test_vit_h_width_with_large_states_equals_transformers(layout: str) -> None:
    model = reference(VIT_H, scale=20)
    state = model.state_dict() if layout == "hf" else openclip(model.state_dict(), VIT_H.layers)
    tower = tower_of(replace(VIT_H, layout=layout), state)
    with torch.no_grad():
        assert float(tower(pixels_for(VIT_H, 1)).penultimate.abs().max()) > 100
    assert_same(tower, model)


@torch.no_grad()
def test_the_activation_is_the_kinds() -> None:
    state = reference(SMALL).state_dict()
    exact, quick = (tower_of(replace(SMALL, activation=name), state) for name in ("gelu", "quick_gelu"))
    pixels = pixels_for(SMALL)
    assert not torch.allclose(exact(pixels).image_embeds, quick(pixels).image_embeds, atol=1e-3)


@torch.no_grad()
def test_pictures_of_a_batch_do_not_touch_each_other() -> None:
    tower = tower_of(SMALL, reference(SMALL).state_dict())
    pixels = pixels_for(SMALL, 3)
    together, alone = tower(pixels), tower(pixels[1:2])
    assert_close(together.image_embeds[1:2], alone.image_embeds)
    assert_close(together.penultimate[1:2], alone.penultimate)


# Files


def with_text_tower(model: CLIPVisionModelWithProjection) -> State:
    """A whole CLIP as transformers saves it, with the position ids that older versions stored."""
    vision = config_of(DEMO)
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 8,
    }
    config = CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=DEMO.projection)
    state = dict(CLIPModel(config).state_dict())
    state.update(model.state_dict())
    state["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    state["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    return state


def openclip_with_text_tower(model: CLIPVisionModelWithProjection) -> State:
    state = openclip(model.state_dict(), DEMO.layers)
    for p, shape in (("weight", (96, 32)), ("bias", (96,))):
        state[f"transformer.resblocks.0.attn.in_proj_{p}"] = torch.randn(shape)
    return state | {
        "token_embedding.weight": torch.randn(50, 32),
        "positional_embedding": torch.randn(8, 32),
        "ln_final.weight": torch.ones(32),
        "ln_final.bias": torch.zeros(32),
        "text_projection": torch.randn(32, 128),
        "logit_scale": torch.tensor(2.0),
    }


FILES: dict[str, Callable[[CLIPVisionModelWithProjection], State]] = {
    "hf": lambda model: model.state_dict(),
    "hf with position ids": lambda model: (
        model.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(257)[None]}
    ),
    "hf, whole CLIP": with_text_tower,
    "hf, prefixed": lambda model: {f"image_encoder.{key}": value for key, value in model.state_dict().items()},
    "openclip": lambda model: openclip(model.state_dict(), DEMO.layers),
    "openclip, whole CLIP": openclip_with_text_tower,
    "openclip, prefixed": lambda model: {
        f"embedder.model.{key}": value for key, value in openclip(model.state_dict(), DEMO.layers).items()
    },
}


@pytest.mark.parametrize("layout", FILES)
def test_every_file_layout_loads(tmp_path: Path, layout: str) -> None:
    model = reference(DEMO)
    tower = load_clip_vision(saved(tmp_path, FILES[layout](model)))
    assert tower.kind.name == "demo ViT/14"
    assert tower.kind.layers == 3
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not any(parameter.is_meta for parameter in tower.parameters())
    assert_same(tower, model)


@pytest.mark.parametrize("suffix", ["bin", "pth"])
def test_torch_files_load(tmp_path: Path, suffix: str) -> None:
    model = reference(DEMO)
    path = tmp_path / f"pytorch_model.{suffix}"
    torch.save(model.state_dict(), path)
    assert_same(load_clip_vision(path), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["hf", "openclip"])
@torch.no_grad()
def test_the_files_dtype_stays(tmp_path: Path, dtype: torch.dtype, layout: str) -> None:
    model = reference(DEMO)
    path = saved(tmp_path, {key: value.to(dtype) for key, value in FILES[layout](model).items()})
    tower = load_clip_vision(path)
    assert {parameter.dtype for parameter in tower.parameters()} == {dtype}
    rounded = reference(DEMO)
    rounded.load_state_dict({key: value.to(dtype).float() for key, value in model.state_dict().items()})
    out = tower(pixels_for(DEMO))  # float32 pixels go in as they come from clip_preprocess
    assert out.image_embeds.dtype == out.penultimate.dtype == dtype
    wanted = rounded(pixels_for(DEMO)).image_embeds
    assert_close(out.image_embeds.float(), wanted, 0.01 if dtype == torch.float16 else 0.1)
    assert_same(tower.float(), rounded)


def test_mixed_dtypes_become_the_widest() -> None:
    model = reference(SMALL)
    state = model.half().float().state_dict()
    mixed = {key: value.half() if "mlp" in key else value for key, value in state.items()}
    tower = tower_of(SMALL, mixed)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    assert_same(tower, model)


def test_weights_are_shared_and_nothing_is_drawn_at_random() -> None:
    state = reference(SMALL).state_dict()
    before = torch.get_rng_state()
    tower = tower_of(SMALL, state)
    assert torch.equal(torch.get_rng_state(), before)
    key = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert tower.state_dict()["blocks.0.fc_1.weight"].data_ptr() == state[key].data_ptr()


# What can be wrong


def test_a_missing_tensor_is_named() -> None:
    state = reference(SMALL).state_dict()
    del state["vision_model.encoder.layers.2.layer_norm2.bias"]
    with pytest.raises(IPAdapterError, match=r"encoder\.safetensors .*layers\.2\.layer_norm2\.bias.*download it again"):
        tower_of(SMALL, state)


def test_several_missing_tensors_are_counted() -> None:
    state = openclip(reference(SMALL).state_dict(), 4)
    missing = {key: value for key, value in state.items() if "resblocks.3.mlp" not in key}
    with pytest.raises(IPAdapterError, match=r"resblocks\.3\.mlp\.c_fc\.bias and 3 more"):
        tower_of(replace(SMALL, layout="openclip"), missing)


@pytest.mark.parametrize(
    ("key", "shape", "layout"),
    [
        ("vision_model.embeddings.position_embedding.weight", (10, 96), "hf"),
        ("visual_projection.weight", (96, 40), "hf"),
        ("visual.proj", (40, 96), "openclip"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (289, 96), "openclip"),
        ("visual.transformer.resblocks.0.attn.in_proj_bias", (3, 96), "openclip"),
        ("visual.conv1.weight", (), "openclip"),
    ],
)
def test_an_odd_shape_is_named(key: str, shape: tuple[int, ...], layout: str) -> None:
    state = reference(SMALL).state_dict()
    state = dict(state) if layout == "hf" else openclip(state, 4)
    assert key in state
    needed = list(state[key].shape)
    state[key] = torch.zeros(shape)
    with pytest.raises(IPAdapterError) as caught:
        tower_of(replace(SMALL, layout=layout), state)
    for part in (key, str(list(shape)), str(needed), "encoder.safetensors"):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.float64])
def test_a_dtype_that_cannot_compute_is_named(dtype: torch.dtype) -> None:
    state = dict(reference(SMALL).state_dict())
    key = "vision_model.encoder.layers.1.mlp.fc2.weight"
    state[key] = state[key].to(dtype)
    with pytest.raises(
        IPAdapterError, match=rf"{key}.*{str(dtype).removeprefix('torch.')}.*float32, float16, bfloat16"
    ):
        tower_of(SMALL, state)


def test_damaged_files_raise_a_sentence(tmp_path: Path) -> None:
    state = dict(reference(DEMO).state_dict())
    whole = saved(tmp_path, state)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-1000])
    del state["vision_model.post_layernorm.weight"]
    for path in (cut, saved(tmp_path, state, "lacking.safetensors"), tmp_path / "absent.safetensors"):
        with pytest.raises(IPAdapterError, match=path.name):
            load_clip_vision(path)


@pytest.mark.parametrize("shape", [(1, 3, 224, 223), (1, 3, 14, 14), (3, 28, 28), (1, 4, 28, 28), (1, 28, 28, 3)])
def test_pixels_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    tower = tower_of(SMALL, reference(SMALL).state_dict())
    with pytest.raises(IPAdapterError, match="28, 28"):
        tower(torch.zeros(shape))

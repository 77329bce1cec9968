"""``load_ip_adapter`` and ``preprocess`` against transformers' CLIP and diffusers' projections."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lib_ipadapter import IPAdapterError, clip_preprocess, engine, load_ip_adapter, preprocess
from tests.adapter_files import Nested, base_adapter, full_face_adapter, plus_adapter, save
from tests.photos import photo

WIDTHS = [32, 48] * 8


@pytest.fixture(autouse=True)
def _fresh_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_default", engine.Engine())


CONTEXT = 64


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPVisionModelWithProjection]:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, image_size=224,
        patch_size=14, projection_dim=128, hidden_act="gelu",
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    path = tmp_path_factory.mktemp("encoder") / "any-name.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path, model


@pytest.fixture(scope="module")
def square() -> np.ndarray:
    return np.asarray(photo("astronaut").resize((224, 224)))


def their_tokens(adapter: Nested, features: Tensor) -> Tensor:
    projection = UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers(
        types.SimpleNamespace(), {k: v.clone() for k, v in adapter["image_proj"].items()}, low_cpu_mem_usage=False
    )
    if features.ndim == 2:
        assert isinstance(projection, ImageProjection)
    elif "latents" in adapter["image_proj"]:
        assert isinstance(projection, IPAdapterPlusImageProjection)
    return projection(features)


def assert_kv(kv: list[Tensor], adapter: Nested, tokens: Tensor) -> None:
    assert len(kv) == 2 * len(WIDTHS)
    for layer in range(len(WIDTHS)):
        for offset, kind in enumerate("kv"):
            wanted = tokens @ adapter["ip_adapter"][f"{2 * layer + 1}.to_{kind}_ip.weight"].T
            error = (kv[2 * layer + offset].cpu().float() - wanted).abs().max() / wanted.abs().max()
            assert float(error) < 1e-4


KINDS = {"base": base_adapter, "plus": plus_adapter, "full-face": full_face_adapter}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_conds_and_unconds(
    kind: str, encoder: tuple[Path, CLIPVisionModelWithProjection], square: np.ndarray, tmp_path: Path
) -> None:
    path, clip = encoder
    adapter = KINDS[kind](WIDTHS, CONTEXT)
    file = save(adapter, tmp_path / "adapter.safetensors")
    load_ip_adapter(str(path), None, str(file))
    conds, unconds = preprocess(square, str(file))

    pixels = clip_preprocess(torch.from_numpy(square.astype(np.float32) / 255)[None])
    seen, nothing = (clip(p, output_hidden_states=True) for p in (pixels, torch.zeros_like(pixels)))
    if kind == "base":
        features, no_features = seen.image_embeds, torch.zeros_like(seen.image_embeds)
    else:
        features, no_features = seen.hidden_states[-2], nothing.hidden_states[-2]
    assert_kv(conds, adapter, their_tokens(adapter, features))
    assert_kv(unconds, adapter, their_tokens(adapter, no_features))
    again, same_unconds = preprocess(square, str(file))
    assert all(torch.equal(a, b) for a, b in zip(conds, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(unconds, same_unconds, strict=True))


@torch.no_grad()
def test_a_negative_file_goes_straight_into_the_layers(
    encoder: tuple[Path, CLIPVisionModelWithProjection], square: np.ndarray, tmp_path: Path
) -> None:
    adapter = base_adapter(WIDTHS, CONTEXT, seed=1)
    file = save(adapter, tmp_path / "adapter.safetensors")
    negative = tmp_path / "negative.safetensors"
    save_file({"data": torch.randn(1, 16, CONTEXT)}, negative)
    load_ip_adapter(str(encoder[0]), str(negative), str(file))
    assert_kv(preprocess(square, str(file))[1], adapter, load_file(negative)["data"])

    other = save(adapter, tmp_path / "other.safetensors")
    wide = tmp_path / "wide.safetensors"
    save_file({"data": torch.zeros(1, 16, 2048)}, wide)
    load_ip_adapter(str(encoder[0]), str(wide), str(other))
    with pytest.raises(IPAdapterError, match="2048 wide and the adapter takes 64"):
        preprocess(square, str(other))


@torch.no_grad()
def test_a_negative_named_alone_or_later_is_used(
    encoder: tuple[Path, CLIPVisionModelWithProjection], square: np.ndarray, tmp_path: Path
) -> None:
    adapter = base_adapter(WIDTHS, CONTEXT, seed=3)
    file = save(adapter, tmp_path / "adapter.safetensors")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for path in (first, second):
        save_file({"data": torch.randn(1, 16, CONTEXT)}, path)
    load_ip_adapter(str(encoder[0]), str(first), None)
    load_ip_adapter(None, None, str(file))
    assert_kv(preprocess(square, str(file))[1], adapter, load_file(first)["data"])
    load_ip_adapter("", str(second), "")
    assert_kv(preprocess(square, str(file))[1], adapter, load_file(second)["data"])
    with pytest.raises(IPAdapterError, match="nowhere"):
        load_ip_adapter(None, str(tmp_path / "nowhere.safetensors"), None)


def test_what_does_not_go_together_is_refused(
    encoder: tuple[Path, CLIPVisionModelWithProjection], square: np.ndarray, tmp_path: Path
) -> None:
    vit_h = save(base_adapter(WIDTHS, CONTEXT, embedding=1024), tmp_path / "vit-h.safetensors")
    with pytest.raises(IPAdapterError, match="don't go together"):
        load_ip_adapter(str(encoder[0]), None, str(vit_h))
    with pytest.raises(IPAdapterError, match="isn't loaded"):
        preprocess(square, str(vit_h))
    file = save(base_adapter(WIDTHS, CONTEXT), tmp_path / "adapter.safetensors")
    load_ip_adapter(str(encoder[0]), None, str(file))
    with pytest.raises(IPAdapterError, match="uint8"):
        preprocess(square.astype(np.float32), str(file))
    with pytest.raises(IPAdapterError, match="nowhere"):
        load_ip_adapter(str(encoder[0]), None, str(tmp_path / "nowhere.safetensors"))


def test_a_picture_that_is_not_square_is_squashed(
    encoder: tuple[Path, CLIPVisionModelWithProjection], tmp_path: Path
) -> None:
    file = save(base_adapter(WIDTHS, CONTEXT, seed=2), tmp_path / "adapter.safetensors")
    load_ip_adapter(str(encoder[0]), None, str(file))
    wide = np.zeros((100, 400, 3), np.uint8)
    wide[:, :100] = 255  # lost by a centre crop, kept by a squash
    whole, cropped = (preprocess(np.ascontiguousarray(p), str(file))[0] for p in (wide, wide[:, 150:250]))
    assert float((whole[0] - cropped[0]).abs().max()) > 1e-3

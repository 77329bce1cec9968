"""The demo model files: public layouts, and they steer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from tests.embedded import Host
from tests.embedded.demo_models import BASE_TOKENS, DemoModels, encoder_model, layer_widths, make_demo_models
from tests.embedded.probe import SMALL
from tests.embedded.shapes import SHAPES


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    return make_demo_models(tmp_path_factory.mktemp("models"))


def test_files_repeat_and_have_the_public_keys(models: DemoModels, tmp_path: Path) -> None:
    again = make_demo_models(tmp_path / "deep" / "folder")
    assert again.base["sdxl"].read_bytes() == models.base["sdxl"].read_bytes()
    assert again.encoder.read_bytes() == models.encoder.read_bytes()
    for shape, layers in (("sd15", 16), ("sdxl", 70)):
        for path, projection in ((models.base[shape], 4), (models.plus[shape], 51)):
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
                assert all(file.get_slice(k).get_dtype() == "F16" for k in keys)
            assert sum(k.startswith("image_proj.") for k in keys) == projection
            numbers = sorted({int(k.split(".")[1]) for k in keys if k.startswith("ip_adapter.")})
            assert numbers == list(range(1, 2 * layers, 2))
            assert len(keys) == projection + 2 * layers
    assert layer_widths("sd15") == [32] * 2 + [64] * 2 + [128] * 2 + [128] * 3 + [64] * 3 + [32] * 3 + [128]
    assert len(layer_widths("sdxl")) == 70


def embeds(picture: np.ndarray[Any, Any], models: DemoModels) -> torch.Tensor:
    model: CLIPVisionModelWithProjection = encoder_model(1)
    model.load_state_dict(load_file(models.encoder), strict=False)
    pixels = (torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None] / 255 - 0.45) / 0.27
    with torch.no_grad():
        return model(pixels).image_embeds


def steer(host: Host, adapter: dict[str, torch.Tensor], embed: torch.Tensor) -> None:
    """Add the picture's attention to every layer of the model's own unet, the paper's way."""
    width = SHAPES[host.sd_model.shape.name].context
    flat = embed @ adapter["image_proj.proj.weight"].float().T + adapter["image_proj.proj.bias"].float()
    tokens = F.layer_norm(flat.view(1, BASE_TOKENS, width), (width,))
    diffusion = host.sd_model.kmodel.diffusion_model
    places = [m.processor.place for n, m in diffusion.unet.named_modules() if n.endswith("attn2")]
    order = {"input": 0, "output": 1, "middle": 2}
    places.sort(key=lambda p: (order[p.block[0]], p.block[1], p.block_index))
    unet = host.sd_model.forge_objects_original.unet.clone()
    for i, place in enumerate(places):
        weights = [adapter[f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight"].float() for x in "kv"]

        def replace(q: Any, k: Any, v: Any, extra: Any, weights: Any = weights) -> torch.Tensor:
            def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                heads = [t.unflatten(2, (extra["n_heads"], -1)).transpose(1, 2) for t in (q, k, v)]
                return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

            ik, iv = ((tokens @ w.T).expand(len(q), -1, -1) for w in weights)
            return attend(k, v) + attend(ik, iv)

        unet.set_model_attn2_replace(replace, *place.key)
    host.sd_model.forge_objects_original.unet = unet
    host.sd_model.forge_objects_after_applying_lora.unet = unet


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_pictures_steer_visibly_and_differently(models: DemoModels, shape: str) -> None:
    rng = np.random.default_rng(0)
    x = np.linspace(0, 255, 224)
    smooth = np.stack([np.tile(x, (224, 1)), np.tile(x[::-1, None], (1, 224)), np.full((224, 224), 60.0)], 2)
    blocks = rng.integers(0, 255, (8, 8, 3)).repeat(28, 0).repeat(28, 1)
    first, second = (embeds(p, models) for p in (smooth, blocks))
    assert F.cosine_similarity(first, second).item() < 0.9
    adapter = load_file(models.base[shape])
    pictures = []
    with Host(shape, []) as host:
        fields = {**SMALL, "steps": 4}
        pictures.append(host.txt2img(**fields).image)
        for embed in (first, second):
            steer(host, adapter, embed)
            pictures.append(host.txt2img(**fields).image)
    plain, a, b = (np.asarray(p, dtype=float) for p in pictures)
    for one, other in ((plain, a), (plain, b), (a, b)):
        assert np.abs(one - other).mean() > 5

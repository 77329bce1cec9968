"""Image projections and layer projections against the modules that the public adapters were trained and loaded with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import types

import pytest
import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection

from lib_ipadapter import ImageProjModel, IPAdapterError, IPAdapterModel, Resampler
from lib_ipadapter.kv import To_KV
from lib_ipadapter.layers import LAYOUTS, SD_V12_CHANNELS, SD_XL_CHANNELS, LayerKey, first_in_forward_order
from tests.adapter_files import base_adapter, full_face_adapter, plus_adapter
from tests.bare_model import LAYERS


def reference_resampler() -> types.ModuleType:
    """``resampler.py`` of the package ``ip-adapter``, loaded alone: the package itself needs an old diffusers."""
    file = next(f for f in importlib.metadata.files("ip-adapter") or () if f.name == "resampler.py")
    spec = importlib.util.spec_from_file_location("reference_resampler", str(file.locate()))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(out: torch.Tensor, wanted: torch.Tensor, relative: float = 1e-5) -> None:
    assert out.shape == wanted.shape
    assert float((out - wanted).abs().max() / wanted.abs().max()) < relative


@torch.no_grad()
def test_image_projection_equals_diffusers() -> None:
    torch.manual_seed(0)
    ours = ImageProjModel(cross_attention_dim=768, clip_embeddings_dim=1024, clip_extra_context_tokens=4)
    theirs = ImageProjection(image_embed_dim=1024, cross_attention_dim=768, num_image_text_embeds=4)
    theirs.load_state_dict({key.replace("proj.", "image_embeds."): value for key, value in ours.state_dict().items()})
    embeds = torch.randn(3, 1024)
    assert_close(ours(embeds), theirs(embeds))


@torch.no_grad()
@pytest.mark.parametrize(
    ("dim", "heads", "width", "out"), [(768, 12, 1280, 768), (1280, 20, 1280, 2048), (128, 2, 128, 64)]
)
def test_resampler_equals_the_reference(dim: int, heads: int, width: int, out: int) -> None:
    torch.manual_seed(1)
    sizes = {
        "dim": dim, "depth": 4, "dim_head": 64, "heads": heads,
        "num_queries": 16, "embedding_dim": width, "output_dim": out, "ff_mult": 4,
    }  # fmt: skip
    ours, theirs = Resampler(**sizes), reference_resampler().Resampler(**sizes)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for value in theirs.state_dict().values():
        value.add_(torch.randn_like(value) / 20)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 257, width) * 3
    assert_close(ours(hidden), theirs(hidden))


@torch.no_grad()
def test_resampler_equals_diffusers() -> None:
    from diffusers import UNet2DConditionModel

    adapter = plus_adapter([64] * 16, 64)
    theirs = UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers(
        types.SimpleNamespace(),
        {k: v.clone() for k, v in adapter["image_proj"].items()},
        low_cpu_mem_usage=False,
    )
    assert isinstance(theirs, IPAdapterPlusImageProjection)
    ours = IPAdapterModel(adapter, plus=True, cross_attention_dim=64, clip_embeddings_dim=128)
    hidden = torch.randn(2, 257, 128, generator=torch.Generator().manual_seed(2)) * 3
    assert_close(ours.image_proj_model(hidden), theirs(hidden))


@torch.no_grad()
def test_full_face_projection_equals_diffusers() -> None:
    from diffusers import UNet2DConditionModel

    adapter = full_face_adapter([64] * 16, 64)
    theirs = UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers(
        types.SimpleNamespace(),
        {k: v.clone() for k, v in adapter["image_proj"].items()},
        low_cpu_mem_usage=False,
    )
    ours = IPAdapterModel(adapter, plus=False, cross_attention_dim=64, clip_embeddings_dim=128)
    hidden = torch.randn(2, 257, 128, generator=torch.Generator().manual_seed(2))
    assert_close(ours.image_proj_model(hidden), theirs(hidden))


@torch.no_grad()
def test_every_layer_gets_its_own_weights_in_numeric_order() -> None:
    widths = [32 + n for n in range(70)]
    sd = base_adapter(widths, 48)["ip_adapter"]
    shuffled = dict(sorted(sd.items()))  # as text, 11 comes before 3
    to_kv = To_KV(48)
    to_kv.load_state_dict_ordered(shuffled)
    tokens = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(3))
    out = to_kv(tokens)
    assert len(out) == 140
    for n, width in enumerate(widths):
        for offset, kind in enumerate("kv"):
            assert out[2 * n + offset].shape == (1, 4, width)
            assert torch.equal(out[2 * n + offset], tokens @ sd[f"{2 * n + 1}.to_{kind}_ip.weight"].T)
    for made, layer in zip(out, to_kv.to_kvs, strict=True):
        assert torch.allclose(made, layer(tokens), atol=1e-6)
        assert not layer.weight.requires_grad


def test_a_layer_with_half_its_weights_is_refused() -> None:
    sd = base_adapter([32] * 16, 48)["ip_adapter"]
    del sd["7.to_v_ip.weight"]
    with pytest.raises(IPAdapterError, match="layer 7"):
        To_KV(48).load_state_dict_ordered(sd)
    with pytest.raises(IPAdapterError, match="no to_k_ip"):
        To_KV(48).load_state_dict_ordered({})


def test_layouts_are_those_of_the_public_models() -> None:
    for name, count, channels in (("sd15", 16, SD_V12_CHANNELS), ("sdxl", 70, SD_XL_CHANNELS)):
        assert list(LAYOUTS[count]) == [LayerKey(*key) for key, _ in LAYERS[name]]
        assert channels == [width for _, width in LAYERS[name] for _ in range(2)]
    assert first_in_forward_order(LAYOUTS[16]) == 0
    assert first_in_forward_order([LayerKey("output", 0, 0), LayerKey("middle", 0, 1), LayerKey("middle", 0, 0)]) == 2


@torch.no_grad()
def test_public_sizes_load_without_being_initialised() -> None:
    adapter = base_adapter(SD_V12_CHANNELS[::2], 768, embedding=1024)
    model = IPAdapterModel(adapter, plus=False)
    assert model.image_proj_model.proj.weight.data_ptr() == adapter["image_proj"]["proj.weight"].data_ptr()
    assert model.layer_widths == tuple(SD_V12_CHANNELS[::2])
    assert model.context_width == 768
    assert model.image_proj_model(torch.randn(2, 1024)).shape == (2, 4, 768)

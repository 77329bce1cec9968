"""Precision: whatever files and UNets are stored in, K/V are right, finite, and of the type that the query has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_ipadapter import IPAdapterError
from lib_ipadapter import kv as kv_module
from lib_ipadapter.clip_vision import CLIPVision
from lib_ipadapter.encoding import encode, image_kv, load_adapter
from lib_ipadapter.formulations import JOINT
from lib_ipadapter.hosts.comfy import _unet_info
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.kv import To_KV
from lib_ipadapter.layers import SD15, SD_V12_CHANNELS, SD_XL_CHANNELS, LayerKey
from lib_ipadapter.plan import ImageKV
from lib_ipadapter.progress import Window
from lib_ipadapter.recognise import EncoderKind
from lib_ipadapter.resident import bytes_there
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.tensorfile import TensorFile
from lib_ipadapter.weighing import weigh
from tests.adapter_files import Nested, base_adapter, full_face_adapter, layer_weights, plus_adapter

T = TypeVar("T")
HALF = (torch.float16, torch.bfloat16)
CONTEXT = 768
WIDTHS = SD_V12_CHANNELS[::2]


def runner(dtype: torch.dtype) -> Any:
    """A host that computes in ``dtype`` on the CPU; the module comes back as it was."""

    def run(module: nn.Module, function: Callable[[torch.device, torch.dtype], T]) -> T:
        module.to(dtype)
        kept = module.state_dict()
        with torch.no_grad():
            made = function(torch.device("cpu"), dtype)
        module.load_state_dict(kept, assign=True)
        return made

    return run


def flat(adapter: Nested) -> dict[str, Tensor]:
    return {f"{group}.{key}": t for group, keys in adapter.items() for key, t in keys.items()}


# Files


ADAPTERS: dict[str, tuple[Callable[[], Nested], tuple[int, ...]]] = {
    "base": (lambda: base_adapter(WIDTHS, CONTEXT, embedding=1024), (1, 1024)),
    "plus": (lambda: plus_adapter(WIDTHS, CONTEXT, embedding=1280, dim=768, heads=12), (1, 257, 1280)),
    "full face": (lambda: full_face_adapter(WIDTHS, CONTEXT, embedding=1280), (1, 257, 1280)),
}


def features_for(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * scale


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """``stored(kind, dtype)``: an adapter's file."""
    folder = tmp_path_factory.mktemp("adapters")

    def get(kind: str, dtype: torch.dtype) -> Path:
        path = folder / f"{kind} {dtype}.safetensors"
        if not path.exists():
            save_file({key: t.to(dtype).contiguous() for key, t in flat(ADAPTERS[kind][0]()).items()}, path)
        return path

    return get


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, *HALF, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_an_adapter_may_be_stored_in_any_precision(stored: Any, dtype: torch.dtype) -> None:
    features = features_for((1, 1024))
    found = image_kv(runner(torch.float32), load_adapter(stored("base", dtype)).model, [features])[0]
    nested = {
        group: {key: t.to(dtype).float() for key, t in keys.items()} for group, keys in ADAPTERS["base"][0]().items()
    }
    projection = nested["image_proj"]
    tokens = (features @ projection["proj.weight"].T + projection["proj.bias"]).view(1, 4, CONTEXT)
    tokens = nn.functional.layer_norm(tokens, (CONTEXT,), projection["norm.weight"], projection["norm.bias"])
    for one, weight in zip(found, nested["ip_adapter"].values(), strict=True):
        torch.testing.assert_close(one, tokens @ weight.T, rtol=1e-4, atol=1e-4)


def test_layers_of_several_precisions(tmp_path: Path) -> None:
    tensors = flat(ADAPTERS["base"][0]())
    dtypes = (torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    for n, key in enumerate(key for key in tensors if key.startswith("ip_adapter.")):
        tensors[key] = tensors[key].to(dtypes[n % 4])
    save_file(tensors, tmp_path / "mixed.safetensors")
    model = load_adapter(tmp_path / "mixed.safetensors").model
    tokens = features_for((1, 4, CONTEXT))
    weights = [t.float() for key, t in tensors.items() if key.startswith("ip_adapter.")]
    for one, weight in zip(model.ip_layers(tokens), weights, strict=True):
        torch.testing.assert_close(one, tokens @ weight.T, rtol=1e-4, atol=1e-4)


# The layers' matrices


@pytest.mark.parametrize("channels", [SD_V12_CHANNELS, SD_XL_CHANNELS], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("chunk", [1, 200_000, 2**30])
def test_few_large_products_equal_one_for_each_layer(
    channels: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_module, "CHUNK", chunk)
    sd = layer_weights(channels[::2], 64, torch.Generator().manual_seed(1))
    to_kv = To_KV(64)
    to_kv.load_state_dict_ordered(sd)
    assert to_kv.widths == tuple(channels)
    tokens = features_for((2, 16, 64))
    calls: list[Tensor] = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(args[1]) or linear(*args))
    found = to_kv(tokens)
    for one, weight in zip(found, sd.values(), strict=True):
        assert one.shape == (2, 16, len(weight))
        torch.testing.assert_close(one, linear(tokens, weight), rtol=1e-5, atol=1e-5)
    assert len(calls) == {1: len(channels), 2**30: len(set(channels))}.get(chunk, len(calls))


def test_a_files_matrices_are_in_memory_once(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = TensorFile.read
    places: set[int] = set()

    def watched(*args: Any) -> dict[str, Tensor]:
        found = read(*args)
        places.update(t.data_ptr() for t in found.values())
        return found

    monkeypatch.setattr(TensorFile, "read", watched)
    to_kv = load_adapter(stored("base", torch.float16)).model.ip_layers
    assert sorted(weight.shape[1] for weight in to_kv._weights) == sorted(set(WIDTHS))
    for weight in to_kv._weights:
        assert {one.data_ptr() for one in weight} <= places
        assert weight.untyped_storage().nbytes() == weight.nbytes
        assert weight.dtype == torch.float16
    assert to_kv.nbytes == 2 * 2 * sum(WIDTHS) * CONTEXT


KIND = EncoderKind("small", 64, 4, 2, 14, 28, 32, "gelu", 128)


class Counting(nn.Module):
    """An encoder that keeps how many pictures it saw at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def penultimates(self, batches: Sequence[Tensor]) -> list[Tensor]:
        self.seen += map(len, batches)
        return list(batches)


def test_a_batch_of_pictures_is_one_forward_and_several_batches_one_loading() -> None:
    encoder, loads = Counting(), []

    def run(module: nn.Module, function: Callable[[torch.device, torch.dtype], T]) -> T:
        loads.append(module)
        return function(torch.device("cpu"), torch.float32)

    pictures = [torch.full((1 + n, 3, 2, 2), float(n)) for n in range(3)]
    made = encode(run, encoder, "penultimate", pictures)  # type: ignore[arg-type]
    assert [float(one[0, 0, 0, 0]) for one in made] == [0.0, 1.0, 2.0]
    assert (encoder.seen, len(loads)) == ([1, 2, 3], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_blocks_of_an_encoder_stay_as_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tower = CLIPVision(KIND).requires_grad_(False).eval().half()
    for block in tower.blocks:
        block.half()
    pixels = torch.randn(2, 3, 28, 28).half()
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in tower.blocks.state_dict().items()}
    tower.to(dtype)
    assert (tower.norm_in.weight.dtype, tower.blocks[0].q.weight.dtype) == (dtype, torch.float16)
    out = tower(pixels)
    for key, tensor in tower.blocks.state_dict().items():
        assert (tensor.data_ptr(), tensor.dtype) == (before[key][0], torch.float16)
        assert torch.equal(tensor, before[key][1])

    for block in tower.blocks:
        block.to(dtype)
    wanted = tower(pixels)
    assert torch.equal(out.penultimate, wanted.penultimate)
    assert torch.equal(out.image_embeds, wanted.image_embeds)
    assert torch.equal(tower.penultimates([pixels])[0], wanted.penultimate)


def test_room_is_made_for_one_block_of_an_encoder_alone() -> None:
    tower = CLIPVision(KIND)
    whole = sum(parameter.numel() for parameter in tower.parameters())
    block = sum(parameter.numel() for parameter in tower.blocks[0].parameters())
    assert bytes_there(tower, torch.float16) == 2 * (whole - (KIND.layers - 1) * block)
    assert bytes_there(nn.Linear(3, 5), torch.float32) == 4 * 20


# Half precision


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3, 6e4, 1e8])
def test_half_precision_is_close_to_float32_and_never_overflows(
    stored: Any, kind: str, dtype: torch.dtype, scale: float
) -> None:
    model = load_adapter(stored(kind, torch.float16)).model
    features = features_for(ADAPTERS[kind][1], scale)
    wanted = image_kv(runner(torch.float32), model, [features])[0]
    found = image_kv(runner(dtype), model, [features])[0]
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert float((one.float() - other).abs().mean() / other.abs().mean()) < (0.01 if dtype == HALF[0] else 0.05)


@pytest.mark.parametrize("output", ["image_embeds", "penultimate"])
@pytest.mark.parametrize("gain", [1.0, 3e4])
def test_an_encoder_of_large_numbers_is_finite_in_half_precision(output: str, gain: float) -> None:
    torch.manual_seed(0)
    tower = CLIPVision(KIND).requires_grad_(False).eval()
    tower.class_embedding += torch.randn(64)
    for block in tower.blocks:
        block.fc_2.weight *= gain
        block.fc_2.bias.fill_(gain / 3)
        block.half()
    tower.half()  # both runs have the same weights
    pictures = [torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))]
    wanted = encode(runner(torch.float32), tower, output, pictures)[0]
    found = encode(runner(torch.float16), tower, output, pictures)[0]
    assert found.isfinite().all()
    limit = wanted.clamp(-65504, 65504)
    assert float((found - limit).abs().mean() / limit.abs().mean()) < 0.01


def test_numbers_that_are_none_end_in_a_sentence(stored: Any) -> None:
    model = load_adapter(stored("base", torch.float16)).model
    model.ip_layers._weights[0][0, 0, 0] = torch.nan
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(IPAdapterError, match=r"adapter makes numbers .* must be finite: its file is damaged"):
            image_kv(runner(dtype), model, [features_for((1, 1024))])


# UNets


class Packed(nn.Module):
    """Forge's layer of an NF4 or GGUF checkpoint: no sizes of its own, and weights of another shape than they say."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        object.__setattr__(self, "weight", weight)


def stand_in(projection: nn.Linear, how: str) -> nn.Module:
    shape = projection.weight.shape
    if how == "nf4":
        packed = torch.zeros(shape.numel() // 2, 1, dtype=torch.uint8)
        return Packed(SimpleNamespace(shape=packed.shape, quant_state=SimpleNamespace(shape=shape)))
    if how == "gguf":
        return Packed(SimpleNamespace(shape=shape))
    return projection


def unet_of(how: str) -> nn.Module:
    widths = dict(zip(SD15, WIDTHS, strict=True))

    def block(name: str, number: int) -> nn.ModuleList:
        key = LayerKey(name, number, 0)
        if key not in widths:
            return nn.ModuleList([nn.Identity()])
        layer, transformer, holder = nn.Module(), nn.Module(), nn.Module()
        layer.to_k = stand_in(nn.Linear(CONTEXT, widths[key], bias=False), how)
        transformer.attn2 = layer
        holder.transformer_blocks = nn.ModuleList([transformer])
        return nn.ModuleList([holder])

    unet = nn.Module()
    unet.input_blocks = nn.ModuleList(block("input", n) for n in range(12))
    unet.middle_block = block("middle", 0)
    unet.output_blocks = nn.ModuleList(block("output", n) for n in range(12))
    return unet


STORED: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "Forge, fp16": ("plain", {"computation_dtype": torch.float16, "dtype": torch.float16}, torch.float16),
    "Forge, fp8": ("plain", {"computation_dtype": torch.bfloat16, "dtype": torch.float8_e4m3fn}, torch.bfloat16),
    "Forge, NF4": ("nf4", {"computation_dtype": torch.float16, "dtype": "nf4"}, torch.float16),
    "Forge, GGUF": ("gguf", {"computation_dtype": torch.bfloat16, "dtype": "gguf"}, torch.bfloat16),
    "ldm_patched, fp16": ("plain", {"manual_cast_dtype": None, "dtype": torch.float16}, torch.float16),
    "ldm_patched, fp8": (
        "plain",
        {"manual_cast_dtype": torch.float16, "dtype": torch.float8_e5m2},
        torch.float16,
    ),
    "ldm_patched, fp8 and no word": ("plain", {"manual_cast_dtype": None, "dtype": torch.float8_e5m2}, torch.float32),
}


@pytest.mark.parametrize("case", STORED)
@pytest.mark.parametrize("query", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_k_and_v_have_the_querys_type_whatever_the_unet_is_stored_in(case: str, query: torch.dtype) -> None:
    how, said, expected = STORED[case]
    about = {key: value for key, value in said.items() if key != "dtype"}
    model = SimpleNamespace(diffusion_model=unet_of(how), get_dtype=lambda: said["dtype"], **about)
    info = _unet_info(SimpleNamespace(model=model, load_device="cpu"))
    assert (info.widths, info.context_width, info.dtype) == (tuple(WIDTHS), CONTEXT, expected)

    def image(seed: int) -> ImageKV:
        generator = torch.Generator().manual_seed(seed)
        return ImageKV.from_pairs([torch.randn(1, 4, width, generator=generator) for width in SD_V12_CHANNELS])

    images = [image(1), image(2)]
    prompts = {COND: (images[0],), UNCOND: (images[1],)}
    terms = [Term(JOINT, Window(), weigh(prompts, JOINT, 1.0, (), max(WIDTHS), UNCOND))]
    injection = Injection(terms, len(SD15))
    injection.to(info.device, info.dtype)
    injection.plan(Call((UNCOND, COND), lambda: 0.5, None), 77, torch.device("cpu"), query)
    exact = Injection(terms, len(SD15))
    exact.to(torch.device("cpu"), torch.float32)
    for role in (COND, UNCOND):
        found, wanted = (each._prompts[0][role][0] for each in (injection, exact))
        for one, other in zip(found.keys + found.values, wanted.keys + wanted.values, strict=True):
            assert one.dtype == query
            torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.02)

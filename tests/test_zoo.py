"""Every public file, one by one: known under any name from its header, and then run, or refused with what it is."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.library import Library
from lib_ipadapter.pictures import clip_preprocess, prepare, read_picture, to_pixels
from lib_ipadapter.recognise import ENCODERS, EncoderKind, encoder_needed, recognise_adapter
from lib_ipadapter.tensorfile import open_tensors
from tests.adapter_files import Nested, base_adapter, full_face_adapter, plus_adapter
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.demo_models import layer_widths
from tests.embedded.shapes import SHAPES, make_unet
from tests.embedded_hosts import request
from tests.huge_files import huge_legacy, huge_safetensors, huge_zip
from tests.photos import base64_photo
from tests.test_clip_vision import openclip, reference
from tests.test_projections import reference_resampler
from tests.test_recognise import ELSEWHERE, ENCODER_FILES, REFUSED, SUPPORTED, public

PICKLED = {"ip-adapter_sd15_light_v11", "kataragi_ip_adapter_Noobtest_800000", "Kolors-IP-Adapter-Plus"}
"""Of the supported files those that are published as pickles."""
FLOAT32 = {"kataragi_ip_adapter_Noobtest_800000"}


pytestmark = pytest.mark.skipif(os.name == "nt", reason="a file with a hole takes its full size there")


# From the header


def whole_files(name: str, folder: Path) -> Iterator[Path]:
    """A public file in its full size, without its weights, in every container, under names that say nothing."""
    shapes = {key: info.shape for key, info in public(name).items()}
    adapter = name not in ENCODER_FILES and len(shapes) > 1 and "vision" not in name
    for number, make in enumerate(
        (huge_safetensors, partial(huge_zip, grouped=adapter), partial(huge_legacy, grouped=adapter))
    ):
        path = make(folder / f"{number}.ckpt", shapes, item=2)
        try:
            yield path
        finally:
            path.unlink()


@pytest.mark.parametrize("name", SUPPORTED)
def test_an_adapter_is_known_under_any_name(tmp_path: Path, name: str) -> None:
    library = Library(lambda: [tmp_path], lambda: [tmp_path])
    for path in whole_files(name, tmp_path):
        assert [kind.description for kind in library.adapters().values()] == [SUPPORTED[name][-1]], path
        assert library.encoders() == {}


@pytest.mark.parametrize("name", ENCODER_FILES)
def test_an_encoder_is_known_under_any_name(tmp_path: Path, name: str) -> None:
    library = Library(lambda: [tmp_path], lambda: [tmp_path])
    for path in whole_files(name, tmp_path):
        assert [kind.name for kind in library.encoders().values()] == [ENCODER_FILES[name][0]], path
        assert library.adapters() == {}


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_file_is_known_for_what_it_is(tmp_path: Path, name: str) -> None:
    library = Library(lambda: [tmp_path], lambda: [tmp_path])
    for path in whole_files(name, tmp_path):
        assert (library.adapters(), library.encoders()) == ({}, {})
        with pytest.raises(IPAdapterError, match=REFUSED[name]):
            recognise_adapter(open_tensors(path).tensors)


# A whole generation, with weights


def small(kind: EncoderKind) -> EncoderKind:
    """A tower of the true widths, patches and pictures, with fewer layers."""
    return replace(kind, layers=2, mlp_width=64)


TOWERS = {kind.name: small(kind) for kind in ENCODERS[:4]}
STORED = {"ViT-H/14": torch.float16, "ViT-bigG/14": torch.bfloat16}


def rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in weights.items()}


class Towers:
    """The four image encoders, each in another dtype, layout and container, and transformers' own beside them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._models = {}
        for number, (name, kind) in enumerate(TOWERS.items()):
            model = reference(kind, seed=number)
            state = rounded(dict(model.state_dict()), STORED.get(name, torch.float32))
            model.load_state_dict(state)
            self._models[name] = model
            if name == "ViT-H/14":
                save_file(state, folder / "1.safetensors")
            elif name == "ViT-bigG/14":
                save_file({k: t.contiguous() for k, t in openclip(state, kind.layers).items()}, folder / "2.bin")
            else:
                text = {"text_model.embeddings.position_ids": torch.arange(8)[None], "logit_scale": torch.tensor(1.0)}
                torch.save({**state, **text}, folder / f"{number}.pth")

    @torch.no_grad()
    def features(self, name: str, output: str, pixels: Tensor) -> Tensor:
        out = self._models[name](pixels, output_hidden_states=True)
        found: Tensor = out.image_embeds if output == "image_embeds" else out.hidden_states[-2]
        return found


@dataclass
class Hosts:
    """A host of either shape, one at a time, which knows the small towers as the true ones."""

    models: Path
    towers: Towers
    patch: pytest.MonkeyPatch
    running: Host | None = None
    shape: str = ""

    def get(self, shape: str) -> Host:
        if self.shape != shape:
            self.close()
            self.running, self.shape = Host(shape, models_path=self.models), shape
            self.patch.setattr("sd_image_prompt.recognise.ENCODERS", tuple(TOWERS.values()))
        assert self.running is not None
        return self.running

    def close(self) -> None:
        self.patch.undo()
        if self.running is not None:
            self.running.close()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "ipadapter").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        made = Hosts(folder, Towers(folder / "clip_vision"), patch)
        yield made
        made.close()


def reduced(name: str, shape: str) -> Nested:
    """A public file's tensors for the host's UNet: only the widths of UNet and latents are smaller."""
    kind = recognise_adapter(public(name))
    widths, context = layer_widths(shape), SHAPES[shape].context
    if kind.variant == "base":
        made = base_adapter(widths, context, kind.embedding_width, kind.tokens)
    elif kind.variant == "plus":
        sizes = {"dim": 128, "heads": kind.heads, "depth": kind.depth, "tokens": kind.tokens}
        made = plus_adapter(widths, context, kind.embedding_width, **sizes)
    else:
        made = full_face_adapter(widths, context, kind.embedding_width)
    if name == "noobIPAMARK1_mark1":
        made |= {"image_proj_model": made["image_proj"], "adapter_modules": made["ip_adapter"]}
    assert {f"{group}.{key}" for group, keys in made.items() for key in keys} == set(public(name))
    return {group: rounded(keys, torch.float32 if name in FLOAT32 else torch.float16) for group, keys in made.items()}


def write(adapter: Nested, path: Path, pickled: bool) -> None:
    if pickled:
        torch.save(adapter, path, _use_new_zipfile_serialization=False)
    else:
        save_file({f"{g}.{key}": t.clone() for g, keys in adapter.items() for key, t in keys.items()}, path)


@torch.no_grad()
def diffusers_kv(adapter: Nested, shape: str, features: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Image tokens, and K and V of every layer in the file's order, by diffusers' own modules."""
    unet = make_unet(SHAPES[shape], 0)
    state = {group: rounded(adapter[group], torch.float32) for group in ("image_proj", "ip_adapter")}
    unet._load_ip_adapter_weights([copy.deepcopy(state)])
    tokens = unet.encoder_hid_proj.image_projection_layers[0](features)
    processors = [each for each in unet.attn_processors.values() if hasattr(each, "to_k_ip")]
    return tokens, [each.to_k_ip[0](tokens) for each in processors], [each.to_v_ip[0](tokens) for each in processors]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


@pytest.mark.parametrize("name", sorted(SUPPORTED, key=lambda name: SUPPORTED[name][0]))
def test_an_adapter_runs_with_its_encoder_and_equals_the_reference(
    hosts: Hosts, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = SUPPORTED[name][4]
    shape = "sd15" if SUPPORTED[name][0] == "sd15" else "sdxl"
    host = hosts.get(shape)
    adapter = reduced(name, shape)
    path = hosts.models / "ipadapter" / "0.pt"
    write(adapter, path, name in PICKLED)
    prepared: list[Any] = []
    preparer: Any = importlib.import_module("sd_image_prompt.preparer").Preparer
    prepare_unit = preparer.prepare

    def watched(self: Any, *args: Any) -> Any:
        prepared.append(prepare_unit(self, *args))
        return prepared[-1]

    monkeypatch.setattr(preparer, "prepare", watched)
    plain = host.txt2img(**request())
    steered = host.txt2img(**request({"model": "0", "images": [base64_photo()]}))
    assert not np.array_equal(np.asarray(plain.image), np.asarray(steered.image))
    assert not host.errors
    ((unit,),) = prepared
    assert encoder_needed(unit.kind) == encoder

    size = TOWERS[encoder].image_size
    pixels = clip_preprocess(to_pixels([prepare(read_picture(base64_photo()), "crop", size)]), size)
    features = hosts.towers.features(encoder, unit.kind.output, pixels)
    tokens, keys, values = diffusers_kv(adapter, shape, features)
    assert tokens.shape[1:] == (SUPPORTED[name][2], SHAPES[shape].context)
    assert len(unit.conds[0].keys) == len(keys) == len(layer_widths(shape))
    for found, wanted in zip((*unit.conds[0].keys, *unit.conds[0].values), (*keys, *values), strict=True):
        assert_close(found, wanted)
    if unit.kind.variant == "plus":
        assert_close(tokens, original_resampler(adapter["image_proj"], features))


@torch.no_grad()
def original_resampler(projection: dict[str, Tensor], features: Tensor) -> Tensor:
    """Image tokens by the module that the plus adapters were trained with."""
    module = reference_resampler().Resampler(
        dim=projection["latents"].shape[2],
        depth=sum(key.endswith(".0.to_q.weight") for key in projection),
        heads=projection["layers.0.0.to_q.weight"].shape[0] // 64,
        num_queries=projection["latents"].shape[1],
        embedding_dim=projection["proj_in.weight"].shape[1],
        output_dim=projection["proj_out.weight"].shape[0],
    )
    module.load_state_dict(rounded(projection, torch.float32))
    tokens: Tensor = module(features)
    return tokens


# Through the API


def answer(hosts: Hosts, path: Path) -> str:
    """What a request says that names a file which is no adapter; the file isn't offered."""
    client = Client(hosts.get("sd15").app)
    assert path.name not in [each["name"] for each in client.get("/ip-adapter/models").json()["adapters"]]
    refusal = client.post("/sdapi/v1/txt2img", json=request({"model": path.name, "images": [base64_photo()]}))
    assert refusal.status_code == 422, refusal.text[:300]
    sentence = str(refusal.json()["detail"])
    assert sentence.endswith(".") and "\n" not in sentence and path.name in sentence
    return sentence


@pytest.mark.parametrize("name", [*REFUSED, *ENCODER_FILES])
def test_the_api_says_what_a_public_file_is(hosts: Hosts, name: str) -> None:
    for path in whole_files(name, hosts.models / "ipadapter"):
        assert REFUSED.get(name, "an image encoder") in answer(hosts, path)


@pytest.mark.parametrize(
    ("names", "what", "where"), ELSEWHERE, ids=[f"{n} {row[1]}" for n, row in enumerate(ELSEWHERE)]
)
def test_the_api_says_where_a_file_belongs(hosts: Hosts, names: list[str], what: str, where: str) -> None:
    path = huge_safetensors(hosts.models / "ipadapter" / "0.safetensors", dict.fromkeys(names, (4, 4)))
    try:
        sentence = answer(hosts, path)
    finally:
        path.unlink()
    assert what in sentence
    assert where in sentence

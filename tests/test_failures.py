"""What can't be done is said in one sentence, as HTTP 422, and the next plain picture is what it was."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from tests.embedded import Host
from tests.embedded.demo_models import DemoModels
from tests.embedded_hosts import request, unit
from tests.mutations import hidden
from tests.photos import base64_photo, photo
from tests.tricks import TRICKS


@pytest.fixture(scope="module")
def client(host_of: Any) -> TestClient:
    return TestClient(host_of("sd15").app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def plain(client: TestClient) -> str:
    return str(client.post("/sdapi/v1/txt2img", json=request()).json()["images"][0])


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil-was-here"),)


@pytest.fixture(scope="module")
def bad_files(models: DemoModels) -> dict[str, bytes]:
    folder = models.models_path / "ipadapter"
    good = models.base["sd15"].read_bytes()
    files = {
        "truncated.safetensors": good[: len(good) // 2],
        "wrong-header.safetensors": b"\xff" * 4096,
        "empty.safetensors": b"",
        "evil.bin": pickle.dumps({"image_proj": Evil(), "ip_adapter": {}}),
        "encoder.safetensors": models.encoder.read_bytes(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    torch.save({"state_dict": {"a": torch.zeros(2)}}, folder / "other.pt")
    files["other.pt"] = (folder / "other.pt").read_bytes()
    return files


def refused(client: TestClient, wanted: dict[str, Any]) -> str:
    answer = client.post("/sdapi/v1/txt2img", json=wanted)
    assert answer.status_code == 422, answer.text[:300]
    sentence = answer.json()["detail"]
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return str(sentence)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.safetensors", "nowhere.safetensors"),
        ("truncated.safetensors", "truncated.safetensors"),
        ("wrong-header.safetensors", "wrong-header.safetensors"),
        ("empty.safetensors", "empty.safetensors"),
        ("evil.bin", "refused"),
        ("encoder.safetensors", "image encoder"),
        ("other.pt", "other.pt"),
        ("demo-base-sdxl.safetensors", "another model family"),
        ("../ipadapter/demo-base-sd15.safetensors", "There is no"),
        ("/etc/passwd", "There is no"),
        ("", "model"),
    ],
)
def test_models(
    client: TestClient, plain: str, models: DemoModels, bad_files: dict[str, bytes], name: str, words: str
) -> None:
    assert words in refused(client, request(unit() | {"model": name}))
    for file, data in bad_files.items():
        assert (models.models_path / "ipadapter" / file).read_bytes() == data, f"{file} was touched"
    assert sorted(models.models_path.rglob("*.corrupted")) == []
    assert not Path("evil-was-here").exists()
    assert client.post("/sdapi/v1/txt2img", json=request()).json()["images"][0] == plain


@pytest.mark.parametrize("trick", TRICKS)
def test_pickles_that_run_something(
    client: TestClient, models: DemoModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trick: str
) -> None:
    def entered(*_: Any, **__: Any) -> Any:
        raise AssertionError("an unpickler was entered")

    for module, names in ((torch, ("load",)), (torch.jit, ("load",)), (pickle, ("load", "loads", "Unpickler"))):
        for name in names:
            monkeypatch.setattr(module, name, entered)
    monkeypatch.chdir(tmp_path)
    for container, data in hidden(TRICKS[trick]).items():
        path = models.models_path / "ipadapter" / f"{container}.bin"
        path.write_bytes(data)
        before = path.stat()
        try:
            sentence = refused(client, request(unit() | {"model": path.name}))
            assert f"{path.name} asks to run" in sentence or (container == "bare" and "is neither" in sentence)
            assert path.name not in client.get("/ip-adapter/models").text
            assert path.read_bytes() == data and path.stat().st_mtime_ns == before.st_mtime_ns
        finally:
            path.unlink()
    assert list(tmp_path.iterdir()) == []


JPEG = base64.b64decode(encoded(photo("coffee"), "JPEG"))
BAD_PICTURES = {
    "no base64": "this is no picture!",
    "base64 of no picture": base64.b64encode(b"just some words").decode(),
    "empty": "",
    "truncated JPEG": base64.b64encode(JPEG[: len(JPEG) // 3]).decode(),
    "truncated PNG": base64.b64encode(base64.b64decode(base64_photo())[:400]).decode(),
    "data URI without data": "data:image/png;base64,",
    "a path": "/etc/hostname",
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_pictures_that_are_none(client: TestClient, plain: str, kind: str) -> None:
    refused(client, request(unit() | {"images": [BAD_PICTURES[kind]]}))
    assert client.post("/sdapi/v1/txt2img", json=request()).json()["images"][0] == plain


def odd_pictures() -> dict[str, str]:
    small = photo("coffee").resize((60, 40))
    deep = Image.fromarray(np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64))
    frames = [small, small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    transparent = small.convert("RGBA")
    transparent.putalpha(100)
    return {
        "1 x 1": encoded(Image.new("RGB", (1, 1), (200, 30, 30))),
        "20,000 pixels wide": encoded(Image.new("RGB", (20000, 8), (30, 130, 30))),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "16 bits": encoded(deep),
        "CMYK": encoded(small.convert("CMYK"), "JPEG"),
        "palette": encoded(small.convert("P")),
        "alpha": encoded(transparent),
        "grey": encoded(small.convert("L")),
        "data URI": "data:image/png;base64," + encoded(small),
    }


@pytest.mark.parametrize("kind", odd_pictures())
def test_odd_pictures_work(client: TestClient, plain: str, kind: str) -> None:
    answer = client.post("/sdapi/v1/txt2img", json=request(unit() | {"images": odd_pictures()[kind]}))
    assert answer.status_code == 200, answer.text[:300]
    assert answer.json()["images"][0] != plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": "NaN"}, "weight"),
        ({"weight": 50}, "weight"),
        ({"start": 0.5, "stop": 0.5}, "start"),
        ({"start": -0.1}, "start"),
        ({"stop": 1.5}, "stop"),
        ({"formulation": "sum"}, "formulation"),
        ({"uncond": "black"}, "uncond"),
        ({"uncond": "file"}, "negative"),
        ({"uncond": "file", "negative": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"preparation": "stretch"}, "preparation"),
        ({"wieght": 1}, "weight"),
        ({"images": []}, "picture"),
        ({"images": [{"sha256": "0" * 64}]}, "upload"),
    ],
)
def test_fields(client: TestClient, fields: dict[str, Any], words: str) -> None:
    assert words in refused(client, request(unit(**fields) if "images" not in fields else unit() | fields))


def test_numbers_as_text_are_numbers(client: TestClient) -> None:
    text = client.post("/sdapi/v1/txt2img", json=request(unit(weight="0.6", stop="1")))
    number = client.post("/sdapi/v1/txt2img", json=request(unit(weight=0.6, stop=1.0)))
    assert text.json()["images"] == number.json()["images"]


def test_a_missing_encoder_is_named_with_where_to_put_it(client: TestClient, models: DemoModels) -> None:
    away = models.encoder.with_suffix(".away")
    models.encoder.rename(away)
    try:
        sentence = refused(client, request(unit()))
    finally:
        away.rename(models.encoder)
    assert "demo ViT" in sentence
    assert "clip_vision" in sentence
    assert client.post("/sdapi/v1/txt2img", json=request(unit())).status_code == 200


def test_an_adapter_that_is_deleted_between_listing_and_use(client: TestClient, models: DemoModels, plain: str) -> None:
    path = models.models_path / "ipadapter" / "short-lived.safetensors"
    path.write_bytes(models.base["sd15"].read_bytes())
    listed = [each["name"] for each in client.get("/ip-adapter/models").json()["adapters"]]
    assert path.name in listed
    wanted = request(unit() | {"model": path.name})
    assert client.post("/sdapi/v1/txt2img", json=wanted).status_code == 200
    path.unlink()
    assert "There is no IP-Adapter model 'short-lived.safetensors'" in refused(client, wanted)
    assert client.post("/sdapi/v1/txt2img", json=request()).json()["images"][0] == plain


def test_a_folder_that_can_only_be_read_is_enough(client: TestClient, models: DemoModels) -> None:
    folder = models.models_path / "ipadapter"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    folder.chmod(0o555)
    try:
        assert client.post("/sdapi/v1/txt2img", json=request(unit(weight=0.9))).status_code == 200
        assert client.get("/ip-adapter/models").status_code == 200
    finally:
        folder.chmod(0o755)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_encoder_that_runs_out_of_memory(client: TestClient, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sd_image_prompt.gathering.encode", encode)
    assert "out of memory" in refused(client, request(unit(photos=("chelsea",), preparation="squash")))
    monkeypatch.undo()
    assert client.post("/sdapi/v1/txt2img", json=request()).json()["images"][0] == plain


def test_a_stop_that_is_already_over_ends_the_job_at_its_first_step(client: TestClient, host: Host) -> None:
    wanted = request(unit(stop=0.3), steps=4, denoising_strength=0.5) | {"init_images": [base64_photo("chelsea")]}
    answer = client.post("/sdapi/v1/img2img", json=wanted)
    assert answer.status_code == 422
    assert "would never act: choose a stop above 0." in answer.json()["detail"]
    assert len(host.unet_calls) <= 1
    assert client.post("/sdapi/v1/img2img", json=wanted | request(unit(stop=0.9), steps=4)).status_code == 200


def test_a_start_that_never_comes(client: TestClient) -> None:
    wanted = request(unit(start=0.9995), steps=3, scheduler="SGM Uniform")
    assert "choose a start of 0." in refused(client, wanted)


TROUBLE = """
from modules import scripts, script_callbacks, shared
class Trouble(scripts.Script):
    kind = None
    def title(self): return "Trouble"
    def show(self, is_img2img): return scripts.AlwaysVisible
    def ui(self, is_img2img):
        import gradio as gr
        return [gr.Textbox("", visible=False)]
    def process(self, p, kind="", *args): Trouble.kind = kind
    def process_before_every_sampling(self, p, kind="", *args, **kwargs):
        if kind != "fail": return
        unet = p.sd_model.forge_objects.unet.clone()
        def raiser(q, k, v, extra_options): raise RuntimeError("something else broke")
        unet.set_model_attn2_replace(raiser, "output", 5, 0)
        p.sd_model.forge_objects.unet = unet
def step(params):
    if Trouble.kind == "interrupt" and params.sampling_step >= 1: shared.state.interrupted = True
script_callbacks.on_cfg_denoiser(step)
"""


@pytest.mark.parametrize("kind", ["interrupt", "fail"])
def test_after_any_end_the_next_plain_picture_is_what_it_was(host_of: Any, tmp_path: Path, kind: str) -> None:
    from tests.embedded.host import PROJECT_ROOT

    scripts = tmp_path / "trouble" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "trouble.py").write_text(TROUBLE)
    host = host_of("sd15", extensions=(PROJECT_ROOT, tmp_path / "trouble"))
    before = host.txt2img(**request(steps=4)).image
    troubled = request(unit(formulation="joint"), steps=4)
    troubled["alwayson_scripts"]["Trouble"] = {"args": [kind]}
    if kind == "fail":
        with pytest.raises(RuntimeError, match="something else broke"):
            host.txt2img(**troubled)
    else:
        host.txt2img(**troubled)
        assert len(host.unet_calls) < 4
    after = host.txt2img(**request(steps=4)).image
    assert np.array_equal(np.asarray(before), np.asarray(after))
    steered = host.txt2img(**request(unit(formulation="joint"), steps=4)).image
    assert not np.array_equal(np.asarray(before), np.asarray(steered))


def test_what_another_extension_puts_into_a_layer_after_us_is_kept_and_so_are_we(host_of: Any, tmp_path: Path) -> None:
    from tests.embedded.host import PROJECT_ROOT

    scripts = tmp_path / "zlate" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "late.py").write_text(
        "from modules import scripts\n"
        "from backend.attention import attention_function\n"
        "class Late(scripts.Script):\n"
        "    def title(self): return 'Late'\n"
        "    def show(self, is_img2img): return scripts.AlwaysVisible\n"
        "    def ui(self, is_img2img):\n"
        "        import gradio as gr\n"
        "        return [gr.Textbox('', visible=False)]\n"
        "    def process_before_every_sampling(self, p, key='', *args, **kwargs):\n"
        "        if not key: return\n"
        "        unet = p.sd_model.forge_objects.unet.clone()\n"
        "        def late(q, k, v, extra_options):\n"
        "            return attention_function(q, k, v, extra_options['n_heads']) * 0.5\n"
        "        for n in (4, 5, 7, 8):\n"
        "            unet.set_model_attn2_replace(late, 'input', n, *([0] if key == '3' else []))\n"
        "        p.sd_model.forge_objects.unet = unet\n"
    )
    host = host_of("sd15", extensions=(PROJECT_ROOT, tmp_path / "zlate"))

    def draw(ours: bool, key: str) -> np.ndarray:
        wanted = request(*([unit(formulation="joint")] if ours else []))
        wanted.setdefault("alwayson_scripts", {})["Late"] = {"args": [key]}
        return np.asarray(host.txt2img(**wanted).image, dtype=float)

    plain, alone = draw(False, ""), draw(True, "")
    for key in ("2", "3"):
        late, both = draw(False, key), draw(True, key)
        for one, other in ((plain, late), (late, both), (alone, both)):
            assert np.abs(one - other).mean() > 1
    assert np.array_equal(draw(False, ""), plain)
    assert not host.errors


def test_in_the_hires_pass_a_unit_that_never_acts_is_said_and_the_job_goes_on(
    host_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_of("sd15")
    said: list[str] = []
    monkeypatch.setattr("sd_image_prompt.hosts.comfy.ComfyHost.comment", lambda self, p, message: said.append(message))
    hires = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.5, "hr_cfg": 5.0, "steps": 4}
    result = host.txt2img(**request(unit(stop=0.3), **hires))
    assert len(result.images) == 1
    assert len(said) == 1
    assert "would never act: choose a stop above 0." in said[0]
    assert f"IP-Adapter error: {json.dumps(said[0])}" in result.infotexts[0]
    assert "IP-Adapter error" not in host.txt2img(**request(unit(), **hires)).infotexts[0]
    assert len(said) == 1


SWAP = """
import copy
from modules import scripts, script_callbacks, shared
class Swap(scripts.Script):
    at = None
    def title(self): return "Swap"
    def show(self, is_img2img): return scripts.AlwaysVisible
    def ui(self, is_img2img):
        import gradio as gr
        return [gr.Textbox("", visible=False)]
    def process(self, p, at="", *args): Swap.at = int(at) if at else None
def step(params):
    if Swap.at is not None and params.sampling_step == Swap.at:
        objects = shared.sd_model.forge_objects
        unet = shared.sd_model.forge_objects_original.unet.clone()
        model = unet.model
        unet.model = copy.copy(model)  # another object over the same layers
        unet.model._modules = dict(model._modules)
        unet.model.diffusion_model = copy.copy(model.diffusion_model)
        objects.unet = unet
        Swap.at = None
script_callbacks.on_cfg_denoiser(step)
"""


@pytest.mark.parametrize(("stop", "swap_at"), [(1.0, 3), (0.5, 2), (0.5, 6)])
def test_another_unet_in_the_middle_of_sampling(host_of: Any, tmp_path: Path, stop: float, swap_at: int) -> None:
    """What a refiner does; here the new UNet has the same weights, so the picture must be the same."""
    from tests.embedded.host import PROJECT_ROOT

    scripts = tmp_path / "swap" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "swap.py").write_text(SWAP)
    host = host_of("sd15", extensions=(tmp_path / "swap", PROJECT_ROOT))
    wanted = request(unit(formulation="joint", stop=stop), steps=8)
    usual = host.txt2img(**wanted).image
    wanted["alwayson_scripts"]["Swap"] = {"args": [str(swap_at)]}
    swapped = host.txt2img(**wanted).image
    assert np.array_equal(np.asarray(usual), np.asarray(swapped))
    assert not host.errors


def test_a_unet_that_does_not_fit_in_the_middle_of_sampling_ends_the_job(
    host_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_of("sd15")
    plain = host.txt2img(**request(steps=4)).image

    def check(self: Any, p: Any, injection: Any, identity: Any) -> bool:
        from modules import shared

        if shared.state.sampling_step >= 2:
            raise sys.modules["sd_image_prompt.errors"].IPAdapterError("The refiner is of another family.")
        return True

    monkeypatch.setattr("sd_image_prompt.hosts.comfy.ComfyHost.check", check)
    with pytest.raises(ValueError, match="another family"):
        host.txt2img(**request(unit(), steps=4))
    assert len(host.unet_calls) <= 3
    monkeypatch.undo()
    assert np.array_equal(np.asarray(plain), np.asarray(host.txt2img(**request(steps=4)).image))


def test_a_refiner_that_does_not_fit_says_which_stop_would_do(host_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_image_prompt.hosts.comfy import ComfyHost  # type: ignore[import-not-found]  # loaded by the script

    host = host_of("sd15")
    usual = ComfyHost.unet_info

    def steps_done() -> int:
        from modules import shared

        return int(shared.state.sampling_step)

    def unet_info(self: Any, p: Any) -> Any:
        if steps_done() >= 4:
            raise sys.modules["sd_image_prompt.errors"].IPAdapterError("The loaded checkpoint has 44 layers.")
        return usual(self, p)

    monkeypatch.setattr(ComfyHost, "unet_info", unet_info)
    monkeypatch.setattr(ComfyHost, "check", lambda *_: steps_done() < 4)
    with pytest.raises(ValueError, match=r"stop to 0\.\d\d or less: The loaded checkpoint has 44") as refusal:
        host.txt2img(**request(unit(), steps=8))
    (stop,) = re.findall(r"stop to (0\.\d\d)", str(refusal.value))
    assert len(host.txt2img(**request(unit(stop=float(stop)), steps=8)).images) == 1

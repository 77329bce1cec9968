"""Every example of the README runs, against the embedded host; and beside each the same with something wrong in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webuiapi
from PIL import Image

from lib_ipadapter import load_ip_adapter, preprocess
from lib_ipadapter.access import ROUTES
from lib_ipadapter.catalogue import Entry
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.units import Unit
from tests.adapter_files import base_adapter, save
from tests.bare_model import SD15_LAYERS, BareModel
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.demo_models import DemoModels
from tests.photos import base64_photo, photo
from tests.test_downloads import DATA, Hub, hub

__all__ = ["hub"]  # a fixture

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
PICTURE = "<base64 of a PNG or JPEG, or a data URI>"
*REQUESTS, CHECK, CHECKED, PREVIEW, SAVE, MODELS, DOWNLOAD, PROGRESS = [
    json.loads(text.replace(PICTURE, base64_photo())) for language, text in BLOCKS if language == "json"
]
PYTHON = [text for language, text in BLOCKS if language == "python"]


def test_there_are_as_many_examples_as_are_run() -> None:
    assert (len(REQUESTS), len(PYTHON)) == (5, 2)


@pytest.mark.parametrize("number", range(len(REQUESTS) - 1))
def test_requests(host: Host, number: int) -> None:
    wanted = REQUESTS[number]
    client = Client(host.app)
    steered = client.post("/sdapi/v1/txt2img", json={**wanted, "seed": 1})
    assert steered.status_code == 200
    plain = client.post("/sdapi/v1/txt2img", json={**wanted, "seed": 1, "alwayson_scripts": {}})
    assert steered.json()["images"] != plain.json()["images"]
    assert "IP-Adapter 1" in json.loads(steered.json()["info"])["infotexts"][0]
    *before, last = wanted["alwayson_scripts"]["IP-Adapter"]["args"]
    wrong = wanted | {"alwayson_scripts": {"IP-Adapter": {"args": [*before, last | {"weight": "a lot"}]}}}
    refused(client.post("/sdapi/v1/txt2img", json=wrong), '"a lot"')


def refused(answer: Any, part: str, status: int = 422) -> None:
    assert answer.status_code == status and part in answer.json()["detail"], answer.json()


def test_the_defaults_are_those_shown() -> None:
    shown = REQUESTS[1]["alwayson_scripts"]["IP-Adapter"]["args"][0]
    default = Unit()
    for name, value in shown.items():
        if name not in ("model", "images", "negative_images"):
            assert getattr(default, name) == getattr(Unit.from_json({name: value}), name)
    assert set(shown) == set(Unit.__dataclass_fields__)


def test_a_request_that_cannot_be_met(host: Host) -> None:
    refused(Client(host.app).post("/sdapi/v1/txt2img", json=REQUESTS[-1]), "picture")


def test_the_table_has_every_route() -> None:
    shown = [
        (methods, path) for methods, path in re.findall(r"^\| (`[^/]*)(/ip-adapter/[^`]*)` \|", README, re.MULTILINE)
    ]
    named = {(method, path) for methods, path in shown for method in re.findall("[A-Z]+", methods)}
    assert named == {(route.method, route.path) for route in ROUTES}


def test_models_are_listed(host: Host) -> None:
    client = Client(host.app)
    assert client.get("/ip-adapter/models").json() == MODELS
    refused(client.get("/ip-adapter/models", headers={"Origin": "https://example"}), "https://example", 403)


def test_check(host: Host) -> None:
    client = Client(host.app)
    answer = client.post("/ip-adapter/check", json=CHECK).json()
    assert re.fullmatch("[0-9a-f]{64}", answer["pictures"][0]["sha256"])
    answer["pictures"][0]["sha256"] = "<64 hexadecimal digits>"
    assert len(answer["layers"]) == 16
    answer["layers"][1:] = ["…"]
    assert answer == CHECKED
    refused(client.post("/ip-adapter/check", json=CHECK | {"scheduler": "fast"}), '"fast"')


def test_preview(host: Host) -> None:
    client = Client(host.app)
    answer = client.post("/ip-adapter/preview", json=PREVIEW).json()
    (seen,) = (Image.open(BytesIO(base64.b64decode(each))) for each in answer["images"])
    assert set(answer) == {"size", "images"} and seen.size == (answer["size"], answer["size"])
    refused(client.post("/ip-adapter/preview", json=PREVIEW | {"preparation": "zoom"}), '"zoom"')


def test_saving(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.cmd_opts, "disable_extension_access", False, raising=False)
    client = Client(host.app)
    answer = client.post("/ip-adapter/saved", json=SAVE).json()
    assert set(answer) == {"name", "pictures", "bytes"} and answer["pictures"] == 1
    refused(client.post("/ip-adapter/saved", json=SAVE), '"lighthouse keeper" is there already')
    drawn = []
    for prompt in ("a house", "a house<ipa:lighthouse keeper:0.7>"):
        wanted = {**REQUESTS[0], "prompt": prompt, "alwayson_scripts": {}, "seed": 1}
        (image,) = client.post("/sdapi/v1/txt2img", json=wanted).json()["images"]
        drawn.append(Image.open(BytesIO(base64.b64decode(image))).tobytes())
    assert drawn[0] != drawn[1]
    wrong = {**REQUESTS[0], "prompt": "<ipa:nobody>", "alwayson_scripts": {}}
    refused(client.post("/sdapi/v1/txt2img", json=wrong), "there are lighthouse keeper")
    assert client.delete("/ip-adapter/saved/lighthouse keeper").status_code == 200


def test_webuiapi(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = host.launch()
    try:
        api = webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1")
        exec(PYTHON[0], {"api": api, "photo_base64": base64_photo()})
        init = photo("coffee").resize((64, 64))
        script = {"IP-Adapter": {"args": [True, {"model": "demo-base-sd15.safetensors", "images": [base64_photo()]}]}}
        fields: dict[str, Any] = {
            "images": [init],
            "prompt": "a cliff",
            "steps": 4,
            "width": 64,
            "height": 64,
            "seed": 1,
        }
        steered = api.img2img(**fields, alwayson_scripts=script)
        plain = api.img2img(**fields)
        wrong = PYTHON[0].replace('"stop": 0.7', '"stop": 7')
        with pytest.raises(RuntimeError, match="is 7; allowed"):
            exec(wrong, {"api": api, "photo_base64": base64_photo()})
    finally:
        host.stop()
    assert (tmp_path / "lighthouse.png").stat().st_size > 1000
    assert not np.array_equal(np.asarray(steered.image), np.asarray(plain.image))


def test_python(models: DemoModels, tmp_path: Path) -> None:
    file = save(base_adapter([width for _, width in SD15_LAYERS], 64), tmp_path / "adapter.safetensors")
    names: dict[str, Any] = {
        "clip_vision_path": str(models.encoder),
        "ip_adapter_path": str(file),
        "photo_array": np.asarray(photo()),
        "model": BareModel(0.1),
    }
    exec(PYTHON[1], names)
    assert len(names["patched"].replacements) == 16
    with pytest.raises(IPAdapterError, match="encoder"):
        load_ip_adapter(str(file), None, str(file))
    with pytest.raises(IPAdapterError, match="int64"):
        preprocess(np.asarray(photo()).astype(np.int64), str(file))


@pytest.fixture
def empty_host(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Without models, in front of a hub of our own that has the example's entry."""
    name, digest = DOWNLOAD["name"], hashlib.sha256(DATA).hexdigest()
    entries = (Entry(name, "SD1.5", "base", "tests", "some/one", "file.safetensors", len(DATA), digest),)
    with Host("sd15", models_path=tmp_path) as made:
        made.cmd_opts.disable_extension_access = False
        for module in ("downloads", "catalogue"):
            monkeypatch.setattr(sys.modules[f"sd_image_prompt.{module}"], "ENTRIES", entries)
        yield made


def test_a_download(empty_host: Host, hub: Hub, tmp_path: Path) -> None:
    client = Client(empty_host.app)
    assert [each["name"] for each in client.get("/ip-adapter/catalogue").json()["entries"]] == [DOWNLOAD["name"]]
    refused(client.post("/ip-adapter/download", json={"name": "ip-adapter_sd51"}), "ip-adapter_sd51")
    hub.gate = threading.Event()
    client.post("/ip-adapter/download", json=DOWNLOAD)
    state = client.get("/ip-adapter/download").json()
    assert {**state, "done": PROGRESS["done"], "total": PROGRESS["total"]} == PROGRESS
    client.post("/ip-adapter/download/cancel")
    hub.gate.set()
    assert ended(client)["status"] == "cancelled"
    client.post("/ip-adapter/download", json=DOWNLOAD)
    state = ended(client)
    assert (state["status"], state["done"], state["total"]) == ("done", len(DATA), len(DATA)), state
    assert [path.read_bytes() for path in tmp_path.rglob("*.safetensors")] == [DATA]


def ended(client: Client) -> dict[str, Any]:
    """The state when the download is over."""
    pause = threading.Event()
    for _ in range(600):
        state: dict[str, Any] = client.get("/ip-adapter/download").json()
        if state["status"] != "running":
            return state
        pause.wait(0.05)
    raise AssertionError(f"The download doesn't end: {state}")

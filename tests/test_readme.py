"""Every example of the README runs, against the embedded host."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webuiapi
from fastapi.testclient import TestClient

from lib_ipadapter.units import Unit
from tests.adapter_files import base_adapter, save
from tests.bare_model import SD15_LAYERS, BareModel
from tests.embedded import Host
from tests.embedded.demo_models import DemoModels
from tests.photos import base64_photo, photo

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
*REQUESTS, MODELS = [json.loads(text) for language, text in BLOCKS if language == "json"]
PYTHON = [text for language, text in BLOCKS if language == "python"]


def test_there_are_as_many_examples_as_are_run() -> None:
    assert (len(REQUESTS), len(PYTHON)) == (3, 2)


@pytest.mark.parametrize("number", [0, 1])
def test_requests(host: Host, number: int) -> None:
    wanted = json.loads(
        json.dumps(REQUESTS[number]).replace("<base64 of a PNG or JPEG, or a data URI>", base64_photo())
    )
    client = TestClient(host.app)
    steered = client.post("/sdapi/v1/txt2img", json={**wanted, "seed": 1})
    assert steered.status_code == 200
    plain = client.post("/sdapi/v1/txt2img", json={**wanted, "seed": 1, "alwayson_scripts": {}})
    assert steered.json()["images"] != plain.json()["images"]
    assert "IP-Adapter 1" in json.loads(steered.json()["info"])["infotexts"][0]


def test_the_defaults_are_those_shown() -> None:
    shown = REQUESTS[1]["alwayson_scripts"]["IP-Adapter"]["args"][0]
    default = Unit()
    for name, value in shown.items():
        if name not in ("model", "images"):
            assert getattr(default, name) == value
    assert set(shown) == set(Unit.__dataclass_fields__)


def test_a_request_that_cannot_be_met(host: Host) -> None:
    answer = TestClient(host.app, raise_server_exceptions=False).post("/sdapi/v1/txt2img", json=REQUESTS[2])
    assert answer.status_code == 422
    assert "picture" in answer.json()["detail"]


def test_models_are_listed(host: Host) -> None:
    assert TestClient(host.app).get("/ip-adapter/models").json() == MODELS


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

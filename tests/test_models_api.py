"""What models there are, asked over HTTP and anew each time: no restart, no 'Reload UI'."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import save_file

from lib_ipadapter.encoding import NEGATIVE_KEY
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.demo_models import DemoModels

BASE = {
    "name": "demo-base-sd15.safetensors",
    "kind": "SD1.5 · base · 4 tokens · needs CLIP demo ViT",
    "family": "sd15",
    "variant": "base",
    "tokens": 4,
    "encoder": "demo ViT/14",
    "encoder_present": True,
}
PLUS = {
    **BASE,
    "name": "demo-plus-sd15.safetensors",
    "kind": "SD1.5 · plus · 16 tokens · needs CLIP demo ViT",
    "variant": "plus",
    "tokens": 16,
}


@pytest.fixture
def folder(models: DemoModels, tmp_path: Path) -> Path:
    """Model folders with one adapter and its encoder."""
    for source in (models.base["sd15"], models.encoder):
        target = tmp_path / "models" / source.parent.name
        target.mkdir(parents=True)
        shutil.copy(source, target)
    return tmp_path / "models"


@pytest.fixture
def own_host(folder: Path) -> Iterator[Host]:
    with Host("sd15", models_path=folder) as made:
        yield made


def listing(host: Host) -> Any:
    """What the route answers, without the files' sizes, once these are seen to be right."""
    answer = Client(host.app).get("/ip-adapter/models")
    assert answer.status_code == 200
    return without_sizes(answer.json(), host.models_path)


def without_sizes(listed: Any, folder: Path) -> Any:
    for each in listed["adapters"]:
        assert each.pop("bytes") == (folder / "ipadapter" / each["name"]).stat().st_size
    return listed


def test_files_come_and_go_without_a_restart(own_host: Host, folder: Path, models: DemoModels) -> None:
    first = {"adapters": [BASE], "encoders": ["demo-vit.safetensors"], "negatives": []}
    assert listing(own_host) == first
    added = folder / "ipadapter" / "faces" / PLUS["name"]
    added.parent.mkdir()
    shutil.copy(models.plus["sd15"], added)
    save_file({NEGATIVE_KEY: torch.zeros(1, 4, 64)}, folder / "ipadapter" / "none.safetensors")
    (folder / "ipadapter" / "notes.bin").write_text("no model", encoding="utf-8")
    (folder / "clip_vision" / "demo-vit.safetensors").rename(folder / "clip_vision" / "b.safetensors")
    assert listing(own_host) == {
        "adapters": [BASE, {**PLUS, "name": f"faces/{PLUS['name']}"}],
        "encoders": ["b.safetensors"],
        "negatives": ["none.safetensors"],
    }
    added.unlink()
    (folder / "ipadapter" / BASE["name"]).unlink()
    assert listing(own_host)["adapters"] == []


def test_a_missing_encoder_is_told(own_host: Host, folder: Path) -> None:
    (folder / "clip_vision" / "demo-vit.safetensors").unlink()
    assert listing(own_host) == {"adapters": [{**BASE, "encoder_present": False}], "encoders": [], "negatives": []}


def test_it_answers_over_a_socket_and_after_reload_ui(own_host: Host, folder: Path, models: DemoModels) -> None:
    url = f"{own_host.launch()}/ip-adapter/models"
    before = without_sizes(requests.get(url, timeout=60).json(), folder)
    own_host.reload_ui()
    shutil.copy(models.plus["sd15"], folder / "ipadapter")
    after = without_sizes(requests.get(f"{own_host.launch()}/ip-adapter/models", timeout=60).json(), folder)
    assert before["adapters"] == [BASE] and after["adapters"] == [BASE, PLUS]
    routes = [route for route in own_host.app.routes if getattr(route, "path", "") == "/ip-adapter/models"]
    assert len(routes) == 1
    assert own_host.errors == []


def test_it_is_described(own_host: Host) -> None:
    described = Client(own_host.app).get("/openapi.json").json()["paths"]["/ip-adapter/models"]
    assert set(described) == {"get"} and "are there now" in described["get"]["description"]


def test_the_pages_refresh_button_lists_anew(own_host: Host, folder: Path, models: DemoModels) -> None:
    def refresh() -> tuple[list[str], list[str]]:
        config = own_host.page.blocks.config
        names = {
            part["props"].get("elem_id"): part["id"] for part in config["components"] if part["props"].get("elem_id")
        }
        button = next(ident for name, ident in names.items() if name.endswith("unit_1_refresh"))
        (event,) = [each for each in own_host.page.blocks.fns.values() if any(t[0] == button for t in each.targets)]
        model, _, _, negative = event.fn(False, BASE["name"], None, "")
        return [name for _, name in model["choices"]], list(negative["choices"])

    assert refresh() == ([BASE["name"]], [])
    shutil.copy(models.plus["sd15"], folder / "ipadapter")
    save_file({NEGATIVE_KEY: torch.zeros(1, 4, 64)}, folder / "ipadapter" / "none.safetensors")
    assert refresh() == ([BASE["name"], PLUS["name"]], ["none.safetensors"])


def test_the_page_says_what_the_first_adapter_is(own_host: Host) -> None:
    props = [part["props"] for part in own_host.page.blocks.config["components"]]
    kinds = [each["value"] for each in props if str(each.get("elem_id")).endswith("unit_1_kind")]
    assert kinds and all(BASE["kind"] in each for each in kinds)

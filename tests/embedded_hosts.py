"""Fixtures for tests that generate in the embedded host; one host runs at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.embedded import Host
from tests.embedded.demo_models import DemoModels, make_demo_models
from tests.photos import base64_photo

TITLE = "IP-Adapter"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    """Small random adapters and an encoder, in a folder of the module's own."""
    return make_demo_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def host_of(models: DemoModels) -> Iterator[Any]:
    """``host_of(shape, **options)``: the running host, or a new one where a test asks for another."""
    running: dict[str, Host] = {}

    def get(shape: str, **options: Any) -> Host:
        key = f"{shape} {options}"
        if key not in running:
            for other in running.values():
                other.close()
            running.clear()
            running[key] = Host(shape, models_path=models.models_path, **options)
        return running[key]

    yield get
    for host in running.values():
        host.close()


@pytest.fixture
def host(host_of: Any) -> Host:
    """The SD1.5-shaped host."""
    made: Host = host_of("sd15")
    return made


def unit(
    kind: str = "base", shape: str = "sd15", photos: tuple[str, ...] = ("astronaut",), **fields: Any
) -> dict[str, Any]:
    """A unit with a demo adapter, as an API client writes it."""
    return {"model": f"demo-{kind}-{shape}.safetensors", "images": [base64_photo(name) for name in photos], **fields}


def request(*units: Any, **fields: Any) -> dict[str, Any]:
    """A quick request; the script is named only when there are units."""
    wanted = {"prompt": "a red house", "steps": 2, "width": 64, "height": 64, "seed": 1, "cfg_scale": 5.0, **fields}
    if units:
        wanted["alwayson_scripts"] = {TITLE: {"args": [True, *units]}}
    return wanted

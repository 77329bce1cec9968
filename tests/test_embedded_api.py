"""The HTTP API: through a public client over a socket, and answer by answer."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import webuiapi
from PIL import Image

from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.probe import PROBE_EXTENSION, SMALL, forget, probe_args, record, run


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host("sd15", [PROBE_EXTENSION]) as made:
        yield made


@pytest.fixture
def client(host: Host) -> Client:
    forget()
    return Client(host.app)


def txt2img(client: Client, **fields: Any) -> Any:
    return client.post("/sdapi/v1/txt2img", json={**SMALL, **fields})


def test_a_public_client(host: Host) -> None:
    address, port = host.launch().rsplit(":", 1)
    assert host.launch() == f"{address}:{port}"
    api = webuiapi.WebUIApi(host="127.0.0.1", port=int(port), steps=2)
    result = api.txt2img(prompt="a fox", seed=1, width=64, height=64, sampler_name="Euler")
    assert result.image.size == (64, 64)
    assert result.image.tobytes() == run(host).image.tobytes()
    assert result.info["all_seeds"] == [1]
    assert result.parameters["prompt"] == "a fox"
    assert result.image.info["parameters"] == result.info["infotexts"][0]
    again = api.img2img(images=[result.image], prompt="a fox", seed=2, width=64, height=64, denoising_strength=0.5)
    assert again.image.size == (64, 64)
    assert again.parameters["init_images"] is None
    with_hires = api.txt2img(prompt="a fox", width=64, height=64, enable_hr=True, hr_scale=1.5, scheduler="karras")
    assert with_hires.image.size == (96, 96)
    assert [s["name"] for s in api.get_samplers()] == ["Euler", "Euler a", "Heun", "DPM++ 2M", "DDIM"]
    assert api.get_sd_models()[0]["title"] == api.get_options()["sd_model_checkpoint"]
    assert api.get_scripts() == {"txt2img": ["probe"], "img2img": ["probe"]}
    assert api.get_progress()["progress"] == 0
    with pytest.raises(RuntimeError) as caught:
        api.txt2img(width=64, height=64, alwayson_scripts=probe_args(init="no such model"))
    assert caught.value.args[0] == 422
    assert "no such model" in caught.value.args[1]


def test_interrupt_over_http(host: Host) -> None:
    url = host.launch()
    api = webuiapi.WebUIApi(host="127.0.0.1", port=int(url.rsplit(":", 1)[1]))
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(api.txt2img(width=64, height=64, sampler_name="Euler", steps=150, n_iter=40))
    )
    thread.start()
    deadline = time.monotonic() + 60
    while not api.get_progress()["progress"] and time.monotonic() < deadline:
        time.sleep(0.01)
    api.interrupt()
    thread.join(60)
    assert len(host.unet_calls) < 150 * 40
    assert results[0].images
    assert run(host).images


def test_failures_as_status_codes(host: Host, client: Client) -> None:
    cases = [
        (probe_args(init="no such model"), 422, {"error": "UserError", "detail": "no such model"}),
        (probe_args(sampler="too late"), 422, {"error": "UserError", "detail": "too late"}),
        (probe_args(replace="raise"), 422, {"error": "UserError", "detail": "raised inside attention"}),
        (probe_args(init="plain", status=None), 500, {"error": "UserError", "detail": "", "message": "plain"}),
        ({"nobody": {"args": []}}, 422, {"detail": "Script 'nobody' not found"}),
    ]
    for scripts, status, expected in cases:
        answer = txt2img(client, alwayson_scripts=scripts)
        assert answer.status_code == status
        assert {k: v for k, v in answer.json().items() if k in expected} == expected
    assert txt2img(client, steps="many").status_code == 422
    assert txt2img(client, sampler_name="nobody's").status_code == 400
    assert txt2img(client, script_name="nobody").status_code == 422
    assert txt2img(client, infotext="a fox\nSteps: 1").status_code == 422
    post = client.post
    assert post("/sdapi/v1/img2img", json=SMALL).status_code == 404
    assert (
        post("/sdapi/v1/img2img", json={**SMALL, "init_images": ["aGVsbG8="]}).json()["detail"]
        == "Invalid encoded image"
    )
    assert post("/sdapi/v1/img2img", json={**SMALL, "init_images": [], "mask": "x"}).status_code == 422
    assert txt2img(client).status_code == 200


def pixels(answer: Any) -> list[bytes]:
    images = [Image.open(io.BytesIO(base64.b64decode(x))) for x in answer.json()["images"]]
    return [image.tobytes() for image in images]


def test_silent_failures_stay_silent(client: Client) -> None:
    plain = pixels(txt2img(client))
    swallowed = txt2img(client, alwayson_scripts=probe_args(**{"raise in before_process": True}))
    assert swallowed.status_code == 200
    assert pixels(swallowed) == plain
    nothing = txt2img(client, alwayson_scripts=probe_args(comment="x", **{"interrupt in process": True}))
    assert nothing.status_code == 200
    assert nothing.json()["images"] == []
    assert len(json.loads(nothing.json()["info"])["infotexts"]) == 1
    assert "x" not in nothing.json()


def test_args_are_positional_with_the_components_values_as_defaults(host: Host, client: Client) -> None:
    def args_of(**fields: Any) -> Any:
        forget()
        assert txt2img(client, **fields).status_code == 200
        return next(d["args"] for name, d in record().details if name == "before_process")

    assert args_of() == (False, "{}", 3)
    assert args_of(alwayson_scripts={"PROBE": {"args": [True]}}) == (True, "{}", 3)
    assert args_of(alwayson_scripts={"probe": {"args": [False, "{}", "as sent", "too many"]}}) == (
        False,
        "{}",
        "as sent",
    )
    assert args_of(alwayson_scripts={"probe": {}}) == (False, "{}", 3)


def test_script_info(client: Client) -> None:
    for_txt2img, for_img2img = client.get("/sdapi/v1/script-info").json()
    assert for_txt2img["is_img2img"] is False
    assert for_img2img["is_img2img"] is True
    assert for_txt2img["name"] == "probe"
    assert for_txt2img["is_alwayson"] is True
    assert [a["label"] for a in for_txt2img["args"]] == ["Probe", "What to do", "A number"]
    assert for_txt2img["args"][2] == {
        "label": "A number",
        "value": 3,
        "minimum": 0,
        "maximum": 10,
        "step": 1,
        "choices": None,
    }


def test_options_and_overrides(host: Host, client: Client) -> None:
    assert client.get("/sdapi/v1/options").json()["probe_option"] == 7
    assert client.post("/sdapi/v1/options", json={"probe_option": 8}).status_code == 200
    assert host.opts.probe_option == 8
    txt2img(client, override_settings={"skip_early_cond": 1.0})
    assert {c.cond_or_uncond for c in host.unet_calls} == {(0,)}
    assert host.opts.skip_early_cond == 0.0


def test_other_routes(client: Client) -> None:
    assert client.get("/probe/ping").json() == "pong"
    image = txt2img(client).json()["images"][0]
    info = client.post("/sdapi/v1/png-info", json={"image": image}).json()
    assert info["parameters"]["Seed"] == "1"
    assert Image.open(io.BytesIO(base64.b64decode(image))).info["parameters"] == info["info"]
    assert txt2img(client, send_images=False).json()["images"] == []

"""The routes: what they answer, and what they refuse, asked as a program on the WebUI's machine and as others."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import Depends, FastAPI, HTTPException
from PIL import Image

from lib_ipadapter import api
from lib_ipadapter.access import ROUTES
from lib_ipadapter.hosts.cmd_opts import extension_access
from lib_ipadapter.hosts.routes import add_routes
from lib_ipadapter.pictures import picture_hash, prepare, read_picture
from lib_ipadapter.refs import ImageRef
from lib_ipadapter.units import Unit
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded_hosts import request, unit
from tests.photos import base64_photo

SENT = read_picture(base64_photo())
PHOTO_HASH = picture_hash(SENT)


@pytest.fixture
def client(host: Host) -> Client:
    return Client(host.app)


def check(client: Client, wanted: Any, **fields: Any) -> Any:
    answer = client.post("/ip-adapter/check", json={"unit": wanted, **fields})
    assert answer.status_code == 200, answer.json()
    return answer.json()


def refused(answer: httpx.Response, status: int, *parts: str) -> None:
    detail = answer.json()["detail"]
    assert answer.status_code == status and all(part in detail for part in parts), (answer.status_code, detail)
    assert isinstance(detail, str) and detail.endswith(".")


# --- check --------------------------------------------------------------------------------------------------------


def test_check_says_what_would_happen(client: Client) -> None:
    told = check(client, unit("plus", stop=0.5), steps=8)
    assert told == {
        "model": "demo-plus-sd15.safetensors",
        "kind": "SD1.5 · plus · 16 tokens · needs CLIP demo ViT",
        "family": "sd15",
        "variant": "plus",
        "tokens": 16,
        "encoder": "demo-vit.safetensors",
        "formulation": "joint",
        "uncond": "zero pixels",
        "pictures": [{"sha256": PHOTO_HASH, "width": SENT.width, "height": SENT.height}],
        "acts": True,
        "steps": {"of": 8, "acting": [1, 2, 3, 4], "weights": [1.0] * 4 + [0.0] * 4},
        "layers": [
            {"group": n, "block": "input" if n < 6 else "middle" if n == 6 else "output", "weight": 1.0}
            for n in range(16)
        ],
        "memory": told["memory"],
        "fits_checkpoint": True,
    }
    base = check(client, unit("base"))
    assert (base["formulation"], base["uncond"], base["steps"]) == ("decoupled", "zero embeds", None)


def test_check_tells_the_steps_in_which_the_unit_then_acts(host: Host, client: Client) -> None:
    """By the noise levels of the UNet calls of a generation with the same settings."""
    one = unit("plus", start=0.3, stop=0.75)
    for fields in ({"scheduler": "karras"}, {"scheduler": "uniform"}):
        told = check(client, one, steps=6, **fields)["steps"]
        host.api.run("txt2img", request(one, steps=6, sampler_name="Euler", **fields))
        real = [1 - float(call.timestep_tensor[0]) / 999 for call in host.unet_calls]
        acting = [0.3 <= p < 0.75 for p in real]
        assert told == {
            "of": 6,
            "acting": [n for n, acts in enumerate(acting, 1) if acts],
            "weights": [float(acts) for acts in acting],
        }
    img2img = check(client, one, steps=8, denoising_strength=0.5)["steps"]
    assert img2img["of"] == 5 and img2img["acting"]
    assert check(client, one, sigmas=[14.6, 3.0, 0.9, 0.2, 0])["steps"]["of"] == 4


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"uncond": "none"},
        {"photos": ("astronaut", "coffee")},
        {"photos": ("astronaut", "astronaut")},
        {"curve": "0@0, 1@1", "photos": ("astronaut", "coffee")},
        {"curve": "0.5@0.9, 0@0.9"},
    ],
)
def test_check_tells_the_memory_that_is_then_taken(
    host: Host, client: Client, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    held: list[int] = []
    import sys

    injection = sys.modules["sd_image_prompt.injection"].Injection
    original = injection.to

    def to(self: Any, device: torch.device, dtype: torch.dtype) -> None:
        original(self, device, dtype)
        tensors = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for prompts in self._prompts
            for images in prompts.values()
            for image in images
            for t in (*image.keys, *image.values)
        }
        raw = sum(t.nbytes for each in self._adjustable.values() for run in each._runs for t in run[1:3])
        held.append(sum(tensors.values()) + raw)

    monkeypatch.setattr(injection, "to", to)
    one = unit("plus", **fields)
    told = check(client, one)["memory"]["kv_bytes"]
    host.api.run("txt2img", request(one))
    assert held and set(held) == {told}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": "nowhere"}, ["nowhere", "demo-"]),
        ({"model": "../demo-plus-sd15.safetensors"}, ["There is no IP-Adapter model"]),
        ({"model": "demo-plus-sdxl.safetensors"}, ["another model family"]),
        ({"images": []}, ["no picture"]),
        ({"images": ["bm90IGEgcGljdHVyZQ=="]}, ["no known image format"]),
        ({"images": ["/etc/passwd"]}, ["no known image format"]),
        ({"images": ["pictures/me.png"]}, ["never a path"]),
        ({"images": ["C:\\picture.png"]}, ["never a path"]),
        ({"images": ["file:///etc/passwd"]}, ["file:///etc/passwd", "aren't fetched"]),
        ({"images": ["http://127.0.0.1:1/a.png"]}, ["settings don't allow"]),
        ({"images": [{"sha256": "0" * 64}]}, ["0" * 64]),
        ({"wieght": 1}, ["wieght", "weight"]),
        ({"weight": 9}, ["weight", "9"]),
        ({"uncond": "file", "negative": "nothing.safetensors"}, ["nothing.safetensors"]),
    ],
)
def test_check_refuses_what_a_generation_refuses(
    host: Host, client: Client, changes: dict[str, Any], parts: list[str]
) -> None:
    wrong = {**unit("plus"), **changes}
    refused(client.post("/ip-adapter/check", json={"unit": wrong}), 422, *parts)
    assert client.post("/sdapi/v1/txt2img", json=request(wrong)).status_code == 422


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, ["unit", "missing"]),
        ({"unit": 5}, ["5"]),
        ({"units": []}, ["units"]),
        ({"unit": unit(), "steps": 0}, ["steps", "1 to 1000"]),
        ({"unit": unit(), "steps": True}, ["steps", "True"]),
        ({"unit": unit(), "steps": 5, "scheduler": "turbo"}, ["turbo", "karras"]),
        ({"unit": unit(), "steps": 5, "scheduler": 3}, ["scheduler"]),
        ({"unit": unit(), "scheduler": "karras"}, ["scheduler", "steps"]),
        ({"unit": unit(), "denoising_strength": 0.5}, ["denoising_strength", "steps"]),
        ({"unit": unit(), "steps": 5, "denoising_strength": 2}, ["denoising_strength", "0 to 1"]),
        ({"unit": unit(), "steps": 5, "sigmas": [2, 1, 0]}, ["sigmas", "one of the two"]),
        ({"unit": unit(), "sigmas": [1, 2]}, ["sigmas", "falling"]),
        ({"unit": unit(), "sigmas": [0]}, ["sigmas", "falling"]),
        ({"unit": unit(stop=0.2), "steps": 8, "denoising_strength": 0.5}, ["would never act", "choose a stop above"]),
    ],
)
def test_check_refuses_bad_questions(client: Client, fields: dict[str, Any], parts: list[str]) -> None:
    refused(client.post("/ip-adapter/check", json=fields), 422, *parts)


def test_check_tells_the_weights_of_the_hires_pass(client: Client) -> None:
    one = unit(weight=2, curve="0@0, 1@0.5", hires_curve="1@0", hires="scaled", hires_scale=0.25)
    assert check(client, one, steps=3)["steps"] == {"of": 3, "acting": [2, 3], "weights": [0.0, 2.0, 2.0]}
    assert check(client, one, steps=3, hires=True)["steps"]["weights"] == [0.5] * 3
    off = check(client, one | {"hires": "off"}, steps=3, hires=True)["steps"]
    assert off == {"of": 3, "acting": [], "weights": [0.0] * 3}
    silent = {"unit": unit(curve="0@0"), "steps": 3}
    refused(client.post("/ip-adapter/check", json=silent), 422, "curve (0@0)", "never act")
    refused(client.post("/ip-adapter/check", json={"unit": unit(curve="1@0, x")}), 422, "at character 6")


def test_check_leaves_nothing_behind(host: Host, client: Client) -> None:
    before = host.api.run("txt2img", request())["images"]
    check(client, unit("plus"), steps=4)
    assert host.api.run("txt2img", request())["images"] == before


# --- preview ------------------------------------------------------------------------------------------------------


def test_preview_is_what_the_encoder_sees(client: Client) -> None:
    images = [base64_photo(), {"data": base64_photo("coffee"), "crop": [0, 1, 2.5]}]
    asked = {"images": images, "preparation": "crop", "model": "demo-base-sd15.safetensors"}
    answer = client.post("/ip-adapter/preview", json=asked).json()
    assert answer["size"] == 28 or answer["size"] % 14 == 0
    seen = [np.asarray(Image.open(BytesIO(base64.b64decode(each)))) for each in answer["images"]]
    wanted = [
        prepare(SENT, "crop", answer["size"]),
        prepare(read_picture(base64_photo("coffee")), "crop", answer["size"], (0.0, 1.0, 2.5)),
    ]
    assert [np.array_equal(a, np.asarray(b)) for a, b in zip(seen, wanted, strict=True)] == [True, True]
    squashed = client.post("/ip-adapter/preview", json={"images": base64_photo(), "preparation": "squash"}).json()
    assert squashed["size"] == 224 and len(squashed["images"]) == 1


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"images": []}, ["images", "empty"]),
        ({}, ["images", "empty"]),
        ({"images": [base64_photo()], "preparation": "stretch"}, ["stretch", "squash"]),
        ({"images": [base64_photo()], "model": "nowhere"}, ["nowhere"]),
        ({"images": [base64_photo()], "model": 3}, ["model"]),
        ({"images": [{"data": base64_photo(), "crop": [2, 0, 1]}]}, ["crop"]),
        ({"images": ["/etc/passwd"]}, ["no known image format"]),
        ({"images": ["pictures/me.png"]}, ["never a path"]),
        ({"images": [base64_photo()], "weight": 1}, ["weight"]),
    ],
)
def test_preview_refuses(client: Client, fields: dict[str, Any], parts: list[str]) -> None:
    refused(client.post("/ip-adapter/preview", json=fields), 422, *parts)


# --- version, encoders, references --------------------------------------------------------------------------------


def test_version_and_encoders(host: Host, client: Client, models: Any) -> None:
    told = client.get("/ip-adapter/version").json()
    assert told["schema"] == 1 and told["version"] in Path("pyproject.toml").read_text("utf-8")
    (encoder,) = client.get("/ip-adapter/encoders").json()["encoders"]
    assert encoder["name"] == "demo-vit.safetensors" and encoder["bytes"] == models.encoder.stat().st_size
    assert encoder["kind"] == "demo ViT/14" and encoder["image_size"] % 14 == 0


class Kept:
    """Reference pictures in a dictionary."""

    def __init__(self, *pictures: Image.Image) -> None:
        self.pictures = {picture_hash(each): each for each in pictures}

    def add(self, picture: Image.Image) -> str:
        self.pictures[picture_hash(picture)] = picture
        return picture_hash(picture)

    def get(self, sha256: str) -> Image.Image:
        if sha256 not in self.pictures:
            raise api.IPAdapterError(f"No picture {sha256}.")
        return self.pictures[sha256]

    def png(self, sha256: str) -> bytes:
        file = BytesIO()
        self.get(sha256).save(file, "PNG")
        return file.getvalue()

    def listing(self) -> list[dict[str, Any]]:
        return [{"sha256": each} for each in self.pictures]

    def forget(self, sha256: str) -> bool:
        return self.pictures.pop(sha256, None) is not None


class Behind(FastAPI):
    """An app with a host's API route, its logins as gradio's apps have them, and our routes."""

    def __init__(self, kept: Kept, dependencies: list[Any], login: Any = None, checkable: bool = True) -> None:
        super().__init__()
        self.auth = login
        self.add_api_route("/sdapi/v1/sd-models", list, dependencies=dependencies)
        if checkable:
            self.add_api_route("/login_check", self._login_check, response_model=None)
        session: Any = type("_", (), {"library": None})()
        answers = api.Answers(session, lambda: None, kept, None, None, extension_access)  # type: ignore[arg-type]
        add_routes(self, answers)

    def _login_check(self, cookie: str = "") -> None:  # gradio's takes it from a cookie, which is its own affair
        if self.auth is not None and cookie != "good":
            raise HTTPException(401, "Not authenticated")


@pytest.fixture
def kept() -> Kept:
    return Kept(SENT)


@pytest.fixture
def open_host(host: Host) -> Iterator[Host]:
    before = vars(host.cmd_opts).get("disable_extension_access")
    host.cmd_opts.disable_extension_access = False
    yield host
    host.cmd_opts.disable_extension_access = before


def test_references_are_listed_fetched_and_deleted(open_host: Host, kept: Kept) -> None:
    client = Client(Behind(kept, []))
    assert client.get("/ip-adapter/references").json() == {"references": [{"sha256": PHOTO_HASH}]}
    fetched = client.get(f"/ip-adapter/references/{PHOTO_HASH.upper()}")
    assert fetched.headers["content-type"] == "image/png"
    assert picture_hash(read_picture(fetched.content)) == PHOTO_HASH
    assert client.delete(f"/ip-adapter/references/{PHOTO_HASH}").json() == {"forgotten": PHOTO_HASH}
    refused(client.delete(f"/ip-adapter/references/{PHOTO_HASH}"), 404, PHOTO_HASH)
    refused(client.get(f"/ip-adapter/references/{PHOTO_HASH}"), 422, PHOTO_HASH)
    refused(client.get("/ip-adapter/references/abc"), 422, "64 hexadecimal digits")
    assert kept.pictures == {}


def test_without_extension_access_no_picture_leaves(open_host: Host, kept: Kept) -> None:
    open_host.cmd_opts.disable_extension_access = True
    client = Client(Behind(kept, []))
    for answer in (
        client.get("/ip-adapter/references"),
        client.get(f"/ip-adapter/references/{PHOTO_HASH}"),
        client.delete(f"/ip-adapter/references/{PHOTO_HASH}"),
    ):
        refused(answer, 403, "extension access is disabled")
    refused(client.post("/ip-adapter/preview", json={"images": [{"sha256": PHOTO_HASH}]}), 403, "extension access")
    assert list(kept.pictures) == [PHOTO_HASH]
    assert client.post("/ip-adapter/preview", json={"images": [base64_photo()]}).status_code == 200


# --- access -------------------------------------------------------------------------------------------------------


def test_every_route_is_there_once_and_described(host: Host, client: Client) -> None:
    described = client.get("/openapi.json").json()["paths"]
    ours = {(method.upper(), path) for path in described if "/ip-adapter" in path for method in described[path]}
    assert ours == {(route.method, route.path) for route in ROUTES}
    assert all(described[route.path][route.method.lower()]["description"] for route in ROUTES)


def test_there_are_no_routes_without_the_hosts_api(kept: Kept) -> None:
    app = FastAPI()
    add_routes(app, object())
    assert not [route for route in app.routes if "ip-adapter" in getattr(route, "path", "")]


def test_the_hosts_logins_are_asked_for(open_host: Host, kept: Kept) -> None:
    def api_auth(key: str = "") -> None:
        if key != "secret":
            raise HTTPException(401, "Incorrect username or password")

    def statuses(client: Client, query: str) -> set[int]:
        return {client.get(f"/ip-adapter/{name}{query}").status_code for name in ("version", "references")}

    both = Client(Behind(kept, [Depends(api_auth)], login={"a": "b"}))
    assert statuses(both, "") == statuses(both, "?key=secret") == statuses(both, "?cookie=good") == {401}
    assert statuses(both, "?key=secret&cookie=good") == {200}
    assert statuses(Client(Behind(kept, [], login={"a": "b"})), "") == {401}
    assert statuses(Client(Behind(kept, [Depends(api_auth)])), "?key=secret") == {200}
    uncheckable = Client(Behind(kept, [], login={"a": "b"}, checkable=False))
    assert statuses(uncheckable, "?cookie=good") == {404}


async def _from(app: FastAPI, address: str, headers: dict[str, str], path: str) -> int:
    transport = httpx.ASGITransport(app=app, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return (await client.get(path, headers=headers)).status_code


def test_who_is_answered_over_the_wire(open_host: Host, kept: Kept) -> None:
    import anyio

    app = Behind(kept, [])
    for address, headers, expected in (
        ("127.0.0.1", {}, 200),
        ("10.0.0.9", {}, 403),
        ("127.0.0.1", {"Host": "tunnel.example"}, 403),
        ("127.0.0.1", {"Origin": "https://evil.example"}, 403),
        ("127.0.0.1", {"Origin": "http://localhost"}, 200),
    ):
        assert anyio.run(_from, app, address, headers, "/ip-adapter/references") == expected, (address, headers)
    assert anyio.run(_from, app, "10.0.0.9", {}, "/ip-adapter/version") == 200


def test_the_owners_word_on_other_sites(open_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(origin: str) -> int:
        return Client(open_host.app).get("/ip-adapter/encoders", headers={"Origin": origin}).status_code

    assert asked("https://a.example") == 403
    monkeypatch.setattr(open_host.cmd_opts, "cors_allow_origins", "https://b.example, https://a.example", raising=False)
    assert [asked("https://a.example"), asked("https://c.example")] == [200, 403]
    monkeypatch.setattr(open_host.cmd_opts, "cors_allow_origins_regex", r"https://.\.example", raising=False)
    assert [asked("https://c.example"), asked("https://c.example.org")] == [200, 403]
    monkeypatch.setattr(open_host.cmd_opts, "cors_allow_origins", "*")
    assert asked("https://d.example.org") == 200


def test_forms_and_broken_bodies(client: Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    refused(client.post("/ip-adapter/check", content="unit=1", headers=form), 415, "application/json")
    refused(client.post("/ip-adapter/check", content="{}"), 415, "application/json")
    json_type = {"Content-Type": "application/json"}
    refused(client.post("/ip-adapter/check", content="{", headers=json_type), 422, "read as JSON")
    refused(client.post("/ip-adapter/check", content="[" * 100_000, headers=json_type), 422, "JSON")
    refused(client.post("/ip-adapter/check", content="[1]", headers=json_type), 422, "object")
    refused(client.post("/ip-adapter/check", content=b"\xff\xfe{", headers=json_type), 422, "JSON")


# --- addresses ----------------------------------------------------------------------------------------------------


def test_addresses_are_fetched_by_the_host_where_its_settings_allow_it(
    host: Host, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    asked: list[str] = []

    def of_host(address: str) -> Image.Image:
        asked.append(address)
        if "local" in address:
            raise HTTPException(500, "Request to local resource not allowed")
        return SENT

    monkeypatch.setattr(sys.modules["modules.api.api"], "decode_base64_to_image", of_host)
    there = {**unit("plus"), "images": ["https://example/a.png"]}
    refused(client.post("/ip-adapter/check", json={"unit": there}), 422, "settings don't allow addresses")
    assert asked == []
    monkeypatch.setitem(host.opts.data, "api_enable_requests", True)
    assert check(client, there)["pictures"][0]["sha256"] == PHOTO_HASH
    by_address = client.post("/sdapi/v1/txt2img", json=request(there)).json()["images"]
    assert by_address == client.post("/sdapi/v1/txt2img", json=request(unit("plus"))).json()["images"]
    assert asked == ["https://example/a.png"] * 2
    local = {**unit("plus"), "images": ["http://local/a.png"]}
    refused(client.post("/ip-adapter/check", json={"unit": local}), 422, "local resource not allowed")
    refused(client.post("/sdapi/v1/txt2img", json=request(local)), 422, "local resource not allowed")


def test_only_addresses_are_changed() -> None:
    kept = Kept()
    one = Unit(model="m", images=(ImageRef(data="http://x/a", weight=0.5), ImageRef(sha256="a" * 64)))
    changed = api.fetched(one, lambda _: SENT, kept.add)
    assert changed.images == (ImageRef(sha256=PHOTO_HASH, weight=0.5), ImageRef(sha256="a" * 64))
    other = Unit(model="m", images=(ImageRef(data=base64_photo()),))
    assert api.fetched(other, lambda _: SENT, kept.add) is other

"""Saved references: the file, its rules, the routes, and generations without the picture."""

from __future__ import annotations

import importlib
import io
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.references import Rules
from lib_ipadapter.saved import FOLDER, MAX_BYTES, SavedReferences
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.demo_models import DemoModels
from tests.embedded_hosts import request, unit
from tests.photos import base64_photo
from tests.test_generation import difference, same


@pytest.fixture
def folder(host: Host, models: DemoModels) -> Iterator[Path]:
    found = Path(host.cmd_opts.data_dir) / "ip-adapter" / FOLDER
    yield found
    for path in found.glob("*") if found.is_dir() else ():
        path.unlink()


@pytest.fixture
def client(host: Host, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setattr(host.cmd_opts, "disable_extension_access", False, raising=False)
    return Client(host.app)


def save(client: Client, name: Any, wanted: Any, **fields: Any) -> Any:
    return client.post("/ip-adapter/saved", json={"name": name, "unit": wanted, **fields})


def saved_unit(name: str, kind: str = "plus", **fields: Any) -> dict[str, Any]:
    return {**unit(kind, **fields), "images": [{"saved": name}]}


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_a_saved_reference_draws_what_its_picture_drew(
    host: Host, client: Client, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {
        **unit(kind, weight=0.8),
        "images": [{"data": base64_photo(), "weight": 0.5}, {"data": base64_photo("coffee"), "crop": [0, 0, 2]}],
    }
    answer = save(client, "Two of them", two)
    assert answer.status_code == 200, answer.json()
    assert answer.json() == {
        "name": "Two of them",
        "pictures": 2,
        "bytes": (folder / "Two of them.safetensors").stat().st_size,
    }
    drawn = host.txt2img(**request(two))
    live: Any = importlib.import_module("sd_image_prompt").live_session
    live._preparer.clear()
    gathering: Any = importlib.import_module("sd_image_prompt.gathering")
    encoded: list[int] = []
    encode = gathering.encode

    def watched(run: Any, tower: Any, output: str, pictures: Any) -> Any:
        encoded.append(len(pictures))
        return encode(run, tower, output, pictures)

    monkeypatch.setattr(gathering, "encode", watched)
    again = host.txt2img(**request(saved_unit("Two of them", kind, weight=0.8)))
    assert same(drawn.image, again.image)
    assert encoded == ([1] if kind == "plus" else [])  # no picture but that of the uncond side
    assert "picture 1: saved name Two of them" in again.infotexts[0]
    assert not host.errors


def test_what_is_pasted_names_it_again(host: Host, client: Client, folder: Path) -> None:
    save(client, "a name", unit("plus"))
    wanted = {**saved_unit("a name"), "images": [{"saved": "a name", "weight": 0.5}]}
    live: Any = importlib.import_module("sd_image_prompt").live_session
    text = host.txt2img(**request(wanted)).infotexts[0]
    parse = importlib.import_module("modules.infotext_utils").parse_generation_parameters
    found = live.read_infotext(parse(text))
    assert [json.loads(slot)["images"] for slot in found.slots() if slot] == [wanted["images"]]
    assert not found.notes


def test_a_mixture_is_saved_mixed(host: Host, client: Client, folder: Path) -> None:
    two = unit("plus", photos=("astronaut", "coffee"), mixture="average")
    assert save(client, "mixed", two).json()["pictures"] == 1
    assert same(host.txt2img(**request(two)).image, host.txt2img(**request(saved_unit("mixed"))).image)


def test_the_file_is_the_owners_and_says_what_it_is_for(client: Client, folder: Path) -> None:
    save(client, "one", unit("plus", weight=0.7, stop=0.8))
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    with safe_open(str(path), "pt") as file:
        header = file.metadata()
        assert set(file.keys()) == {"features", "thumbnail"}
    assert header["family"] == "sd15" and header["output"] == "penultimate" and len(header["encoder"]) == 64
    assert json.loads(header["defaults"]) == {"model": "demo-plus-sd15.safetensors", "weight": 0.7, "stop": 0.8}


def test_list_thumbnail_and_delete(client: Client, folder: Path) -> None:
    save(client, "b", unit("plus"))
    save(client, "a.b-c_d ä", unit("base", weight=0.5))
    listed = client.get("/ip-adapter/saved").json()["saved"]
    assert [each["name"] for each in listed] == ["a.b-c_d ä", "b"]
    assert (
        listed[0]["defaults"] == {"model": "demo-base-sd15.safetensors", "weight": 0.5} and listed[0]["pictures"] == 1
    )
    picture = Image.open(io.BytesIO(client.get("/ip-adapter/saved/a.b-c_d ä").content))
    assert picture.size == (128, 128)
    assert client.delete("/ip-adapter/saved/b").json() == {"forgotten": "b"}
    gone = client.delete("/ip-adapter/saved/b")
    assert gone.status_code == 404 and 'named "b"; there are a.b-c_d ä' in gone.json()["detail"]
    assert client.get("/ip-adapter/saved/b").status_code == 422


def test_a_taken_name_is_kept_until_it_shall_be_replaced(client: Client, folder: Path) -> None:
    save(client, "one", unit("plus"))
    before = (folder / "one.safetensors").read_bytes()
    answer = save(client, "one", unit("base"))
    assert answer.status_code == 422 and "is there already" in answer.json()["detail"]
    assert (folder / "one.safetensors").read_bytes() == before
    assert save(client, "one", unit("base"), replace=True).status_code == 200
    assert (folder / "one.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("name", "wanted", "fields", "part"),
    [
        ("a/b", unit(), {}, 'name is "a/b"'),
        ("", unit(), {}, "allowed are 1 to 64"),
        (3, unit(), {}, 'The field "name" must be a text'),
        ("a", {"model": "demo-base-sd15.safetensors"}, {}, "no picture that takes part"),
        ("a", {**unit(), "model": "nowhere"}, {}, "nowhere"),
        ("a", unit(), {"replace": 1}, 'The field "replace" is 1'),
        ("a", unit(), {"over": True}, 'The field "over" is unknown'),
    ],
)
def test_what_cannot_be_saved_is_said(
    client: Client, folder: Path, name: Any, wanted: Any, fields: dict[str, Any], part: str
) -> None:
    answer = save(client, name, wanted, **fields)
    assert answer.status_code == 422 and part in answer.json()["detail"]
    assert not folder.exists() or not list(folder.iterdir())


def test_another_adapter_or_encoder_is_refused(host_of: Any, client: Client, folder: Path, models: DemoModels) -> None:
    save(client, "one", unit("plus"))
    host = host_of("sd15")
    with pytest.raises(ValueError, match="sd15 adapters that take penultimate, and the adapter is for sd15 and takes"):
        host.txt2img(**request(saved_unit("one", "base")))
    path = folder / "one.safetensors"
    with safe_open(str(path), "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {**header, "encoder": "0" * 64})
    with pytest.raises(ValueError, match="with the fingerprint 0000000000, and the adapter's here is demo-vit"):
        host.txt2img(**request(saved_unit("one")))
    save_file(tensors, path, {**header, "family": "sdxl"})
    with pytest.raises(ValueError, match="for sdxl adapters"):
        host.txt2img(**request(saved_unit("one")))
    checked = client.post("/ip-adapter/check", json={"unit": saved_unit("one")})
    assert checked.status_code == 422 and "for sdxl adapters" in checked.json()["detail"]


def test_check_knows_it(client: Client, folder: Path) -> None:
    save(client, "one", unit("plus", photos=("astronaut", "coffee")))
    answer = client.post("/ip-adapter/check", json={"unit": saved_unit("one")}).json()
    assert answer["pictures"] == [{"saved": "one", "pictures": 2}]


BROKEN: dict[str, Any] = {
    "no header": lambda t, h: (t, {}),
    "newer": lambda t, h: (t, {**h, "version": "2"}),
    "weights": lambda t, h: (t, {**h, "weights": "[0]"}),
    "no number": lambda t, h: (t, {**h, "weights": '["a"]'}),
    "deep": lambda t, h: (t, {**h, "weights": "[" * 100000}),
    "too many weights": lambda t, h: (t, {**h, "weights": "[1, 1]"}),
    "defaults": lambda t, h: (t, {**h, "defaults": '{"images": ["QQ=="]}'}),
    "no features": lambda t, h: ({"thumbnail": t["thumbnail"]}, h),
    "shape": lambda t, h: ({**t, "features": t["features"].flatten()}, h),
    "whole numbers": lambda t, h: ({**t, "features": t["features"].int()}, h),
    "not finite": lambda t, h: ({**t, "features": t["features"] * float("nan")}, h),
    "thumbnail": lambda t, h: ({**t, "thumbnail": torch.zeros(1, 10000, 3, dtype=torch.uint8)}, h),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_file_has_a_sentence(host: Host, client: Client, folder: Path, how: str) -> None:
    save(client, "one", unit("plus"))
    path = folder / "one.safetensors"
    with safe_open(str(path), "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors, header = BROKEN[how](tensors, header)
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=r"one\.safetensors is no saved reference that can be read, for "):
        host.txt2img(**request(saved_unit("one")))
    if how != "not finite":
        assert "problem" in client.get("/ip-adapter/saved").json()["saved"][0]


def test_a_name_that_is_none_tells_those_that_there_are(host: Host, client: Client, folder: Path) -> None:
    with pytest.raises(ValueError, match='No saved reference is named "one"; there is none yet'):
        host.txt2img(**request(saved_unit("one")))
    save(client, "two", unit("plus"))
    with pytest.raises(ValueError, match='No saved reference is named "one"; there are two'):
        host.txt2img(**request(saved_unit("one")))


def test_the_rules_of_the_store_hold(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / FOLDER / "mine.safetensors")
    for rules, part in (
        (Rules(None), "are off with the reference store"),
        (Rules(tmp_path / "r", guarded=True), "aren't told"),
    ):
        with pytest.raises(IPAdapterError) as caught:
            SavedReferences(lambda rules=rules: rules).read("other")
        assert part in str(caught.value) and "mine" not in str(caught.value)
    with pytest.raises(IPAdapterError, match="are off"):
        SavedReferences(lambda: Rules(None)).check_name("a")
    assert SavedReferences(lambda: Rules(None)).names() == []
    assert SavedReferences(lambda: Rules(tmp_path / "r")).names() == ["mine"]


def test_there_is_a_limit_and_nothing_is_deleted_for_it(host: Host, client: Client, folder: Path) -> None:
    store: Any = importlib.import_module("sd_image_prompt.references").default
    rules = store.rules
    save(client, "one", unit("plus"))
    try:
        store.rules = lambda: Rules(rules().folder, (folder / "one.safetensors").stat().st_size + 10)
        answer = save(client, "two", unit("plus"))
        assert answer.status_code == 422 and "delete some, or raise it" in answer.json()["detail"]
        assert save(client, "one", unit("plus"), replace=True).status_code == 200
    finally:
        store.rules = rules
    assert [path.name for path in folder.iterdir()] == ["one.safetensors"]


def test_a_file_that_is_too_large_is_not_read(host: Host, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "large.safetensors").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="it has 67 MB, and at most 67 are read"):
        host.txt2img(**request(saved_unit("large")))


def test_other_files_and_links_outside_the_folder_are_not_reached(host: Host, client: Client, folder: Path) -> None:
    for name in ("../references/x", "..%2Fx", "a/b"):
        assert client.get(f"/ip-adapter/saved/{name}").status_code in (404, 422)
    with pytest.raises(ValueError, match="allowed are 1 to 64"):
        host.txt2img(**request(saved_unit("../one")))


def test_the_page_does_not_serve_the_folder(host: Host, folder: Path) -> None:
    assert {str(folder), str(folder.parent / "references")} <= set(host.page.blocks.blocked_paths)


def test_strangers_are_refused(host_of: Any) -> None:
    client = Client(host_of("sd15", command_line=["--listen"]).app)
    assert client.get("/ip-adapter/saved").status_code == 403
    assert client.post("/ip-adapter/saved", json={"name": "a", "unit": unit()}).status_code == 403
    assert client.delete("/ip-adapter/saved/a").status_code == 403


def test_the_strip_shows_its_thumbnail(host: Host, client: Client, folder: Path) -> None:
    save(client, "one", unit("plus"))
    live: Any = importlib.import_module("sd_image_prompt").live_session
    units: Any = importlib.import_module("sd_image_prompt.units")
    (picture,) = live._preparer.pictures(units.Unit.from_json(saved_unit("one")))
    assert picture.size == (128, 128)
    assert difference(picture, Image.new("RGB", picture.size)) > 10


def test_the_page_lists_saves_and_deletes_but_not_for_strangers(
    host: Host, client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: Any = importlib.import_module("sd_image_prompt.ui.handlers")
    store: Any = importlib.import_module("sd_image_prompt.references").default
    live: Any = importlib.import_module("sd_image_prompt").live_session

    def page(**wish: Any) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(handlers.saved_references(json.dumps(wish), live.save_reference))
        return answer

    slot = json.dumps(unit("plus"))
    assert "ipa:one:1" in page(do="save", name="one", slot=slot)["note"]
    assert "there already" in page(do="save", name="one", slot=slot)["note"]
    assert "Saved" in page(do="replace", name="one", slot=slot)["note"]
    assert "has no picture" in page(do="save", name="two", slot="")["note"]
    (listed,) = page(do="list")["saved"]
    assert listed["name"] == "one" and listed["uri"].startswith("data:image/png")
    (shown,) = json.loads(handlers.preview(json.dumps([{"saved": "one"}]), "crop"))
    assert shown["uri"] == listed["uri"]

    rules = store.rules()
    monkeypatch.setattr(store, "rules", lambda: Rules(rules.folder, rules.limit_bytes, guarded=True))
    for wish in ({"do": "list"}, {"do": "delete", "name": "one"}, {"do": "replace", "name": "one", "slot": slot}):
        answer = page(**wish)
        assert answer["saved"] == [] and "neither listed nor shown" in answer["note"]
    (shown,) = json.loads(handlers.preview(json.dumps([{"saved": "one"}]), "crop"))
    assert "uri" not in shown and "neither listed nor shown" in shown["problem"]
    monkeypatch.setattr(store, "rules", lambda: rules)

    assert "is deleted" in page(do="delete", name="one")["note"] and page(do="list")["saved"] == []
    assert "named &quot;one&quot;" in page(do="delete", name="one")["note"]

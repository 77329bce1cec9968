"""Infotexts and references in the embedded host: written by a job, pasted into the page, and kept from strangers."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib_ipadapter.pictures import picture_hash, read_picture
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded_hosts import TITLE, request, unit
from tests.photos import base64_photo

SMALL = read_picture(base64_photo())
HASH = picture_hash(SMALL)


def store(host: Host) -> Path:
    return Path(host.cmd_opts.data_dir, "ip-adapter", "references")


def references() -> Any:
    return sys.modules["sd_image_prompt.references"]


@pytest.fixture
def empty(host: Host) -> Iterator[Host]:
    """The host without any reference, with its settings as they are by default."""
    references().forget_all()
    before = dict(host.opts.data)
    yield host
    host.opts.data.clear()
    host.opts.data.update(before)
    references().forget_all()


def pasted(host: Host, infotext: str) -> tuple[bool, list[str], str]:
    """The checkbox, the slots and the note after a paste."""
    runner = host.runners["txt2img"]
    ours = [component for component, _ in runner.infotext_fields]
    values = [update["value"] for component, update in host.page.pasted("txt2img", infotext) if component in ours]
    return values[0], values[1:11], values[11]


def test_a_pasted_infotext_makes_the_same_picture_again(empty: Host) -> None:
    wanted = unit(weight=0.75, start=0.1, preparation="pad")
    first = empty.txt2img(**request(wanted))
    assert HASH in first.infotexts[0]
    enabled, slots, note = pasted(empty, first.infotexts[0])
    assert enabled is True
    assert [bool(slot) for slot in slots] == [True] + [False] * 9
    assert note == ""
    assert json.loads(slots[0])["images"] == [{"sha256": HASH}]
    again = empty.txt2img(**request(), alwayson_scripts={TITLE: {"args": [enabled, *slots]}})
    assert again.image.tobytes() == first.image.tobytes()
    assert again.infotexts == first.infotexts


def test_units_without_a_tab_are_said(empty: Host) -> None:
    four = [unit(weight=0.2), unit("plus", weight=0.2), unit(weight=0.1), unit("plus", weight=0.1)]
    text = empty.txt2img(**request(*four)).infotexts[0]
    _, slots, note = pasted(empty, text)
    assert [bool(slot) for slot in slots] == [True] * 4 + [False] * 6
    assert "Of the units filled here 4 have no tab, because 3 are shown" in note


def test_other_infotexts_switch_us_off(empty: Host) -> None:
    plain = empty.txt2img(**request())
    assert pasted(empty, plain.infotexts[0]) == (False, [""] * 10, "")


def test_what_is_missing_is_said(empty: Host) -> None:
    text = empty.txt2img(**request(unit())).infotexts[0]
    references().forget_all()
    enabled, slots, note = pasted(empty, text.replace("demo-base-sd15", "demo-renamed"))
    assert enabled and HASH in slots[0]
    assert HASH in note and "demo-renamed.safetensors is called demo-base-sd15.safetensors here" in note
    with pytest.raises(ValueError, match=HASH) as refused:
        empty.txt2img(**request(), alwayson_scripts={TITLE: {"args": [enabled, *slots]}})
    assert getattr(refused.value, "status_code", None) == 422


def test_a_used_reference_is_stored_for_its_owner_alone(empty: Host) -> None:
    empty.txt2img(**request(unit()))
    (file,) = store(empty).iterdir()
    assert file.name == f"{HASH}.png"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    answer = empty.txt2img(**request({**unit(), "images": [{"sha256": HASH}]}))
    assert HASH in answer.infotexts[0]


def test_the_page_does_not_serve_the_store(empty: Host) -> None:
    empty.txt2img(**request(unit()))
    beside = store(empty).parent / "beside.txt"
    beside.write_text("served", "utf-8")
    client = Client(empty.app)
    assert client.get(f"/file={beside}").status_code == 200
    for path in (
        store(empty) / f"{HASH}.png",
        store(empty).parent / "references" / ".." / "references" / f"{HASH}.png",
    ):
        assert client.get(f"/file={path}").status_code == 403


def test_a_folder_that_can_not_be_written_does_not_stop_the_job(empty: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    comments: list[str] = []
    monkeypatch.setattr(empty.Txt2Img, "comment", lambda self, text: comments.append(text))
    shutil.rmtree(store(empty), ignore_errors=True)
    store(empty).parent.mkdir(exist_ok=True)
    store(empty).write_text("in the way", "utf-8")
    try:
        answer = empty.txt2img(**request(unit()))
    finally:
        store(empty).unlink()
    assert HASH in answer.infotexts[0] and len(answer.images) == 1
    (sentence,) = comments
    assert "couldn't be stored" in sentence


def test_settings_switch_store_and_hashes_off(empty: Host) -> None:
    empty.opts.data["ip_adapter_reference_store"] = "off"
    empty.opts.data["ip_adapter_hide_hashes"] = True
    text = empty.txt2img(**request(unit())).infotexts[0]
    assert HASH not in text and "picture 1: hidden" in text
    assert not store(empty).is_dir() or list(store(empty).iterdir()) == []


def test_where_strangers_may_come_a_hash_restores_nothing(empty: Host) -> None:
    empty.cmd_opts.webui_is_non_local = True
    try:
        handle = references().add(SMALL)
        assert handle != HASH
        answer = empty.txt2img(**request({**unit(), "images": [{"sha256": handle}]}))
        assert HASH in answer.infotexts[0] and handle not in answer.infotexts[0]
        assert not store(empty).is_dir() or list(store(empty).iterdir()) == []
        # What was made of the picture is still kept, and isn't for strangers either.
        with pytest.raises(ValueError, match=HASH):
            empty.txt2img(**request({**unit(), "images": [{"sha256": HASH}]}))
        assert HASH in pasted(empty, answer.infotexts[0])[2]
    finally:
        references().forget(handle)
        empty.cmd_opts.webui_is_non_local = False


def test_a_picture_that_takes_no_part_may_be_missing(empty: Host) -> None:
    images = [{"data": base64_photo()}, {"sha256": "0" * 64, "weight": 0}]
    text = empty.txt2img(**request({**unit(), "images": images})).infotexts[0]
    assert f"picture 2: {'0' * 64} weight 0" in text
    assert "picture 2" in pasted(empty, text)[2]


def test_the_settings_of_the_store(empty: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    comments: list[str] = []
    monkeypatch.setattr(empty.Txt2Img, "comment", lambda self, text: comments.append(text))
    labels = empty.opts.data_labels
    assert labels["ip_adapter_reference_store"].default == "when the WebUI is local"
    assert labels["ip_adapter_reference_store_mb"].default == 1024
    assert labels["ip_adapter_hide_hashes"].default is False
    empty.opts.data["ip_adapter_reference_store_mb"] = 0
    text = empty.txt2img(**request(unit())).infotexts[0]
    assert HASH in text and [each for each in comments if "are allowed in all" not in each] == [] != comments

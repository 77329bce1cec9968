"""The page's part: what its events do, how its controls are wired to the slots, that gradio serves it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_ipadapter import pictures, references
from lib_ipadapter.ui import handlers
from lib_ipadapter.units import SCHEMA_VERSION, UNIT_SLOTS, ImageRef, Unit
from tests.embedded.gradio_compat import gr

from lib_ipadapter.ui import accordion  # isort: skip  # gradio is importable only by now

VISIBLE = range(1, accordion.VISIBLE_UNITS + 1)
SETTINGS = (
    "enabled",
    "hashes",
    "model",
    "weight",
    "start",
    "stop",
    "formulation",
    "uncond",
    "negative",
    "preparation",
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- Handlers


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "wide <1>.png", tmp_path / "tall.png"]
    noise(60, 30).save(paths[0])
    noise(20, 50, 1).save(paths[1])
    return paths


@pytest.mark.parametrize("as_file", [str, lambda path: SimpleNamespace(name=str(path))], ids=["gradio 4", "gradio 3"])
@pytest.mark.parametrize("preparation", ["crop", "squash", "pad"])
def test_files_are_kept_and_shown_as_the_encoder_sees_them(files: list[Path], as_file: Any, preparation: str) -> None:
    text, previews, note = handlers.keep_files([as_file(path) for path in files], preparation)
    hashes = json.loads(text)
    assert note == "" and len(hashes) == len(previews) == 2
    for path, sha256, preview in zip(files, hashes, previews, strict=True):
        picture = Image.open(path)
        assert np.array_equal(np.asarray(references.get(sha256)), np.asarray(picture))
        expected = pictures.prepare(picture, preparation)
        assert preview.size == expected.size == (224, 224)
        assert np.array_equal(np.asarray(preview), np.asarray(expected))
    assert [np.asarray(each).tobytes() for each in handlers.preview(text, preparation)[0]] == [
        np.asarray(each).tobytes() for each in previews
    ]


@pytest.mark.parametrize("nothing", [None, []])
def test_no_files_clear_the_unit(nothing: Any) -> None:
    assert handlers.keep_files(nothing, "crop") == ("", [], "")
    assert handlers.preview("", "crop") == ([], "")


def test_a_file_that_is_no_picture_keeps_none_and_is_named(files: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken <b>.png"
    broken.write_bytes(files[0].read_bytes()[:60])
    text, previews, note = handlers.keep_files([str(files[1]), str(broken)], "crop")
    assert (text, previews) == ("", [])
    assert "broken &lt;b&gt;.png: " in note and "<b>" not in note and str(tmp_path) not in note


def test_a_picture_that_is_gone_is_said() -> None:
    previews, note = handlers.preview(json.dumps(["0" * 64]), "crop")
    assert previews == [] and "upload it again" in note


def test_check_shows_the_sentence_that_a_generation_would_stop_with() -> None:
    assert handlers.check("") == ""
    assert handlers.check(Unit(images=(ImageRef(sha256="0" * 64),)).to_json()) == ""
    note = handlers.check('{"start": 0.8, "stop": 0.5}')
    assert "&quot;start&quot; is 0.8 and &quot;stop&quot; is 0.5" in note and 'role="alert"' in note


# --- The slot's script

HASHES = ["a" * 64, "b" * 64]
DEFAULTS: dict[str, Any] = {
    "enabled": True,
    "hashes": json.dumps(HASHES),
    "model": "one.safetensors",
    "weight": 1,
    "start": 0,
    "stop": 1,
    "formulation": "auto",
    "uncond": "auto",
    "negative": "n.safetensors",
    "preparation": "crop",
}


def test_the_slot_script_takes_the_controls_in_their_order() -> None:
    (parameters,) = re.findall(r"^\(([^)]*)\) => \{$", accordion.SLOT_SCRIPT, re.MULTILINE)
    assert tuple(parameters.split(", ")) == tuple(name.replace("hashes", "pictures") for name in SETTINGS)
    assert f"version: {SCHEMA_VERSION}," in accordion.SLOT_SCRIPT
    assert not accordion.SLOT_SCRIPT.endswith(";")  # gradio puts it in brackets


@pytest.fixture(scope="module")
def write_slots() -> Any:
    """Runs the slot script on settings as gradio does: with the slot's old value as one more argument."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")

    def write(*settings: dict[str, Any]) -> list[str]:
        rows = [[{**DEFAULTS, **each}[name] for name in SETTINGS] + ["old"] for each in settings]
        code = f"const write = ({accordion.SLOT_SCRIPT});\nconst rows = {json.dumps(rows)};\n"
        code += "console.log(JSON.stringify(rows.map((row) => write(...row))));"
        done = subprocess.run([node, "-e", code], capture_output=True, text=True, encoding="utf-8", check=True)
        return list(json.loads(done.stdout))

    return write


def test_slots_hold_what_the_page_shows(write_slots: Any) -> None:
    images = tuple(ImageRef(sha256=each) for each in HASHES)
    cases: list[tuple[dict[str, Any], Unit]] = [
        ({}, Unit(model="one.safetensors", images=images)),
        ({"hashes": json.dumps(HASHES[:1])}, Unit(model="one.safetensors", images=images[:1])),
        ({"model": None}, Unit(images=images)),
        ({"model": 'é"\\ ü.bin'}, Unit(model='é"\\ ü.bin', images=images)),
        (
            {"weight": -0.35, "start": 0.1, "stop": 0.75, "formulation": "joint", "preparation": "pad"},
            Unit(True, "one.safetensors", images, -0.35, 0.1, 0.75, "joint", preparation="pad"),
        ),
        ({"uncond": "none"}, Unit(model="one.safetensors", images=images, uncond="none")),
        (
            {"uncond": "file"},
            Unit(model="one.safetensors", images=images, uncond="file", negative="n.safetensors"),
        ),
    ]
    slots = write_slots(*(settings for settings, _ in cases))
    assert [Unit.from_json(slot) for slot in slots] == [unit for _, unit in cases]
    assert max(map(len, slots)) < 1000


def test_slots_are_empty_when_a_unit_is_off_or_has_no_picture(write_slots: Any) -> None:
    off = [
        {"enabled": False},
        {"hashes": ""},
        {"hashes": "[]"},
        {"hashes": None},
        {"enabled": False, "hashes": ""},
    ]
    assert write_slots(*off) == [""] * len(off)


def test_slots_hold_bad_settings_too_so_that_the_job_stops(write_slots: Any) -> None:
    bad = [{"start": 0.8, "stop": 0.5}, {"weight": None}, {"uncond": "file", "negative": None}]
    for slot in write_slots(*bad):
        assert handlers.check(slot) != ""


# --- The page


class FileLists:
    def __init__(self, adapters: list[str], negatives: list[str]) -> None:
        self._adapters, self._negatives = adapters, negatives

    def adapters(self) -> list[str]:
        return self._adapters

    def describe(self, name: str) -> str:
        return f"<{name}> · plus" if name in self._adapters else ""

    def negatives(self) -> list[str]:
        return self._negatives


class InputAccordion:
    """A checkbox and an accordion in one, in place of a WebUI's."""

    def __init__(self, value: bool, label: str, elem_id: str) -> None:
        self.checkbox = gr.Checkbox(value=value, label=label, elem_id=f"{elem_id}-checkbox", visible=False)
        self.accordion = gr.Accordion(label=label, open=value, elem_id=elem_id)
        self.value = value

    def __enter__(self) -> None:
        self.accordion.__enter__()

    def __exit__(self, *caught: Any) -> None:
        self.accordion.__exit__(*caught)


def build(adapters: list[str], negatives: list[str]) -> tuple[gr.Blocks, list[Any]]:
    with gr.Blocks(analytics_enabled=False) as page:
        components = accordion.build(FileLists(adapters, negatives), InputAccordion, lambda name: f"t_{name}")
    return page, components


@pytest.fixture(scope="module")
def page() -> Iterator[SimpleNamespace]:
    blocks, components = build(["one.safetensors", "zwei é.bin"], ["n.safetensors"])
    config = blocks.get_config_file()
    ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}
    props = {each["props"].get("elem_id"): each["props"] for each in config["components"]}
    yield SimpleNamespace(
        blocks=blocks,
        components=components,
        config=config,
        ids=ids,
        props=props,
        events=config["dependencies"],
    )
    blocks.close()


def test_the_arguments_are_the_checkbox_and_ten_hidden_slots(page: SimpleNamespace) -> None:
    assert len(page.components) == 1 + UNIT_SLOTS
    for number, slot in enumerate(page.components[1:], 1):
        props = page.props[f"t_slot_{number}"]
        assert isinstance(slot, gr.Textbox) and slot.value == "" and props["visible"] is False
        assert slot.do_not_save_to_config is True


def test_every_visible_control_writes_its_own_slot_in_the_page(page: SimpleNamespace) -> None:
    scripts = [event for event in page.events if event["js"]]
    assert len(scripts) == len(VISIBLE) * len(SETTINGS)
    for number in VISIBLE:
        controls = [page.ids[f"t_unit_{number}_{name}"] for name in SETTINGS]
        for control in controls:
            (event,) = [event for event in scripts if (control, "change") in map(tuple, event["targets"])]
            assert event["js"] == accordion.SLOT_SCRIPT and not event["backend_fn"]
            assert event["inputs"] == controls
            assert event["outputs"] == [page.ids[f"t_slot_{number}"]]


def test_events_on_the_server_wait_for_no_generation_and_are_no_api(page: SimpleNamespace) -> None:
    server = [event for event in page.events if event["backend_fn"]]
    assert len(server) == len(VISIBLE) * 5
    slots = {page.ids[f"t_slot_{number}"] for number in range(1, UNIT_SLOTS + 1)}
    for event in server:
        assert event["queue"] is False and event["api_name"] is False
        assert not slots & set(event["outputs"])  # an answer that comes late must not overwrite a slot


def test_controls_begin_with_the_schema_s_defaults(page: SimpleNamespace) -> None:
    for number in VISIBLE:
        shown = {name: page.props[f"t_unit_{number}_{name}"]["value"] for name in SETTINGS}
        assert shown.pop("hashes") == "" and shown.pop("model") == "one.safetensors"
        assert shown.pop("negative") == "n.safetensors"
        assert shown == {name: getattr(Unit(), name) for name in shown}
        assert page.props[f"t_unit_{number}_previews"]["format"] == "png"


def test_no_files_on_disk_still_make_a_page() -> None:
    blocks, components = build([], [])
    props = {each["props"].get("elem_id"): each["props"] for each in blocks.get_config_file()["components"]}
    assert len(components) == 11
    assert props["t_unit_1_model"]["choices"] == [] and props["t_unit_1_model"].get("value") is None


def test_refresh_lists_the_files_anew() -> None:
    adapters = ["one"]
    with gr.Blocks() as blocks:
        accordion.build(FileLists(adapters, ["n"]), InputAccordion, lambda name: f"t_{name}")
    ids = {each["props"].get("elem_id"): each["id"] for each in blocks.get_config_file()["components"]}
    adapters.append("two")
    for number in VISIBLE:
        refresh = ids[f"t_unit_{number}_refresh"]
        (event,) = [each for each in blocks.fns.values() if (refresh, "click") in map(tuple, each.targets)]
        model, negative = event.fn()
        assert model["choices"] == ["one", "two"] and negative["choices"] == ["n"]
        outputs = [output._id for output in event.outputs]
        assert outputs == [ids[f"t_unit_{number}_model"], ids[f"t_unit_{number}_negative"]]


def test_what_the_chosen_adapter_is_stands_below_it(page: SimpleNamespace) -> None:
    for number in VISIBLE:
        kind, model = page.ids[f"t_unit_{number}_kind"], page.ids[f"t_unit_{number}_model"]
        assert "&lt;one.safetensors&gt; · plus" in page.props[f"t_unit_{number}_kind"]["value"]
        (event,) = [each for each in page.blocks.fns.values() if [output._id for output in each.outputs] == [kind]]
        assert [tuple(target) for target in event.targets] == [(model, "change")]
        assert [each._id for each in event.inputs] == [model]
        assert "&lt;zwei é.bin&gt; · plus" in event.fn("zwei é.bin")
        assert event.fn(None) == event.fn("gone.bin") == ""


def test_gradio_serves_the_page(page: SimpleNamespace) -> None:
    _, url, _ = page.blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the page is on this machine
    with opener.open(url, timeout=30) as answer:
        assert answer.status == 200 and "t_slot_10" in answer.read().decode("utf-8")
    with opener.open(f"{url}config", timeout=30) as answer:
        served = {each["props"].get("elem_id") for each in json.load(answer)["components"]}
    assert set(page.ids) <= served

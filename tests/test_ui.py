"""The page's part: what its events do, how its controls are wired to the slots, that gradio serves it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_ipadapter import pictures, references
from lib_ipadapter.applies import NEEDS
from lib_ipadapter.intents import FIELDS, INTENTS
from lib_ipadapter.refs import ImageRef
from lib_ipadapter.ui import handlers
from lib_ipadapter.units import SCHEMA_VERSION, UNCONDS, UNIT_SLOTS, Unit
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
    "timing",
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


def sent(*paths: Path) -> str:
    """As the page sends files."""
    return json.dumps([{"name": path.name, "data": data_uri(path)} for path in paths])


def hashes_of(*paths: Path) -> list[str]:
    return list(json.loads(handlers.keep(sent(*paths))[0])["hashes"])


def test_files_are_kept_and_named_by_their_hashes(files: list[Path]) -> None:
    text, note = handlers.keep(sent(*files))
    again, _ = handlers.keep(sent(*files))
    hashes = json.loads(text)["hashes"]
    assert note == "" and len(hashes) == 2 and hashes == json.loads(again)["hashes"]
    assert text != again  # or the page would see no change when the same pictures come twice
    for path, sha256 in zip(files, hashes, strict=True):
        assert np.array_equal(np.asarray(references.get(sha256)), np.asarray(Image.open(path)))


@pytest.mark.parametrize("preparation", ["crop", "squash", "pad"])
def test_previews_are_the_encoder_s_input_to_the_bit(files: list[Path], preparation: str) -> None:
    hashes = hashes_of(*files)
    entries = [{"sha256": hashes[0], "crop": [0.0, 0.5, 2.0]}, {"sha256": hashes[1], "weight": 0.5}, data_uri(files[0])]
    answers = json.loads(handlers.preview(json.dumps(entries), preparation))
    crops = ((0.0, 0.5, 2.0), (0.5, 0.5, 1.0), (0.5, 0.5, 1.0))
    for path, crop, answer in zip((*files, files[0]), crops, answers, strict=True):
        assert answer["preparation"] == preparation
        shown = pictures.read_picture(answer["uri"])
        expected = pictures.prepare(Image.open(path), preparation, crop=crop)
        assert np.array_equal(np.asarray(shown), np.asarray(expected))


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_pictures_are_forgotten_when_asked(files: list[Path]) -> None:
    first, second = hashes_of(*files)
    assert handlers.forget(None) == handlers.forget("") == handlers.forget_all("") == ""
    assert "The copy is deleted." in handlers.forget(first)
    assert "There was no copy of it." in handlers.forget(first)
    assert not references.has(first) and references.has(second)
    assert "deleted" in handlers.forget_all("yes")
    assert not references.has(second) and "0 copies are deleted" in handlers.forget_all("yes")


def test_the_page_says_where_pictures_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "memory alone" in handlers.kept_line()
    monkeypatch.setattr(references.default, "rules", lambda: references.Rules(tmp_path))
    assert f"is kept in {tmp_path.as_posix()}" in handlers.kept_line()


@pytest.mark.parametrize("nothing", [None, "", "[]"])
def test_no_files_add_nothing(nothing: str | None) -> None:
    text, note = handlers.keep(nothing)
    assert json.loads(text)["hashes"] == [] and note == ""
    assert handlers.preview("", "crop") == handlers.preview(None, "crop") == "[]"


def test_a_file_that_is_no_picture_keeps_none_and_is_named(files: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken <b>.png"
    broken.write_bytes(files[0].read_bytes()[:60])
    references.default.forget_all()
    text, note = handlers.keep(sent(files[1], broken))
    assert json.loads(text)["hashes"] == [] and references.default.listing() == []
    assert "broken &lt;b&gt;.png: " in note and "<b>" not in note and 'role="alert"' in note
    _, note = handlers.keep(json.dumps([{"name": "film.mp4", "data": "data:,"}]))
    assert "film.mp4: " in note


def test_a_picture_that_is_gone_is_said() -> None:
    (answer,) = json.loads(handlers.preview(json.dumps([{"sha256": "0" * 64}]), "crop"))
    assert "upload it again" in answer["problem"] and "uri" not in answer


def test_check_shows_the_sentence_that_a_generation_would_stop_with() -> None:
    assert handlers.check("") == ""
    assert handlers.check(Unit(images=(ImageRef(sha256="0" * 64),)).to_json()) == ""
    note = handlers.check('{"start": 0.8, "stop": 0.5}')
    assert "&quot;start&quot; is 0.8 and &quot;stop&quot; is 0.5" in note and 'role="alert"' in note


# --- The slots' script

HASHES = ["a" * 64, "b" * 64]
IMAGES = [{"sha256": HASHES[0], "weight": 0.5}, {"sha256": HASHES[1], "crop": [0.1, 0.2, 3]}]
REFS = (ImageRef(sha256=HASHES[0], weight=0.5), ImageRef(sha256=HASHES[1], crop=(0.1, 0.2, 3.0)))
DEFAULTS: dict[str, Any] = {
    "enabled": True,
    "hashes": json.dumps(IMAGES),
    "model": "one.safetensors",
    "weight": 1,
    "start": 0,
    "stop": 1,
    "formulation": "auto",
    "uncond": "auto",
    "negative": "n.safetensors",
    "preparation": "crop",
    "timing": "noise",
}
SCRIPT = Path(__file__).parent.parent / "javascript" / "ip_adapter.js"


def in_page(function: str, *calls: list[Any]) -> list[Any]:
    """What a function of the page's script answers to each of the calls."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    code = f"globalThis.document = {{ addEventListener() {{}} }};\n{SCRIPT.read_text(encoding='utf-8')}\n"
    code += f"const calls = {json.dumps(calls)};\n"
    code += f"console.log(JSON.stringify(calls.map((call) => ipAdapter.{function}(...call))));"
    done = subprocess.run([node, "-e", code], capture_output=True, text=True, encoding="utf-8", check=True)
    return list(json.loads(done.stdout))


def write_slots(*settings: dict[str, Any], old: str = "") -> list[str]:
    return in_page("unitText", *([[{**DEFAULTS, **each}[name] for name in SETTINGS], old] for each in settings))


def test_the_script_takes_the_controls_in_their_order_and_knows_the_schema_s_defaults() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    (names,) = re.findall(r"const NAMES = (\[.*?\]);", script)
    assert tuple(json.loads(names)) == tuple(name.replace("hashes", "pictures") for name in SETTINGS)
    assert f"version: {SCHEMA_VERSION}," in script
    (shown,) = in_page("shown", [{}])
    default = Unit()
    assert dict(zip(SETTINGS, shown, strict=True)) == {
        name: "" if name == "hashes" else getattr(default, name) for name in SETTINGS
    }


def test_slots_hold_what_the_page_shows() -> None:
    one = "one.safetensors"
    cases: list[tuple[dict[str, Any], Unit]] = [
        ({}, Unit(model=one, images=REFS)),
        ({"hashes": json.dumps(IMAGES[:1])}, Unit(model=one, images=REFS[:1])),
        ({"model": None}, Unit(images=REFS)),
        ({"model": 'é"\\ ü.bin'}, Unit(model='é"\\ ü.bin', images=REFS)),
        (
            {"weight": -0.35, "start": 0.1, "stop": 0.75, "formulation": "joint", "preparation": "pad"},
            Unit(True, one, REFS, -0.35, 0.1, 0.75, "joint", preparation="pad"),
        ),
        ({"uncond": "none", "timing": "steps"}, Unit(model=one, images=REFS, uncond="none", timing="steps")),
        ({"uncond": "file"}, Unit(model=one, images=REFS, uncond="file", negative="n.safetensors")),
        ({"enabled": False}, Unit(enabled=False, model=one, images=REFS)),  # it keeps what it had
    ]
    slots = write_slots(*(settings for settings, _ in cases))
    assert [Unit.from_json(slot) for slot in slots] == [unit for _, unit in cases]
    assert max(map(len, slots)) < 1000


def test_slots_are_empty_when_a_unit_has_no_picture() -> None:
    without = [{"hashes": ""}, {"hashes": "[]"}, {"hashes": None}, {"enabled": False, "hashes": ""}]
    assert write_slots(*without) == [""] * len(without)


def test_slots_hold_bad_settings_too_so_that_the_job_stops() -> None:
    for slot in write_slots({"start": 0.8, "stop": 0.5}, {"weight": None}, {"uncond": "file", "negative": None}):
        assert handlers.check(slot) != ""


def test_what_a_control_can_t_show_stays_in_the_slot() -> None:
    unit = Unit(model="gone.bin", images=REFS, weight=3.5, uncond="none")
    (shown,) = in_page("shown", [json.loads(unit.to_json())])
    controls = dict(zip(SETTINGS, shown, strict=True))
    assert controls["weight"] == 2 and controls["model"] == "gone.bin" and json.loads(controls["hashes"]) == IMAGES
    same, moved = write_slots(controls, {**controls, "start": 0.2}, old=unit.to_json())
    assert same == unit.to_json()  # no loop: what only mirrors the slot writes nothing
    assert Unit.from_json(moved) == replace(unit, start=0.2)


def test_intents_are_what_the_schema_allows_and_differ() -> None:
    units = [Unit(**dict(zip(FIELDS, values, strict=True))) for values in INTENTS.values()]
    assert units[0] == Unit() and len(set(map(Unit.to_json, units))) == len(INTENTS)


# --- The page


class FileLists:
    def __init__(self, adapters: list[str], negatives: list[str]) -> None:
        self._adapters, self._negatives = adapters, negatives

    def adapters(self) -> list[str]:
        return self._adapters

    def choices(self, everything: bool) -> list[tuple[str, str]]:
        more = [("other (doesn't fit: SDXL)", "other")] if everything else []
        return [(name, name) for name in self._adapters] + more

    def describe(self, name: str) -> str:
        return f"<{name}> · plus" if name in self._adapters else ""

    def misfit(self, name: str) -> str:
        return f"The adapter {name} is made for another model family." if name == "other" else ""

    def applies(self, name: str) -> dict[str, Any]:
        fitting = self._negatives if name != "other" else []
        values = [each for each in UNCONDS if each != "file" or fitting]
        return {"needs": NEEDS, "values": {"uncond": values}, "files": {"negative": fitting}}

    def save_reference(self, unit: object, name: object, replace: bool = False) -> None:
        raise AssertionError("nobody asked for that")

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
    for number in VISIBLE:
        controls = [page.ids[f"t_unit_{number}_{name}"] for name in SETTINGS]
        slot, intent = page.ids[f"t_slot_{number}"], page.ids[f"t_unit_{number}_intent"]
        writing = [event for event in page.events if event["js"] and slot in event["outputs"]]
        assert {tuple(target) for event in writing for target in event["targets"]} == {
            (control, "change") for control in controls
        }
        for event in writing:
            assert f'ipAdapter.write("t_slot_{number}"' in event["js"] and not event["backend_fn"]
            assert event["inputs"] == [*controls, slot] and event["outputs"] == [slot, intent]


def test_controls_follow_their_slot_in_the_page(page: SimpleNamespace) -> None:
    for number in VISIBLE:
        controls = [page.ids[f"t_unit_{number}_{name}"] for name in SETTINGS]
        slot = page.ids[f"t_slot_{number}"]
        (event,) = [each for each in page.events if each["js"] and (slot, "change") in map(tuple, each["targets"])]
        assert f'ipAdapter.follow("t_slot_{number}"' in event["js"] and not event["backend_fn"]
        assert event["inputs"] == [slot, *controls] and event["outputs"] == controls


def test_events_on_the_server_wait_for_no_generation_and_are_no_api(page: SimpleNamespace) -> None:
    server = [event for event in page.events if event["backend_fn"]]
    assert len(server) == len(VISIBLE) * 8 + 4
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
        model, kind, facts, negative = event.fn(False, "one", "n", "")
        assert model["choices"] == [("one", "one"), ("two", "two")] and negative["choices"] == ["n"]
        assert "plus" in kind and json.loads(facts)["files"] == {"negative": ["n"]}
        assert ("other (doesn't fit: SDXL)", "other") in event.fn(True, "one", "n", "")[0]["choices"]
        outputs = [output._id for output in event.outputs]
        assert outputs == [ids[f"t_unit_{number}_{name}"] for name in ("model", "kind", "facts", "negative")]


def test_what_the_chosen_adapter_is_stands_below_it(page: SimpleNamespace) -> None:
    for number in VISIBLE:
        kind, model = page.ids[f"t_unit_{number}_kind"], page.ids[f"t_unit_{number}_model"]
        assert "&lt;one.safetensors&gt; · plus" in page.props[f"t_unit_{number}_kind"]["value"]
        (event,) = [
            each for each in page.blocks.fns.values() if (model, "change") in map(tuple, each.targets) if each.fn
        ]
        assert event.outputs[0]._id == kind and event.inputs[0]._id == model
        assert "&lt;zwei é.bin&gt; · plus" in event.fn("zwei é.bin", None, "")[0]
        assert event.fn(None, None, "")[0] == "" and "no model gone.bin here" in event.fn("gone.bin", None, "")[0]


def test_the_negative_file_goes_with_the_model_unless_the_unit_has_one() -> None:
    lists = FileLists(["one"], ["a", "b"])
    with gr.Blocks() as blocks:
        accordion.build(lists, InputAccordion, lambda name: f"t_{name}", shown=1)
    ids = {each["props"].get("elem_id"): each["id"] for each in blocks.get_config_file()["components"]}
    target = (ids["t_unit_1_model"], "change")
    (event,) = [each for each in blocks.fns.values() if target in map(tuple, each.targets) if each.fn]
    unit = Unit(model="one", images=REFS, uncond="file", negative="c").to_json()
    assert event.fn("one", "c", "")[2] == gr.update(choices=["a", "b"], value="a")
    assert event.fn("one", "c", unit)[2] == event.fn("one", "b", "")[2] == gr.update(choices=["a", "b"])


def test_another_checkpoint_changes_lists_and_the_model_of_units_without_pictures() -> None:
    adapters = ["one"]
    with gr.Blocks() as blocks:
        accordion.build(FileLists(adapters, []), InputAccordion, lambda name: f"t_{name}", shown=2)
    props = {each["props"].get("elem_id"): each for each in blocks.get_config_file()["components"]}
    target = (props["t_look"]["id"], "change")
    (event,) = [each for each in blocks.fns.values() if target in map(tuple, each.targets)]
    seen = props["t_seen"]["props"]["value"]
    units = [False, "one", None, "", False, "one", None, Unit(model="one", images=REFS).to_json()]
    assert event.fn("1", seen, *units) == (seen, *[gr.update()] * 8)
    adapters[:] = ["two"]
    now, model, kind, *rest = event.fn("2", seen, *units)
    assert now != seen and model == gr.update(choices=[("two", "two")], value="two") and "two" in kind
    assert rest[2] == gr.update(choices=[("two", "two")], value="one") and "no model one here" in rest[3]
    adapters[:] = ["one", "other"]
    assert "another model family" in event.fn("3", "", False, "other", None, units[-1], *units[4:])[2]


def test_gradio_3_has_labels_for_values() -> None:
    label = "a (b) (doesn't fit: SDXL)"
    assert handlers.model_name(label) == "a (b)" and handlers.model_name("a (b)") == "a (b)"
    assert handlers.model_name(None) == ""


def test_gradio_serves_the_page(page: SimpleNamespace) -> None:
    _, url, _ = page.blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the page is on this machine
    with opener.open(url, timeout=30) as answer:
        assert answer.status == 200 and "t_slot_10" in answer.read().decode("utf-8")
    with opener.open(f"{url}config", timeout=30) as answer:
        served = {each["props"].get("elem_id") for each in json.load(answer)["components"]}
    assert set(page.ids) <= served


def test_building_the_page_again_and_again_registers_nothing_twice() -> None:
    events = []
    for _ in range(10):
        blocks, components = build(["one.safetensors"], [])
        assert len(components) == 1 + UNIT_SLOTS
        events.append(len(blocks.get_config_file()["dependencies"]))
    assert len(set(events)) == 1


@pytest.mark.parametrize(("shown", "tabs"), [(1, 1), (10, 10), (0, 1), (99, 10)])
def test_as_many_units_are_shown_as_asked_for(shown: int, tabs: int) -> None:
    with gr.Blocks() as blocks:
        made = accordion.build(
            FileLists(["one"], []), InputAccordion, str, shown=shown, start_with={"weight": 0.5, "timing": "steps"}
        )
    props = {each["props"].get("elem_id"): each["props"] for each in blocks.get_config_file()["components"]}
    assert len(made) == 1 + UNIT_SLOTS
    assert sum(f"unit_{number}" in props for number in range(1, 12)) == tabs
    assert props["unit_1_weight"]["value"] == 0.5 and props["unit_1_timing"]["value"] == "steps"
    assert props["unit_1_intent"].get("value") is None

"""The page in a browser: what a person does in the accordion, in headless Chromium against the embedded host."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from safetensors.torch import save_file

from lib_ipadapter.encoding import NEGATIVE_KEY
from lib_ipadapter.pictures import picture_hash, read_picture
from lib_ipadapter.progress import Window
from lib_ipadapter.steps import of_scheduler
from lib_ipadapter.units import Unit
from tests import version_sets
from tests.embedded.demo_models import make_demo_models

ROOT = Path(__file__).parent.parent
UNIT = "#script_txt2img_ipadapter_unit_1_"
SLOT = "#script_txt2img_ipadapter_slot_1 :is(textarea, input)"
ACCORDION = "#script_txt2img_ipadapter_accordion"
MODEL = "demo-plus-sd15.safetensors"
FOREIGN_NOISE = ("Failed to load resource", "Unable to preload CSS")
"""What gradio's own page says where its fonts can't be had."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of this machine."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("There is no Chromium on this machine: install it, for example with 'apt-get install chromium'.")
    with sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@dataclass(frozen=True)
class Running:
    """A host that runs in a process of its own."""

    address: str
    models: Path


@pytest.fixture(scope="module", params=["4.40.0", "3.41.2"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With the gradio of one half of the WebUIs, and libraries of its age."""
    models = make_demo_models(tmp_path_factory.mktemp("host") / "models").models_path
    command = [sys.executable, "-u", "-m", "tests.embedded", "--port", "0", "--models", str(models)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    if request.param == "3.41.2":
        if sys.prefix == sys.base_prefix:
            pytest.skip("gradio 3 is laid over an environment and this Python is none: run it through dev.py test.")
        environment["PYTHONPATH"] = str(version_sets.made_gradio_3())
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            assert running.stdout is not None
            said = []
            for line in running.stdout:
                said.append(line)
                if line.startswith("Running on "):
                    break
            else:
                pytest.fail("The host didn't start: " + "".join(said))
            reader = threading.Thread(target=running.stdout.read)  # or the pipe would be full one day
            reader.start()
            yield Running(line.split()[2], models)
        finally:
            running.terminate()
            running.wait()
            reader.join()


@contextmanager
def opened(browser: Any, host: Running) -> Iterator[Any]:
    """A fresh page; none of its errors is ours."""
    errors: list[str] = []
    made = browser.new_page(viewport={"width": 1280, "height": 1500})
    made.set_default_timeout(15000)
    made.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.goto(host.address)
    made.wait_for_selector(f"{ACCORDION}-visible-checkbox")
    yield made
    made.close()
    assert [each for each in errors if not each.startswith(FOREIGN_NOISE)] == []


@pytest.fixture
def page(browser: Any, host: Running) -> Iterator[Any]:
    """With the accordion ticked."""
    with opened(browser, host) as made:
        made.check(f"{ACCORDION}-visible-checkbox")
        made.wait_for_selector(f"{UNIT}files input[type=file]", state="attached")
        yield made


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two pictures that aren't square."""
    paths = []
    for seed in (0, 1):
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        path = tmp_path / f"{seed}.png"
        Image.fromarray(np.kron(pixels, np.ones((20, 20, 1), np.uint8))).save(path)
        paths.append(str(path))
    return paths


def until(page: Any, condition: str, argument: object = None) -> None:
    page.wait_for_function(condition, arg=argument, timeout=20000)


def slot(page: Any) -> dict[str, Any]:
    text = page.input_value(SLOT)
    return dict(json.loads(text)) if text else {}


def upload(page: Any, files: list[str], total: int) -> None:
    page.set_input_files(f"{UNIT}files input[type=file]", files)
    pictures(page, total)


def pictures(page: Any, total: int) -> None:
    """Waits for so many pictures with their previews."""
    until(
        page,
        "([cards, total]) => document.querySelectorAll(cards).length === total",
        [f"{UNIT}list img[src^=data]", total],
    )


def has(page: Any, key: str, value: object) -> None:
    """Waits until the slot has this value."""
    until(
        page,
        "([slot, key, value]) => { const unit = JSON.parse(document.querySelector(slot).value || '{}');"
        " return JSON.stringify(unit[key]) === JSON.stringify(value); }",
        [SLOT, key, value],
    )


def put(page: Any, text: str) -> None:
    """Changes the slot from outside, as a pasted infotext does."""
    page.evaluate(
        "([slot, text]) => { const box = document.querySelector(slot); box.value = text;"
        " box.dispatchEvent(new Event('input', { bubbles: true })); }",
        [SLOT, text],
    )


def number(page: Any, selector: str, value: object) -> None:
    page.fill(selector, str(value))
    page.press(selector, "Enter")
    page.dispatch_event(selector, "change")


def generate(page: Any) -> bytes:
    """A small picture."""
    for name, value in (("seed", 7), ("width", 64), ("height", 64), ("steps", 2)):
        number(page, f"#txt2img_{name} input[type=number]", value)
    return start(page)


def paste(page: Any, infotext: str) -> None:
    """Into the prompt, then the host's button."""
    page.fill("#txt2img_prompt textarea", infotext)
    page.click("#txt2img_paste")
    until(page, "() => !document.querySelector('#txt2img_prompt textarea').value.includes('Steps: ')")


def shown_picture(page: Any) -> bytes:
    source = page.wait_for_selector("#txt2img_gallery img").get_attribute("src")
    return bytes(page.request.get(source).body())


def pixels(file: bytes) -> bytes:
    return Image.open(BytesIO(file)).convert("RGB").tobytes()


def start(page: Any) -> bytes:
    """The picture that the page's button makes, with the page's settings as they are."""
    page.evaluate("() => document.querySelector('#html_log_txt2img .performance')?.setAttribute('data-old', '')")
    page.click("#txt2img_generate")
    page.wait_for_selector("#html_log_txt2img .performance:not([data-old])", state="attached", timeout=12000)
    return shown_picture(page)


def test_a_pasted_infotext_makes_the_picture_again_in_a_fresh_page(
    page: Any, browser: Any, host: Running, files: list[str], tmp_path: Path
) -> None:
    assert page.evaluate("() => gradio_config.version") in ("4.40.0", "3.41.2")
    upload(page, files, 2)
    page.click(f"{UNIT}model input")
    page.click(f"{UNIT}model :text('{MODEL}')")
    has(page, "model", MODEL)
    page.click(f"{UNIT}intent label:has-text('Variation')")
    has(page, "weight", 1.3)
    unit = slot(page)
    made = generate(page)
    infotext = page.inner_text("#html_info_txt2img")
    assert all(each["sha256"] in infotext for each in unit["images"]) and MODEL in infotext
    with opened(browser, host) as fresh:
        assert fresh.is_checked(f"{ACCORDION}-visible-checkbox") is False
        assert fresh.evaluate("() => document.querySelectorAll('.ip-adapter-card').length") == 0
        paste(fresh, infotext)
        pictures(fresh, 2)
        assert fresh.is_checked(f"{ACCORDION}-visible-checkbox")
        assert Unit.from_json(slot(fresh)) == Unit.from_json(unit)
        assert pixels(start(fresh)) == pixels(made)
        put(fresh, json.dumps({**unit, "images": unit["images"][:1]}))
        pictures(fresh, 1)
        assert pixels(start(fresh)) != pixels(made)
    with opened(browser, host) as fresh:  # the same through the file
        (tmp_path / "made.png").write_bytes(made)
        fresh.click("#tabs > .tab-nav > button:has-text('PNG Info')")
        fresh.set_input_files("#pnginfo_image input[type=file]", str(tmp_path / "made.png"))
        until(fresh, "() => document.querySelector('#pnginfo_generation_info textarea').value.includes('IP-Adapter 1')")
        fresh.click("#txt2img_tab")
        pictures(fresh, 2)
        assert Unit.from_json(slot(fresh)) == Unit.from_json(unit)
        assert pixels(start(fresh)) == pixels(made)


def test_a_paste_says_which_picture_is_missing_and_which_unit_has_no_tab(page: Any) -> None:
    paste(page, f'a\nSteps: 2, Seed: 1, Size: 64x64, IP-Adapter 7: "model: {MODEL}, picture 1: {"0" * 64}"')
    page.wait_for_selector(f"#script_txt2img_ipadapter_paste_note :text('{'0' * 64}')")
    page.wait_for_selector("#script_txt2img_ipadapter_paste_note :text('7 have no tab')")
    until(page, "() => document.querySelector('.ip-adapter-badge').textContent === '1'")


def test_pictures_are_moved_weighed_cropped_and_removed(page: Any, files: list[str]) -> None:
    upload(page, files[:1], 1)
    upload(page, files[1:], 2)  # adding keeps what is there
    first, second = slot(page)["images"]
    page.click(f"{UNIT}list .ip-adapter-card:nth-child(1) [title='Move right']")
    has(page, "images", [second, first])
    number(page, f"{UNIT}list .ip-adapter-card:nth-child(1) .ip-adapter-weight", 0.5)
    has(page, "images", [{**second, "weight": 0.5}, first])
    before = page.get_attribute(f"{UNIT}list .ip-adapter-card:nth-child(2) img", "src")
    page.evaluate(
        "(card) => { const zoom = document.querySelector(card + ' [data-crop=zoom]'); zoom.value = 2;"
        " zoom.dispatchEvent(new Event('change')); }",
        f"{UNIT}list .ip-adapter-card:nth-child(2)",
    )
    has(page, "images", [{**second, "weight": 0.5}, {**first, "crop": [0.5, 0.5, 2]}])
    until(
        page,
        "([image, old]) => document.querySelector(image).src !== old",
        [f"{UNIT}list .ip-adapter-card:nth-child(2) img", before],
    )
    page.click(f"{UNIT}list .ip-adapter-card:nth-child(1) [title^=Remove]")
    has(page, "images", [{**first, "crop": [0.5, 0.5, 2]}])


def test_kept_pictures_are_forgotten_when_that_is_confirmed(page: Any, files: list[str]) -> None:
    upload(page, files, 2)
    first, second = slot(page)["images"]
    answers = [False, True, True]
    page.on("dialog", lambda dialog: dialog.accept() if answers.pop(0) else dialog.dismiss())
    button = f"{UNIT}list .ip-adapter-card:nth-child(1) [title*=delete]"
    page.click(button)
    assert slot(page)["images"] == [first, second]
    page.click(button)
    has(page, "images", [second])
    page.wait_for_selector(f"{UNIT}upload_note :text('The copy is deleted.')")
    page.click("#script_txt2img_ipadapter_kept .label-wrap")
    page.click("#script_txt2img_ipadapter_forget_all")
    page.wait_for_selector("#script_txt2img_ipadapter_forgotten :text('deleted')")
    page.click("#txt2img_generate")
    page.wait_for_selector(f"#html_log_txt2img :text('{second['sha256']}')")
    assert answers == []


def test_intents_set_the_fields_and_a_disabled_unit_keeps_its_content(page: Any, files: list[str]) -> None:
    upload(page, files, 2)
    until(page, "() => document.querySelector('.ip-adapter-badge').textContent === '1'")
    page.click(f"{UNIT}intent label:has-text('Composition')")
    has(page, "stop", 0.5)
    has(page, "preparation", "pad")
    page.uncheck(f"{UNIT}enabled input")
    has(page, "enabled", False)
    assert len(slot(page)["images"]) == 2 and slot(page)["stop"] == 0.5
    assert page.evaluate("() => document.querySelector('.ip-adapter-badge').textContent") == ""


def test_controls_follow_a_slot_that_changes_from_outside(page: Any) -> None:
    unit = {"version": 1, "model": "gone.bin", "weight": 3.5, "start": 0.25, "timing": "steps", "images": ["AAAA"]}
    text = json.dumps(unit)
    put(page, text)
    until(page, "(box) => document.querySelector(box).value === 'gone.bin'", f"{UNIT}model input")
    until(page, "(box) => document.querySelector(box).value === '0.25'", f"{UNIT}start input[type=number]")
    page.wait_for_selector(f"{UNIT}kind :text('no model gone.bin here')")
    page.wait_for_selector(f"{UNIT}list .ip-adapter-problem:not(:empty)")
    assert page.input_value(SLOT) == text  # nothing was lost on the way round
    page.click(f"{UNIT}advanced .label-wrap")
    number(page, f"{UNIT}stop input[type=number]", 0.75)
    has(page, "stop", 0.75)
    assert slot(page).items() >= {**unit, "stop": 0.75}.items()


def test_get_models_opens_and_a_refused_job_says_why(page: Any) -> None:
    page.click("#script_txt2img_ipadapter_get_models .label-wrap")
    page.click("#script_txt2img_ipadapter_download_start")
    page.wait_for_selector("#script_txt2img_ipadapter_download_status :text('No model is chosen')")
    page.click("#txt2img_generate")
    page.wait_for_selector("#html_log_txt2img :text('has no picture in any enabled unit')")


IMG2IMG = UNIT.replace("txt2img", "img2img")


def test_pictures_are_sent_from_gallery_img2img_and_png_info(page: Any, files: list[str]) -> None:
    page.uncheck(f"{ACCORDION}-visible-checkbox")
    made = generate(page)
    page.click("#image_buttons_txt2img #ip_adapter_send_0")
    pictures(page, 1)
    assert page.is_checked(f"{ACCORDION}-visible-checkbox")
    assert slot(page)["images"] == [{"sha256": picture_hash(read_picture(made))}]
    tab = "#tabs > .tab-nav > button:has-text('{}')"
    page.click(tab.format("PNG Info"))
    page.set_input_files("#pnginfo_image input[type=file]", files[0])
    page.wait_for_selector("#pnginfo_image img")
    page.click("#tab_pnginfo #ip_adapter_send_3")  # into the first unit without pictures: the second
    second = "#script_txt2img_ipadapter_unit_2_"
    page.wait_for_selector(f"{second}list img[src^=data]")
    assert picture_hash(read_picture(Path(files[0]))) in page.input_value(f"{second}hashes :is(textarea, input)")
    page.click(tab.format("img2img"))
    page.set_input_files("#img2img_image input[type=file]", files[1])
    page.wait_for_selector("#img2img_image img")
    page.click("#tab_img2img #ip_adapter_send_2")
    page.wait_for_selector(f"{IMG2IMG}list img[src^=data]")
    assert picture_hash(read_picture(Path(files[1]))) in page.input_value(f"{IMG2IMG}hashes :is(textarea, input)")


def test_a_picture_is_pasted_from_the_clipboard_into_the_unit_under_the_pointer(page: Any, files: list[str]) -> None:
    shown = base64.b64encode(Path(files[0]).read_bytes()).decode()
    event = """async (data) => {
        const blob = await (await fetch(`data:image/png;base64,${data}`)).blob();
        const clipboardData = new DataTransfer();
        clipboardData.items.add(new File([blob], "image.png", { type: "image/png" }));
        document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
    }"""
    page.hover("#txt2img_prompt textarea")
    page.evaluate(event, shown)
    page.hover(f"{UNIT}model")
    page.evaluate(event, shown)
    pictures(page, 1)
    assert slot(page)["images"] == [{"sha256": picture_hash(read_picture(Path(files[0])))}]


def test_a_picture_is_dragged_from_the_gallery_into_a_unit(page: Any) -> None:
    page.uncheck(f"{ACCORDION}-visible-checkbox")
    made = generate(page)
    page.check(f"{ACCORDION}-visible-checkbox")
    page.drag_and_drop("#txt2img_gallery img", f"{UNIT}model")
    pictures(page, 1)
    assert slot(page)["images"] == [{"sha256": picture_hash(read_picture(made))}]


def test_a_drag_moves_the_crop(page: Any, files: list[str]) -> None:
    upload(page, files[:1], 1)
    image = f"{UNIT}list .ip-adapter-card img"
    before = page.get_attribute(image, "src")
    box = page.locator(image).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    has(page, "images", [{**slot(page)["images"][0], "crop": [0.75, 0.5, 1]}])  # to the left: more of the right
    until(page, "([image, old]) => document.querySelector(image).src !== old", [image, before])
    page.click(f"{UNIT}intent label:has-text('Composition')")  # which shows the whole picture, so there is no crop
    has(page, "preparation", "pad")
    page.mouse.down()
    page.mouse.move(box["x"], box["y"], steps=4)
    page.mouse.up()
    assert slot(page)["images"][0]["crop"] == [0.75, 0.5, 1]


def test_the_line_below_start_and_stop_knows_the_schedule(page: Any) -> None:
    page.click(f"{UNIT}advanced .label-wrap")
    number(page, "#txt2img_steps input[type=number]", 12)
    number(page, f"{UNIT}stop input[type=number]", 0.6)
    for name in ("Karras", "SGM Uniform"):
        page.click("#txt2img_scheduler input")
        page.click(f"#txt2img_scheduler :text('{name}')")
        acting = [n for n, progress in enumerate(of_scheduler(name, 12), 1) if Window(0, 0.6).contains(progress)]
        page.wait_for_selector(f"{UNIT}steps:text-is('Acts in steps 1 to {acting[-1]} of 12.')")
    page.click(f"{UNIT}timing label:has-text('steps')")
    page.wait_for_selector(f"{UNIT}steps:text-is('Acts in steps 1 to 8 of 12.')")


def disabled(page: Any, selector: str) -> bool:
    return bool(page.evaluate("(selector) => document.querySelector(selector).disabled", selector))


def test_only_what_applies_is_enabled(page: Any, host: Running, files: list[str]) -> None:
    upload(page, files[:1], 1)
    page.click(f"{UNIT}advanced .label-wrap")
    file, negative = f"{UNIT}uncond input[value=file]", f"{UNIT}negative input"
    assert disabled(page, negative)
    assert disabled(page, file) and not disabled(page, f"{UNIT}uncond input[value=none]")  # there is no such file
    assert not disabled(page, f"{UNIT}list [data-crop=zoom]")
    page.click(f"{UNIT}preparation label:has-text('squash')")
    until(page, "(zoom) => document.querySelector(zoom).disabled", f"{UNIT}list [data-crop=zoom]")
    try:
        for name, width in (("fits", 64), ("other", 2048)):
            save_file({NEGATIVE_KEY: torch.zeros(1, 4, width)}, host.models / "ipadapter" / f"{name}.safetensors")
        page.click(f"{UNIT}refresh")
        until(page, "(file) => !document.querySelector(file).disabled", file)
        page.click(f"{UNIT}uncond label:has-text('file')")
        has(page, "negative", "fits.safetensors")
        assert not disabled(page, negative)
        page.click(negative)
        assert page.locator(f"{UNIT}negative li, {UNIT}negative [role=option]").all_inner_texts() == [
            "✓\nfits.safetensors"
        ]
    finally:
        for name in ("fits", "other"):
            (host.models / "ipadapter" / f"{name}.safetensors").unlink()


def edited(page: Any, name: str) -> str:
    return f"{UNIT}editors [data-field={name}]"


def drag(page: Any, selector: str, *way: tuple[float, float]) -> None:
    """From place to place on an element, in parts of its width and height."""
    box = page.locator(selector).bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in way]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def test_editors_write_the_unit_and_show_what_it_has(page: Any, browser: Any, host: Running, files: list[str]) -> None:
    page.click(f"{UNIT}advanced .label-wrap")
    page.click(f"{UNIT}editors summary")
    page.select_option(edited(page, "layers"), "style")  # before there is a picture, too
    page.select_option(edited(page, "mask_where"), "left half")
    assert page.input_value(SLOT) == ""
    upload(page, files[:1], 1)
    has(page, "layers", "style")
    has(page, "mask", {"template": "left half"})
    plain = slot(page)
    page.fill(edited(page, "curve"), "0.5@0, 1@0.25")
    page.press(edited(page, "curve"), "Tab")
    has(page, "curve", "0.5@0, 1@0.25")
    plot = f"{UNIT}editors [data-plot=curve]"
    assert page.locator(f"{plot} circle").count() == 2
    assert page.locator(f"{plot} .ip-adapter-step").count() == int(
        page.input_value("#txt2img_steps input[type=number]")
    )
    box = page.locator(plot).bounding_box()
    page.mouse.dblclick(box["x"] + 0.9 * box["width"], box["y"] + 0.9 * box["height"])
    until(page, "(plot) => document.querySelectorAll(`${plot} circle`).length === 3", plot)
    points = slot(page)["curve"].split(", ")
    assert points[:2] == ["0.5@0", "1@0.25"] and 0.85 < float(points[2].split("@")[1]) < 0.97
    page.fill(edited(page, "curve"), "")
    page.press(edited(page, "curve"), "Tab")
    until(page, "(slot) => !('curve' in JSON.parse(document.querySelector(slot).value))", SLOT)

    # SD1.5's groups: all but 4 to 8 have style. The bar of group 6 is drawn up to the strength.
    bars = f"{UNIT}editors .ip-adapter-bars"
    assert page.locator(f"{bars} .ip-adapter-slot").count() == 16
    heights = page.eval_on_selector_all(
        f"{bars} .ip-adapter-bar", "(all) => all.map((each) => each.getAttribute('height'))"
    )
    assert [float(each) > 0 for each in heights] == [n not in range(4, 9) for n in range(16)]
    drag(page, bars, (6.5 / 16, 0.5), (6.5 / 16, 52 / 120))
    has(page, "layers", ", ".join(f"{n}:1" for n in range(16) if n not in (4, 5, 7, 8)))
    page.select_option(edited(page, "layers"), "all")
    until(page, "(slot) => !('layers' in JSON.parse(document.querySelector(slot).value))", SLOT)

    # What is drawn on the canvas is kept as a picture; the left half stays white from the template.
    drag(page, f"{UNIT}editors canvas", (0.75, 0.25), (0.75, 0.75))
    until(page, "(slot) => JSON.parse(document.querySelector(slot).value).mask?.sha256", SLOT)
    has(page, "images", plain["images"])
    page.set_input_files(edited(page, "negative_images"), files[1])
    until(page, "(slot) => JSON.parse(document.querySelector(slot).value).negative_images?.length === 1", SLOT)
    page.select_option(edited(page, "mixture"), "average")
    has(page, "mixture", "average")
    assert page.is_checked(edited(page, "nested"))
    page.uncheck(edited(page, "nested"))
    has(page, "nested", False)
    given = Unit.from_json(slot(page))
    assert given.mask.sha256 and given.negative_images and not given.nested
    made = generate(page)
    infotext = page.inner_text("#html_info_txt2img")
    assert given.mask.sha256 in infotext and "mixture: average" in infotext
    with opened(browser, host) as fresh:
        paste(fresh, infotext)
        pictures(fresh, 1)
        assert Unit.from_json(slot(fresh)) == given
        assert pixels(start(fresh)) == pixels(made)
        fresh.click(f"{UNIT}editors summary")
        assert fresh.input_value(edited(fresh, "mixture")) == "average"
        assert fresh.input_value(edited(fresh, "mask_where")) == "picture"

    # A preset sets gradio's controls too, and is told by the fields.
    page.select_option(edited(page, "preset"), "like A1111 ControlNet")
    has(page, "timing", "steps")
    assert page.is_checked(f"{UNIT}preparation input[value=squash]")
    page.click(f"{UNIT}timing label:has-text('noise')")
    until(page, "(preset) => document.querySelector(preset).value === ''", edited(page, "preset"))

    # A mask of one picture alone.
    page.select_option(edited(page, "mask_mask_of"), label="picture 1")
    page.select_option(edited(page, "mask_where"), "top half")
    has(page, "images", [{**plain["images"][0], "mask": {"template": "top half"}}])
    assert slot(page)["mask"] == json.loads(given.to_json())["mask"]

    # Out with the picture and in with another: the rest stays. From outside: the editors follow.
    page.click(f"{UNIT}list button[title^=Remove]")
    until(page, "(slot) => document.querySelector(slot).value === ''", SLOT)
    upload(page, files[1:], 1)
    has(page, "mixture", "average")
    put(page, json.dumps({"images": slot(page)["images"], "curve": "1@0.5, 0@0.5", "layers": "0:1, 3:0.5"}))
    until(page, "(curve) => document.querySelector(curve).value === '1@0.5, 0@0.5'", edited(page, "curve"))
    assert page.input_value(edited(page, "layers")) == "0:1, 3:0.5"
    assert page.input_value(edited(page, "mask_where")) == "" and page.is_checked(edited(page, "nested"))


def test_a_saved_reference_is_made_used_and_deleted_on_the_page(page: Any, files: list[str]) -> None:
    page.click(f"{UNIT}advanced .label-wrap")
    page.click(f"{UNIT}editors summary")
    section = f"{UNIT}editors .ip-adapter-section:has([data-field=saved])"
    page.fill(edited(page, "save_as"), "keeper")
    page.click(f"{section} button:text-is('Save')")
    page.wait_for_selector(f"{section} .ip-adapter-note:has-text('has no picture')")
    upload(page, files[:1], 1)
    sent = slot(page)
    page.click(f"{section} button:text-is('Save')")
    page.wait_for_selector(f"{section} .ip-adapter-remark:has-text('<ipa:keeper:1>')")
    picture = generate(page)
    page.click(f"{UNIT}list button[title^=Remove]")
    until(page, "(slot) => document.querySelector(slot).value === ''", SLOT)
    assert page.input_value(edited(page, "saved")) == "keeper"
    page.click(f"{section} button:text-is('Use')")
    pictures(page, 1)  # with its thumbnail
    has(page, "images", [{"saved": "keeper"}])
    assert Unit.from_json({**slot(page), "images": sent["images"]}) == Unit.from_json(sent)
    assert pixels(start(page)) == pixels(picture)
    page.on("dialog", lambda dialog: dialog.accept())
    page.click(f"{section} button:text-is('Delete')")
    page.wait_for_selector(f"{section} .ip-adapter-remark:has-text('is deleted')")
    assert page.locator(f"{edited(page, 'saved')} option").count() == 0


def test_models_are_listed_anew_when_the_accordion_opens(page: Any, host: Running) -> None:
    header = f"{ACCORDION} .label-wrap >> nth=0"
    page.click(header)
    new = host.models / "ipadapter" / "another.safetensors"
    shutil.copy(host.models / "ipadapter" / MODEL, new)
    try:
        page.click(header)
        page.wait_for_timeout(300)
        page.click(f"{UNIT}model input")
        page.wait_for_selector(f"{UNIT}model :text('another.safetensors')")
    finally:
        new.unlink()


def test_other_accordions_stay_where_they_are(browser: Any, host: Running, page: Any) -> None:
    above = ["#txt2img_hr", "#txt2img_seed"]
    place = "(ids) => ids.map((id) => JSON.stringify(document.querySelector(id).getBoundingClientRect()))"
    with opened(browser, host) as closed:
        closed.wait_for_timeout(500)
        before = closed.evaluate(place, above)
        shifts = closed.evaluate(
            "() => new Promise((done) => new PerformanceObserver((list) => done(list.getEntries()"
            ".flatMap((each) => each.sources.map((source) => source.node?.outerHTML?.slice(0, 200) || ''))))"
            ".observe({ type: 'layout-shift', buffered: true }) ?? setTimeout(() => done([]), 500))"
        )
        assert [each for each in shifts if "ip-adapter" in each] == []
    page.click(f"{UNIT}advanced .label-wrap")
    assert page.evaluate(place, above) == before

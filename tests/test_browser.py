"""The page in a browser: what a person does in the accordion, in headless Chromium against the embedded host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from tests import version_sets

ROOT = Path(__file__).parent.parent
UNIT = "#script_txt2img_ipadapter_unit_1_"
SLOT = "#script_txt2img_ipadapter_slot_1 :is(textarea, input)"
ACCORDION = "#script_txt2img_ipadapter_accordion"
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


@pytest.fixture(scope="module", params=["gradio 4", "gradio 3"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a host that runs in a process of its own, with the gradio of one half of the WebUIs."""
    command = [sys.executable, "-u", "-m", "tests.embedded", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    if request.param == "gradio 3":
        if sys.prefix == sys.base_prefix:
            pytest.skip("gradio 3 is laid over an environment and this Python is none: run it through dev.py test.")
        folder = version_sets.made("gradio 3", Path(sys.prefix, "version-sets", "gradio3"), version_sets.GRADIO_3)
        environment["PYTHONPATH"] = str(folder)
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert running.stdout is not None
        said = []
        for line in running.stdout:
            said.append(line)
            if line.startswith("Running on "):
                break
        else:
            pytest.fail("The host didn't start: " + "".join(said))
        threading.Thread(target=running.stdout.read, daemon=True).start()  # or the pipe would be full one day
        yield line.split()[2]
    finally:
        running.terminate()
        running.wait()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A fresh page with the accordion ticked; none of its errors is ours."""
    errors: list[str] = []
    made = browser.new_page(viewport={"width": 1280, "height": 1500})
    made.set_default_timeout(15000)
    made.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.goto(address)
    made.check(f"{ACCORDION}-visible-checkbox")
    made.wait_for_selector(f"{UNIT}files input[type=file]", state="attached")
    yield made
    made.close()
    assert [each for each in errors if not each.startswith(FOREIGN_NOISE)] == []


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
    """The picture that the page's button makes."""
    for name, value in (("seed", 7), ("width", 64), ("height", 64), ("steps", 2)):
        number(page, f"#txt2img_{name} input[type=number]", value)
    page.evaluate("() => document.querySelector('#html_log_txt2img .performance')?.setAttribute('data-old', '')")
    page.click("#txt2img_generate")
    page.wait_for_selector("#html_log_txt2img .performance:not([data-old])", state="attached", timeout=12000)
    source = page.wait_for_selector("#txt2img_gallery img").get_attribute("src")
    return bytes(page.request.get(source).body())


def test_a_picture_is_made_again_in_a_fresh_page(page: Any, browser: Any, address: str, files: list[str]) -> None:
    upload(page, files, 2)
    model = page.input_value(f"{UNIT}model input")
    unit = slot(page)
    assert unit["model"] == model and len(unit["images"]) == 2
    made = generate(page)
    assert model in page.inner_text("#html_info_txt2img")
    fresh = browser.new_page()
    fresh.goto(address)
    fresh.check(f"{ACCORDION}-visible-checkbox")
    fresh.wait_for_selector(SLOT, state="attached")
    without = fresh.evaluate("() => document.querySelectorAll('.ip-adapter-card').length")
    put(fresh, json.dumps(unit))
    pictures(fresh, 2)
    assert without == 0 and generate(fresh) == made
    put(fresh, json.dumps({**unit, "images": unit["images"][:1]}))
    pictures(fresh, 1)
    image = "#txt2img_gallery img"
    old = fresh.get_attribute(image, "src")
    fresh.click("#txt2img_generate")
    until(fresh, "([image, old]) => document.querySelector(image)?.src.endsWith(old) === false", [image, old])
    fresh.close()


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


def test_a_result_is_sent_into_the_first_unit_without_pictures(page: Any, files: list[str]) -> None:
    page.uncheck(f"{ACCORDION}-visible-checkbox")
    generate(page)
    page.click("#ip_adapter_send_0")
    pictures(page, 1)
    assert page.is_checked(f"{ACCORDION}-visible-checkbox") and len(slot(page)["images"]) == 1

"""A job passed on to another WebUI, as front ends for several machines do: same arguments, same picture.

They (stable-diffusion-webui-distributed, say) take what every always-on script has among the job's arguments, in
``before_process``, and post it to the other WebUI's API. Here that other one runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.demo_models import DemoModels
from tests.embedded_hosts import TITLE, request, unit
from tests.photos import photo

ROOT = Path(__file__).resolve().parent.parent

FORWARDER = '''
from modules import scripts


def packed(p):
    return {
        script.title(): {"args": list(p.script_args[script.args_from : script.args_to])}
        for script in p.scripts.scripts
        if script.alwayson
    }


class Forwarder(scripts.Script):
    """Keeps what it would send before the job, and what it would have sent after it."""

    def title(self):
        return "Distribute"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return []

    def before_process(self, p, *args):
        self.before = packed(p)

    def postprocess(self, p, processed, *args):
        self.after = packed(p)
'''


@pytest.fixture(scope="module")
def forwarding(models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The WebUI that jobs are sent to first; its forwarder is loaded before our script, as its name has it."""
    extension = tmp_path_factory.mktemp("distributed")
    (extension / "scripts").mkdir()
    (extension / "scripts" / "distributed.py").write_text(FORWARDER, encoding="utf-8")
    with Host("sd15", [extension, ROOT], models.models_path) as made:
        yield made


@pytest.fixture(scope="module")
def worker(models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of another WebUI with the same models and a data folder of its own."""
    command = [sys.executable, "-m", "tests.embedded", "--port", "0", "--models", str(models.models_path)]
    command += ["--data-dir", str(tmp_path_factory.mktemp("data"))]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("Running on ")), "")
            assert line, "the second WebUI did not start"
            yield line.split()[2]
        finally:
            watchdog.cancel()
            process.kill()


def forwarder(host: Host) -> Any:
    return host.runners["txt2img"].script_by_title("Distribute")


def forward(host: Host, worker: str, fields: dict[str, Any]) -> requests.Response:
    """Post what the forwarder of the first WebUI saw to the second, as JSON text."""
    seen = forwarder(host).before
    assert seen == forwarder(host).after, "the job changed its own arguments"
    text = json.dumps(seen, allow_nan=False)
    assert json.loads(text) == seen
    scripts = {title: value for title, value in seen.items() if title != "Distribute"}
    session = requests.Session()
    session.trust_env = False  # the other WebUI is on this machine
    return session.post(f"{worker}/sdapi/v1/txt2img", json={**fields, "alwayson_scripts": scripts}, timeout=300)


UNITS = [unit("base", weight=0.8), unit("plus", photos=("coffee", "chelsea"), stop=0.7)]
FORMS: dict[str, list[Any]] = {
    "switch and objects": [True, *UNITS],
    "objects alone": UNITS,
    "switch and texts": [True, *map(json.dumps, UNITS)],
    "an empty slot between": [True, UNITS[0], "", UNITS[1]],
}


@pytest.mark.parametrize("form", FORMS)
def test_an_api_job_is_the_same_on_both(forwarding: Host, worker: str, form: str) -> None:
    plain = request()
    sent = {**plain, "alwayson_scripts": {TITLE: {"args": FORMS[form]}}}
    text = json.dumps(sent)
    first = Client(forwarding.app).post("/sdapi/v1/txt2img", content=text)
    assert first.status_code == 200, first.text
    seen = forwarder(forwarding).before[TITLE]["args"]
    assert seen == [*FORMS[form], *[""] * (11 - len(FORMS[form]))]
    assert first.json()["parameters"]["alwayson_scripts"] == sent["alwayson_scripts"]

    second = forward(forwarding, worker, plain)
    assert second.status_code == 200, second.text
    assert second.json()["images"] == first.json()["images"]
    assert json.loads(second.json()["info"])["infotexts"] == json.loads(first.json()["info"])["infotexts"]
    without = Client(forwarding.app).post("/sdapi/v1/txt2img", json=plain)
    assert without.json()["images"] != first.json()["images"]


def test_a_job_without_us_is_the_same_on_both(forwarding: Host, worker: str) -> None:
    first = Client(forwarding.app).post("/sdapi/v1/txt2img", json=request())
    assert forwarder(forwarding).before[TITLE]["args"] == [False, *[""] * 10]
    assert forward(forwarding, worker, request()).json()["images"] == first.json()["images"]


def from_page(host: Host, slots: list[str]) -> None:
    """What the page's Generate does with these slots' texts."""
    defaults = {name: component.value for name, component in host.page.tabs["txt2img"].fields.items()}
    script = host.runners["txt2img"].script_by_title(TITLE)
    assert script is not None and script.args_from is not None
    args: list[Any] = [component.value for component in host.page.tabs["txt2img"].script_inputs]
    args[0] = 0  # the page hands over the position in its list of scripts
    args[script.args_from] = True
    args[script.args_from + 1 : script.args_from + 1 + len(slots)] = slots
    pictures, _, _, log = host.page.generate("txt2img", {**defaults, **request()}, tuple(args))
    assert len(pictures) == 1, log


def test_a_job_of_the_page_whose_pictures_only_the_first_has_is_refused_by_the_second(
    forwarding: Host, worker: str
) -> None:
    references = sys.modules["sd_image_prompt.references"]
    sha256 = references.add(photo())
    slot = json.dumps({"version": 1, "model": UNITS[0]["model"], "images": [{"sha256": sha256}]})
    from_page(forwarding, [slot])
    seen = forwarder(forwarding).before[TITLE]["args"]
    assert seen[:2] == [True, slot]

    answer = forward(forwarding, worker, request())
    assert answer.status_code == 422
    sentence = answer.json()["detail"]
    assert f'The reference picture with sha256 "{sha256}" isn\'t kept here' in sentence
    assert sentence.endswith("upload it again, or send it as base64.") and "images" not in answer.json()

"""The page: what it contains, and what its Generate button does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.components import InputAccordion
from tests.embedded.gradio_compat import gr
from tests.embedded.probe import PROBE_EXTENSION, probe_args, record, run


def page_fields(host: Host, tab: str = "txt2img", **changed: Any) -> dict[str, Any]:
    fields = {name: component.value for name, component in host.page.tabs[tab].fields.items()}
    return {**fields, "prompt": "a fox", "seed": 1, "steps": 2, "width": 64, "height": 64, **changed}


def script_args(host: Host, tab: str = "txt2img", **wanted: Any) -> tuple[Any, ...]:
    on = probe_args(**wanted)["Probe"]["args"]
    return (0, *on, 3)


def test_page_with_scripts_and_assets(tmp_path: Path) -> None:
    extension = tmp_path / "extension"
    shutil.copytree(PROBE_EXTENSION, extension, ignore=shutil.ignore_patterns("__pycache__"))
    (extension / "javascript").mkdir()
    (extension / "javascript" / "own.js").write_text("onUiLoaded(() => { window.ownScriptRan = 1; });", "utf-8")
    (extension / "style.css").write_text(".own-class { color: red; }", "utf-8")
    with Host("sd15", [extension]) as host:
        client = Client(host.app)
        html = client.get("/").text
        assert "ownScriptRan" in html
        assert html.index("function onUiLoaded") < html.index("ownScriptRan")
        config = client.get("/config").json()
        assert ".own-class" in config["css"]
        ids = {c["props"].get("elem_id") for c in config["components"]}
        assert {"txt2img_prompt", "txt2img_generate", "txt2img_gallery", "html_info_txt2img", "img2img_image"} <= ids
        for tab in ("txt2img", "img2img"):
            assert {f"script_{tab}_probe_enable", f"script_{tab}_probe_enable-checkbox"} <= ids
        # what an upload from the page becomes is gradio's business; a job's is ours
        job = host.page.generate("txt2img", page_fields(host), script_args(host))
        assert len(job[0]) == 1
        assert job[0][0].tobytes() == run(host, wanted={}).image.tobytes()
        assert "a fox" in job[2]
        assert "Time taken" in job[3]


def test_generate_shows_exceptions_and_comments() -> None:
    with Host("sd15", [PROBE_EXTENSION]) as host:
        pictures, info, infotext, log = host.page.generate(
            "txt2img", page_fields(host), script_args(host, init="no <model>")
        )
        assert (pictures, info, infotext) == ([], "", "")
        assert "<div class='error'>UserError: no &lt;model&gt;</div>" in log
        wanted = {"comment": "nothing <done>", "interrupt in process": True}
        pictures, _, infotext, log = host.page.generate("txt2img", page_fields(host), script_args(host, **wanted))
        assert pictures == []
        assert "nothing &lt;done&gt;" in log
        assert "Steps: 2" in infotext
        assert host.state.interrupted is False
        pictures, *_ = host.page.generate("txt2img", page_fields(host, batch_size=2, n_iter=2), (0, False, "{}", 3))
        assert [p.size for p in pictures] == [(128, 128)] + [(64, 64)] * 4  # the grid first
        _, _, _, log = host.page.generate(
            "img2img", page_fields(host, "img2img", init_images=None), (0, False, "{}", 3)
        )
        assert "ValueError: img2img needs a picture" in log
        assert record().hooks


def test_generate_through_gradio() -> None:
    with Host("sd15", [PROBE_EXTENSION]) as host:
        blocks = host.page.blocks
        (fn,) = [f for f in blocks.fns.values() if f.targets and f.targets[0][1] == "click" and len(f.outputs) == 4][:1]
        tab = host.page.tabs["txt2img"]
        assert list(fn.inputs) == [*tab.fields.values(), *tab.script_inputs]
        assert list(tab.script_inputs[1:]) == list(host.runners["txt2img"].alwayson_scripts[0].controls)


def test_input_accordion_is_a_checkbox() -> None:
    with gr.Blocks():
        with InputAccordion(True, label="Thing", elem_id="thing") as accordion:
            gr.Textbox()
            with accordion.extra():
                gr.HTML("")
        assert accordion.value is True
        assert accordion.elem_id == "thing-checkbox"
        assert accordion.accordion.elem_id == "thing"
        assert accordion.accordion.open is True
        assert accordion.get_block_name() == "checkbox"
        assert isinstance(accordion, gr.Checkbox)
        numbered = [InputAccordion(False, label="x").elem_id for _ in range(2)]
    assert len(set(numbered)) == 2


@pytest.mark.parametrize("text", ["", "no parameters at all"])
def test_pasting_what_is_no_infotext_changes_nothing_by_accident(text: str) -> None:
    with Host("sd15", [PROBE_EXTENSION]) as host:
        updates = [u for c, u in host.page.pasted("txt2img", text)]
        values = [u["value"] for u in updates if "value" in u]
        # prompt, negative prompt, and the probe's accordion, which is switched off
        assert values == [text, "", False]

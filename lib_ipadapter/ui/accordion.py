"""The accordion in the txt2img and img2img tabs, for gradio 3.41 and gradio 4.

The script's arguments are its checkbox and ten hidden slots, one unit as JSON in each. The visible controls
are no arguments: every change of one writes its unit's slot, in the page itself (``slot.js``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import gradio as gr

from ..units import FORMULATIONS, PREPARATIONS, UNCONDS, UNIT_SLOTS, Unit
from . import handlers

TITLE = "IP-Adapter"
VISIBLE_UNITS = 3
PASTE_NOTE = "paste_note"
"""Attribute of the checkbox: the component that says what a pasted infotext couldn't bring back."""
PAGE_WEIGHTS = (-1.0, 2.0)
"""The range of the slider; requests may go further (``units.WEIGHT_RANGE``)."""

SLOT_SCRIPT = Path(__file__).with_name("slot.js").read_text(encoding="utf-8").strip()

# Gradio 4 renamed the argument for code that runs in the page. (Forge accepts both names there.)
_GRADIO_3 = int(gr.__version__.partition(".")[0]) < 4
_JS = "_js" if _GRADIO_3 else "js"
# Previews must be the encoder's input to the bit; gradio 4 would send a lossy format. Gradio 3 always sends
# PNG.
_EXACT: dict[str, Any] = {} if _GRADIO_3 else {"format": "png"}
# Quiet events: no queue (they must not wait behind a generation), no progress bar, no entry in the page's API
# list.
_QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_name": False}


class FileLists(Protocol):
    """Where the names in the dropdowns come from."""

    def adapters(self) -> list[str]:
        """Names of the adapter files."""

    def describe(self, name: str) -> str:
        """What the adapter of this name is, in words; '' if there is none."""

    def negatives(self) -> list[str]:
        """Names of the negative files."""


class Downloads(Protocol):
    """What gets models; see :class:`..downloads.Downloader`."""

    def catalogue(self) -> list[dict[str, Any]]:
        """All entries."""

    def start(self, name: object) -> dict[str, Any]:
        """Starts one."""

    def state(self) -> dict[str, Any]:
        """The running or the last one."""

    def cancel(self) -> dict[str, Any]:
        """Ends the running one."""


def build(
    files: FileLists,
    input_accordion: Callable[..., Any],
    elem_id: Callable[[str], str],
    tool_button: Callable[..., Any] = gr.Button,
    downloads: Downloads | None = None,
) -> list[Any]:
    """Build the accordion in the gradio context at hand and return the script's argument components.

    Args:
        files: the names for the dropdowns.
        input_accordion: the WebUI's ``InputAccordion``: an accordion that is a checkbox.
        elem_id: makes the id of an element from its local name.
        tool_button: the WebUI's small button.
        downloads: gets models; the page has no 'Get models' without it.

    Returns:
        The checkbox, then :data:`~lib_ipadapter.units.UNIT_SLOTS` hidden text boxes. Nothing outside them
        remembers the call, which hosts make several times under blocks that they throw away.
    """
    adapters, negatives = files.adapters(), files.negatives()
    accordion = input_accordion(False, label=TITLE, elem_id=elem_id("accordion"))
    with accordion:
        slots = [_hidden(f"Unit {number}", elem_id(f"slot_{number}")) for number in range(1, UNIT_SLOTS + 1)]
        paste_note = gr.HTML("", elem_id=elem_id(PASTE_NOTE))
        setattr(accordion, PASTE_NOTE, paste_note)
        with gr.Tabs(elem_id=elem_id("units")):
            for number, slot in enumerate(slots[:VISIBLE_UNITS], 1):
                with gr.Tab(f"Unit {number}", elem_id=elem_id(f"unit_{number}")):
                    unit = _build_unit(slot, adapters, negatives, partial(_unit_id, elem_id, number), tool_button)
                    _connect_lists(files, unit)
        if downloads is not None:
            _build_downloads(downloads, elem_id)
    # These positions are the HTTP API: append only. Anything for the script as a whole becomes position 12,
    # after the ten slots; a new setting of a unit is a new key in its JSON and needs no position.
    return [accordion, *slots]


@dataclass(frozen=True)
class _Lists:
    """The components of one unit that list files."""

    refresh: Any
    model: Any
    kind: Any
    negative: Any


def _build_unit(
    slot: Any,
    adapters: list[str],
    negatives: list[str],
    elem_id: Callable[[str], str],
    tool_button: Callable[..., Any],
) -> _Lists:
    default = Unit()
    hashes = _hidden("Pictures", elem_id("hashes"))
    with gr.Row():
        enabled = gr.Checkbox(label="Enable", value=default.enabled, elem_id=elem_id("enabled"), scale=1)
        model = gr.Dropdown(
            label="Adapter",
            choices=adapters,
            value=adapters[0] if adapters else None,
            elem_id=elem_id("model"),
            scale=8,
        )
        refresh = tool_button(value="\U0001f504", elem_id=elem_id("refresh"), scale=0, min_width=40)
    kind = gr.HTML(elem_id=elem_id("kind"))
    with gr.Row():
        uploaded = gr.File(
            label="Pictures", file_count="multiple", file_types=["image"], elem_id=elem_id("files"), scale=1
        )
        gallery = gr.Gallery(
            label="As the image encoder sees them",
            columns=4,
            height=240,
            elem_id=elem_id("previews"),
            scale=1,
            **_EXACT,
        )
    upload_note = gr.HTML(elem_id=elem_id("upload_note"))
    with gr.Row():
        low, high = PAGE_WEIGHTS
        weight = gr.Slider(low, high, default.weight, step=0.05, label="Weight", elem_id=elem_id("weight"))
        start = gr.Slider(0.0, 1.0, default.start, step=0.01, label="Start", elem_id=elem_id("start"))
        stop = gr.Slider(0.0, 1.0, default.stop, step=0.01, label="Stop", elem_id=elem_id("stop"))
    with gr.Row():
        formulation = gr.Radio(
            label="Formulation",
            choices=list(FORMULATIONS),
            value=default.formulation,
            elem_id=elem_id("formulation"),
        )
        preparation = gr.Radio(
            label="Preparation",
            choices=list(PREPARATIONS),
            value=default.preparation,
            elem_id=elem_id("preparation"),
        )
    with gr.Row():
        uncond = gr.Dropdown(label="Uncond", choices=list(UNCONDS), value=default.uncond, elem_id=elem_id("uncond"))
        negative = gr.Dropdown(
            label="Negative file (used when uncond is “file”)",
            choices=negatives,
            value=negatives[0] if negatives else None,
            elem_id=elem_id("negative"),
        )
    slot_note = gr.HTML(elem_id=elem_id("note"))

    # In the order of slot.js's parameters.
    controls = [enabled, hashes, model, weight, start, stop, formulation, uncond, negative, preparation]
    for control in controls:
        # The labels are too common to be keys in the host's file of saved defaults.
        control.do_not_save_to_config = True
        control.change(fn=None, inputs=controls, outputs=[slot], **_QUIET, **{_JS: SLOT_SCRIPT})
    uploaded.do_not_save_to_config = True

    uploaded.change(
        fn=handlers.keep_files,
        inputs=[uploaded, preparation],
        outputs=[hashes, gallery, upload_note],
        **_QUIET,
    )
    preparation.change(fn=handlers.preview, inputs=[hashes, preparation], outputs=[gallery, upload_note], **_QUIET)
    slot.change(fn=handlers.check, inputs=[slot], outputs=[slot_note], **_QUIET)
    return _Lists(refresh, model, kind, negative)


def _build_downloads(downloads: Downloads, elem_id: Callable[[str], str]) -> None:
    """The folded 'Get models'. None of it is an argument of the script."""
    labels = handlers.catalogue_labels(downloads.catalogue())
    with gr.Accordion("Get models", open=False, elem_id=elem_id("get_models")):
        choice = gr.Dropdown(label="Model", choices=labels, value=None, elem_id=elem_id("download_choice"))
        licence = gr.HTML(elem_id=elem_id("download_licence"))
        with gr.Row():
            start = gr.Button("Download", elem_id=elem_id("download_start"))
            cancel = gr.Button("Cancel", elem_id=elem_id("download_cancel"))
            refresh = gr.Button("Refresh", elem_id=elem_id("download_refresh"))
        status = gr.HTML(elem_id=elem_id("download_status"))
    choice.do_not_save_to_config = True

    def show(label: object) -> str:
        return handlers.licence_note(downloads.catalogue(), label)

    def begin(label: object) -> str:
        return handlers.start_download(downloads.start, label)

    def read() -> str:
        return handlers.download_note(downloads.state())

    def end() -> str:
        return handlers.download_note(downloads.cancel())

    # The page asks again while a download runs: a generator or a timer would need gradio's queue, which a host may
    # have switched off.
    poll = (
        f"() => {{ setTimeout(() => {{ const status = document.getElementById('{elem_id('download_status')}'); "
        "if (status && status.querySelector('[data-running]')) "
        f"document.getElementById('{elem_id('download_refresh')}').click(); }}, 1000); return []; }}"
    )
    choice.change(fn=show, inputs=[choice], outputs=[licence], **_QUIET)
    for button, function, inputs in ((start, begin, [choice]), (cancel, end, []), (refresh, read, [])):
        event = button.click(fn=function, inputs=inputs, outputs=[status], **_QUIET)
        event.then(fn=None, inputs=[], outputs=[], **_QUIET, **{_JS: poll})


def _connect_lists(files: FileLists, unit: _Lists) -> None:
    def read() -> tuple[Any, Any]:
        return gr.update(choices=files.adapters()), gr.update(choices=files.negatives())

    def describe(name: str | None) -> str:
        return handlers.remark(files.describe(name or ""))

    unit.kind.value = describe(unit.model.value)
    unit.model.change(fn=describe, inputs=[unit.model], outputs=[unit.kind], **_QUIET)
    unit.refresh.click(fn=read, inputs=[], outputs=[unit.model, unit.negative], **_QUIET)


def _unit_id(elem_id: Callable[[str], str], number: int, name: str) -> str:
    return elem_id(f"unit_{number}_{name}")


def _hidden(label: str, elem_id: str) -> Any:
    box = gr.Textbox(value="", label=label, visible=False, elem_id=elem_id)
    box.do_not_save_to_config = True
    return box

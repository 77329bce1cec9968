"""The accordion in the txt2img and img2img tabs, for gradio 3.41 and gradio 4.

The script's arguments are its checkbox and ten hidden slots, one unit as JSON in each. The visible controls
are no arguments: every change of one writes its unit's slot, in the page itself (``javascript/ip_adapter.js``),
and when a slot changes from outside, they follow it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import gradio as gr

from ..errors import IPAdapterError
from ..intents import FIELDS, INTENTS
from ..units import FORMULATIONS, PREPARATIONS, TIMINGS, UNCONDS, UNIT_SLOTS, Unit
from . import editors, handlers

TITLE = "IP-Adapter"
VISIBLE_UNITS = 3
PASTE_NOTE = "paste_note"
"""Attribute of the checkbox: the component that says what a pasted infotext couldn't bring back."""
PAGE_WEIGHTS = (-1.0, 2.0)
"""The range of the slider; requests may go further (``checks.WEIGHT_RANGE``)."""

# Gradio 4 renamed the argument for code that runs in the page. (Forge accepts both names there.)
_GRADIO_3 = int(gr.__version__.partition(".")[0]) < 4
_JS = "_js" if _GRADIO_3 else "js"
# Quiet events: no queue (they must not wait behind a generation), no progress bar, no entry in the page's API
# list.
_QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_name": False}


class FileLists(Protocol):
    """Where the names in the dropdowns come from."""

    def adapters(self) -> list[str]:
        """Names of the adapter files."""

    def choices(self, everything: bool) -> list[tuple[str, str]]:
        """Label and name of the adapters that fit the loaded checkpoint; of the others too, with the reason."""

    def describe(self, name: str) -> str:
        """What the adapter of this name is, in words; '' if there is none."""

    def misfit(self, name: str) -> str:
        """Why the adapter of this name can't act in the loaded checkpoint; '' if it can."""

    def applies(self, name: str) -> dict[str, Any]:
        """What applies to a unit with the adapter of this name, see :mod:`..applies`."""

    def negatives(self) -> list[str]:
        """Names of the negative files."""

    def save_reference(self, unit: Unit, name: object, replace: bool = False) -> object:
        """Saves a unit's pictures, encoded, under a name."""


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
    shown: int = VISIBLE_UNITS,
    start_with: Mapping[str, Any] | None = None,
    progress_of_pass: Callable[[str, str, int], list[float] | None] = lambda *_: None,
) -> list[Any]:
    """Build the accordion in the gradio context at hand and return the script's argument components.

    Args:
        files: the names for the dropdowns.
        input_accordion: the WebUI's ``InputAccordion``: an accordion that is a checkbox.
        elem_id: makes the id of an element from its local name.
        tool_button: the WebUI's small button.
        downloads: gets models; the page has no 'Get models' without it.
        shown: how many units have a tab.
        progress_of_pass: progress of every step by names of sampler and scheduler and number of steps, where the WebUI
            tells it.
        start_with: what the controls of a new unit begin with where it isn't the schema's default.

    Returns:
        The checkbox, then :data:`~lib_ipadapter.units.UNIT_SLOTS` hidden text boxes. Nothing outside them
        remembers the call, which hosts make several times under blocks that they throw away.
    """
    names = files.choices(False)
    negatives = files.applies(names[0][1] if names else "")["files"]["negative"]
    default = Unit()
    with suppress(IPAdapterError):  # a setting that was edited by hand must not cost the page its accordion
        default = replace(default, **(start_with or {}))
    accordion = input_accordion(False, label=TITLE, elem_id=elem_id("accordion"))
    with accordion:
        slots = [_hidden(f"Unit {number}", elem_id(f"slot_{number}")) for number in range(1, UNIT_SLOTS + 1)]
        paste_note = gr.HTML("", elem_id=elem_id(PASTE_NOTE))
        gr.HTML(editors.shared_facts(), elem_id=elem_id("editors_facts"))
        setattr(accordion, PASTE_NOTE, paste_note)
        built = []
        with gr.Tabs(elem_id=elem_id("units")):
            for number, slot in enumerate(slots[: min(max(shown, 1), UNIT_SLOTS)], 1):
                with gr.Tab(f"Unit {number}", elem_id=elem_id(f"unit_{number}"), elem_classes=["ip-adapter-unit"]):
                    unit = _build_unit(
                        slot,
                        elem_id(f"slot_{number}"),
                        names,
                        negatives,
                        partial(_unit_id, elem_id, number),
                        tool_button,
                        default,
                    )
                    built.append(unit)
        for number, slot in enumerate(slots[len(built) :], len(built) + 1):
            note = f"(text) => ipAdapter.unseen({json.dumps(elem_id(f'slot_{number}'))}, text)"
            slot.change(fn=None, inputs=[slot], outputs=[], **_QUIET, **{_JS: note})
        _connect_lists(files, built, elem_id)
        _connect_schedule(progress_of_pass, elem_id)
        _connect_saved(files, elem_id)
        _build_kept(elem_id)
        if downloads is not None:
            _build_downloads(downloads, elem_id)
    # These positions are the HTTP API: append only. Anything for the script as a whole becomes position 12,
    # after the ten slots; a new setting of a unit is a new key in its JSON and needs no position.
    return [accordion, *slots]


@dataclass(frozen=True)
class _Lists:
    """The components of one unit that list files."""

    slot: Any
    refresh: Any
    everything: Any
    model: Any
    kind: Any
    facts: Any
    negative: Any


def _build_unit(
    slot: Any,
    slot_id: str,
    names: Sequence[tuple[str, str]],
    negatives: list[str],
    elem_id: Callable[[str], str],
    tool_button: Callable[..., Any],
    default: Unit,
) -> _Lists:
    hashes, forget = _hidden("Pictures", elem_id("hashes")), _hidden("Forget", elem_id("forget"))
    names_of_hidden = ("incoming", "added", "previews", "facts")
    incoming, added, previews, facts = (_hidden(name, elem_id(name)) for name in names_of_hidden)
    with gr.Row(elem_classes=["ip-adapter-top"]):
        # No gr.File: gradio 3.41 drops an upload during which the page updates anything else.
        gr.HTML(
            f'<label class="ip-adapter-drop" id="{elem_id("files")}"><input type="file" accept="image/*" multiple>'
            f'Add pictures: click, drop or paste</label><div class="ip-adapter-list" id="{elem_id("list")}"></div>',
            elem_classes=["ip-adapter-pictures"],
        )
    upload_note = gr.HTML(elem_id=elem_id("upload_note"))
    with gr.Row():
        model = gr.Dropdown(
            label="Model",
            info="Adapters that fit the loaded checkpoint.",
            choices=_choices(names),
            value=names[0][1] if names else None,
            allow_custom_value=True,  # a pasted name that isn't there stays, and is said to be missing
            elem_id=elem_id("model"),
            scale=5,
        )
        refresh = tool_button(value="\U0001f504", elem_id=elem_id("refresh"), scale=0, min_width=40)
    kind = gr.HTML(elem_id=elem_id("kind"))
    with gr.Row():
        enabled = gr.Checkbox(
            label="Use this unit",
            info="Off keeps all of it.",
            value=default.enabled,
            elem_id=elem_id("enabled"),
            scale=1,
            min_width=140,
        )
        low, high = PAGE_WEIGHTS
        weight = gr.Slider(
            low,
            high,
            default.weight,
            step=0.05,
            label="Strength",
            info="-1 to 2; 0: off, 1: as trained.",
            elem_id=elem_id("weight"),
            scale=4,
        )
    fits = [name for name, values in INTENTS.items() if values == tuple(getattr(default, each) for each in FIELDS)]
    intent = gr.Radio(
        label="Intent",
        info="Sets strength and Advanced.",
        choices=list(INTENTS),
        value=fits[0] if fits else None,
        elem_id=elem_id("intent"),
    )
    with gr.Accordion("Advanced", open=False, elem_id=elem_id("advanced")):
        with gr.Row():
            start = gr.Slider(
                0.0,
                1.0,
                default.start,
                step=0.01,
                label="Start",
                info="0 (pure noise) to 1 (done).",
                elem_id=elem_id("start"),
            )
            stop = gr.Slider(
                0.0,
                1.0,
                default.stop,
                step=0.01,
                label="Stop",
                info="Behind start; after it the prompt goes on alone.",
                elem_id=elem_id("stop"),
            )
        gr.HTML(f'<div class="ip-adapter-remark" id="{elem_id("steps")}"></div>')
        timing = gr.Radio(
            label="Timing",
            info="What start and stop are parts of: the noise schedule, or the steps of a pass.",
            choices=list(TIMINGS),
            value=default.timing,
            elem_id=elem_id("timing"),
        )
        with gr.Row():
            formulation = gr.Radio(
                label="Formulation",
                info="Joint: one attention with the text; decoupled: its own, added; auto: by the model.",
                choices=list(FORMULATIONS),
                value=default.formulation,
                elem_id=elem_id("formulation"),
            )
            preparation = gr.Radio(
                label="Preparation",
                info="How a picture becomes the encoder's square.",
                choices=list(PREPARATIONS),
                value=default.preparation,
                elem_id=elem_id("preparation"),
            )
        uncond = gr.Radio(
            label="Uncond",
            info="What the negative side gets in place of the picture.",
            choices=list(UNCONDS),
            value=default.uncond,
            elem_id=elem_id("uncond"),
        )
        negative = gr.Dropdown(
            label="Negative file",
            info="The file of image tokens for the negative side.",
            choices=negatives,
            value=negatives[0] if negatives else None,
            allow_custom_value=True,
            elem_id=elem_id("negative"),
        )
        everything = gr.Checkbox(
            label="Show all models",
            info="Also those that don't fit the loaded checkpoint.",
            value=False,
            elem_id=elem_id("everything"),
        )
    gr.HTML(editors.place(elem_id("editors")), elem_id=elem_id("editors_box"))
    slot_note = gr.HTML(elem_id=elem_id("note"))

    # In the order of NAMES in javascript/ip_adapter.js.
    controls = [enabled, hashes, model, weight, start, stop, formulation, uncond, negative, preparation, timing]
    own = json.dumps(slot_id)
    script = f"(...args) => ipAdapter.write({own}, {json.dumps(INTENTS)}, args)"
    for control in controls:
        control.change(fn=None, inputs=[*controls, slot], outputs=[slot, intent], **_QUIET, **{_JS: script})
    for each in (*controls, intent, everything):
        # The labels are too common to be keys in the host's file of saved defaults.
        each.do_not_save_to_config = True
    follow = f"(slot, ...controls) => ipAdapter.follow({own}, slot, controls.slice(0, {len(controls)}))"
    slot.change(fn=None, inputs=[slot, *controls], outputs=controls, **_QUIET, **{_JS: follow})
    choose = f"(intent, ...now) => ({json.dumps(INTENTS)})[intent] || now.slice(0, {len(FIELDS)})"
    fields = [weight, start, stop, formulation, uncond, preparation]
    intent.input(fn=None, inputs=[intent, *fields], outputs=fields, **_QUIET, **{_JS: choose})

    incoming.change(fn=handlers.keep, inputs=[incoming], outputs=[added, upload_note], **_QUIET)
    forget.change(fn=handlers.forget, inputs=[forget], outputs=[upload_note], **_QUIET)
    join = f"(text) => ipAdapter.join({own}, text)"
    added.change(fn=None, inputs=[added], outputs=[], **_QUIET, **{_JS: join})
    for control in (hashes, preparation):
        control.change(fn=handlers.preview, inputs=[hashes, preparation], outputs=[previews], **_QUIET)
    draw = f"(text, ...controls) => ipAdapter.previews({own}, text, controls)"
    previews.change(fn=None, inputs=[previews, *controls], outputs=[], **_QUIET, **{_JS: draw})
    apply = f"(facts, ...controls) => ipAdapter.apply({own}, controls)"
    facts.change(fn=None, inputs=[facts, *controls], outputs=[], **_QUIET, **{_JS: apply})
    slot.change(fn=handlers.check, inputs=[slot], outputs=[slot_note], **_QUIET)
    return _Lists(slot, refresh, everything, model, kind, facts, negative)


def _connect_saved(files: FileLists, elem_id: Callable[[str], str]) -> None:
    """The editors ask for the saved references, and to save and delete them."""
    wish, told = _hidden("Saved wanted", elem_id("saved_wanted")), _hidden("Saved", elem_id("saved"))
    read = lambda text: handlers.saved_references(text, files.save_reference)  # noqa: E731
    wish.change(fn=read, inputs=[wish], outputs=[told], **_QUIET)
    script = f"(text) => ipAdapter.savedTold({json.dumps(elem_id('saved'))}, text)"
    told.change(fn=None, inputs=[told], outputs=[], **_QUIET, **{_JS: script})


def _build_kept(elem_id: Callable[[str], str]) -> None:
    """The folded 'Kept pictures'. None of it is an argument of the script."""
    sure = _hidden("Sure", elem_id("forget_sure"))
    with gr.Accordion("Kept pictures", open=False, elem_id=elem_id("kept")):
        gr.HTML(handlers.kept_line())
        every = gr.Button("Forget all", elem_id=elem_id("forget_all"))
        said = gr.HTML(elem_id=elem_id("forgotten"))
    ask = "() => [confirm('Delete the copies of all pictures? Parameters will not bring them back then.') ? 'yes' : '']"
    every.click(fn=handlers.forget_all, inputs=[sure], outputs=[said], **_QUIET, **{_JS: ask})


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


def _connect_lists(files: FileLists, units: Sequence[_Lists], elem_id: Callable[[str], str]) -> None:
    """Model and what hangs on it, by a unit's own buttons, and when the page asks whether the checkpoint is another."""

    def describe(name: str) -> str:
        if name and name not in files.adapters():
            return handlers.note(f"There is no model {name} here now: choose another, or put it into its folder.")
        misfit = files.misfit(name)
        return handlers.note(misfit) if misfit else handlers.remark(files.describe(name))

    def chosen(label: str | None, negative: str | None, slot: str) -> tuple[Any, ...]:
        name = handlers.model_name(label)
        facts = files.applies(name)
        listed = facts["files"]["negative"]
        # What a unit was given stays, also where it doesn't fit: the job says so.
        stays = negative in listed or not listed or handlers.has_file(slot)
        return describe(name), json.dumps(facts), gr.update(choices=listed, **({} if stays else {"value": listed[0]}))

    def read(everything: bool, name: str | None, negative: str | None, slot: str) -> tuple[Any, ...]:
        return gr.update(choices=_choices(files.choices(everything))), *chosen(name, negative, slot)

    def look(_: str, seen: str, *values: Any) -> tuple[Any, ...]:
        now = handlers.digest([files.choices(True), files.choices(False), files.negatives()])
        if now == seen:
            return seen, *(gr.update() for _ in range(4 * len(units)))
        updates: list[Any] = []
        for n in range(0, len(values), 4):
            everything, label, negative, slot = values[n : n + 4]
            choices = files.choices(everything)
            fitting = [name for _, name in files.choices(False)]
            # A unit without pictures has no model yet that somebody wants.
            other = fitting[0] if fitting and handlers.model_name(label) not in fitting and not slot else label
            updates += [gr.update(choices=_choices(choices), value=other), *chosen(other, negative, slot)]
        return now, *updates

    for unit in units:
        name = unit.model.value or ""
        unit.kind.value, unit.facts.value = describe(name), json.dumps(files.applies(name))
        inputs, outputs = [unit.model, unit.negative, unit.slot], [unit.kind, unit.facts, unit.negative]
        unit.model.change(fn=chosen, inputs=inputs, outputs=outputs, **_QUIET)
        for event in (unit.refresh.click, unit.everything.change):
            event(fn=read, inputs=[unit.everything, *inputs], outputs=[unit.model, *outputs], **_QUIET)
    wish, seen = _hidden("Look", elem_id("look")), _hidden("Seen", elem_id("seen"))
    seen.value = handlers.digest([files.choices(True), files.choices(False), files.negatives()])
    inputs = [each for unit in units for each in (unit.everything, unit.model, unit.negative, unit.slot)]
    outputs = [each for unit in units for each in (unit.model, unit.kind, unit.facts, unit.negative)]
    wish.change(fn=look, inputs=[wish, seen, *inputs], outputs=[seen, *outputs], **_QUIET)


def _connect_schedule(
    progress_of_pass: Callable[[str, str, int], list[float] | None], elem_id: Callable[[str], str]
) -> None:
    """The page asks which steps a pass has when the controls of that, which are the host's, have other values."""
    asked, told = _hidden("Schedule wanted", elem_id("schedule_wanted")), _hidden("Schedule", elem_id("schedule"))
    asked.change(fn=lambda text: handlers.schedule(text, progress_of_pass), inputs=[asked], outputs=[told], **_QUIET)
    script = f"(text) => ipAdapter.schedule({json.dumps(elem_id('accordion'))}, text)"
    told.change(fn=None, inputs=[told], outputs=[], **_QUIET, **{_JS: script})


def _choices(labelled: Sequence[tuple[str, str]]) -> list[Any]:
    """A dropdown's choices: gradio 3 knows no labels beside the values, so there the label is the value."""
    return [label if _GRADIO_3 else (label, name) for label, name in labelled]


def _unit_id(elem_id: Callable[[str], str], number: int, name: str) -> str:
    return elem_id(f"unit_{number}_{name}")


def _hidden(label: str, elem_id: str) -> Any:
    box = gr.Textbox(value="", label=label, visible=False, elem_id=elem_id)
    box.do_not_save_to_config = True
    return box

"""The script runner of one tab: makes the scripts, their controls and args, and calls their hooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .gradio_compat import gr
from .reports import Reports
from .scripts_api import AlwaysVisible, Script


class ScriptRunner:
    """Scripts of one tab in load order; ``inputs[0]`` is the script dropdown, then each script's components."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        self.scripts: list[Script] = []
        self.selectable_scripts: list[Script] = []
        self.alwayson_scripts: list[Script] = []
        self.titles: list[str] = []
        self.inputs: list[Any] = [None]
        self.infotext_fields: list[tuple[Any, Any]] = []
        self.paste_field_names: list[str] = []

    def initialize_scripts(self, is_img2img: bool, classes: Sequence[Any]) -> None:
        """Make one instance of every class (entries with ``script_class`` and ``path``) that wants to be here."""
        self.scripts, self.selectable_scripts, self.alwayson_scripts = [], [], []
        for entry in classes:
            try:
                script = entry.script_class()
                script.filename = entry.path
                script.is_txt2img = not is_img2img
                script.is_img2img = is_img2img
                script.tabname = "img2img" if is_img2img else "txt2img"
                visibility = script.show(is_img2img)
            except Exception as error:
                self._reports.report(f"Error # failed to initialize Script {entry.module}: ", error)
                continue
            if visibility is AlwaysVisible:
                script.alwayson = True
                self.alwayson_scripts.append(script)
            elif visibility:
                self.selectable_scripts.append(script)
            if visibility:
                self.scripts.append(script)

    def prepare_ui(self) -> None:
        """A page begins."""
        self.inputs = [None]
        self.infotext_fields, self.paste_field_names = [], []

    def setup_ui_for_section(self, section: str | None) -> None:
        """Build the controls of the always-visible scripts that want to be here, inside the current gradio block."""
        for script in sorted(self.alwayson_scripts, key=lambda s: s.sorting_priority):
            if script.section == section:
                self._create_group(script, visible=True)

    def setup_ui(self) -> list[Any]:
        """Build the controls of all scripts that have no section; the components of all in arg order."""
        self.titles = [self._title(s) for s in self.selectable_scripts]
        self.setup_ui_for_section(None)
        dropdown = gr.Dropdown(
            label="Script", elem_id="script_list", choices=["None", *self.titles], value="None", type="index"
        )
        self.inputs[0] = dropdown
        for script in self.selectable_scripts:
            self._create_group(script, visible=False)
        if self.selectable_scripts:
            groups = [s.group for s in self.selectable_scripts]
            dropdown.change(
                lambda chosen: [gr.update(visible=i + 1 == chosen) for i in range(len(groups))], [dropdown], groups
            )
        return self.inputs

    def _title(self, script: Script) -> str:
        try:
            return script.title()
        except Exception as error:
            self._reports.report(f"Error calling: {script.filename}/title", error)
            return f"{script.filename} [error]"

    def _create_group(self, script: Script, visible: bool) -> None:
        script.args_from = script.args_to = len(self.inputs)
        if not script.create_group:
            self._create_controls(script)
            return
        with gr.Group(visible=visible) as group:
            self._create_controls(script)
        script.group = group

    def _create_controls(self, script: Script) -> None:
        try:
            controls = script.ui(script.is_img2img)
        except Exception as error:
            self._reports.report(f"Error calling: {script.filename}/ui", error)
            controls = None
        script.controls = controls
        if controls is None:
            return
        script.name = self._title(script).lower()
        for control in controls:
            control.custom_script_source = os.path.basename(script.filename or "")
        script.api_info = {
            "name": script.name,
            "is_alwayson": script.alwayson,
            "is_img2img": script.is_img2img,
            "args": [_arg_info(c) for c in controls],
        }
        self.infotext_fields += script.infotext_fields or []
        self.paste_field_names += script.paste_field_names or []
        self.inputs += controls
        script.args_to = len(self.inputs)

    def default_script_args(self) -> list[Any]:
        """What the API uses where a request says nothing: the components' values. Calls ``ui()`` twice, as hosts do."""
        last = max([1, *(s.args_to or 1 for s in self.scripts)])
        args: list[Any] = [None] * last
        args[0] = 0
        with gr.Blocks():
            for script in self.scripts:
                if script.ui(script.is_img2img):
                    args[script.args_from : script.args_to] = [c.value for c in script.ui(script.is_img2img)]
        return args

    def script_by_title(self, name: str) -> Script | None:
        """The first script with that title, case ignored."""
        return next((s for s in self.scripts if s.title().lower() == name.lower()), None)

    def run(self, p: Any, *args: Any) -> Any:
        """Run the selected script of the dropdown, if any; its result or None."""
        if not args or not args[0]:
            return None
        script = self.selectable_scripts[args[0] - 1]
        return script.run(p, *args[script.args_from : script.args_to])

    def call(self, hook: str, p: Any, *before: Any, **kwargs: Any) -> None:
        """Call one hook of all always-visible scripts in load order; an exception is reported and swallowed."""
        for script in self.alwayson_scripts:
            try:
                script_args = p.script_args[script.args_from : script.args_to]
                getattr(script, hook)(p, *before, *script_args, **kwargs)
            except Exception as error:
                self._reports.report(f"Error running {hook}: {script.filename}", error)


def _arg_info(component: Any) -> dict[str, Any]:
    info: dict[str, Any] = {
        "label": component.label or "",
        "value": None,
        "minimum": None,
        "maximum": None,
        "step": None,
    }
    for key in ("value", "minimum", "maximum", "step"):
        value = getattr(component, key, None)
        if value is not None:
            info[key] = value
    choices = getattr(component, "choices", None)
    info["choices"] = None if choices is None else [c[0] if isinstance(c, tuple) else c for c in choices]
    return info

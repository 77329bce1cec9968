"""``modules.script_callbacks``: lists of functions that extensions register, called with exceptions swallowed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .reports import Reports


@dataclass
class CFGDenoiserParams:
    """Before the UNet calls of one denoiser call."""

    x: Any
    image_cond: Any
    sigma: Any
    sampling_step: int
    total_sampling_steps: int
    text_cond: Any
    text_uncond: Any
    denoiser: Any = None


@dataclass
class CFGDenoisedParams:
    x: Any
    sampling_step: int
    total_sampling_steps: int
    inner_model: Any


@dataclass
class AfterCFGCallbackParams:
    """After guidance; ``x`` may be replaced."""

    x: Any
    sampling_step: int
    total_sampling_steps: int


@dataclass
class ImageSaveParams:
    image: Any
    p: Any
    filename: str
    pnginfo: dict[str, Any]


EVENTS = (
    "app_started",
    "model_loaded",
    "ui_tabs",
    "ui_settings",
    "before_image_saved",
    "image_saved",
    "cfg_denoiser",
    "cfg_denoised",
    "cfg_after_cfg",
    "before_component",
    "after_component",
    "infotext_pasted",
    "script_unloaded",
    "before_ui",
    "before_reload",
)
"""Events for which ``on_<event>(callback, name=...)`` exists. Nothing here saves files, tells of single components or
calls ``cfg_denoised`` (nor does Forge): functions for these are taken and never called."""


@dataclass(frozen=True)
class ScriptCallback:
    script: str
    callback: Callable[..., Any]
    name: str


class Callbacks:
    """Registered functions by event, in the order of registration."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        self._lists: dict[str, list[ScriptCallback]] = {event: [] for event in EVENTS}

    def add(self, event: str, callback: Callable[..., Any], name: str | None = None) -> None:
        script = next((f.filename for f in inspect.stack() if not f.filename.startswith(__file__)), "unknown file")
        self._lists[event].append(ScriptCallback(script, callback, name or "unnamed"))

    def run(self, event: str, *args: Any) -> list[Any]:
        """Call all functions of an event; an exception is reported and the next one is called."""
        results = []
        for entry in list(self._lists[event]):
            try:
                results.append(entry.callback(*args))
            except Exception as error:
                self._reports.report(f"Error executing callback {event} for {entry.script}", error)
        return results

    def clear(self) -> None:
        for entries in self._lists.values():
            entries.clear()

    def remove_callbacks_for_function(self, callback: Callable[..., Any]) -> None:
        for entries in self._lists.values():
            entries[:] = [e for e in entries if e.callback is not callback]

    def registrars(self) -> dict[str, Callable[..., None]]:
        """``{"on_cfg_denoiser": function, ...}`` as they stand in the module."""

        def registrar(event: str) -> Callable[..., None]:
            def register(callback: Callable[..., Any], *, name: str | None = None) -> None:
                self.add(event, callback, name)

            return register

        return {f"on_{event}": registrar(event) for event in EVENTS}

"""A small X/Y/Z plot for the embedded host: what a real one does with its axes, for one axis."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from typing import Any

import gradio as gr
import numpy as np
from modules import processing, scripts


class AxisOption:
    """An axis, by the names that real ones have."""

    def __init__(
        self,
        label: str,
        type: Callable[[Any], Any],
        apply: Callable[[Any, Any, Any], None],
        format_value: Callable[[Any, Any, Any], Any] = lambda p, opt, x: f"{opt.label}: {x}",
        confirm: Callable[[Any, Any], None] | None = None,
        cost: float = 0.0,
        choices: Callable[[], list[str]] | None = None,
        prepare: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.label, self.type, self.apply, self.format_value = label, type, apply, format_value
        self.confirm, self.cost, self.choices, self.prepare = confirm, cost, choices, prepare


def _replace(p: Any, x: str, xs: list[str]) -> None:
    if xs[0] not in p.prompt:
        raise RuntimeError(f"Prompt S/R did not find {xs[0]} in prompt.")
    p.prompt = p.prompt.replace(xs[0], x)


axis_options = [
    AxisOption("Nothing", str, lambda p, x, xs: None),
    AxisOption("Seed", int, lambda p, x, xs: setattr(p, "seed", x)),
    AxisOption("Prompt S/R", str, _replace),
]
RANGE = re.compile(r"\s*([\d.]+)\s*-\s*([\d.]+)\s*\[(\d+)\]\s*")


class Script(scripts.Script):  # type: ignore[misc]  # a WebUI has no type information
    """One picture for each value."""

    def title(self) -> str:
        """As real ones are called."""
        return "X/Y/Z plot"

    def ui(self, is_img2img: bool) -> list[Any]:
        """Label and values of the axes."""
        labels = [option.label for option in axis_options]
        return [
            component
            for axis in "XY"
            for component in (
                gr.Dropdown(labels, value="Nothing", label=f"{axis} type"),
                gr.Textbox("", label=f"{axis} values"),
            )
        ]

    def run(self, p: Any, x_type: str, x_values: str, y_type: str, y_values: str) -> Any:
        """All cells, in one result."""
        x, y = (next(each for each in axis_options if each.label == label) for label in (x_type, y_type))
        xs, ys = _values(p, x, x_values), _values(p, y, y_values)
        results = []
        for second in ys:
            for first in xs:
                cell = copy(p)
                x.apply(cell, first, xs)
                y.apply(cell, second, ys)
                results.append(processing.process_images(cell))
        whole = results[0]
        whole.images = [image for result in results for image in result.images]
        whole.infotexts = [text for result in results for text in result.infotexts]
        return whole


def _values(p: Any, axis: AxisOption, text: str) -> list[Any]:
    if axis.label == "Nothing":
        return [0]
    values: list[Any] = [each.strip() for each in text.split(",")]
    if axis.type == float:  # noqa: E721  # as real ones ask
        ranges = [RANGE.fullmatch(each) for each in values]
        values = [
            each
            for text, found in zip(values, ranges, strict=True)
            for each in (np.linspace(float(found[1]), float(found[2]), int(found[3])).tolist() if found else [text])
        ]
    values = [axis.type(each) for each in values]
    if axis.confirm:
        axis.confirm(p, values)
    return values

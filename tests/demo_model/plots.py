"""The plots of an evaluation, for the README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .evaluate import ADAPTERS, FORMS, STOPS, WEIGHTS, standard_error

LINES = {"shape and colour": "-", "colour": "--", "texture": ":"}
COLOURS = {"plus": "#2563eb", "base": "#d97706"}


def plots(known: Mapping[str, Any], folder: Path) -> None:
    """Writes ``weights.png`` and ``stops.png``: adherence to the reference, decoupled and joint side by side."""
    _plot(known, folder / "weights.png", "weight", WEIGHTS, ADAPTERS)
    _plot(known, folder / "stops.png", "stop", STOPS, ("plus",))


def _plot(
    known: Mapping[str, Any], path: Path, name: str, values: tuple[float, ...], adapters: tuple[str, ...]
) -> None:
    figure, axes = pyplot.subplots(1, len(FORMS), figsize=(9, 3.4), sharey=True)
    references = [each for each in known["results"] if each["measure"] == "reference"]
    plain = next(each for each in references if each["steering"] is None)
    for form, axis in zip(FORMS, axes, strict=True):
        for adapter in adapters:
            for measure, style in LINES.items():
                points: dict[float, float] = {}
                for value in values:
                    wanted = {"adapter": adapter, "formulation": form, "weight": 1.0, "stop": 1.0, "negative": "auto"}
                    wanted[name] = value
                    found = [plain] if value == 0 else [each for each in references if each["steering"] == wanted]
                    if found:
                        points[value] = found[0][measure]
                if len(points) < 2:
                    continue  # not measured
                errors = [standard_error(point, known["references"]) for point in points.values()]
                axis.errorbar(
                    list(points),
                    list(points.values()),
                    errors,
                    label=f"{adapter}: {measure}",
                    ls=style,
                    color=COLOURS[adapter],
                    capsize=2,
                )
        axis.set_title(form)
        axis.set_xlabel(name)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of pictures like the reference")
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(LINES), fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

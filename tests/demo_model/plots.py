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
    plain = next(each for each in known["results"] if each["measure"] == "reference" and each["steering"] is None)
    for form, axis in zip(FORMS, axes, strict=True):
        for adapter in adapters:
            for measure, style in LINES.items():
                points = []
                for value in values:
                    wanted = {"adapter": adapter, "formulation": form, "weight": 1.0, "stop": 1.0, "negative": "auto"}
                    wanted[name] = value
                    found = [
                        each
                        for each in known["results"]
                        if each["measure"] == "reference" and each["steering"] == wanted
                    ]
                    points.append((found[0] if found else plain)[measure])
                errors = [standard_error(point, known["references"]) for point in points]
                axis.errorbar(
                    values, points, errors, label=f"{adapter}: {measure}", ls=style, color=COLOURS[adapter], capsize=2
                )
        axis.set_title(form)
        axis.set_xlabel(name)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of pictures like the reference")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

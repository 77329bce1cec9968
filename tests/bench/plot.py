"""The plot of a run: a panel for each case, and how the cost grows with the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

COLUMNS = 3


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes the plot of ``bench.json``'s content."""
    cases = results["cases"]
    if not cases:
        return
    lines = -(-(len(cases) + 1) // COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(6 * COLUMNS, 6 * lines), squeeze=False)
    growth, *unused = axes.flat[len(cases) :]
    for axis in unused:
        axis.set_visible(False)
    for axis, (name, case) in zip(axes.flat, cases.items(), strict=False):
        rows = {key: row["percent"] for key, row in case["variants"].items() if row["over"] != key}
        medians = [row["median"] for row in rows.values()]
        below = [row["median"] - row["low"] for row in rows.values()]
        above = [row["high"] - row["median"] for row in rows.values()]
        axis.barh(list(rows), medians, xerr=[below, above], capsize=2)
        axis.invert_yaxis()
        axis.set_title(name)
        axis.set_xlabel("% over no adapter")
        pictures = [n for n in case["pictures"] if f"joint, {n}" in rows]
        growth.plot(pictures, [_busy(case, f"joint, {n}") for n in pictures], marker="o", label=name)
    growth.set_title("joint, device busy")
    growth.set_xlabel("pictures")
    growth.set_ylabel("% over no adapter")
    growth.legend()
    figure.suptitle(f"{results['device']}, torch {results['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=60)
    pyplot.close(figure)


def _busy(case: Mapping[str, Any], name: str) -> float:
    """A variant's device time over no adapter's, in percent; where none was recorded, a step's."""
    variant, baselines = case["variants"][name], [case["variants"][key] for key in ("no adapter", "no adapter, again")]
    if "a step on the device" not in variant:
        return float(variant["percent"]["median"])
    taken = [each["a step on the device"]["device ms"] for each in (variant, *baselines)]
    return (taken[0] / (sum(taken[1:]) / len(baselines)) - 1) * 100

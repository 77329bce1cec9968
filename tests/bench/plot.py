"""The plot of a run: a panel for each case, and how the cost grows with the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes the plot of ``bench.json``'s content."""
    cases = results["cases"]
    if not cases:
        return
    figure, axes = pyplot.subplots(1, len(cases) + 1, figsize=(5 * len(cases) + 5, 7), squeeze=False)
    growth = axes[0][-1]
    for axis, (name, case) in zip(axes[0], cases.items(), strict=False):
        rows = {key: row["percent"] for key, row in case["variants"].items() if row["over"] != key}
        medians = [row["median"] for row in rows.values()]
        errors = [
            [row["median"] - row["low"] for row in rows.values()],
            [r["high"] - r["median"] for r in rows.values()],
        ]
        axis.barh(list(rows), medians, xerr=errors, capsize=2)
        axis.invert_yaxis()
        axis.set_title(name)
        axis.set_xlabel("% over no adapter")
        pictures = [n for n in case["pictures"] if f"joint, {n}" in rows]
        growth.plot(pictures, [rows[f"joint, {n}"]["median"] for n in pictures], marker="o", label=name)
    growth.set_title("joint")
    growth.set_xlabel("pictures")
    growth.set_ylabel("% over no adapter")
    growth.legend()
    figure.suptitle(f"{results['device']}, torch {results['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)

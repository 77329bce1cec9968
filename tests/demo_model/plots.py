"""The table and the plots of an evaluation, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float, float]
"""x, share, standard error."""
Panel = tuple[str, dict[str, list[Point]]]
"""Title, and lines by name."""

PANEL, MARGIN, TOP = 300, 50, 40
COLOURS = {"shape and colour": "#000000", "shape": "#0072b2", "colour": "#d55e00", "texture": "#009e73"}
"""Of the lines; those of Okabe and Ito, which colour-blind people tell apart."""
COLUMNS = ("shape", "colour", "shape and colour", "texture", "background", "place")


def error(share: float, count: int) -> float:
    """The binomial standard error."""
    return (share * (1 - share) / count) ** 0.5


def write_report(results: dict[str, Any], folder: Path) -> None:
    """``table.md``, ``weight.png`` and ``stop.png``."""
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    for axis, ticks in (("weight", (0, 0.25, 0.5, 0.75, 1, 1.25)), ("stop", (0, 0.25, 0.5, 0.75, 1))):
        made = panels(results["rows"], axis)
        if made:
            draw(made, axis, ticks).save(folder / f"{axis}.png")


def table(results: dict[str, Any]) -> str:
    """All rows as Markdown, each share with its standard error."""
    lines = [f"| | {' | '.join(COLUMNS)} | difference |", f"|---{'|---' * len(COLUMNS)}|---|"]
    for row in results["rows"]:
        cells = [f"{row[name]:.2f} ± {error(row[name], row['count']):.2f}" for name in COLUMNS]
        apart = f"{row['difference']:.3f} ± {row['difference error']:.3f}" if "difference" in row else ""
        lines.append(f"| {_name(row)} | {' | '.join(cells)} | {apart} |")
    facts = f"{results['count']} pictures a row, {results['steps']} steps, seed {results['seed']}"
    return "\n".join(
        [*lines, "", f"{facts}; {results['device']}, torch {results['torch']}, {results['seconds']} s.", ""]
    )


def _name(row: dict[str, Any]) -> str:
    said = [row["group"], row.get("adapter"), row.get("formulation"), row.get("what"), row.get("negative")]
    if "weight" in row:
        said.append(f"weight {row['weight']}")
    if row["group"] == "stop":
        said.append(f"stop {row['stop']}")
    return ", ".join(str(each) for each in said if each)


def panels(rows: Sequence[dict[str, Any]], axis: str) -> list[Panel]:
    """A panel for each adapter and formulation, decoupled and joint side by side."""
    by_weight = [row for row in rows if row["group"] == "weight"]
    none = [row for row in by_weight if not row["adapter"]]
    made: list[Panel] = []
    for pair in dict.fromkeys((row["adapter"], row["formulation"]) for row in by_weight if row["adapter"]):
        own = [row for row in rows if (row.get("adapter"), row.get("formulation")) == pair]
        if axis == "weight":
            points = [(row["weight"], row) for row in (*none, *own) if row["group"] == "weight"]
        else:
            points = [(0.0, row) for row in none]
            points += [(row["stop"], row) for row in own if row["group"] == "stop"]
            points += [(1.0, row) for row in own if row["group"] == "weight" and row["weight"] == 1]
        lines = {name: [(x, row[name], error(row[name], row["count"])) for x, row in points] for name in COLOURS}
        made.append((" ".join(pair), lines))
    return made


def draw(made: Sequence[Panel], axis: str, ticks: Sequence[float]) -> Image.Image:
    """Panels two in a row, with bars of one standard error."""
    wide, high = PANEL + 2 * MARGIN, PANEL + 2 * TOP
    rows = -(-len(made) // 2)
    picture = Image.new("RGB", (2 * wide, rows * high + 30), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for number, (title, lines) in enumerate(made):
        left, top = number % 2 * wide + MARGIN, number // 2 * high + TOP

        def at(x: float, y: float, left: int = left, top: int = top) -> tuple[float, float]:
            return left + x / ticks[-1] * PANEL, top + (1 - y) * PANEL

        canvas.text((left + PANEL / 2, top - 12), title, "black", font, anchor="ms")
        for share in (0, 0.25, 0.5, 0.75, 1):
            canvas.line([at(0, share), at(ticks[-1], share)], "#dddddd")
            canvas.text((left - 8, at(0, share)[1]), f"{share:g}", "black", font, anchor="rm")
        for tick in ticks:
            canvas.text((at(tick, 0)[0], top + PANEL + 6), f"{tick:g}", "black", font, anchor="mt")
        canvas.text((left + PANEL / 2, top + PANEL + 22), axis, "black", font, anchor="mt")
        for name, points in lines.items():
            colour, width = COLOURS[name], 3 if name == "shape and colour" else 2
            canvas.line([at(x, y) for x, y, _ in points], colour, width)
            for x, y, e in points:
                canvas.line([at(x, y - e), at(x, y + e)], colour, width)
    left = MARGIN
    for name, colour in COLOURS.items():
        y = rows * high + 12
        canvas.line([(left, y), (left + 24, y)], colour, 3)
        canvas.text((left + 30, y), name, "black", font, anchor="lm")
        left += 60 + int(font.getlength(name))
    return picture

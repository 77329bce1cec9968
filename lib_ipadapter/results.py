"""What is done with references when a job is over: shown beside the result, or saved beside its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

GAP = 8
"""Pixels between the panels of a strip."""


def strip(references: Sequence[Image.Image], result: Image.Image) -> Image.Image:
    """The references and the result in one row, all as high as the result, in proportion."""
    height = result.height
    panels = [
        each.convert("RGB").resize((max(1, round(each.width * height / each.height)), height), Image.Resampling.LANCZOS)
        for each in references
    ]
    panels.append(result.convert("RGB"))
    whole = Image.new("RGB", (sum(panel.width + GAP for panel in panels) - GAP, height), (255, 255, 255))
    left = 0
    for panel in panels:
        whole.paste(panel, (left, 0))
        left += panel.width + GAP
    return whole


def save_beside(references: Sequence[Image.Image], result: Path) -> list[Path]:
    """Saves references as PNG files without metadata, named after the file of a result; what is there is kept.

    Raises:
        OSError: if a file can't be written.
    """
    saved = []
    for number, reference in enumerate(references, 1):
        path = result.with_name(f"{result.stem}-reference-{number}.png")
        bare = reference.convert("RGB")
        bare.info = {}
        with path.open("xb") as file:
            try:
                bare.save(file, "PNG")
            except OSError:
                path.unlink()
                raise
        saved.append(path)
    return saved

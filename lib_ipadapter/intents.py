"""What a reference is wanted for, as presets of a unit's fields: the page's simple choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = ("weight", "start", "stop", "formulation", "uncond", "preparation")
"""What a preset sets, in this order."""

INTENTS: Mapping[str, tuple[Any, ...]] = {
    # The defaults of a unit.
    "Style & subject": (1.0, 0.0, 1.0, "auto", "auto", "crop"),
    # The prompt lays out the scene first. For adapters made for faces.
    "Face": (0.8, 0.1, 1.0, "auto", "auto", "crop"),
    # Early steps decide where things are; the whole picture counts, not its middle.
    "Composition": (0.8, 0.0, 0.5, "auto", "auto", "pad"),
    # Near to the whole picture.
    "Variation": (1.3, 0.0, 1.0, "auto", "auto", "pad"),
}
"""By the name in the page."""

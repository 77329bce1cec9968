"""How tests drive the probe extension."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .host import Host, Result

PROBE_EXTENSION = Path(__file__).parent / "probe_extension"


def probe_args(**wanted: Any) -> dict[str, Any]:
    """The request field that switches the probe on."""
    return {"Probe": {"args": [True, json.dumps(wanted)]}}


def record() -> Any:
    """What the probe of the active host saw since it was last emptied."""
    return sys.modules["modules.shared"].probe


def forget() -> None:
    """Empty the probe's record."""
    seen = record()
    for name in ("hooks", "details", "options", "k_tokens", "denoiser"):
        getattr(seen, name).clear()


SMALL: dict[str, Any] = {"prompt": "a fox", "seed": 1, "steps": 2, "width": 64, "height": 64, "sampler_name": "Euler"}
"""Fields of a quick request."""


def run(host: Host, tab: str = "txt2img", wanted: dict[str, Any] | None = None, **fields: Any) -> Result:
    """One quick request with the probe's record emptied before; ``wanted`` switches the probe on."""
    forget()
    scripts = probe_args(**wanted) if wanted is not None else {}
    result: Result = getattr(host, tab)(**{**SMALL, "alwayson_scripts": scripts, **fields})
    return result

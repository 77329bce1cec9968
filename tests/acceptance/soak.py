"""Many generations in a row, in turn with a second process of the same WebUI that hasn't the extension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .cases import TITLE, unit
from .webui import Server

WARM = 20
"""Generations before memory is looked at."""
ALLOWED = 0.1
"""MB a generation that resident memory may grow faster than without the extension."""

UNITS = ((unit(),), (unit("base"),), (unit(), unit("base", weight=-0.5)))


def soak(steered: Server, plain: Server, wanted: Mapping[str, Any], generations: int) -> str:
    """What went wrong; empty if nothing did. Prints what was measured."""
    seen: dict[str, list[dict[str, int]]] = {"with": [], "without": []}
    for n in range(generations):
        for name, server in (("with", steered), ("without", plain)):
            body = {**wanted, "seed": n}
            if name == "with":
                body["alwayson_scripts"] = {TITLE: {"args": [True, *UNITS[n % len(UNITS)]]}}
            status, answer = server.call("/sdapi/v1/txt2img", body)
            if status != 200:
                return f"generation {n} {name} the extension answered {status}: {str(answer)[:200]}"
            seen[name].append(server.call("/acceptance/state")[1])
    slopes = {name: _slope([each["resident"] for each in states[WARM:]]) for name, states in seen.items()}
    print(
        f"resident memory: {slopes['with']:+.3f} MB a generation with, {slopes['without']:+.3f} without, from "
        f"generation {WARM} to {generations}; from {_megabytes(seen['with'])} and {_megabytes(seen['without'])}",
        flush=True,
    )
    if slopes["with"] > slopes["without"] + ALLOWED:
        return f"resident memory grows by {slopes['with']:.3f} MB a generation, {slopes['without']:.3f} without"
    end = WARM + (generations - WARM) // len(UNITS) * len(UNITS)  # where the same units were on as after WARM
    for what in ("tensors", "hooks"):
        first, last = seen["with"][WARM - 1][what], seen["with"][end - 1][what]
        print(f"{what}: {first} after generation {WARM}, {last} after generation {end}", flush=True)
        if first != last:
            return f"{first} {what} after generation {WARM}, {last} after generation {end}"
    return ""


def _megabytes(states: list[dict[str, int]]) -> str:
    return f"{states[WARM]['resident'] / 1e6:.1f} to {states[-1]['resident'] / 1e6:.1f} MB"


def _slope(resident: list[int]) -> float:
    """MB a generation, by least squares."""
    return float(np.polyfit(np.arange(len(resident)), np.asarray(resident) / 1e6, 1)[0])

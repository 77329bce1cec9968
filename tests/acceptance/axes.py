"""Our axes of X/Y/Z plot in an installed WebUI: each cell is the picture that its unit gives alone, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from .cases import PHOTOGRAPH, TITLE, half_mask, pixels, same, unit, xyz_args
from .webui import Server

SCRIPT = "X/Y/Z plot"
AXES: Mapping[str, tuple[str, list[dict[str, Any]]]] = {
    "[IP-Adapter] weight": ("0.3, 1", [{"weight": 0.3}, {"weight": 1.0}]),
    "[IP-Adapter] stop": ("0.3-1 [2]", [{"stop": 0.3}, {"stop": 1.0}]),
    "[IP-Adapter] model": (
        "acceptance-plus.safetensors, acceptance-base.safetensors",
        [{}, {"model": "acceptance-base.safetensors"}],
    ),
    "[IP-Adapter] formulation": ("joint, decoupled", [{"formulation": "joint"}, {"formulation": "decoupled"}]),
    "[IP-Adapter] uncond": ("none, zero pixels", [{"uncond": "none"}, {"uncond": "zero pixels"}]),
    "[IP-Adapter] preparation": ("squash, pad", [{"preparation": "squash"}, {"preparation": "pad"}]),
    "[IP-Adapter] layers": ("style, 0:1; 5:0.5", [{"layers": "style"}, {"layers": "0:1, 5:0.5"}]),
    "[IP-Adapter] curve": ("1@0; 0@0.6, 0.5@0", [{"curve": "1@0, 0@0.6"}, {"curve": "0.5@0"}]),
    "[IP-Adapter] image": ("1, 2", [{"images": [PHOTOGRAPH]}, {"images": [half_mask()]}]),
}
"""Values of an axis, and what each makes of the unit."""
LISTED = 2 * 23
"""Axes of two units."""
WRONG: Mapping[str, tuple[str, str]] = {
    "[IP-Adapter] weight": ("0.3, 7", "from -5 to 5"),
    "[IP-Adapter] model": ("acceptance-plus.safetensors, nowhere", "nowhere"),
    "[IP-Adapter] uncond": ("none, green", "green"),
    "[IP-Adapter] image": (hashlib.sha256(b"").hexdigest(), "sha256"),
    "[IP-Adapter 2] weight": ("0.3", "unit 2, which is off"),
}
"""Values that are refused before the first cell, and a part of the sentence."""


def axes_problem(server: Server, plain: Mapping[str, Any]) -> str:
    """What went wrong; empty if nothing did."""
    of_two = unit() | {"images": [PHOTOGRAPH, half_mask()]}
    for axis, (values, cells) in AXES.items():
        asked = of_two if axis.endswith("image") else unit()
        status, answer = server.call("/sdapi/v1/txt2img", _grid(server, plain, axis, values, asked))
        if status != 200:
            return f"{axis} answered {status}: {str(answer.get('detail'))[:300]}"
        pictures = pixels(answer)[-len(cells) :]
        if len(pixels(answer)) <= len(cells) or same(pictures[:1], pictures[1:]):
            return f"{axis}: its cells are missing or all the same"
        for cell, picture in zip(cells, pictures, strict=True):
            alone = server.call("/sdapi/v1/txt2img", _steered(plain, asked | cell))[1]
            if not same([picture], pixels(alone)[:1]):
                return f"{axis}: the cell of {cell.keys()} isn't the picture that the unit gives alone"
    for axis, (values, sentence) in WRONG.items():
        status, answer = server.call("/sdapi/v1/txt2img", _grid(server, plain, axis, values, unit()))
        if status != 422 or sentence not in str(answer.get("detail")):
            return f"{axis} with {values} answered {status}: {str(answer.get('detail'))[:300]}"
    return listing_problem(server)


def listing_problem(server: Server) -> str:
    """Whether our axes aren't listed, each once."""
    infos = server.call("/sdapi/v1/script-info")[1]
    choices = [each["choices"] for info in infos for each in info["args"] if each["label"] == "X type"]
    for labels in choices:
        ours = [label for label in labels if label.startswith("[IP-Adapter")]
        if len(ours) != LISTED or len(set(ours)) != LISTED:
            return f"the axes are listed as {ours}"
    return "" if choices else "there is no X/Y/Z plot"


def _steered(plain: Mapping[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    return {**plain, "alwayson_scripts": {TITLE: {"args": [True, asked]}}}


def _grid(server: Server, plain: Mapping[str, Any], axis: str, values: str, asked: dict[str, Any]) -> dict[str, Any]:
    args = xyz_args(values, axis, use_text=True, draw_legend=False, include_lone=True, include_sub_images=True)
    return {**_steered(plain, asked), "script_name": SCRIPT, "script_args": args(server)}

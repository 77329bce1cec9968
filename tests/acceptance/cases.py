"""What an installed WebUI is asked, and how its answers are judged.

A case passes if the reference changes the picture, its sentence is in the answer where one is due, and the plain
picture afterwards is bit for bit what it was.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .webui import Server, WebUI

TITLE, PROBE_TITLE, BATCH_TITLE = "IP-Adapter", "Acceptance probe", "Acceptance batch"
ERROR_KEY = "IP-Adapter error"

Pictures = list[np.ndarray]


def encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def photograph() -> str:
    """A seeded picture with structure, as base64: stripes, a disc, noise."""
    y, x = np.mgrid[0:300, 0:400].astype(np.float64)
    rng = np.random.default_rng(0)
    disc = ((x - 260) ** 2 + (y - 120) ** 2 < 70**2) * 120
    picture = np.stack([127 + 90 * np.sin(x / 18), 60 + disc, 127 + 80 * np.cos(y / 25)], -1) + rng.normal(
        0, 12, (300, 400, 1)
    )
    return encoded(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))


PHOTOGRAPH = photograph()


def half_mask() -> str:
    mask = np.zeros((300, 400), np.uint8)
    mask[80:220, 100:300] = 255
    return encoded(Image.fromarray(mask))


def unit(adapter: str = "plus", **fields: Any) -> dict[str, Any]:
    return {"model": f"acceptance-{adapter}.safetensors", "images": [PHOTOGRAPH], **fields}


def pair(**fields: Any) -> dict[str, Any]:
    """A unit with two pictures, the second being the first upside down."""
    picture = Image.open(io.BytesIO(base64.b64decode(PHOTOGRAPH)))
    turned = encoded(picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    return unit(**fields) | {"images": [PHOTOGRAPH, turned]}


def halves() -> dict[str, Any]:
    """A unit with two pictures, each on its half of the canvas."""
    two = pair(formulation="decoupled")
    sides = [{"template": f"{side} half", "feather": 0.1} for side in ("left", "right")]
    return two | {"images": [{"data": data, "mask": mask} for data, mask in zip(two["images"], sides, strict=True)]}


ScriptArgs = Callable[[Server], list[Any]]


@dataclass(frozen=True)
class Case:
    """A request with the extension on, held against the same request with it off."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    units: tuple[dict[str, Any], ...] = (unit(),)
    endpoint: str = "txt2img"
    probe: str = ""
    """What the probe is to do, see ``tests/real_host_probe``."""
    needs: str = ""
    """An always-on script of the WebUI, by the beginning of its title, that is to be switched on."""
    needs_args: tuple[Any, ...] = ()
    script: tuple[str, ScriptArgs] | None = None
    """A selectable script and what gives its arguments."""
    sentence: str = ""
    """What must be said: in ``detail`` where the status is an error, else in the pictures' parameters."""
    status: int = 200
    compare: bool = True
    """Whether the same request without units is drawn too, and must differ."""
    maps: int = 0
    """How many influence maps must stand behind the pictures."""


def xyz_args(values: str, axis: str = "Seed", **others: Any) -> ScriptArgs:
    """Arguments of the X/Y/Z script for one axis, by the labels of its components.

    Args:
        others: values of further components, by the beginning of their labels in lower case with ``_`` for spaces.
    """

    def args(server: Server) -> list[Any]:
        infos = server.call("/sdapi/v1/script-info")[1]
        (info,) = (i for i in infos if i["name"].startswith("x/y/z") and not i["is_img2img"])
        given = []
        for each in info["args"]:
            value = each["value"]
            if (each["label"] or "").endswith(" type"):  # sent by number
                value = each["choices"].index(axis) if each["label"] == "X type" else 0
            name = (each["label"] or "").lower().replace(" ", "_")
            value = next((others[other] for other in others if name.startswith(other)), value)
            given.append(values if each["label"] == "X values" and each["choices"] is None else value)
        return given

    return args


IMG2IMG: dict[str, Any] = {"init_images": [PHOTOGRAPH], "denoising_strength": 0.75, "steps": 4}
INPAINT: dict[str, Any] = {**IMG2IMG, "mask": half_mask(), "inpainting_fill": 1}
HIRES: dict[str, Any] = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
FORGE_HIRES = {"hr_additional_modules": ["Use same choices"], "hr_cfg": 7.0}
LONG = "a lighthouse on a cliff above the stormy sea in the evening light, " * 7
NOWHERE = (unit() | {"model": "nowhere"},)


def sd15_cases(webui: WebUI) -> list[Case]:
    """Everything that an API can reach."""
    hires = {**HIRES, **FORGE_HIRES} if webui.is_backend else HIRES
    other = "acceptance-b.safetensors"
    return [
        Case("base, decoupled", units=(unit("base"),)),
        Case("plus, joint"),
        Case("base, joint", units=(unit("base", formulation="joint"),)),
        Case("plus, decoupled", units=(unit(formulation="decoupled"),)),
        Case("joint, no uncond", units=(unit(uncond="none"),)),
        Case("two units, negative weight", units=(unit(), unit("base", weight=-0.5))),
        Case("style layers", units=(unit(layers="style"),)),
        Case("style precise, joint", units=(unit(layers="style precise", composition_weight=0.5),)),
        Case("K+mean(V) with penalty", units=(unit(formulation="K+mean(V) with penalty"),)),
        Case("curve", {"steps": 4}, units=(unit(curve="0.2@0, 1@0.5, 0@0.9"),)),
        Case(
            "curve in steps, hires off",
            {**hires, "steps": 4},
            units=(unit(curve="1@0, 0.2@1", timing="steps", hires="off"),),
        ),
        Case("one picture per batch item", {"batch_size": 2}, units=(pair(pictures="one per batch item"),)),
        Case("average, noise as negative", units=(pair(mixture="average", noise="shuffle"),)),
        Case("mask, joint", units=(unit(mask="left half"),)),
        Case("like Forge, by preset", units=(unit(preset="like Forge"),)),
        Case("influence map, joint", {"batch_size": 2}, units=(unit(influence=True, mask="left half"),), maps=1),
        Case("influence map, decoupled", units=(pair(formulation="decoupled", influence=True),), maps=2),
        Case("soft masks by picture, decoupled", {"batch_size": 2}, units=(halves(),)),
        Case(
            "mask, inpaint only masked",
            {**INPAINT, "inpaint_full_res": True},
            units=(unit(mask="top half"),),
            endpoint="img2img",
        ),
        Case("balance of two pictures", units=(pair(balance=True),)),
        Case("batch of 2, count 2", {"batch_size": 2, "n_iter": 2}),
        Case("AND", {"prompt": "a lighthouse AND a ship :0.7", "batch_size": 2}),
        Case("long prompt", {"prompt": LONG}),
        Case("long negative", {"negative_prompt": LONG}),
        Case("CFG 1", {"cfg_scale": 1.0}),
        Case("Heun", {"sampler_name": "Heun"}),
        Case("DPM++ 2M Karras", {"sampler_name": "DPM++ 2M", "scheduler": "Karras"}),
        Case("DDIM", {"sampler_name": "DDIM", "steps": 3}),
        Case("odd size", {"width": 136, "height": 200}),
        Case("hires fix", hires),
        Case("hires fix, other checkpoint", {**hires, "hr_checkpoint_name": other}),
        Case("refiner", {"refiner_checkpoint": other, "refiner_switch_at": 0.5, "steps": 4}),
        Case("checkpoint in the request", {"override_settings": {"sd_model_checkpoint": other}}),
        Case("img2img", IMG2IMG, endpoint="img2img"),
        Case("inpaint, whole picture", {**INPAINT, "inpaint_full_res": False}, endpoint="img2img"),
        Case("inpaint, only masked", {**INPAINT, "inpaint_full_res": True}, endpoint="img2img"),
        Case("img2img batch", IMG2IMG, endpoint="img2img", script=(BATCH_TITLE, lambda _: [])),
        Case("X/Y/Z grid", script=("X/Y/Z plot", xyz_args("1,2"))),
        Case("self-attention guidance", needs="selfattentionguidance integrated", needs_args=(True, 0.5, 2.0)),
        Case(
            "perturbed-attention guidance", needs="perturbedattentionguidance integrated", needs_args=(True, 3.0, 0.0)
        ),
        Case(
            "tiles",
            {"width": 256, "height": 128},
            needs="multidiffusion integrated",
            needs_args=(True, "MultiDiffusion", 128, 128, 32, 1),
        ),
        Case("a job inside the job", probe="nested"),
        Case("interrupt", {"steps": 4}, probe="interrupt", compare=False),
        Case("skip", {"steps": 4, "n_iter": 2}, probe="skip", compare=False),
        Case("exceptions in other scripts' hooks", probe="raise"),
        Case("exception inside sampling", {"steps": 4}, probe="fail", status=500, compare=False),
        Case("disabled unit", units=(unit(enabled=False), unit("base"))),
        Case("no picture", units=(unit() | {"images": []},), status=422, sentence="picture"),
        Case("unknown model", units=NOWHERE, status=422, sentence="nowhere"),
        Case("path as model", units=(unit() | {"model": "../acceptance-a"},), status=422, sentence="There is no"),
        Case("unknown field", units=(unit() | {"wieght": 1},), status=422, sentence="wieght"),
        Case("unknown model in a job inside", units=NOWHERE, probe="nested unit", sentence="nowhere", compare=False),
        Case("unknown model in a grid", units=NOWHERE, script=("X/Y/Z plot", xyz_args("1,2")), sentence="nowhere"),
        Case(
            "stop behind the first step",
            {**IMG2IMG, "denoising_strength": 0.5},
            (unit(stop=0.2),),
            "img2img",
            status=422,
            sentence="would never act",
        ),
    ]


def sdxl_cases(webui: WebUI) -> list[Case]:
    """SDXL alone, and on its way to a refiner."""
    hires = {**HIRES, **FORGE_HIRES} if webui.is_backend else HIRES
    refined = {"refiner_switch_at": 0.5, "steps": 4}
    base = (unit("base"),)
    return [
        Case("SDXL: base, decoupled", units=base),
        Case("SDXL: plus, joint, long prompt", {"prompt": LONG}),
        Case("SDXL: hires fix", hires, units=base),
        Case("SDXL: another SDXL as refiner", {**refined, "refiner_checkpoint": "acceptance-xl-b.safetensors"}),
        Case(
            "SDXL: its refiner, behind the unit's stop",
            {**refined, "refiner_checkpoint": "acceptance-xl-refiner.safetensors"},
            (unit("base", stop=0.3),),
        ),
        Case(
            "SDXL: its refiner, within the unit's window",
            {**refined, "refiner_checkpoint": "acceptance-xl-refiner.safetensors"},
            base,
            status=422,
            sentence="unit's stop to 0.",
        ),
        Case("SDXL: an adapter for SD1.5", units=(unit("sd15"),), status=422, sentence="another model family"),
    ]


PLAIN: dict[str, Any] = {
    "prompt": "a lighthouse on a cliff",
    "negative_prompt": "blurry",
    "steps": 2,
    "width": 128,
    "height": 128,
    "seed": 12345,
    "cfg_scale": 7.0,
    "sampler_name": "Euler",
    "save_images": False,
    "send_images": True,
}


def plain_request(checkpoint: str) -> dict[str, Any]:
    # WebUIs without a full settings file keep a request's overrides, so every request says which checkpoint it means.
    return {**PLAIN, "override_settings": {"sd_model_checkpoint": checkpoint}}


CUT_SHORT = ("interrupt", "skip")
"""Probes that leave less than the whole picture."""


class NotRun(Exception):
    """The WebUI hasn't what a case needs."""


def request(server: Server, case: Case, plain: Mapping[str, Any], units: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The case as a request, with these units.

    Raises:
        NotRun: if the WebUI hasn't the script that the case switches on.
    """
    scripts: dict[str, Any] = {}
    if units:
        scripts[TITLE] = {"args": [case.probe != "nested unit", *units]}
    if case.probe:
        scripts[PROBE_TITLE] = {"args": [case.probe]}
    if case.needs:
        titles = [title for title in server.always_on if title.startswith(case.needs)]
        if not titles:
            raise NotRun(f"it has no script {case.needs!r}")
        scripts[titles[0]] = {"args": list(case.needs_args)}
    wanted = {**plain, **case.fields, **({"alwayson_scripts": scripts} if scripts else {})}
    if case.script:
        wanted |= {"script_name": case.script[0], "script_args": case.script[1](server)}
    return wanted


def pixels(answer: Mapping[str, Any]) -> Pictures:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(i))).convert("RGB")) for i in answer.get("images", [])]


def same(a: Pictures, b: Pictures) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def run_case(
    server: Server, case: Case, plain: Mapping[str, Any], reference: Pictures, keep: Path | None = None
) -> str:
    """What went wrong; empty if nothing did.

    Args:
        plain: the request that every case builds on.
        reference: what it gives without the extension.
        keep: folder for the pictures with and without units.

    Raises:
        NotRun: see :func:`request`.
    """
    problem = _judged(server, case, plain, keep)
    if problem:
        return problem
    status, answer = server.call("/sdapi/v1/txt2img", dict(plain))
    if status != 200:
        return f"the plain picture afterwards answered {status}"
    return "" if same(reference, pixels(answer)) else "the plain picture afterwards is another one"


def _judged(server: Server, case: Case, plain: Mapping[str, Any], keep: Path | None) -> str:
    path = f"/sdapi/v1/{case.endpoint}"
    compare = case.compare and case.status == 200 and not case.sentence
    without = server.call(path, request(server, case, plain, ())) if compare else None
    status, answer = server.call(path, request(server, case, plain, case.units))
    if case.probe in CUT_SHORT:
        whole = server.call(path, request(server, replace(case, probe=""), plain, case.units))
        if same(pixels(answer), pixels(whole[1])):
            return "nothing was cut short"
    if status != case.status:
        return f"answered {status}: {_text(answer)}"
    if case.sentence:
        said = answer["info"] if status == 200 else answer.get("detail")
        if case.sentence not in str(said) or (status == 200 and ERROR_KEY not in str(said)):
            return f"the sentence is {str(said)[:300]!r}"
    if without is None:
        return ""
    if without[0] != 200:
        return f"without the extension it answered {without[0]}: {_text(without[1])}"
    before, after = pixels(without[1]), pixels(answer)
    texts = [text for text in json.loads(answer["info"])["infotexts"] if text]
    if case.maps:
        seen = [text for text in texts[-case.maps :] if text.startswith(f"{TITLE} influence of unit 1")]
        if len(seen) != case.maps or any(picture.shape != after[0].shape for picture in after[-case.maps :]):
            return f"of {case.maps} influence maps there are {len(seen)}"
        texts, after = texts[: -case.maps], after[: -case.maps]
    if keep is not None:
        _keep(keep, case.name, before, after)
    if len(before) != len(after) or not after:
        return f"{len(after)} pictures, {len(before)} without"
    unchanged = [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if np.array_equal(a, b)]
    if unchanged:
        return f"the reference changed nothing in picture {unchanged[0]}"
    if not texts or not all(f"{TITLE} 1" in text for text in texts):
        return "a picture's parameters don't name the unit"
    if ERROR_KEY in answer["info"]:
        return "a picture's parameters name an error"
    return ""


def _text(answer: Mapping[str, Any]) -> str:
    return str(answer.get("detail") or answer.get("errors") or answer.get("message"))[:200]


def _keep(folder: Path, name: str, before: Pictures, after: Pictures) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = "".join(c if c.isalnum() else "-" for c in name)
    Image.fromarray(before[0]).save(folder / f"{stem}.plain.png")
    Image.fromarray(after[0]).save(folder / f"{stem}.png")

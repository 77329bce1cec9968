"""Axes of X/Y/Z plot: every cell is what its unit draws alone, nothing is encoded twice, bad values never begin."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib_ipadapter import axes
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.pictures import picture_hash, read_picture
from lib_ipadapter.refs import ImageRef
from lib_ipadapter.units import Unit
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.demo_models import DemoModels
from tests.embedded.host import PROJECT_ROOT
from tests.embedded_hosts import request, unit
from tests.photos import base64_photo

XYZ = PROJECT_ROOT / "tests" / "xyz_extension"
LABELS = [
    f"[IP-Adapter{unit}] {field}"
    for unit in ("", " 2")
    for field in (
        *("model", "image", "weight", "start", "stop", "formulation", "uncond", "preparation", "timing"),
        *("curve", "hires", "layers", "mixture", "mask", "composition weight", "hires curve", "hires scale"),
        *("inside jobs", "pictures", "balance", "noise", "noise strength", "uncond weight"),
    )
]


@pytest.fixture(scope="module", params=["before us", "after us"])
def xyz_host(request: pytest.FixtureRequest, models: DemoModels) -> Iterator[Host]:
    """X/Y/Z plot is loaded before us as in a real WebUI, or after."""
    extensions = [XYZ, PROJECT_ROOT] if request.param == "before us" else [PROJECT_ROOT, XYZ]
    with Host("sd15", extensions, models.models_path) as made:
        yield made


def grid(x: str, values: str, *units: Any, y: str = "Nothing", y_values: str = "") -> dict[str, Any]:
    return {**request(*units), "script_name": "X/Y/Z plot", "script_args": [x, values, y, y_values]}


def drawn(host: Host, wanted: dict[str, Any]) -> list[str]:
    answer = Client(host.app).post("/sdapi/v1/txt2img", json=wanted)
    assert answer.status_code == 200, answer.json()
    images: list[str] = answer.json()["images"]
    return images


def pixels(data: str) -> bytes:
    return read_picture(data).tobytes()


def labels(host: Host) -> list[str]:
    (module,) = {id(each.module): each.module for each in host.scripts_data if each.path.endswith("grid.py")}.values()
    return [option.label for option in module.axis_options if option.label.startswith("[")]


CELLS: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("weight", "0.3, -1", [{"weight": 0.3}, {"weight": -1.0}]),
    ("weight", "0-1 [3]", [{"weight": 0.0}, {"weight": 0.5}, {"weight": 1.0}]),
    ("start", "0, 0.6", [{"start": 0.0}, {"start": 0.6}]),
    ("stop", "0.4, 1", [{"stop": 0.4}, {"stop": 1.0}]),
    ("formulation", "joint, decoupled", [{"formulation": "joint"}, {"formulation": "decoupled"}]),
    ("uncond", "none, black picture", [{"uncond": "none"}, {"uncond": "black picture"}]),
    ("layers", "style, ease in", [{"layers": "style"}, {"layers": "ease in"}]),
    ("curve", "1@0; 0.2@1, 0.5@0.3", [{"curve": "1@0, 0.2@1"}, {"curve": "0.5@0.3"}]),
    ("preparation", "squash, pad", [{"preparation": "squash"}, {"preparation": "pad"}]),
    ("mixture", "average, add", [{"mixture": "average"}, {"mixture": "add"}]),
    ("mask", "left half, centre", [{"mask": "left half"}, {"mask": "centre"}]),
    ("balance", "off, on", [{}, {"balance": True}]),
    ("noise", "none, fade", [{}, {"noise": "fade"}]),
    ("uncond weight", "0.5, 1", [{"uncond_weight": 0.5}, {}]),
    ("pictures", "together, one per generation", [{}, {"pictures": "one per generation"}]),
    (
        "model",
        "demo-plus-sd15.safetensors, demo-base-sd15.safetensors",
        [{"model": "demo-plus-sd15.safetensors"}, {"model": "demo-base-sd15.safetensors"}],
    ),
    ("image", "1, 2", [{"images": [base64_photo()]}, {"images": [base64_photo("coffee")]}]),
]


@pytest.mark.parametrize(("field", "values", "cells"), CELLS)
def test_a_cell_is_what_its_unit_draws_alone(
    xyz_host: Host, field: str, values: str, cells: list[dict[str, Any]]
) -> None:
    photos = ("astronaut", "coffee") if field in ("image", "balance", "pictures") else ("coffee",)
    asked = unit("plus", photos=photos)
    pictures = drawn(xyz_host, grid(f"[IP-Adapter] {field}", values, asked))
    assert pictures == [drawn(xyz_host, request(asked | cell))[0] for cell in cells]
    assert len(set(pictures)) == len(cells)
    assert drawn(xyz_host, request()) == drawn(xyz_host, {**request(), "alwayson_scripts": {}})


def test_the_second_unit_and_two_axes(xyz_host: Host) -> None:
    one, two = unit("plus"), unit("base", photos=("coffee",))
    wanted = grid("[IP-Adapter 2] weight", "0.5, 1", one, two, y="[IP-Adapter] stop", y_values="0.6, 1")
    cells = [({"stop": y}, {"weight": x}) for y in (0.6, 1.0) for x in (0.5, 1.0)]
    assert drawn(xyz_host, wanted) == [drawn(xyz_host, request(one | a, two | b))[0] for a, b in cells]
    # neither value of one axis is held against what the other one is going to change
    narrow = unit("plus", start=0.1, stop=0.3)
    assert len(drawn(xyz_host, grid("[IP-Adapter] start", "0.4", narrow, y="[IP-Adapter] stop", y_values="1"))) == 1


def test_an_axis_of_the_hires_pass(xyz_host: Host) -> None:
    hires = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.75, "steps": 4}
    pictures = drawn(xyz_host, {**grid("[IP-Adapter] hires", "same, scaled, off", unit("plus")), **hires})
    cells = ({}, {"hires": "scaled"}, {"hires": "off"})
    alone = [drawn(xyz_host, request(unit("plus") | cell, **hires))[0] for cell in cells]
    # The hires fields stand elsewhere in a copied job's parameters.
    assert [pixels(each) for each in pictures] == [pixels(each) for each in alone]
    assert len({pixels(each) for each in pictures}) == 3


def test_a_cell_is_no_job_inside_another(xyz_host: Host) -> None:
    pictures = drawn(xyz_host, grid("[IP-Adapter] weight", "0.5, 1", unit("plus", nested=False)))
    alone = [drawn(xyz_host, request(unit("plus", weight=weight)))[0] for weight in (0.5, 1.0)]
    assert [pixels(each) for each in pictures] == [pixels(each) for each in alone]


def test_cells_share_what_is_encoded(xyz_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    preparer: Any = sys.modules["sd_image_prompt.gathering"]
    seen: list[int] = []
    original = preparer.encode

    def encode(run: Any, encoder: Any, output: str, pictures: Any) -> Any:
        seen.append(len(pictures))
        return original(run, encoder, output, pictures)

    monkeypatch.setattr(preparer, "encode", encode)
    sys.modules["sd_image_prompt"].live_session._preparer.clear()  # type: ignore[attr-defined]
    drawn(xyz_host, grid("[IP-Adapter] weight", "0.2, 0.4, 0.6, 0.8, 1", unit("plus")))
    assert seen == [2]  # the picture and the uncond one, together and once
    drawn(xyz_host, grid("[IP-Adapter] formulation", "joint, decoupled", unit("plus")))
    assert seen == [2]
    drawn(xyz_host, grid("[IP-Adapter] preparation", "crop, squash, crop, squash", unit("plus")))
    assert seen == [2, 1]


@pytest.mark.parametrize(
    ("x", "values", "units", "parts"),
    [
        ("[IP-Adapter] weight", "0.5, 7", [unit()], ["weight", "7", "from -5 to 5"]),
        ("[IP-Adapter] weight", "0.5, strong", [unit()], ["[IP-Adapter] weight", "strong", "ranges"]),
        ("[IP-Adapter] stop", "0.5, 0", [unit()], ["stop", "0"]),
        ("[IP-Adapter] model", "demo-plus-sd15.safetensors, nowhere", [unit()], ["nowhere", "demo-"]),
        ("[IP-Adapter] formulation", "joint, jiont", [unit()], ["jiont", "decoupled"]),
        ("[IP-Adapter] image", "1, 2", [unit()], ["2", "1 pictures"]),
        ("[IP-Adapter] image", "0" * 64, [unit()], ["0" * 64]),
        ("[IP-Adapter] image", "/etc/hosts", [unit()], ["/etc/hosts", "sha256"]),
        ("[IP-Adapter 2] weight", "0.5", [unit()], ["unit 2, which is off"]),
        ("[IP-Adapter] weight", "0.5", [unit(enabled=False), unit()], ["unit 1, which is off"]),
        ("[IP-Adapter] curve", "1@0; 1@2", [unit()], ["at character 8", "from 0 to 1"]),
        ("[IP-Adapter] balance", "on, maybe", [unit()], ["[IP-Adapter] balance", "maybe", "off and on"]),
        ("[IP-Adapter] weight", "0.5", [], ["IP-Adapter is switched off"]),
    ],
)
def test_bad_values_are_said_before_anything_is_drawn(
    xyz_host: Host, x: str, values: str, units: list[Any], parts: list[str]
) -> None:
    xyz_host.unet_calls.clear()
    answer = Client(xyz_host.app).post("/sdapi/v1/txt2img", json=grid(x, values, *units))
    detail = answer.json()["detail"]
    assert answer.status_code == 422 and all(part in detail for part in parts), detail
    assert detail.endswith(".") and xyz_host.unet_calls == []


def test_they_are_listed_once_also_after_reload_ui(xyz_host: Host) -> None:
    assert labels(xyz_host) == LABELS
    (module,) = {id(each.module): each.module for each in xyz_host.scripts_data if "xyz" in each.path}.values()
    old = list(module.axis_options)
    xyz_host.reload_ui()
    assert labels(xyz_host) == LABELS and xyz_host.errors == []
    # where the list lives on, ours of the earlier load are replaced, not kept beside the new ones
    (module,) = {id(each.module): each.module for each in xyz_host.scripts_data if "xyz" in each.path}.values()
    module.axis_options[:] = old
    xyz_host.callbacks.run("before_ui")
    assert labels(xyz_host) == LABELS
    ours = [each for each in old if each.label.startswith("[")]
    assert not {id(each) for each in ours} & {id(each) for each in module.axis_options}


def test_a_host_without_x_y_z_plot(host: Host) -> None:
    assert host.errors == [] and not [each for each in host.scripts_data if "xyz" in each.path]


def test_pictures_of_files_are_for_the_page_of_a_closed_webui(tmp_path: Path) -> None:
    image = read_picture(base64_photo())
    image.save(tmp_path / "a.png")
    kept: dict[str, Any] = {}
    store: Any = SimpleNamespace(add=lambda picture: kept.setdefault(picture_hash(picture), picture_hash(picture)))
    one = Unit(images=(ImageRef(data="x"),))
    assert axes.picture(str(tmp_path / "a.png"), one, store, True) == ImageRef(sha256=picture_hash(image))
    with pytest.raises(IPAdapterError, match="can't be read"):
        axes.picture(str(tmp_path / "b.png"), one, store, True)
    kept.clear()
    with pytest.raises(IPAdapterError, match="other machines can't reach"):
        axes.picture(str(tmp_path / "a.png"), one, store, False)
    assert kept == {}


def test_a_hash_keeps_nothing_and_is_looked_up() -> None:
    asked: list[str] = []
    store: Any = SimpleNamespace(get=asked.append)
    assert axes.picture("AB" * 32, Unit(), store, False) == ImageRef(sha256="ab" * 32)
    assert asked == ["ab" * 32]


def test_copies_of_a_job_dont_share_what_an_axis_sets() -> None:
    made = axes.make(list, str, lambda _: lambda value, unit: ImageRef(data=value), "IP-Adapter")
    weight = next(each for each in made if each.label == "[IP-Adapter] weight")
    job = SimpleNamespace()
    weight.apply(job, 0.5, [])
    copied = SimpleNamespace(**vars(job))
    weight.apply(copied, 0.7, [])
    assert axes.of(job) == {(1, "weight"): 0.5} and axes.of(copied) == {(1, "weight"): 0.7}
    assert weight.format_value(job, weight, 0.30000000000000004) == "[IP-Adapter] weight: 0.3"
    assert weight.format_value(job, weight, "ab" * 32) == "[IP-Adapter] weight: ababababab"


def test_a_job_without_us_inside_a_cell_stays_without_us() -> None:
    def read(value: str, unit: Unit) -> ImageRef:
        raise AssertionError

    for args in ([], [False, "", ""]):
        assert axes.overridden(args, {(1, "weight"): 0.5}, read) is args
        with pytest.raises(IPAdapterError, match="switched off"):
            axes.overridden(args, {(1, "weight"): 0.5}, read, before=True)

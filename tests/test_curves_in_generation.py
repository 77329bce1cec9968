"""Curves, the hires pass and jobs inside jobs, in whole generations of the embedded host."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib_ipadapter.infotext import parse
from lib_ipadapter.units import Unit
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.infotext import parse_generation_parameters
from tests.embedded_hosts import request, unit
from tests.photos import base64_photo
from tests.test_generation import Watch, difference, host_with_nested_jobs, progress_of, same

HIRES: dict[str, Any] = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.75, "hr_cfg": 5.0}


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[Host], list[float]]:
    """``weights(host)``: of one unit in each UNet call of the host's last job, 0 where it didn't act."""
    seen: list[tuple[int, float]] = []
    injection = sys.modules["sd_image_prompt.injection"].Injection
    original = injection.plan

    def plan(self: Any, *args: Any) -> Any:
        made = original(self, *args)
        (term,) = self.terms
        source = term.weighed
        if made.idle:
            weight = 0.0
        elif hasattr(source, "weight"):
            weight = source.weight * self._factors[0]
        else:
            weight = source.at_weight
        seen.append((len(hosts[-1].unet_calls) - 1, weight))
        return made

    module = sys.modules["sd_image_prompt.preparer"]
    weigh = module.weigh

    def weighed(prompts: Any, formulation: Any, weight: float, *args: Any) -> Any:
        made = weigh(prompts, formulation, weight, *args)
        object.__setattr__(made, "at_weight", weight)
        return made

    hosts: list[Host] = []
    monkeypatch.setattr(injection, "plan", plan)
    monkeypatch.setattr(module, "weigh", weighed)
    sys.modules["sd_image_prompt"].live_session._preparer.clear()  # type: ignore[attr-defined]

    def found(host: Host) -> list[float]:
        by_call = dict(seen)
        assert all(by_call[call] == weight for call, weight in seen)
        return [by_call.get(call, 0.0) for call in range(len(host.unet_calls))]

    def begin(host: Host) -> list[float]:
        if not hosts:
            hosts.append(host)
            return []
        made = found(host)
        seen.clear()
        return made

    return begin


def drawn(host: Host, *units: Any, **fields: Any) -> Any:
    return (host.img2img if "init_images" in fields else host.txt2img)(**request(*units, **fields)).image


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
@pytest.mark.parametrize("formulation", ["joint", "decoupled"])
def test_a_step_is_that_of_the_constant_weight(host_of: Any, shape: str, formulation: str) -> None:
    host = host_of(shape)
    photos = ("astronaut", "coffee")

    def of(**fields: Any) -> Any:
        return drawn(host, unit("plus", shape, photos, formulation=formulation, **fields), steps=1)

    wanted = of(weight=0.8 * 0.3)
    assert same(of(weight=0.8, curve="0.3@0"), wanted)
    # The first step's place in the noise schedule isn't quite 0; among the steps it is.
    assert same(of(weight=0.8, curve="0.3@0.1, 1@0.9"), wanted)
    assert same(of(weight=0.8, curve="0.3@0, 1@0.9", timing="steps"), wanted)
    assert difference(of(weight=0.8), wanted) > 1


@pytest.mark.parametrize("formulation", ["joint", "decoupled"])
@pytest.mark.parametrize("timing", ["noise", "steps"])
def test_start_and_stop_are_a_curve(host: Host, formulation: str, timing: str) -> None:
    def of(**fields: Any) -> Any:
        return drawn(host, unit("plus", formulation=formulation, timing=timing, **fields), steps=6)

    whole = of()
    for window, curve in (
        ({"stop": 0.5}, "1@0.5, 0@0.5"),
        ({"start": 0.3}, "0@0.3, 1@0.3"),
        ({"start": 0.3, "stop": 0.8}, "0@0.3, 1@0.3, 1@0.8, 0@0.8"),
    ):
        assert same(of(**window), of(curve=curve))
        assert same(of(**window), of(curve="1@0", **window))
        assert difference(of(**window), whole) > 0.1
    assert same(of(curve="1@0.5, 0.2@0.5", stop=0.5), of(stop=0.5))
    assert same(of(curve="1@0.4"), whole)


@pytest.mark.parametrize("sampler", ["Euler", "Heun"])
@pytest.mark.parametrize("timing", ["noise", "steps"])
def test_every_call_has_the_weight_of_its_place(host: Host, weights: Any, timing: str, sampler: str) -> None:
    weights(host)
    one = unit("plus", weight=0.5, curve="0@0, 1@0.2, 0.4@0.6, 0@0.6", stop=0.9, timing=timing)
    drawn(host, one, steps=8, sampler_name=sampler)
    count = len(host.unet_calls)
    places = [n / count for n in range(count)] if timing == "steps" else [progress_of(c.sigma) for c in host.unet_calls]
    if timing == "steps" and sampler == "Heun":
        places = [n / 16 for n in range(count)]  # two calls a step are announced, the last one takes one
    wanted = [0.5 * (5 * p if p < 0.2 else 1 - (p - 0.2) * 1.5 if p < 0.6 else 0) for p in places]
    found = weights(host)
    assert found == pytest.approx(wanted, abs=1e-4) and len(set(found)) > 3


def test_check_tells_the_weights_that_are_then_used(host: Host, weights: Any) -> None:
    weights(host)
    one = unit("plus", weight=-0.5, curve="0.2@0, 1@0.5", stop=0.9)
    drawn(host, one, steps=7, scheduler="Karras", sampler_name="Euler")
    told = Client(host.app).post("/ip-adapter/check", json={"unit": one, "steps": 7, "scheduler": "karras"}).json()
    assert told["steps"]["weights"] == pytest.approx(weights(host), abs=2e-3)


def test_the_hires_pass_may_have_a_weight_of_its_own(host: Host, weights: Any) -> None:
    weights(host)
    ramp = "0@0, 1@1"

    def of(**fields: Any) -> tuple[list[float], list[float], list[float]]:
        drawn(host, unit("plus", weight=0.8, **fields), steps=4, **HIRES)
        first = [n for n, call in enumerate(host.unet_calls) if call.pass_name != "hires"]
        found = weights(host)
        places = [progress_of(call.sigma) for call in host.unet_calls]
        assert 0 < len(first) < len(places)
        return found[: len(first)], found[len(first) :], places[len(first) :]

    first, second, places = of()
    assert first == [0.8] * 4 and second == [0.8] * len(places)
    first, second, places = of(hires="scaled", hires_scale=0.25)
    assert first == [0.8] * 4 and second == [0.2] * len(places)
    for off in ({"hires": "off"}, {"hires": "scaled", "hires_scale": 0}):
        first, second, places = of(**off)
        assert first == [0.8] * 4 and second == [0.0] * len(places)
    first, second, places = of(hires_curve=ramp)
    assert first == [0.8] * 4 and second == pytest.approx([0.8 * p for p in places], abs=1e-4)
    first, second, places = of(curve=ramp, hires="scaled")
    assert len(set(first)) == 4 and second == pytest.approx([0.4 * p for p in places], abs=1e-4)
    first, second, places = of(curve=ramp, hires_curve="0.5@0")
    assert len(set(first)) == 4 and second == [0.4] * len(places)


def test_off_in_the_hires_pass_nothing_acts_there(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where no unit does, nor where another one does."""
    watch = Watch(host, monkeypatch)
    base = unit("base", formulation="joint", hires="off")
    for units, first, second in (
        ([base], 4, 0),
        ([base, unit("plus", formulation="joint")], 20, 16),
        ([unit("plus", formulation="joint"), base], 20, 16),
        ([base, unit("plus", formulation="joint", hires="off")], 20, 0),
    ):
        watch.tokens.clear()
        drawn(host, *units, steps=4, **HIRES)
        passes = [call.pass_name for call in host.unet_calls]
        assert passes.count("hires") > 1
        assert watch.image_tokens() == [second if each == "hires" else first for each in passes]
    assert not host.errors


@pytest.mark.parametrize(
    ("curve", "fields"),
    [
        ("0@0", {}),
        ("0@0.3, 1@0.3, 1@0.4, 0@0.4", {"steps": 2}),
        ("1@0, 0@0.4", {"steps": 8, "init_images": [base64_photo("chelsea")], "denoising_strength": 0.5}),
    ],
)
def test_a_curve_that_is_zero_in_all_steps_fails_loudly(host: Host, curve: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"where its curve .* isn't 0.* so it would never act: choose a curve"):
        drawn(host, unit(curve=curve), **fields)
    if curve.endswith("0@0.4") and "init_images" in fields:
        assert len(host.unet_calls) <= 1  # its first call says it
    assert drawn(host, unit())
    refused = Client(host.app).post("/sdapi/v1/txt2img", json=request(unit(curve="0@0")))
    assert refused.status_code == 422 and "curve (0@0)" in refused.json()["detail"]


def test_in_the_hires_pass_that_is_said_and_the_job_goes_on(host: Host) -> None:
    result = host.txt2img(**request(unit(hires_curve="0@0"), **HIRES))
    assert len(result.images) == 1
    assert "IP-Adapter error" in result.infotexts[0] and "curve (0@0)" in result.infotexts[0]
    quiet = host.txt2img(**request(unit(hires="off"), **HIRES))
    assert "IP-Adapter error" not in quiet.infotexts[0]


def test_parameters_bring_everything_back(host: Host) -> None:
    fields = {
        "curve": "0.2@0, 0.8@0.3, 0@0.7",
        "hires_curve": "1@0.5, 0.5@0.5",
        "hires": "scaled",
        "hires_scale": 0.25,
        "nested": False,
    }
    text = host.txt2img(**request(unit(**fields))).infotexts[0]
    (found, *_) = parse(parse_generation_parameters(text)).units
    assert isinstance(found, Unit) and {name: getattr(found, name) for name in fields} == fields


@pytest.mark.parametrize("nested", [True, False])
def test_a_unit_may_stay_out_of_jobs_inside_the_job(
    host_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nested: bool
) -> None:
    """Beside one that doesn't: told apart by their tokens."""
    host = host_with_nested_jobs(host_of, tmp_path, "p.script_args")
    watch = Watch(host, monkeypatch)
    units = [unit("base", formulation="joint", nested=nested), unit("plus", formulation="joint")]
    result = host.txt2img(**request(*units, n_iter=2))
    assert {call.depth for call in host.unet_calls} == {0, 1}
    inside = 20 if nested else 16
    assert watch.image_tokens() == [20 if call.depth == 0 else inside for call in host.unet_calls]
    assert all("IP-Adapter 1" in text and "IP-Adapter error" not in text for text in result.infotexts)
    watch.tokens.clear()
    host.txt2img(**request(units[0]))
    assert watch.image_tokens() == [4 if call.depth == 0 or nested else 0 for call in host.unet_calls]
    assert not host.errors

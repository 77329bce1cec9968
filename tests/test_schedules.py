"""The steps of a pass before anything is drawn: what the page is told, against what the host's samplers then do."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lib_ipadapter.hosts.schedules import progress_of_pass
from lib_ipadapter.progress import scaled_linear_schedule
from lib_ipadapter.steps import of_img2img, of_scheduler, of_sigmas
from lib_ipadapter.ui import handlers
from tests.embedded import Host
from tests.embedded.samplers import SAMPLERS
from tests.embedded.sampling import create_sampler
from tests.embedded.schedules import SCHEDULES, ddim_timesteps


@pytest.mark.parametrize("scheduler", [each.label for each in SCHEDULES])
@pytest.mark.parametrize("sampler", [each.name for each in SAMPLERS if not each.timesteps])
def test_the_steps_told_are_those_that_the_sampler_takes(host: Host, sampler: str, scheduler: str) -> None:
    p = SimpleNamespace(scheduler=scheduler, is_hr_pass=False, extra_generation_params={})
    taken = of_sigmas(create_sampler(host, sampler).get_sigmas(p, 7).tolist())
    # the host's table is in float32 and rounds timesteps
    assert progress_of_pass(sampler, scheduler, 7) == pytest.approx(taken, abs=1e-3)


def test_samplers_over_timesteps_have_their_own(host: Host) -> None:
    taken = [1 - t / 999 for t in ddim_timesteps(7).tolist()[::-1]]
    assert progress_of_pass("DDIM", "Karras", 7) == pytest.approx(taken)


def test_a_penultimate_level_that_a_sampler_drops_is_no_step(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    config = next(each for each in SAMPLERS if each.name == "Euler")
    monkeypatch.setitem(config.options, "discard_next_to_last_sigma", True)
    seven, eight = progress_of_pass("Euler", "Karras", 7), of_scheduler("karras", 8)
    assert seven == pytest.approx(eight[:-1], abs=1e-3)


@pytest.mark.parametrize("name", ["modules.sd_schedulers", "modules.sd_samplers_timesteps", "modules.sd_models"])
def test_a_host_that_can_not_tell_is_no_error(host: Host, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert progress_of_pass("Euler", "Karras", 7) is None
    assert progress_of_pass("none of this name", "Karras", 7) is None


def test_noise_levels_and_progress_are_inverse() -> None:
    schedule = scaled_linear_schedule()
    for timestep in (0.0, 0.5, 499.25, 999.0):
        assert 1 - schedule.progress(schedule.sigma(timestep)) == pytest.approx(timestep / 999, abs=1e-9)


ASKED: dict[str, Any] = {"sampler": "Euler", "scheduler": "Karras", "steps": 5}


def test_the_page_is_told_what_the_host_says_or_what_is_usual() -> None:
    text = json.dumps(ASKED)
    told = json.loads(handlers.schedule(text, lambda *asked: [0.1, 0.9] if asked == ("Euler", "Karras", 5) else None))
    assert told == {"asked": text, "progress": [0.1, 0.9], "exact": True}
    told = json.loads(handlers.schedule(text, lambda *_: None))
    assert told == {"asked": text, "progress": of_scheduler("karras", 5), "exact": False}
    told = json.loads(handlers.schedule(json.dumps({**ASKED, "scheduler": "unheard of"}), lambda *_: None))
    assert told["progress"] == of_scheduler("uniform", 5) and told["exact"] is False
    told = json.loads(handlers.schedule(json.dumps({**ASKED, "strength": 0.5}), lambda *_: None))
    assert told["progress"] == of_img2img(of_scheduler("karras", 5), 0.5)


@pytest.mark.parametrize(
    "asked",
    ["", "[]", "{", json.dumps({**ASKED, "steps": 0}), json.dumps({**ASKED, "steps": 1001}), '{"sampler": "Euler"}'],
)
def test_what_can_not_be_asked_gets_no_answer(asked: str) -> None:
    assert handlers.schedule(asked, lambda *_: None) == ""

"""Steps told beforehand, against what the embedded host's samplers really do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.progress import progress_of_timestep
from lib_ipadapter.steps import SCHEDULERS, factors, of_img2img, of_scheduler, of_sigmas
from lib_ipadapter.units import Unit
from tests.embedded import Host
from tests.photos import base64_photo

REQUEST = {"prompt": "a fox", "width": 64, "height": 64, "seed": 1, "sampler_name": "Euler"}


@pytest.mark.parametrize("name", ["uniform", "karras", "sgm_uniform"])
@pytest.mark.parametrize("strength", [None, 0.3, 1.0])
def test_the_steps_are_those_that_a_sampler_does(host: Host, name: str, strength: float | None) -> None:
    fields: dict[str, Any] = {**REQUEST, "steps": 7, "scheduler": name}
    if strength is None:
        host.api.run("txt2img", fields)
    else:
        host.api.run("img2img", {**fields, "init_images": [base64_photo()], "denoising_strength": strength})
    real = [progress_of_timestep(float(call.timestep_tensor[0])) for call in host.unet_calls]
    told = of_scheduler(name, 7)
    if strength is not None:
        told = of_img2img(told, strength)
    assert told == pytest.approx(real, abs=2e-3)


def test_exponential_is_even_in_the_logarithm() -> None:
    levels = torch.linspace(torch.tensor(14.614642).log(), torch.tensor(0.0291675).log(), 6).exp().tolist()
    assert of_scheduler("Exponential", 6) == pytest.approx(of_sigmas([*levels, 0.0]), abs=1e-5)


def test_one_step_and_many() -> None:
    for name in SCHEDULERS:
        assert of_scheduler(name, 1)[0] == pytest.approx(0, abs=1e-5)
        many = of_scheduler(name, 1000)
        assert many == sorted(many) and len(many) == 1000


def acting(progress: list[float], **fields: Any) -> list[int]:
    return [number for number, factor in enumerate(factors(Unit(**fields), progress), 1) if factor]


def test_windows() -> None:
    progress = of_scheduler("uniform", 5)
    assert acting(progress) == [1, 2, 3, 4, 5]
    assert acting(progress, start=0.25, stop=0.75) == [2, 3]
    assert acting(of_img2img(progress, 0.5), stop=0.1) == []


def test_an_unknown_schedule() -> None:
    with pytest.raises(IPAdapterError, match='"turbo".*uniform, sgm_uniform, karras'):
        of_scheduler("turbo", 5)

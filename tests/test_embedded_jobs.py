"""Jobs: hooks in the hosts' order, resets, passes, interrupts, exceptions, repeatability."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.embedded import Host
from tests.embedded.probe import PROBE_EXTENSION, record, run

BATCH_BEFORE = ["before_process_batch", "after_extra_networks_activate", "process_batch"]
PER_IMAGE = ["postprocess_image", "postprocess_maskoverlay", "postprocess_image_after_composite"]
AFTER = ["post_sample", "postprocess_batch", "postprocess_batch_list"]
PBES = "process_before_every_sampling"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host("sd15", [PROBE_EXTENSION]) as made:
        yield made


@pytest.fixture
def photo() -> Image.Image:
    x = np.linspace(0, 255, 64, dtype=np.uint8)
    return Image.fromarray(
        np.stack([np.tile(x, (64, 1)), np.tile(x[:, None], (1, 64)), np.full((64, 64), 90, np.uint8)], 2)
    )


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


def of_hook(name: str) -> list[dict[str, Any]]:
    return [details for hook, details in record().details if hook == name]


def test_the_same_request_gives_the_same_picture(host: Host) -> None:
    first = run(host)
    assert run(host).image.tobytes() == first.image.tobytes()
    assert np.asarray(first.image).std() > 20
    assert difference(run(host, seed=2).image, first.image) > 5
    assert difference(run(host, prompt="a blue car").image, first.image) > 5
    assert difference(run(host, negative_prompt="green").image, first.image) > 5


def test_hooks_in_order(host: Host) -> None:
    run(host, n_iter=2, batch_size=2, wanted={})
    once = [*BATCH_BEFORE, PBES, "cfg_denoiser", "cfg_denoiser", *AFTER, *PER_IMAGE * 2]
    assert record().hooks == ["before_process", "process", *once * 2, "postprocess"]
    assert of_hook("process") == [{"grad": True, "inference": False}]
    assert all(d["inference"] for d in of_hook(PBES))
    assert [c.iteration for c in host.unet_calls] == [0, 0, 1, 1]


def test_hires_calls_the_hook_twice_the_first_time_on_the_stale_unet(host: Host) -> None:
    result = run(host, enable_hr=True, hr_scale=1.5, hr_cfg=7.0, hr_second_pass_steps=3, wanted={"replace": "half"})
    assert result.image.size == (96, 96)
    first = [*BATCH_BEFORE, PBES, "cfg_denoiser", "cfg_denoiser"]
    second = ["after_extra_networks_activate", "before_hr", PBES, PBES, *["cfg_denoiser"] * 3]
    assert record().hooks == ["before_process", "process", *first, *second, *AFTER, *PER_IMAGE, "postprocess"]
    assert [(d["patched"], d["hires"], d["shape"][2:]) for d in of_hook(PBES)] == [
        (False, False, (8, 8)),
        (True, True, (12, 12)),
        (False, True, (12, 12)),
    ]
    assert [c.pass_name for c in host.unet_calls] == ["txt2img"] * 2 + ["hires"] * 3
    assert host.unet_calls[2].sigma < 5  # 3 executed steps out of int(3 / 0.75) = 4
    run(host, enable_hr=True, hr_scale=1.5)
    assert {c.cond_or_uncond for c in host.unet_calls if c.pass_name == "hires"} == {(0,)}  # the API's hr_cfg is 1


@pytest.mark.parametrize(
    ("sampler", "scheduler", "steps", "calls"),
    [
        ("Euler", "Automatic", 7, 7),
        ("Euler", "SGM Uniform", 7, 7),
        ("Euler a", "Automatic", 7, 7),
        ("DPM++ 2M", "Karras", 7, 7),
        ("Heun", "Automatic", 7, 13),
        ("DDIM", "Automatic", 20, 19),
        ("DDIM", "Automatic", 7, 7),
        ("DDIM", "Automatic", 1, 0),
        ("Heun", "Automatic", 1, 1),
    ],
)
def test_calls_of_each_sampler(host: Host, sampler: str, scheduler: str, steps: int, calls: int) -> None:
    run(host, sampler_name=sampler, scheduler=scheduler, steps=steps, wanted={})
    sigmas = [c.sigma for c in host.unet_calls]
    assert len(sigmas) == calls
    assert sigmas == sorted(sigmas, reverse=True)
    assert all(0 <= c.timestep <= 999 for c in host.unet_calls)
    if calls and sampler != "DDIM":
        assert sigmas[0] == pytest.approx(14.6146, abs=1e-3)
        assert host.unet_calls[0].timestep == 999
    if sampler == "Heun" and calls > 1:
        assert sigmas[1] == pytest.approx(sigmas[2])  # one step's second call, the next one's first
        assert record().denoiser[0].denoiser.total_steps == 2 * steps


def test_automatic_schedule_of_dpmpp_2m_is_karras(host: Host) -> None:
    pictures = {
        run(host, **fields).image.tobytes()
        for fields in (
            {"sampler_name": "DPM++ 2M", "scheduler": "Karras"},
            {"sampler_name": "DPM++ 2M", "scheduler": "Automatic"},
            {"sampler_name": "DPM++ 2M Karras"},
        )
    }
    assert len(pictures) == 1


def test_img2img_executes_a_share_of_the_steps(host: Host, photo: Image.Image) -> None:
    result = run(host, "img2img", init_images=[photo], steps=20, denoising_strength=0.5, wanted={})
    assert len(host.unet_calls) == 11
    assert {c.pass_name for c in host.unet_calls} == {"img2img"}
    assert host.unet_calls[0].timestep == pytest.approx(999 - 9 * 999 / 19, abs=1)
    assert record().denoiser[0].total_sampling_steps == 11
    assert of_hook(PBES)[0]["shape"] == (1, 4, 8, 8)
    assert (
        difference(
            result.image, run(host, "img2img", init_images=[photo.rotate(90)], steps=20, denoising_strength=0.5).image
        )
        > 5
    )
    run(host, "img2img", init_images=[photo], steps=20, denoising_strength=0.5, sampler_name="DDIM", batch_size=2)
    assert len(host.unet_calls) == 9
    assert host.unet_calls[0].rows == 4


def test_a_batch_is_made_of_its_single_pictures(host: Host) -> None:
    both = run(host, batch_size=2, seed=7)
    singles = [run(host, seed=s).image for s in (7, 8)]
    assert all(difference(a, b) < 0.1 for a, b in zip(both.images, singles, strict=True))
    counted = run(host, n_iter=2, seed=7)
    assert [a.tobytes() for a in counted.images] == [b.tobytes() for b in singles]
    assert counted.info["all_seeds"] == [7, 8]


def test_interrupt_during_sampling_keeps_the_picture_so_far(host: Host) -> None:
    before = run(host).image.tobytes()
    result = run(host, steps=6, n_iter=3, enable_hr=True, wanted={"interrupt at": 2})
    assert len(result.images) == 1
    assert len(host.unet_calls) == 3
    assert record().hooks[-1] == "postprocess"
    assert of_hook("postprocess") == [{"images": 1, "interrupted": True}]
    assert run(host).image.tobytes() == before


def test_interrupt_in_process_gives_no_picture_but_an_infotext(host: Host) -> None:
    result = run(host, wanted={"interrupt in process": True, "comment": "nothing <done>"})
    assert result.images == []
    assert len(result.infotexts) == 1
    assert host.unet_calls == []


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "init": ({"init": "no such model"}, "no such model"),
    "sampler": ({"sampler": "too late"}, "too late"),
    "attention": ({"replace": "raise"}, "raised inside attention"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_exceptions_that_escape_end_the_job(host: Host, name: str) -> None:
    wanted, message = FAILURES[name]
    before = run(host).image.tobytes()
    with pytest.raises(Exception, match=message) as caught:
        run(host, wanted=wanted)
    assert (caught.value.status_code, caught.value.detail) == (422, message)  # type: ignore[attr-defined]
    assert "postprocess" not in record().hooks
    assert (PBES in record().hooks) == (name != "init")
    assert host.state.job == ""
    assert run(host).image.tobytes() == before


def test_exceptions_in_hooks_are_reported_and_swallowed(host: Host) -> None:
    before = run(host).image.tobytes()
    count = len(host.errors)
    wanted = {"raise in before_process": True, "raise in callback": True}
    assert run(host, wanted=wanted).image.tobytes() == before
    messages = [str(report.error) for report in host.errors[count:]]
    assert messages == ["raised in before_process", "raised in a callback", "raised in a callback"]


def test_plain_replacement_changes_nothing_and_half_does(host: Host) -> None:
    before = run(host).image
    assert run(host, wanted={"replace": "plain"}).image.tobytes() == before.tobytes()
    assert len(record().options) == 4
    assert run(host, wanted={"tiles": True}).image.tobytes() == before.tobytes()
    assert difference(run(host, wanted={"replace": "half"}).image, before) > 0.2
    assert run(host).image.tobytes() == before.tobytes()


def test_a_job_inside_a_job(host: Host) -> None:
    alone = run(host, prompt="nested", seed=5).image.tobytes()
    outer = run(host).image.tobytes()
    result = run(host, wanted={"nested": True})
    assert [image.tobytes() for image in result.images] == [outer, alone]
    assert [c.depth for c in host.unet_calls] == [0, 0, 1, 1]
    assert record().hooks.count("postprocess") == 2


def test_infotext(host: Host) -> None:
    wanted: dict[str, Any] = {"x": "a, b: c"}
    result = run(host, wanted=wanted, batch_size=2, negative_prompt="bad\nthings")
    image = result.images[1]
    text = image.info["parameters"]
    assert text == result.infotexts[1]
    params = host.page.pasted("txt2img", text)
    from tests.embedded.infotext import parse_generation_parameters

    parsed = parse_generation_parameters(text)
    assert parsed["Prompt"] == "a fox"
    assert parsed["Negative prompt"] == "bad\nthings"
    assert parsed["Seed"] == "2"
    assert (parsed["Size-1"], parsed["Size-2"]) == ("64", "64")
    assert json.loads(parsed["Probe"]) == wanted
    assert parsed["Probe list"] == "second"
    assert parsed["Probe text"] == 'äöü, "quoted": back\\slash\nnew line 日本'
    assert "Probe nothing" not in text
    script = host.runners["txt2img"].alwayson_scripts[0]
    updates = {id(component): update for component, update in params}
    enabled, box, _ = script.controls
    assert updates[id(enabled)]["value"] is True
    assert json.loads(updates[id(box)]["value"]) == wanted
    foreign = {id(c): u for c, u in host.page.pasted("txt2img", "a cat\nSteps: 3, Sampler: Euler, Seed: 1")}
    assert foreign[id(enabled)]["value"] is False
    assert "value" not in foreign[id(box)]

"""Whole generations in the embedded host, through the script as a WebUI loads it and the API as a client calls it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

import tests.embedded.attention
from tests.embedded import Host
from tests.embedded.demo_models import DemoModels
from tests.embedded.host import PROJECT_ROOT
from tests.embedded_hosts import TITLE, request, unit
from tests.photos import base64_photo

TEXT_TOKENS = 77


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=float)


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(pixels(a) - pixels(b)).mean())


def same(a: Image.Image, b: Image.Image) -> bool:
    return bool(np.array_equal(pixels(a), pixels(b)))


class Watch:
    """How many image tokens the cross-attention of each UNet call saw beside the text, from the host's attention."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = host
        self.tokens: dict[int, set[int]] = {}
        original = tests.embedded.attention.attention_function

        def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args: Any, **kwargs: Any) -> Any:
            self.tokens.setdefault(len(host.unet_calls), set()).add(k.shape[1])
            return original(q, k, v, heads, *args, **kwargs)

        monkeypatch.setattr(tests.embedded.attention, "attention_function", watched)
        monkeypatch.setattr("backend.attention.attention_function", watched)

    def image_tokens(self) -> list[int]:
        """One number for each UNet call of the last job."""
        counts = []
        for call in sorted(self.tokens):
            beside = {n - TEXT_TOKENS for n in self.tokens[call] if TEXT_TOKENS <= n < 2 * TEXT_TOKENS}
            assert len(beside) == 1, f"layers of one UNet call disagree: {beside}"
            counts.append(beside.pop())
        return counts


def progress_of(sigma: float) -> float:
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alphas = scheduler.alphas_cumprod.double().numpy()
    log_sigmas = 0.5 * np.log((1 - alphas) / alphas)
    timestep = np.interp(np.log(max(sigma, 1e-9)), log_sigmas, np.arange(1000))
    return float(1 - timestep / 999)


WINDOWS = [(0.0, 0.5), (0.25, 1.0), (0.0, 1.0)]
SAMPLERS = [
    ("Euler", "Automatic"),
    ("DPM++ 2M", "Karras"),
    ("Heun", "Automatic"),
    ("DDIM", "Automatic"),
    ("Euler", "SGM Uniform"),
]
PASSES: dict[str, dict[str, Any]] = {
    "txt2img": {},
    "img2img": {"init_images": [base64_photo("chelsea")], "denoising_strength": 0.5},
    "hires": {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5, "hr_cfg": 5.0},
}


@pytest.mark.parametrize(("sampler", "scheduler"), SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("kind", PASSES)
def test_units_act_in_exactly_the_calls_they_were_asked_for(
    host: Host, monkeypatch: pytest.MonkeyPatch, sampler: str, scheduler: str, steps: int, kind: str
) -> None:
    # Three joint units told apart by their tokens: 4, 16 and 2 x 16.
    units = [
        unit("base", formulation="joint"),
        unit("plus", formulation="joint"),
        unit("plus", photos=("astronaut", "coffee"), formulation="joint"),
    ]
    weights = [4, 16, 32]
    for each, (start, stop) in zip(units, WINDOWS, strict=True):
        each.update(start=start, stop=stop)
    fields = {"steps": steps, "sampler_name": sampler, "scheduler": scheduler, **PASSES[kind]}
    run = host.img2img if kind == "img2img" else host.txt2img

    run(**request(**fields))
    calls = list(host.unet_calls)
    progress = [progress_of(call.sigma) for call in calls]

    def acts(window: tuple[float, float], p: float) -> bool:
        start, stop = window
        return (start == 0 or p >= start - 1e-5) and (stop == 1 or p < stop - 1e-5)

    first_pass = [p for p, call in zip(progress, calls, strict=True) if call.pass_name != "hires"]
    for number, window in enumerate(WINDOWS):
        if not any(acts(window, p) for p in first_pass):
            with pytest.raises(ValueError, match="would never act"):
                run(**request(units[number], **fields))
    kept = [n for n, window in enumerate(WINDOWS) if any(acts(window, p) for p in first_pass)]
    if not kept:
        return
    watch = Watch(host, monkeypatch)
    run(**request(*(units[n] for n in kept), **fields))
    expected = [sum(weights[n] for n in kept if acts(WINDOWS[n], p)) for p in progress]
    assert watch.image_tokens() == expected
    assert not host.errors


def test_the_last_call_of_a_plain_schedule_is_not_lost(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(host, monkeypatch)
    host.txt2img(**request(unit("base", formulation="joint"), steps=4))
    assert progress_of(host.unet_calls[-1].sigma) == pytest.approx(1.0)
    assert watch.image_tokens() == [4] * 4


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.25, 0.8), (0.6, 1.0), (0.0, 0.01)])
def test_start_and_stop_may_be_parts_of_the_steps(
    host: Host, monkeypatch: pytest.MonkeyPatch, kind: str, start: float, stop: float
) -> None:
    """In every pass they count from its own beginning, whatever the noise schedule does."""
    watch = Watch(host, monkeypatch)
    run = host.img2img if kind == "img2img" else host.txt2img
    wanted = unit("base", formulation="joint", start=start, stop=stop, timing="steps")
    run(**request(wanted, steps=8, sampler_name="Euler", **PASSES[kind]))
    by_pass: dict[str, int] = {}
    places = []
    for call in host.unet_calls:
        places.append((call.pass_name, by_pass.setdefault(call.pass_name, 0)))
        by_pass[call.pass_name] += 1
    assert len(by_pass) == (2 if kind == "hires" else 1) and min(by_pass.values()) >= 4
    shares = [n / by_pass[name] for name, n in places]
    assert watch.image_tokens() == [4 * (p >= start and (stop == 1 or p < stop)) for p in shares]


def test_the_second_call_of_a_step_counts_too(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(host, monkeypatch)
    half = unit("base", formulation="joint", stop=0.5, timing="steps")
    host.txt2img(**request(half, steps=4, sampler_name="Heun"))
    assert watch.image_tokens() == [4] * 4 + [0] * 3  # the last step has one call alone


def test_a_unit_between_two_steps_never_acts(host: Host) -> None:
    between = unit(start=0.3, stop=0.4, timing="steps")
    with pytest.raises(
        ValueError, match=r"this pass's steps lie between 0.00 and 0.50 of the steps, so it would never"
    ):
        host.txt2img(**request(between, steps=2))


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.0, 0.5), (0.3, 0.8), (0.6, 1.0)])
def test_decoupled_units_act_in_their_window_too(
    host: Host, monkeypatch: pytest.MonkeyPatch, start: float, stop: float
) -> None:
    acted: set[int] = set()
    original = sys.modules["sd_image_prompt.plan"].scaled_dot_product

    def watched(*args: Any) -> torch.Tensor:
        acted.add(len(host.unet_calls) - 1)  # the host records a call before it makes it
        return original(*args)

    monkeypatch.setattr("sd_image_prompt.plan.scaled_dot_product", watched)
    host.txt2img(**request(unit(formulation="decoupled", start=start, stop=stop), steps=8))
    progress = [progress_of(call.sigma) for call in host.unet_calls]
    assert acted == {n for n, p in enumerate(progress) if (start == 0 or p >= start) and (stop == 1 or p < stop)}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"batch_size": 2, "n_iter": 2},
    "CFG 1": {"cfg_scale": 1.0},
    "AND": {"prompt": "a red house AND a blue car :0.7", "batch_size": 2},
    "long prompt": {"prompt": "a red house " * 8},
    "long negative": {"negative_prompt": "a red house " * 8},
    "very long prompt": {"prompt": "a red house " * 30},
    "hires": {"enable_hr": True, "hr_scale": 1.25, "denoising_strength": 0.7},
    "img2img": {"init_images": [base64_photo("chelsea")], "denoising_strength": 0.75, "steps": 4},
    "Heun": {"sampler_name": "Heun"},
}


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
@pytest.mark.parametrize("formulation", ["joint", "decoupled"])
@pytest.mark.parametrize("case", CASES)
def test_on_steers_and_off_is_bit_identical(host_of: Any, shape: str, formulation: str, case: str) -> None:
    host = host_of(shape)
    run = host.img2img if "init_images" in CASES[case] else host.txt2img
    plain = run(**request(**CASES[case]))
    one = unit("plus", shape, formulation=formulation, weight=0.8)
    steered = run(**request(one, **CASES[case]))
    assert len(steered.images) == len(plain.images)
    assert all(difference(a, b) > 3 for a, b in zip(plain.images, steered.images, strict=True))
    assert f"formulation: {formulation}" in steered.infotexts[0]
    again = run(**request(one, **CASES[case]))
    assert all(same(a, b) for a, b in zip(steered.images, again.images, strict=True))
    off = {
        "plain again": request(**CASES[case]),
        "weight 0": request({**one, "weight": 0}, **CASES[case]),
        "switched off": request(**CASES[case]) | {"alwayson_scripts": {TITLE: {"args": [False, one]}}},
    }
    for name, wanted in off.items():
        result = run(**wanted)
        assert all(same(a, b) for a, b in zip(plain.images, result.images, strict=True)), name
        assert TITLE not in result.infotexts[0]
    assert not host.errors


def test_it_is_bit_identical_to_not_being_installed(host_of: Any, models: DemoModels) -> None:
    installed = host_of("sd15")
    before = installed.txt2img(**request(batch_size=2))
    installed.txt2img(**request(unit()))
    after = installed.txt2img(**request(batch_size=2))
    without = host_of("sd15", extensions=[]).txt2img(**request(batch_size=2))
    for a, b, c in zip(before.images, after.images, without.images, strict=True):
        assert same(a, c)
        assert same(b, c)


@pytest.mark.parametrize(
    "units",
    [
        (unit("plus", formulation="joint"), unit("base")),
        (unit("plus", photos=("astronaut", "coffee"), formulation="joint", balance=True),),
    ],
    ids=["two units", "balanced"],
)
@pytest.mark.parametrize("options", [{"split_calls": True}, {"row_order": "a1111"}])
def test_how_the_host_splits_a_step_changes_nothing(
    host_of: Any, options: dict[str, Any], units: tuple[dict[str, Any], ...]
) -> None:
    wanted = request(*units, prompt="a red house AND a car", negative_prompt="x " * 90, batch_size=2)
    usual = host_of("sd15").txt2img(**wanted)
    split = host_of("sd15", **options).txt2img(**wanted)
    for a, b in zip(usual.images, split.images, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 2


def test_the_share_of_a_picture_does_not_depend_on_how_the_host_equalises_prompts(host_of: Any) -> None:
    """With one UNet call for each prompt, nothing is repeated; with repeats the result must be the same."""
    wanted = request(unit("plus", formulation="joint"), prompt="a red house " * 8)
    repeated = host_of("sd15").txt2img(**wanted)
    assert host_of("sd15").unet_calls[0].context_tokens == 2 * TEXT_TOKENS
    alone = host_of("sd15", split_calls=True).txt2img(**wanted)
    assert np.abs(pixels(repeated.image) - pixels(alone.image)).max() <= 2


def test_uncond_sources(host: Host, models: DemoModels) -> None:
    from safetensors.torch import save_file

    context = host.sd_model.shape.context
    negative = models.models_path / "ipadapter" / "negative.safetensors"
    save_file({"data": torch.randn(1, 16, context, generator=torch.Generator().manual_seed(0))}, negative)
    wide = models.models_path / "ipadapter" / "negative-wide.safetensors"
    save_file({"data": torch.zeros(1, 16, context + 8)}, wide)
    sources: list[dict[str, Any]] = [
        {"uncond": name} for name in ("auto", "zero pixels", "zero embeds", "black picture", "none")
    ]
    sources.append({"uncond": "file", "negative": negative.name})
    for kind in ("base", "plus"):
        results = [host.txt2img(**request(unit(kind, **source))).image for source in sources]
        for (n, a), (m, b) in itertools.combinations(enumerate(results), 2):
            auto = {"base": 2, "plus": 1}[kind]
            assert same(a, b) is ((n, m) == (0, auto)), (kind, sources[n], sources[m])
    with pytest.raises(ValueError, match=f"{context + 8} wide and the adapter takes {context}"):
        host.txt2img(**request(unit(uncond="file", negative=wide.name)))


def test_the_list_shows_what_fits_the_loaded_checkpoint(host_of: Any) -> None:
    for shape, other, family in (("sd15", "sdxl", "SDXL"), ("sdxl", "sd15", "SD1.5")):
        host_of(shape).txt2img(**request())
        session: Any = sys.modules["sd_image_prompt"].live_session  # type: ignore[attr-defined]
        fitting = [(f"demo-{kind}-{shape}.safetensors",) * 2 for kind in ("base", "plus")]
        names = [f"demo-{kind}-{other}.safetensors" for kind in ("base", "plus")]
        assert session.choices(False) == fitting
        assert session.choices(True) == fitting + [(f"{name} (doesn't fit: {family})", name) for name in names]


def test_preparations_differ_for_a_picture_that_is_not_square(host: Host) -> None:
    results = [
        host.txt2img(**request(unit(photos=("coffee",), preparation=p))).image for p in ("crop", "squash", "pad")
    ]
    assert not any(same(a, b) for a, b in itertools.combinations(results, 2))
    infotext = host.txt2img(**request(unit(preparation="pad"))).infotexts[0]
    assert "preparation: pad" in infotext


def test_several_units_and_pictures_each_add_their_share(host: Host) -> None:
    one = host.txt2img(**request(unit())).image
    two_pictures = host.txt2img(**request(unit(photos=("astronaut", "coffee")))).image
    two_units = host.txt2img(**request(unit(), unit(photos=("coffee",)))).image
    negative = host.txt2img(**request(unit(weight=-0.7))).image
    for a, b in itertools.combinations([one, two_pictures, two_units, negative], 2):
        assert difference(a, b) > 1
    with_disabled = host.txt2img(**request(unit(), unit(photos=("coffee",), enabled=False))).image
    assert same(one, with_disabled)


def test_a_pictures_weight_is_its_part_of_the_units(host: Host) -> None:
    def pictures(*weights: float, **fields: Any) -> Any:
        whole = unit(photos=("astronaut", "coffee")[: len(weights)], **fields)
        images = [{"data": data, "weight": weight} for data, weight in zip(whole["images"], weights, strict=True)]
        return host.txt2img(**request({**whole, "images": images})).image

    assert same(pictures(0.5), host.txt2img(**request(unit(weight=0.5))).image)
    assert same(pictures(0.5, weight=-1.0), host.txt2img(**request(unit(weight=-0.5))).image)
    assert same(pictures(1.0, 0.0), host.txt2img(**request(unit())).image)
    assert same(pictures(0.0, 0.0), host.txt2img(**request()).image)
    assert difference(pictures(1.0, 1.0), pictures(1.0, 0.3)) > 0.5


def test_a_crop_is_what_the_encoder_sees(host: Host) -> None:
    def cropped(*crop: float, **fields: Any) -> Any:
        whole = unit(photos=("coffee",), **fields)
        return host.txt2img(**request({**whole, "images": [{"data": whole["images"][0], "crop": crop}]})).image

    plain = host.txt2img(**request(unit(photos=("coffee",)))).image
    assert same(cropped(0.5, 0.5, 1), plain)
    assert difference(cropped(0, 0, 2), plain) > 0.5
    assert same(cropped(0, 0, 2, preparation="squash"), cropped(0.5, 0.5, 1, preparation="squash"))


def test_switched_on_without_a_picture_the_job_stops(host: Host) -> None:
    for units in ([], [unit(enabled=False)]):
        with pytest.raises(ValueError, match="no picture in any enabled unit"):
            host.txt2img(**request() | {"alwayson_scripts": {TITLE: {"args": [True, *units]}}})
    assert len(host.txt2img(**request()).images) == 1


NESTED = """
import copy
from modules import scripts, processing
class Nested(scripts.Script):
    inside = False
    def title(self): return 'Nested'
    def show(self, is_img2img): return scripts.AlwaysVisible
    def postprocess_image(self, p, pp, *args):
        if Nested.inside: return
        Nested.inside = True
        try:
            inner = processing.StableDiffusionProcessingImg2Img(sd_model=p.sd_model, init_images=[pp.image],
                prompt=p.prompt, negative_prompt=p.negative_prompt, steps=4, width=64, height=64,
                denoising_strength=0.5, cfg_scale=p.cfg_scale, seed=p.seed)
            inner.scheduler = 'SGM Uniform'
            inner.scripts, inner.script_args = p.scripts, INNER_ARGS
            pp.image = processing.process_images(inner).images[0]
        finally:
            Nested.inside = False
"""
"""An extension that draws once more in every picture, as face detailers do."""


def host_with_nested_jobs(host_of: Any, folder: Path, inner_args: str) -> Host:
    scripts = folder / "nested" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "nested.py").write_text(NESTED.replace("INNER_ARGS", inner_args))
    made: Host = host_of("sd15", extensions=(PROJECT_ROOT, folder / "nested"))
    return made


@pytest.mark.parametrize(
    ("inner_unit", "words"),
    [
        (unit() | {"model": "nowhere"}, "nowhere"),  # refused before anything is drawn
        (unit(stop=0.1), "would never act"),  # in its first UNet call
        (unit(start=0.9995), "would never act"),  # at the end of its sampling
    ],
)
def test_the_sentence_of_a_job_inside_a_job_is_seen_outside(
    host_of: Any, tmp_path: Path, inner_unit: dict[str, Any], words: str
) -> None:
    host = host_with_nested_jobs(host_of, tmp_path, f"[True, {inner_unit!r}] + [''] * 9")
    result = host.txt2img(**request(n_iter=2))
    assert len(result.images) == 2  # the host swallows what the inner job raises
    for text in result.infotexts:
        assert "IP-Adapter error" in text
        assert words in text
    assert words in result.info["extra_generation_params"]["IP-Adapter error"]
    assert len(host.txt2img(**request(unit())).images) == 1


def test_a_job_inside_a_job_has_its_own_units(host_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = host_with_nested_jobs(host_of, tmp_path, "[False] + [''] * 10")
    plain = host.txt2img(**request())
    assert {call.depth for call in host.unet_calls} == {0, 1}
    watch = Watch(host, monkeypatch)
    steered = host.txt2img(**request(unit(formulation="joint"), n_iter=2))
    assert watch.image_tokens() == [4 if call.depth == 0 else 0 for call in host.unet_calls]
    assert difference(plain.image, steered.image) > 3
    assert same(plain.image, host.txt2img(**request()).image)
    assert not host.errors

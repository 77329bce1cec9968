"""Noise levels and samplers against diffusers' schedulers, which nobody here wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from tests.embedded.predictor import Predictor
from tests.embedded.samplers import ddim, dpmpp_2m, euler, heun
from tests.embedded.schedules import SCHEDULES_BY_NAME, ddim_timesteps, discrete

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (1, 7, 20)


def nothing(*args: Any) -> torch.Tensor:
    return torch.zeros(())


def denoiser(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A smooth, nonlinear stand-in for a model."""
    s = sigma.view(-1, 1, 1, 1)
    return torch.tanh(x / (1 + s)) * 0.8 + 0.1 * torch.sin(s)


def test_predictor_is_the_scaled_linear_table() -> None:
    predictor = Predictor()
    alphas = EulerDiscreteScheduler(**BETAS).alphas_cumprod.double()
    expected = ((1 - alphas) / alphas).sqrt()
    assert predictor.sigmas.shape == (1000,)
    assert predictor.sigmas.dtype == torch.float32
    assert torch.allclose(predictor.sigmas.double(), expected, rtol=1e-4)  # theirs is computed in float32
    assert predictor.sigma_max.item() == pytest.approx(14.6146, abs=1e-4)
    assert predictor.sigma_min.item() == pytest.approx(0.029167, abs=1e-5)
    # values read off a host
    for percent, sigma in [(0.0001, 14.6058), (0.1, 8.3072), (0.25, 4.0861), (0.5, 1.61558), (0.75, 0.69515)]:
        assert predictor.percent_to_sigma(percent) == pytest.approx(sigma, rel=1e-4)
    assert predictor.percent_to_sigma(0) == 999999999.9
    assert predictor.percent_to_sigma(1) == 0.0
    assert predictor.timestep(torch.tensor([0.0292, 1.0, 14.6146, 100.0])).tolist() == [0, 354, 999, 999]
    assert predictor.sigma(torch.tensor([0.0, 499.5, 2000.0])).tolist() == pytest.approx(
        [0.0292, 1.6156, 14.6146], abs=1e-4
    )


@pytest.mark.parametrize("n", STEPS)
def test_schedules(n: int) -> None:
    predictor = Predictor()
    karras, sgm_uniform = (SCHEDULES_BY_NAME[name] for name in ("karras", "sgm_uniform"))
    reference = EulerDiscreteScheduler(**BETAS, interpolation_type="linear", timestep_spacing="linspace")
    reference.set_timesteps(timesteps=np.linspace(999, 0, n).tolist())
    # theirs interpolates sigma, k-diffusion its logarithm: equal within a fraction of one table entry
    assert discrete(n, predictor)[:-1].numpy() == pytest.approx(reference.sigmas[:-1].numpy(), rel=2e-3)
    if n > 1:
        reference = EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, timestep_spacing="linspace")
        reference.set_timesteps(n)
        assert karras.sigmas(n, predictor).numpy() == pytest.approx(reference.sigmas.numpy(), rel=1e-4)
    sgm = sgm_uniform.sigmas(n, predictor)
    expected = [999.0 - 999.0 * i / n for i in range(n)]
    assert predictor.timestep(sgm[:-1]).tolist() == pytest.approx(expected, abs=0.51)
    for sigmas in (discrete(n, predictor), karras.sigmas(n, predictor), sgm):
        assert sigmas.shape == (n + 1,)
        assert sigmas[-1] == 0
        assert bool((sigmas.diff() < 0).all())
        assert sigmas[0].item() == pytest.approx(14.6146, abs=1e-3)


def test_ddim_timesteps_are_the_leading_ones() -> None:
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(20)
    assert ddim_timesteps(20).tolist() == scheduler.timesteps.tolist()[::-1]
    assert ddim_timesteps(7).tolist() == [1, 143, 285, 427, 569, 711, 853, 995]
    assert ddim_timesteps(1).tolist() == [1]


def through_scheduler(scheduler: Any, x: torch.Tensor, steps: int) -> torch.Tensor:
    """The same model through a diffusers scheduler, in its own variables."""
    scheduler.set_timesteps(steps)
    calls = list(scheduler.timesteps)
    for i, t in enumerate(calls):
        sigma = scheduler.sigmas[i]
        if isinstance(scheduler, DPMSolverMultistepScheduler):
            # its latents are variance-preserving
            scaled = x * (1 + sigma**2) ** 0.5
            x = scheduler.step((scaled - denoiser(scaled, sigma[None])) / sigma, t, x, return_dict=False)[0]
        else:
            x = scheduler.step((x - denoiser(x, sigma[None])) / sigma, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_samplers_follow_diffusers(name: str) -> None:
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kwargs = BETAS | {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
    scheduler: Any
    if name == "euler":
        scheduler, ours = EulerDiscreteScheduler(**kwargs), euler
    elif name == "heun":
        scheduler, ours = HeunDiscreteScheduler(**kwargs), heun
    else:
        scheduler = DPMSolverMultistepScheduler(
            **kwargs, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", lower_order_final=True
        )
        ours = dpmpp_2m
    steps = 8
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    if name == "heun":
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
        assert len(sigmas) == steps + 1
    start = x * sigmas[0]
    first = x * sigmas[0] / (1 + sigmas[0] ** 2) ** 0.5 if name == "dpmpp_2m" else start
    expected = through_scheduler(scheduler, first, steps)
    calls: list[float] = []

    def model(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(float(sigma[0]))
        return denoiser(x, sigma)

    out = ours(model, start, sigmas, {}, nothing, nothing)
    assert torch.allclose(out, expected, rtol=2e-3, atol=2e-4)
    assert len(calls) == (2 * steps - 1 if name == "heun" else steps)


def test_ddim_follows_diffusers() -> None:
    scheduler = DDIMScheduler(
        **BETAS, timestep_spacing="leading", steps_offset=1, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod.double()
    scheduler.alphas_cumprod = alphas
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def epsilon(x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sigma = ((1 - alphas[t.long()]) / alphas[t.long()]) ** 0.5
        scaled = x * ((1 + sigma**2) ** 0.5).view(-1, 1, 1, 1)
        return (scaled - denoiser(scaled, sigma)) / sigma.view(-1, 1, 1, 1)

    expected = x
    # the hosts' loop leaves out the last timestep
    for t in scheduler.timesteps[:-1]:
        expected = scheduler.step(epsilon(expected, t[None]), int(t), expected, return_dict=False)[0]
    out = ddim(epsilon, x, ddim_timesteps(10), alphas, {}, nothing)
    assert torch.allclose(out, expected, rtol=1e-6, atol=1e-8)

"""Progress from sigmas and timesteps, and the windows that units act in."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from lib_ipadapter.progress import SigmaSchedule, Window, progress_of_timestep, scaled_linear_schedule


@pytest.fixture(scope="module")
def sigmas() -> np.ndarray:
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return np.asarray(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5)


def test_every_training_sigma_has_its_timestep(sigmas: np.ndarray) -> None:
    for schedule in (scaled_linear_schedule(), SigmaSchedule(sigmas.tolist())):
        for timestep in range(1000):
            assert schedule.progress(float(sigmas[timestep])) == pytest.approx(1 - timestep / 999, abs=1e-6)


def test_between_timesteps_progress_is_linear_in_log_sigma(sigmas: np.ndarray) -> None:
    for timestep in (0.5, 499.25, 998.9):
        sigma = np.exp(np.interp(timestep, range(1000), np.log(sigmas)))
        assert scaled_linear_schedule().progress(float(sigma)) == pytest.approx(1 - timestep / 999, abs=1e-6)


@pytest.mark.parametrize(("sigma", "progress"), [(1e9, 0.0), (14.7, 0.0), (0.02, 1.0), (0.0, 1.0)])
def test_beyond_the_schedule_progress_is_clamped(sigma: float, progress: float) -> None:
    assert scaled_linear_schedule().progress(sigma) == pytest.approx(progress)


@pytest.mark.parametrize(("timestep", "progress"), [(999, 0), (0, 1), (499.5, 0.5), (-1, 1), (1200, 0)])
def test_timesteps(timestep: float, progress: float) -> None:
    assert progress_of_timestep(timestep) == pytest.approx(progress)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_windows_side_by_side_share_no_call_and_miss_none(a: float, b: float, progress: float) -> None:
    first, second = sorted((a, b))
    inside = [
        Window(start, stop).contains(progress)
        for start, stop in ((0, first), (first, second), (second, 1))
        if start < stop
    ]
    assert sum(inside) == 1


def test_the_ends_are_open() -> None:
    assert Window(0, 1).contains(1.0)
    assert Window(0.5, 1).contains(1.0)
    assert not Window(0, 0.999).contains(1.0)
    assert not Window(0, 0.5).contains(0.5)
    assert Window(0.5, 1).contains(0.5)


def test_a_sigma_that_went_through_float32_still_meets_its_threshold(sigmas: np.ndarray) -> None:
    for timestep in range(1, 999, 7):
        threshold = 1 - timestep / 999
        progress = scaled_linear_schedule().progress(float(np.float32(sigmas[timestep])))
        assert Window(threshold, 1).contains(progress)
        assert not Window(0, threshold).contains(progress)

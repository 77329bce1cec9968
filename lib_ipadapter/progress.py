"""How far along a pass a UNet call is, and in which calls a unit acts.

Progress is p = 1 - t / 999, t the timestep on the model's 1000-step training schedule: 0 is pure noise, 1 a finished
picture. Every UNet call has one, also the second call of a second-order sampler's step. A unit may ask for another
measure: the share of the pass's UNet calls that have been made.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LAST_TIMESTEP = 999

# Sigmas travel through float32, so a timestep comes back with an error of about 1e-5; a threshold that coincides with
# a call's progress must not be missed by that.
SLACK = 1e-6


Progress = float | Callable[[], float]
"""Progress of a UNet call, or what finds it out. That waits for all that the device still has to do."""


def known(progress: Progress) -> float:
    """``progress`` as a number."""
    return progress() if callable(progress) else progress


def progress_of_timestep(timestep: float) -> float:
    """Progress 0…1 of a training timestep 999…0 (clamped)."""
    return min(1.0, max(0.0, 1.0 - timestep / LAST_TIMESTEP))


def executed(params: Any) -> float | None:
    """The share of a pass's denoiser calls made before this one, from what a host's denoiser callback tells.

    It is what hosts go by when they bring in a refiner. Samplers that choose their own number of steps may go beyond.
    """
    step, total = (getattr(getattr(params, "denoiser", None), name, None) for name in ("step", "total_steps"))
    if not isinstance(step, int) or not isinstance(total, int) or total < 1:
        return None
    return min(1.0, step / total)


class SigmaSchedule:
    """The model's training schedule, to turn a sigma into progress without touching a device.

    Args:
        sigmas: one sigma for each timestep 0…999, ascending.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self._log_sigmas = [math.log(max(sigma, 1e-12)) for sigma in sigmas]

    def sigma(self, timestep: float) -> float:
        """Noise level at a timestep of the table; between two, linear in log sigma."""
        logs = self._log_sigmas
        low = min(max(int(timestep), 0), len(logs) - 2)
        part = min(max(timestep - low, 0.0), 1.0)
        return math.exp(logs[low] + part * (logs[low + 1] - logs[low]))

    def progress(self, sigma: float) -> float:
        """Progress of ``sigma``; between two timesteps, linear in log sigma, as k-diffusion has it."""
        logs = self._log_sigmas
        log_sigma = math.log(max(sigma, 1e-12))
        high = min(max(bisect_left(logs, log_sigma), 1), len(logs) - 1)
        span = logs[high] - logs[high - 1]
        timestep = high - 1 + (log_sigma - logs[high - 1]) / span if span > 0 else float(high)
        return progress_of_timestep(timestep * LAST_TIMESTEP / (len(logs) - 1))


@lru_cache(maxsize=1)
def scaled_linear_schedule() -> SigmaSchedule:
    """The schedule that SD1.x, SD2.x and SDXL were trained with: beta from 0.00085 to 0.012, linear in its root."""
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    alpha, sigmas = 1.0, []
    for step in range(LAST_TIMESTEP + 1):
        alpha *= 1.0 - (first + (last - first) * step / LAST_TIMESTEP) ** 2
        sigmas.append(math.sqrt((1.0 - alpha) / alpha))
    return SigmaSchedule(sigmas)


NOISE, STEPS = "noise", "steps"
"""What a window is a part of: the noise schedule, or the calls of the UNet that a pass takes, counted."""
TIMINGS = (NOISE, STEPS)


@dataclass(frozen=True)
class Window:
    """The part of a pass in which a unit acts: start <= p < stop, p the progress by the window's timing.

    Start 0 has no lower end and stop 1 no upper end, so that the defaults mean every call: the last call of
    k-diffusion's samplers has p = 1 and the first may lie above the training schedule.
    """

    start: float = 0.0
    stop: float = 1.0
    timing: str = NOISE

    @property
    def is_whole(self) -> bool:
        """Whether it contains every UNet call."""
        return self.start <= 0 and self.stop >= 1

    def contains(self, progress: float) -> bool:
        """Whether a UNet call at ``progress`` lies in the window."""
        return (self.start <= 0 or progress >= self.start - SLACK) and (self.stop >= 1 or progress < self.stop - SLACK)

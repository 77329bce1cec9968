"""In which sampler steps a unit acts, told before anything is drawn: the noise levels that the usual schedules have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from . import curves
from .curves import Curve
from .errors import IPAdapterError
from .progress import (
    LAST_TIMESTEP,
    NOISE,
    STEPS,
    SigmaSchedule,
    Window,
    progress_of_timestep,
    scaled_linear_schedule,
)
from .units import Unit

STEPS_RANGE = (1, 1000)

# The training schedule's ends, as samplers take them.
SIGMA_MIN, SIGMA_MAX = 0.0291675, 14.614642


def _uniform(steps: int) -> list[float]:
    """k-diffusion's default: timesteps evenly from 999 to 0."""
    return [progress_of_timestep(LAST_TIMESTEP * (1 - n / max(1, steps - 1))) for n in range(steps)]


def _sgm_uniform(steps: int) -> list[float]:
    """The same with one step more, whose last isn't taken."""
    return _uniform(steps + 1)[:-1]


def _karras(steps: int) -> list[float]:
    """Karras et al. 2022, equation 5, with rho 7."""
    low, high = SIGMA_MIN ** (1 / 7), SIGMA_MAX ** (1 / 7)
    return of_sigmas([(high + n / max(1, steps - 1) * (low - high)) ** 7 for n in range(steps)])


def _exponential(steps: int) -> list[float]:
    """Evenly in the logarithm of sigma."""
    low, high = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
    return of_sigmas([math.exp(high + n / max(1, steps - 1) * (low - high)) for n in range(steps)])


SCHEDULERS: Mapping[str, Callable[[int], list[float]]] = {
    "uniform": _uniform,
    "sgm_uniform": _sgm_uniform,
    "karras": _karras,
    "exponential": _exponential,
}
"""Progress of every step of a number of steps, by the name that hosts have for the schedule."""


def of_sigmas(sigmas: Sequence[float], schedule: SigmaSchedule | None = None) -> list[float]:
    """Progress of steps at these noise levels; a 0 behind them, where sampling ends, is no step."""
    schedule = schedule or scaled_linear_schedule()
    levels = list(sigmas)
    if levels and levels[-1] == 0:
        levels.pop()
    return [schedule.progress(sigma) for sigma in levels]


def of_scheduler(name: str, steps: int) -> list[float]:
    """Progress of every step of a schedule.

    Raises:
        IPAdapterError: for a schedule that isn't in :data:`SCHEDULERS`.
    """
    made = SCHEDULERS.get(name.strip().lower().replace(" ", "_"))
    if made is None:
        raise IPAdapterError(
            f'The field "scheduler" is "{name[:40]}"; allowed are {", ".join(SCHEDULERS)}: for another one give the '
            'noise levels as "sigmas".'
        )
    return made(steps)


def of_img2img(progress: Sequence[float], strength: float) -> list[float]:
    """The steps that img2img does at a denoising strength, of those it was given: the last ones."""
    done = int(min(strength, 0.999) * len(progress)) + 1
    return list(progress[-done:])


def counted(steps: int) -> list[float]:
    """Progress of every step of a number of steps where the steps themselves are counted."""
    return [n / steps for n in range(steps)]


def takes_part(unit: Unit, hires: bool) -> bool:
    """Whether a unit acts at all in a pass, the hires one or another."""
    return not (hires and (unit.hires == "off" or (unit.hires == "scaled" and unit.hires_scale == 0)))


def curve_of(unit: Unit, hires: bool) -> Curve:
    """A unit's factor of its weight in a pass in which it takes part."""
    curve = curves.parse(unit.hires_curve if hires and unit.hires_curve else unit.curve)
    return curve.scaled(unit.hires_scale) if hires and unit.hires == "scaled" else curve


def factors(unit: Unit, progress: Sequence[float], hires: bool = False) -> list[float]:
    """A unit's factor of its weight in every step, 0 where it doesn't act; ``progress`` by its timing."""
    if not takes_part(unit, hires):
        return [0.0] * len(progress)
    window, curve = Window(unit.start, unit.stop, unit.timing), curve_of(unit, hires)
    return [curve.at(now) if window.contains(now) else 0.0 for now in progress]


TIMING_WORDS = {NOISE: "the noise schedule", STEPS: "the steps"}
_SHOWN_CHARACTERS = 80


def never_acted(unit: Unit, progress: tuple[float, float] | None, hires: bool = False) -> str:
    """What to say of a unit that acted in no UNet call of a pass; ``progress`` of its first and its furthest call."""
    subject = f"The IP-Adapter unit with {unit.model} acts from start {unit.start:g} to stop {unit.stop:g}"
    curve = curve_of(unit, hires).points
    if curve:
        text = curves.write(curve)
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
        subject += f" where its curve ({shown}) isn't 0"
    if progress is None:
        return f"{subject}, and the sampler called the UNet not once, so it would never act: choose more steps."
    first, last = progress
    cure = "choose a curve that isn't 0 there" if curve else "choose more steps or a wider window"
    if not Window(0.0, unit.stop).contains(first):
        cure = f"choose a stop above {first:.2f}"
    elif unit.start > last:
        cure = f"choose a start of {last:.2f} or less"
    return (
        f"{subject}, and this pass's steps lie between {first:.2f} and {last:.2f} of {TIMING_WORDS[unit.timing]}, so "
        f"it would never act: {cure}."
    )

"""Noise levels of the samplers, by the hosts' formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .predictor import Predictor


def discrete(n: int, predictor: Predictor) -> torch.Tensor:
    """k-diffusion's default: evenly spaced timesteps from 999 to 0, then sigma 0. ``[n + 1]``."""
    t = torch.linspace(len(predictor.sigmas) - 1, 0, n, device=predictor.sigmas.device)
    return torch.cat([predictor.sigma(t), t.new_zeros(1)])


def karras(n: int, predictor: Predictor, rho: float = 7.0) -> torch.Tensor:
    """Karras et al. 2022, eq. 5, between the model's smallest and largest sigma, then 0. ``[n + 1]``."""
    low, high = predictor.sigma_min.item() ** (1 / rho), predictor.sigma_max.item() ** (1 / rho)
    ramp = torch.linspace(0, 1, n)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1)])


def sgm_uniform(n: int, predictor: Predictor) -> torch.Tensor:
    """Evenly spaced timesteps from the first to the last, the last one left out, then 0. ``[n + 1]``."""
    start, end = predictor.timestep(predictor.sigma_max), predictor.timestep(predictor.sigma_min)
    t = torch.linspace(float(start), float(end), n + 1)[:-1]
    return torch.cat([predictor.sigma(t), torch.zeros(1)])


def ddim_timesteps(n: int) -> torch.Tensor:
    """A1111's timesteps for DDIM, ascending: 1, 1 + 1000 // n, ... — not always ``n`` of them. int64."""
    return torch.tensor(range(0, 1000, 1000 // n)).add(1).clip(0, 999)


@dataclass(frozen=True)
class Schedule:
    """One entry of the list that the API and the page offer."""

    name: str
    label: str
    function: Callable[[int, Predictor], torch.Tensor] | None
    """None: the sampler's own preference."""


SCHEDULES = (
    Schedule("automatic", "Automatic", None),
    Schedule("uniform", "Uniform", discrete),
    Schedule("karras", "Karras", karras),
    Schedule("sgm_uniform", "SGM Uniform", sgm_uniform),
)
SCHEDULES_BY_NAME = {key: s for s in SCHEDULES for key in (s.name, s.label)}

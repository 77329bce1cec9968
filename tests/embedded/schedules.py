"""Noise levels of the samplers, by the hosts' formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .predictor import Predictor


def discrete(n: int, predictor: Predictor) -> torch.Tensor:
    """k-diffusion's default: evenly spaced timesteps from 999 to 0, then sigma 0. ``[n + 1]``."""
    t = torch.linspace(len(predictor.sigmas) - 1, 0, n, device=predictor.sigmas.device)
    return torch.cat([predictor.sigma(t), t.new_zeros(1)])


def karras(n: int, sigma_min: float, sigma_max: float, device: torch.device, rho: float = 7.0) -> torch.Tensor:
    """Karras et al. 2022, eq. 5, between the model's smallest and largest sigma, then 0. ``[n + 1]``."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    ramp = torch.linspace(0, 1, n, device=device)
    return torch.cat([(high + ramp * (low - high)) ** rho, ramp.new_zeros(1)])


def sgm_uniform(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: torch.device) -> torch.Tensor:
    """Evenly spaced timesteps from the first to the last, the last one left out, then 0. ``[n + 1]``."""
    start, end = (inner_model.sigma_to_t(torch.tensor(sigma)) for sigma in (sigma_max, sigma_min))
    t = torch.linspace(float(start), float(end), n + 1)[:-1]
    return torch.cat([inner_model.t_to_sigma(t), torch.zeros(1)]).to(device)


def ddim_timesteps(n: int) -> torch.Tensor:
    """A1111's timesteps for DDIM, ascending: 1, 1 + 1000 // n, ... — not always ``n`` of them. int64."""
    return torch.tensor(range(0, 1000, 1000 // n)).add(1).clip(0, 999)


@dataclass(frozen=True)
class Schedule:
    """One entry of the list that the API and the page offer."""

    name: str
    label: str
    function: Callable[..., torch.Tensor] | None
    """None: the sampler's own preference. Called by keyword, as :meth:`sigmas` does."""
    default_rho: float = -1
    need_inner_model: bool = False

    def sigmas(self, n: int, predictor: Predictor) -> torch.Tensor:
        """Noise levels of ``n`` steps, ``[n + 1]``."""
        assert self.function is not None
        given = {"rho": self.default_rho} if self.default_rho != -1 else {}
        if self.need_inner_model:
            given["inner_model"] = _InnerModel(predictor)
        sigma_min, sigma_max = predictor.sigma_min.item(), predictor.sigma_max.item()
        return self.function(n=n, sigma_min=sigma_min, sigma_max=sigma_max, device=torch.device("cpu"), **given)


class _InnerModel:
    """What the hosts' schedule functions are given of a model."""

    def __init__(self, predictor: Predictor) -> None:
        self.sigmas = predictor.sigmas
        self._predictor = predictor

    def get_sigmas(self, n: int) -> torch.Tensor:
        return discrete(n, self._predictor)

    def sigma_to_t(self, sigma: torch.Tensor) -> torch.Tensor:
        return self._predictor.timestep(sigma)

    def t_to_sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        return self._predictor.sigma(timestep)


def _uniform(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: torch.device) -> torch.Tensor:
    return inner_model.get_sigmas(n).to(device)


SCHEDULES = (
    Schedule("automatic", "Automatic", None),
    Schedule("uniform", "Uniform", _uniform, need_inner_model=True),
    Schedule("karras", "Karras", karras, default_rho=7.0),
    Schedule("sgm_uniform", "SGM Uniform", sgm_uniform, need_inner_model=True),
)
SCHEDULES_BY_NAME = {key: s for s in SCHEDULES for key in (s.name, s.label)}

"""The noise levels of a pass by the WebUI's own tables of samplers and schedulers, asked before anything is drawn."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..progress import LAST_TIMESTEP, progress_of_timestep, scaled_linear_schedule
from ..steps import of_sigmas


class _TrainingSchedule:
    """What the WebUI's schedule functions ask of a model, answered by the schedule that SD was trained with."""

    def __init__(self) -> None:
        self.sigmas = torch.tensor([scaled_linear_schedule().sigma(t) for t in range(LAST_TIMESTEP + 1)])

    def get_sigmas(self, n: int) -> Tensor:
        """k-diffusion's default, evenly spaced timesteps and a 0; ``[n + 1]``."""
        timesteps = torch.linspace(LAST_TIMESTEP, 0, n).tolist()
        return torch.tensor([*map(scaled_linear_schedule().sigma, timesteps), 0.0])

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Timestep of a noise level."""
        return torch.tensor((1 - scaled_linear_schedule().progress(float(sigma))) * LAST_TIMESTEP)

    def t_to_sigma(self, timestep: Tensor) -> Tensor:
        """Noise level of each timestep."""
        levels = [scaled_linear_schedule().sigma(t) for t in timestep.flatten().tolist()]
        return torch.tensor(levels).view(timestep.shape)


def progress_of_pass(sampler: str, scheduler: str, steps: int) -> list[float] | None:
    """Progress of every step of a pass, by the names that the page shows; None where the WebUI can't tell.

    Its functions may ask for the checkpoint, and would load one, so they are asked only when one is loaded.
    """
    try:
        if import_module("modules.sd_models").model_data.sd_model is None:
            return None
        samplers: Any = import_module("modules.sd_samplers").all_samplers_map
        config = samplers.get(sampler)
        if config is None:
            return None
        # Those that go over timesteps instead of noise levels, such as DDIM.
        if any(config is each for each in import_module("modules.sd_samplers_timesteps").samplers_data_timesteps):
            return [progress_of_timestep(t) for t in reversed(_timesteps(steps))]
        levels = _sigmas(config.options, scheduler, steps)
        return None if levels is None else of_sigmas(levels)
    except Exception:  # tables and signatures are the WebUI's own, and a line of words isn't worth an error
        return None


def _timesteps(steps: int) -> list[int]:
    return [min(t + 1, LAST_TIMESTEP) for t in range(0, 1000, 1000 // steps)]


def _sigmas(options: Any, scheduler: str, steps: int) -> list[float] | None:
    schedulers: Any = import_module("modules.sd_schedulers").schedulers_map
    training = _TrainingSchedule()
    drops = bool(options.get("discard_next_to_last_sigma", False))
    count = steps + int(drops)
    chosen = schedulers.get(scheduler)
    if chosen is None or chosen.function is None:
        chosen = schedulers.get(options.get("scheduler"))
    if chosen is None or chosen.function is None:
        levels = training.get_sigmas(count).tolist()
    else:
        given: dict[str, Any] = {"sigma_min": float(training.sigmas[0]), "sigma_max": float(training.sigmas[-1])}
        if getattr(chosen, "default_rho", -1) != -1:
            given["rho"] = chosen.default_rho
        if getattr(chosen, "need_inner_model", False):
            given["inner_model"] = training
        levels = chosen.function(n=count, device=torch.device("cpu"), **given).tolist()
    return [*levels[:-2], levels[-1]] if drops else levels

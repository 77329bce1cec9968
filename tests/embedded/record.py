"""The record of UNet calls that tests read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class UNetCall:
    """One call of the UNet."""

    pass_name: str
    """``txt2img``, ``hires`` or ``img2img``."""
    depth: int
    """0 for the request's own job, 1 for a job that a script runs inside it, and so on."""
    iteration: int
    denoiser_step: int
    """Number of the denoiser call within the pass; several UNet calls may share one."""
    cond_or_uncond: tuple[int, ...]
    """Role of each chunk of ``batch_size`` rows: 0 cond, 1 uncond."""
    batch_size: int
    shape: tuple[int, ...]
    """Shape of the UNet's input, ``(rows, 4, H, W)``."""
    context_tokens: int
    sigma_tensor: torch.Tensor = field(repr=False)
    timestep_tensor: torch.Tensor = field(repr=False)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def roles(self) -> tuple[int, ...]:
        """Role of each row."""
        return tuple(role for role in self.cond_or_uncond for _ in range(self.batch_size))

    @property
    def sigma(self) -> float:
        return float(self.sigma_tensor[0])

    @property
    def timestep(self) -> float:
        return float(self.timestep_tensor[0])

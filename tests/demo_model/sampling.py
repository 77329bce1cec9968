"""Drawing with the models while they are trained, and what the judge says of the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .clip import ATTRIBUTES, Judge
from .scenes import Scenes, held_out_combinations, sample
from .unet import ImageKV

LATENT = 16
"""Side of the latents of a picture of 128 pixels."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents and timesteps to noise."""


def alphas(device: torch.device | str = "cpu") -> Tensor:
    """SD's ``alphas_cumprod``: scaled-linear betas, 1000 steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


@torch.no_grad()
def ddim(predict: Predict, noise: Tensor, steps: int = 25) -> Tensor:
    """Denoise from pure noise in even steps (Song et al., arXiv 2010.02502, eta 0)."""
    table = alphas(noise.device)
    x = noise
    times = torch.linspace(999, 0, steps + 1).round().long()[:-1].tolist()
    for n, t in enumerate(times):
        a = table[t]
        e = predict(x, torch.full((len(x),), t, device=x.device)).float()
        clean = ((x - (1 - a).sqrt() * e) / a.sqrt()).clamp(-6, 6)
        before = table[times[n + 1]] if n + 1 < len(times) else torch.ones((), device=x.device)
        x = before.sqrt() * clean + (1 - before).sqrt() * e
    return x


def guided(
    unet: Callable[..., Tensor],
    context: Tensor,
    uncond: Tensor,
    scale: float,
    images: Sequence[ImageKV] | None = None,
    none: Sequence[ImageKV] | None = None,
) -> Predict:
    """Classifier-free guidance over ``unet``; image tokens of cond and uncond rows, or no picture at all."""
    dtype = context.dtype
    both = torch.cat([context, uncond])
    kv = None
    if images is not None and none is not None:
        rows = len(context)
        kv = [
            (torch.cat([k, nk.expand(rows, -1, -1)]), torch.cat([v, nv.expand(rows, -1, -1)]))
            for (k, v), (nk, nv) in zip(images, none, strict=True)
        ]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out = unet(torch.cat([x, x]).to(dtype), torch.cat([t, t]), both, kv).float()
        by_cond, by_uncond = out.chunk(2)
        return by_uncond + scale * (by_cond - by_uncond)

    return predict


def held_out_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Simple scenes of held-out combinations, each combination about equally often."""
    scenes = sample(count, generator, allow_held_out=True, simple=True)
    table = torch.tensor(held_out_combinations(), device=generator.device)
    row = table[torch.arange(count, device=generator.device) % len(table)]
    same = scenes.background == row[:, 1]
    return replace(
        scenes,
        shape=row[:, 0],
        colour=row[:, 1],
        texture=row[:, 2],
        background=torch.where(same, (row[:, 1] + 3) % 10, scenes.background),
    )


@torch.no_grad()
def judged(judge: Judge, pictures: Tensor, scenes: Scenes) -> dict[str, float]:
    """Shares of pictures (0..1) whose attributes are those of the scenes, by the judge; and shape with colour."""
    dtype = next(judge.parameters()).dtype
    parts = [judge(part.to(dtype)) for part in pictures.split(256)]
    right: dict[str, Tensor] = {}
    for n, name in enumerate(ATTRIBUTES):
        answer = torch.cat([part[n] for part in parts]).argmax(1)
        wanted = getattr(scenes, name)
        right[name] = answer == (wanted - 1 if name == "count" else wanted)
    named = ("shape", "colour", "texture", "background", "size", "place", "count")
    shares = {name: round(float(right[name].float().mean()), 4) for name in named}
    shares["shape and colour"] = round(float((right["shape"] & right["colour"]).float().mean()), 4)
    three = right["shape"] & right["colour"] & right["texture"]
    shares["shape, colour and texture"] = round(float(three.float().mean()), 4)
    return shares

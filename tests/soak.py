"""Many generations in a row in the embedded host: what lives in the process mustn't grow.

python -m tests.soak --generations 200 --device cuda
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.embedded import Host
from tests.embedded.demo_models import make_demo_models
from tests.embedded_hosts import request, unit

WARM = 20
"""Generations before anything is counted: caches fill, libraries are loaded."""
UNITS = (
    (unit("plus"),),
    (unit(),),
    (unit("plus", photos=("astronaut", "chelsea")), unit(weight=-0.5)),
    (),
)


@dataclass(frozen=True)
class Alive:
    """What lives after a generation."""

    tensors: int
    hooks: int
    allocated: int
    """Bytes on a GPU; 0 without one."""


def alive(host: Host) -> Alive:
    gc.collect()
    unet = host.sd_model.kmodel.diffusion_model
    return Alive(
        tensors=sum(isinstance(each, torch.Tensor) for each in gc.get_objects()),
        hooks=sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()),
        allocated=torch.cuda.memory_allocated() if host.device.type == "cuda" else 0,
    )


def run(host: Host, generations: int, warm: int = WARM) -> list[Alive]:
    """Generates with every set of units in turn; what lived after each round of them, from ``warm`` generations on."""
    seen = []
    for n in range(generations):
        host.txt2img(**request(*UNITS[n % len(UNITS)], seed=n, negative_prompt="blurry"))
        if n >= warm and n % len(UNITS) == len(UNITS) - 1:
            seen.append(alive(host))
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.generations < WARM + len(UNITS):
        parser.error(f"--generations {args.generations}: {WARM + len(UNITS)} or more.")
    with tempfile.TemporaryDirectory() as folder:
        models = make_demo_models(Path(folder))
        with Host("sd15", models_path=models.models_path, device=args.device) as host:
            seen = run(host, args.generations)
    print(f"after generation {WARM} and more: {seen[0]}\nafter generation {args.generations}: {seen[-1]}")
    return 0 if seen[0] == seen[-1] else 1


if __name__ == "__main__":
    sys.exit(main())

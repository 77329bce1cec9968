"""The engine again and again on any device, without a WebUI: what is allocated mustn't grow.

python -m tests.engine_soak --rounds 200 --device cuda
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib_ipadapter import load_ip_adapter, patch_model, preprocess
from tests import checkpoints
from tests.adapter_files import plus_adapter, save
from tests.bare_model import LAYERS, BareModel

WARM = 20
CONTEXTS = {"sd15": 768, "sdxl": 2048}
HEAD, PIXELS, TEXT = 64, 256, 77


@dataclass(frozen=True)
class Alive:
    """What lives after a round."""

    tensors: int
    allocated: int
    """Bytes on a GPU; 0 without one."""


def make_files(folder: Path, layout: str) -> tuple[str, str]:
    """A small image encoder, and a plus adapter for it of the layout's own width."""
    encoder, adapter = folder / "encoder.safetensors", folder / "adapter.safetensors"
    checkpoints.write_random(encoder, checkpoints.image_encoder(width=128, layers=3, mlp=512, projection=128), 3)
    widths = [width for _, width in LAYERS[layout]]
    save(plus_adapter(widths, CONTEXTS[layout], embedding=128), adapter, torch.float16)
    return str(encoder), str(adapter)


def run(folder: Path, layout: str, device: torch.device, rounds: int) -> list[Alive]:
    """In each round another picture is encoded and acts in every cross-attention layer; what lived after each."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    encoder, adapter = make_files(folder, layout)
    load_ip_adapter(encoder, None, adapter)
    pictures = np.random.default_rng(0)
    seen = []
    with torch.inference_mode():
        for _ in range(rounds):
            prompts = preprocess(pictures.integers(0, 255, (300, 400, 3), dtype=np.uint8), adapter)
            conds, unconds = ([t.to(device, dtype) for t in each] for each in prompts)
            model = patch_model(BareModel(0.0), [((conds, unconds), 0.9, 0.8)])
            for key, width in LAYERS[layout]:
                q, k = (torch.randn(2, tokens, width, device=device, dtype=dtype) for tokens in (PIXELS, TEXT))
                options = {"n_heads": width // HEAD, "cond_or_uncond": [1, 0], "original_shape": [2, 4, 16, 16]}
                model.replacements[key](q, k, k, options)
            del prompts, conds, unconds, model, q, k
            gc.collect()
            seen.append(
                Alive(
                    tensors=sum(isinstance(each, torch.Tensor) for each in gc.get_objects()),
                    allocated=torch.cuda.memory_allocated() if device.type == "cuda" else 0,
                )
            )
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layout", choices=list(CONTEXTS), default="sdxl")
    args = parser.parse_args()
    if args.rounds <= WARM:
        parser.error(f"--rounds {args.rounds}: more than {WARM}.")
    with tempfile.TemporaryDirectory() as folder:
        seen = run(Path(folder), args.layout, torch.device(args.device), args.rounds)
    print(f"after round {WARM}: {seen[WARM - 1]}\nafter round {args.rounds}: {seen[-1]}")
    return 0 if seen[WARM - 1] == seen[-1] else 1


if __name__ == "__main__":
    sys.exit(main())

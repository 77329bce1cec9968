"""Train the small real model: ``python -m tests.demo_model.train --out FOLDER``.

Everything that a call makes is in the folder when it ends, in the files' final form, so a later call goes on from them
(``--resume``). A stage that fails is said and left as it was; those that need it are still tried.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from . import trainer
from .stages import FULL, SMOKE, STAGES, Run
from .store import Store
from .trainer import Budget

STARTING = 40.0
"""Seconds that must be left for a stage to be begun."""
SAVING = 20.0
"""Seconds before the end of a call in which figures are measured and files written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line; returns the exit code."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m tests.demo_model.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for all files")
    parser.add_argument("--total", type=float, default=36, help="minutes of the whole training, over all calls")
    parser.add_argument("--minutes", type=float, default=None, help="minutes of this call; by default all of them")
    parser.add_argument("--tokenizer", type=Path, help="folder to write the tokeniser to; it depends on the code alone")
    parser.add_argument("--resume", type=Path, help="folder of an earlier call to go on from")
    parser.add_argument("--again", nargs="*", default=[], choices=list(STAGES), help="stages to train anew or further")
    parser.add_argument("--only", nargs="*", default=list(STAGES), choices=list(STAGES), help="stages of this call")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage with a few pictures")
    parser.add_argument("--bfloat16", action="store_true", help="compute on a CPU as on a GPU")
    parser.add_argument("--steps", type=int, default=None, help="end each stage after so many steps")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    trainer.everywhere_bfloat16 = args.bfloat16
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        # another attention backend, which plans anew for every shape
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    args.out.mkdir(parents=True, exist_ok=True)
    until = started + 60 * (args.total if args.minutes is None else args.minutes) - SAVING
    store = Store(args.out, args.seed, device)
    if args.resume is not None:
        store.load(args.resume)
    for name in args.again:
        store.stage(name).update(seconds=0.0, done=False)
    calls = store.report["calls"] = store.report.get("calls", 0) + 1
    failed = False
    for number, (name, (share, function)) in enumerate(STAGES.items()):
        known = store.stage(name)
        # a stage takes some time before its first step
        too_late = time.monotonic() >= until - (0 if args.smoke else STARTING)
        if known["done"] or name not in args.only or too_late:
            continue
        generator = torch.Generator(device).manual_seed(args.seed * 1000 + calls * 100 + number)
        steps = args.steps if args.steps is not None else 8 if args.smoke else None
        budget = Budget(60 * args.total * share, known["seconds"], until, steps)
        before = {part: {k: v.clone() for k, v in m.state_dict().items()} for part, m in store.modules().items()}
        try:
            known["figures"] = function(Run(store, SMOKE if args.smoke else FULL, generator, budget))
            known["done"] = steps is not None or budget.total() >= trainer.ENOUGH * budget.seconds
            known.pop("failed", None)
        except Exception as error:
            failed = True
            traceback.print_exc()
            known["failed"] = f"{type(error).__name__}: {error}"[:500]
            _restore(store, before)
        known["seconds"] = round(budget.total(), 1)
        _at_rest(store)
        store.save()
        print(f"{name}: {known.get('failed') or known['figures']}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if args.tokenizer is not None:
        store.save_tokenizer(args.tokenizer)
    _at_rest(store)
    store.save()
    done = all(known["done"] for known in map(store.stage, STAGES))
    print(f"{'All stages are done' if done else 'More is to do'}; the files are in {args.out}.", flush=True)
    return int(failed)


def _at_rest(store: Store) -> None:
    """All models in float32, as files are written from."""
    for module in store.modules().values():
        module.float().eval()


def _restore(store: Store, before: dict[str, dict[str, torch.Tensor]]) -> None:
    for part, module in store.modules().items():
        module.float()
        module.load_state_dict(before[part])


if __name__ == "__main__":
    sys.exit(main())

"""``python dev.py bench``: see the package's text."""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from .launches import launches
from .plot import draw
from .preparation import measure_preparation
from .tables import markdown
from .timing import LEAST_ROUNDS, Times, measure, on_one_core, over, points
from .unets import FAMILIES, Sampling, make_unet
from .variants import make_variants


@dataclass(frozen=True)
class Case:
    """UNet steps of one kind."""

    family: str
    batch: int
    pictures: tuple[int, ...]
    peers: bool
    rounds: int
    steps: int
    """UNet calls in a round."""
    seconds: float
    """When they are over, the case ends with the rounds it has, or the least number of rounds."""


GPU_CASES: Mapping[str, Case] = {
    "sdxl-b1": Case("sdxl", 1, (1, 2, 4, 8, 16), True, 400, 2, 150),
    "sdxl-b4": Case("sdxl", 4, (1, 2, 4, 8, 16), True, 200, 2, 210),
    "sdxl-b2": Case("sdxl", 2, (1, 4, 16), False, 15, 2, 30),
    "sdxl-b8": Case("sdxl", 8, (1, 4, 16), False, LEAST_ROUNDS, 2, 60),
    "sd15-b1": Case("sd15", 1, (1, 2, 4, 8, 16), True, 400, 4, 60),
    "sd15-b4": Case("sd15", 4, (1, 4, 16), True, 40, 4, 40),
}
CPU_CASES: Mapping[str, Case] = {"sd15-256-b1": Case("sd15-256", 1, (1, 4), False, 15, 2, 600)}
SMALL_CASES: Mapping[str, Case] = {
    "small-sd15-b2": Case("small-sd15", 2, (1, 4), True, LEAST_ROUNDS, 1, 60),
    "small-sdxl-b1": Case("small-sdxl", 1, (1, 4), True, LEAST_ROUNDS, 1, 60),
}
PREPARATION = "preparation"


@dataclass(frozen=True)
class Target:
    """The most that a variant may cost over its baseline, or above 'plain', in percent of the baseline."""

    most: float
    above: str = ""


def targets(case: Case) -> Mapping[str, Target | tuple[Target, ...]]:
    """What was set out to be reached, by variant."""
    outside = {"outside the window": Target(0.2)}
    if case.family.startswith("sd15"):
        return {"joint, 1": Target(2.0), **outside}
    if case.batch == 1:
        return {"joint, 1": Target(2.0, "plain, 1"), **outside}
    if case.batch != 4:
        return outside
    return {
        "joint, 1": (Target(1.0), Target(0.3, "plain, 1")),
        "joint, 4": Target(2.0),
        "joint, 16": Target(5.0),
        "decoupled, 1": Target(4.0),
        **outside,
    }


def run_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Measures one case."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    family = FAMILIES[case.family]
    sampling = Sampling(make_unet(family, device, dtype), family, case.batch)
    made = make_variants(sampling, case.pictures, case.peers, targets(case))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with on_one_core() if device.type == "cuda" else nullcontext():
        times = measure(made.variants, case.rounds, case.steps, synchronize, case.seconds)
    asked = {}
    if device.type == "cuda":
        for name, variant in made.variants.items():
            with variant.around():
                asked[name] = launches(variant.step)
    made.close()
    rows = {}
    for name, variant in made.variants.items():
        summary = over(times, name, variant.baseline)
        taken = sorted(t for t in times[name] if t is not None)
        row = {"ms": taken[len(taken) // 2], "over": variant.baseline, "percent": asdict(summary)}
        if name.startswith("joint") and (plain := name.replace("joint", "plain")) in made.variants:
            row["above plain"] = asdict(points(times, name, plain, variant.baseline))
        if name in made.held:
            row["held bytes"] = made.held[name]
        if name in made.expected:
            row["K/V bytes"] = made.expected[name]
        if name in asked:
            row["a step on the device"] = asked[name]
        rows[name] = row
    finite = bool(torch.isfinite(made.variants["no adapter"].step()).all())
    return {
        **asdict(case),
        "finite": finite,
        "variants": rows,
        "targets": _judged(case, rows, times),
        "ms per step": times,
    }


def _judged(case: Case, rows: Mapping[str, Any], times: Times) -> list[dict[str, Any]]:
    judged = []
    for name, wanted in targets(case).items():
        for target in wanted if isinstance(wanted, tuple) else (wanted,):
            found = rows[name]["above plain" if target.above else "percent"]
            judged.append({"variant": name, **asdict(target), "found": found, "met": found["high"] <= target.most})
    gap = points(times, "joint, 1, 77/154", "no adapter, 77/154", "no adapter, 77/154")
    equal = rows["joint, 1"]["percent"]
    found = {"median": gap.median - equal["median"], "high": gap.high - equal["median"], "rounds": gap.rounds}
    judged.append({"variant": "joint, 1, 77/154", "most": 1.0, "above": "joint, 1", "found": found})
    judged[-1]["met"] = found["high"] <= 1.0
    return judged


def show(name: str, result: Mapping[str, Any]) -> None:
    """Prints a case's table."""
    heads = f"{'variant':36}{'ms/step':>9}  {'over its baseline, % [95 %]':32}{'above plain':>24}"
    print(f"\n{name}\n{heads}  {'kernels':>8}{'waits':>6}  held MB")
    for variant, row in result["variants"].items():
        cells = [_cell(row["percent"]), _cell(row["above plain"]) if "above plain" in row else ""]
        asked = row.get("a step on the device", {})
        cells.append(f"{asked['kernels']:8}{asked['waits']:6}" if asked else " " * 14)
        held = f"{row['held bytes'] / 1e6:8.1f}" if row.get("held bytes") else ""
        if "K/V bytes" in row and held:
            held += f" (K/V {row['K/V bytes'] / 1e6:.1f})"
        print(f"{variant:36}{row['ms']:9.2f}  {cells[0]:32}{cells[1]:>24}  {cells[2]}  {held}", flush=True)
    for target in result["targets"]:
        above = f" above {target['above']}" if target["above"] else ""
        word = "met" if target["met"] else "NOT met"
        print(f"  at most {target['most']:+.1f}{above}: {target['variant']}: {word} ({target['found']['high']:+.2f})")


def _cell(summary: Mapping[str, float]) -> str:
    return f"{summary['median']:+7.2f} [{summary['low']:+.2f}, {summary['high']:+.2f}] n={summary['rounds']:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser("dev.py bench", description="What an image prompt costs; see tests/bench.")
    parser.add_argument("--gpu", action="store_true", help="run on the GPU, in half precision")
    parser.add_argument("--small", action="store_true", help="UNets of toy size: shows that it runs, measures nothing")
    parser.add_argument("--cases", help="comma-separated; default: all of the device's")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the JSON and the plot")
    parser.add_argument("--rounds", type=int, help="rounds of every case, in place of its own number")
    given = parser.parse_args(argv)
    cases = SMALL_CASES if given.small else GPU_CASES if given.gpu else CPU_CASES
    chosen = given.cases.split(",") if given.cases else [*cases, PREPARATION]
    device = torch.device("cuda", torch.cuda.current_device()) if given.gpu else torch.device("cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if given.gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "cases": {},
    }
    print(", ".join(f"{key} {value}" for key, value in results.items() if key != "cases"))
    for name in chosen:
        if name == PREPARATION:
            results[PREPARATION] = measure_preparation(device, given.small)
        else:
            case = cases[name]
            if given.rounds:
                case = Case(**{**asdict(case), "rounds": given.rounds})
            results["cases"][name] = run_case(case, device)
            show(name, results["cases"][name])
        gc.collect()
        if given.gpu:
            torch.cuda.empty_cache()
        # Written after each, so that nothing measured is lost.
        (given.out / "bench.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (given.out / "bench.md").write_text(markdown(results), encoding="utf-8")
    draw(results, given.out / "bench.png")


if __name__ == "__main__":
    main()

"""What image prompts do to the small model's pictures: ``python -m tests.demo_model.evaluate --out FOLDER``.

200 held-out references, every weight and stop, both adapters, both formulations, by the extension's own engine (see
``steering``). A classifier whose own accuracy is in the same table says what a picture shows. Writes ``results.json``
as it goes, then ``table.md``, ``strip.png``, and the plots where matplotlib is there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "tests.demo_model"

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lib_ipadapter.layer_weights import SD, TYPES

from .captions import choose_phrases
from .clip import IMAGE_SIZE
from .files import save_png, sheet
from .sampling import held_out_scenes, judged
from .scenes import Scenes, render, sample
from .steering import Model, Steering, as_pictures

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
ADAPTERS, FORMS = ("plus", "base"), ("decoupled", "joint")
MEASURED = ("shape and colour", "colour", "texture", "shape", "background")
SHOWN = 8
_ONE_BY_ONE = [name for name, kind in TYPES.items() if any(group.swapped for group in kind.tables[SD])]
"""Layer types that give the cond row's picture to the uncond row, of which a batch of many prompts has but one."""


@dataclass(frozen=True)
class Subject:
    """What all conditions are measured on: references and their scenes, and prompts that say something else."""

    scenes: Scenes
    references: list[Image.Image]
    prompted: Scenes
    captions: Tensor

    @staticmethod
    def make(model: Model, count: int, seed: int = 20251125) -> Subject:
        """``count`` held-out references, always the same for one seed and device kind."""
        generator = torch.Generator(model.device).manual_seed(seed)
        scenes = held_out_scenes(count, generator)
        prompted = sample(count, generator, simple=True)
        captions = model.store.tokens(choose_phrases(prompted, generator, full=True))
        return Subject(scenes, as_pictures(render(scenes, IMAGE_SIZE)), prompted, captions)


def standard_error(share: float, count: int) -> float:
    """Of a share of ``count`` independent pictures."""
    return math.sqrt(max(share * (1 - share), 0.25 / count) / count)


class Evaluation:
    """All measures, kept as they are made.

    Args:
        model: what draws.
        subject: what it is measured on.
        steps: of sampling.
        done: told of every measure.
    """

    def __init__(
        self, model: Model, subject: Subject, steps: int = 25, done: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> None:
        self.model, self.subject, self.steps, self._done = model, subject, steps, done
        self.results: list[dict[str, Any]] = []
        self.shown: dict[str, Tensor] = {}
        # kept, since what the model remembers of a list goes by its identity
        self._alone = [[each] for each in subject.references]

    @property
    def count(self) -> int:
        return len(self.subject.references)

    def draw(self, steering: Steering | None, prompted: bool = False, seed: int = 1) -> Tensor:
        """A picture for each reference."""
        captions = self.subject.captions if prompted else None
        references = self.subject.references
        if steering is None or steering.layers not in _ONE_BY_ONE:
            return self.model.draw(seed, captions, references, steering, self.count, self.steps)
        made = []
        for n, alone in enumerate(self._alone):
            caption = None if captions is None else captions[n : n + 1]
            made.append(self.model.draw(1000 * seed + n, caption, alone, steering, 1, self.steps))
        return torch.cat(made)

    def measure(self, name: str, steering: Steering | None, prompted: bool = False) -> dict[str, float]:
        """Shares of pictures that show what the reference shows, or what the prompt says where there is one."""
        pictures = self.draw(steering, prompted)
        scenes = self.subject.prompted if prompted else self.subject.scenes
        shares = judged(self.model.store.judge, pictures, scenes)
        self.shown[name if steering is None else f"{name} {steering}"] = pictures[:SHOWN].cpu()
        self._keep(name, steering, shares)
        return shares

    def diversity(self, steering: Steering | None) -> float:
        """Mean distance of pixels between pictures of one reference and different seeds, 0..1."""
        first, second = (self.draw(steering, seed=seed) for seed in (1, 2))
        distance = float((first - second).abs().mean())
        self._keep("diversity over seeds", steering, {"distance": round(distance, 4)})
        return distance

    def _keep(self, name: str, steering: Steering | None, values: dict[str, float]) -> None:
        entry = {"measure": name, "steering": None if steering is None else asdict(steering), **values}
        self.results.append(entry)
        self._done(entry)

    def judge(self) -> dict[str, float]:
        """The classifier's own accuracy, on the references and on what the VAE makes of them."""
        drawn = render(self.subject.scenes, 128)
        shares = judged(self.model.store.judge, drawn, self.subject.scenes)
        self._keep("the judge on drawn scenes", None, shares)
        vae = self.model.store.vae
        back = torch.cat([vae.decode(vae.encode(part)) for part in (drawn * 2 - 1).split(50)]) / 2 + 0.5
        self._keep(
            "the judge behind the VAE", None, judged(self.model.store.judge, back.clamp(0, 1), self.subject.scenes)
        )
        return shares

    def layer_types(self) -> None:
        """What each layer type takes of the reference, plus decoupled; and what it leaves of the prompt."""
        for name, kind in TYPES.items():
            if not kind.pictures:
                self.measure("reference", Steering("plus", layers=name))
        for name in ("all", "style", "composition", "strong style", "strong composition"):
            self.measure("text", Steering("plus", weight=1.0, layers=name), prompted=True)

    def everything(self) -> None:
        """All conditions, the most telling first."""
        self.judge()
        self.measure("reference", None)
        self.measure("text", None, prompted=True)
        for form in FORMS:
            for weight in WEIGHTS[1:]:
                self.measure("reference", Steering("plus", form, weight))
        for form in FORMS:
            for stop in STOPS[1:-1]:
                self.measure("reference", Steering("plus", form, 1.0, stop))
            self.measure("text", Steering("plus", form, 0.5), prompted=True)
            self.measure("reference", Steering("plus", form, 1.0, negative="reference"))
            self.diversity(Steering("plus", form))
        self.diversity(None)
        for form in FORMS:
            for weight in WEIGHTS[1:]:
                self.measure("reference", Steering("base", form, weight))
            self.measure("text", Steering("base", form, 0.5), prompted=True)


PARTS: dict[str, Callable[[Evaluation], None]] = {
    "everything": Evaluation.everything,
    "layer types": Evaluation.layer_types,
}
"""By name on the command line."""


def layout(pictures: Tensor, photograph: Image.Image) -> Tensor:
    """How much of a photograph's coarse layout pictures have: correlation of their 4 x 4 mean colours, ``[N]``."""
    side = min(photograph.size)
    left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
    square = photograph.convert("RGB").crop((left, top, left + side, top + side)).resize((128, 128))
    values = torch.tensor(list(square.tobytes()), dtype=torch.float32).view(1, 128, 128, 3).permute(0, 3, 1, 2) / 255
    grids = [F.adaptive_avg_pool2d(each.cpu(), 4).flatten(1) for each in (values, pictures)]
    of, have = (each - each.mean(1, keepdim=True) for each in grids)
    return (of * have).sum(1) / (of.norm() * have.norm(dim=1)).clamp(min=1e-6)


def table(results: Sequence[dict[str, Any]], count: int) -> str:
    """The results as Markdown; shares in percent with the standard error of the first column."""
    lines = [f"| what | steering | {' | '.join(MEASURED)} |", "|---|---|" + "---|" * len(MEASURED)]
    for entry in results:
        steering = entry["steering"]
        how = "none"
        if steering is not None:
            how = f"{steering['adapter']}, {steering['formulation']}, weight {steering['weight']:g}"
            how += "" if steering["stop"] == 1 else f", stop {steering['stop']:g}"
            how += "" if steering.get("layers", "all") == "all" else f", {steering['layers']} layers"
            how += "" if steering["negative"] == "auto" else ", the reference as negative"
        if "distance" in entry:
            lines.append(f"| {entry['measure']} | {how} | {entry['distance']:.3f} |" + " |" * (len(MEASURED) - 1))
            continue
        cells = [f"{100 * entry[name]:.1f}" for name in MEASURED]
        cells[0] += f" ± {100 * standard_error(entry[MEASURED[0]], count):.1f}"
        lines.append(f"| {entry['measure']} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo_model.evaluate", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for table, plots and strip")
    parser.add_argument("--references", type=int, default=200)
    parser.add_argument("--only", choices=list(PARTS), default="everything", help="the part that is measured")
    parser.add_argument("--steps", type=int, default=25, help="of sampling")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plots-of", type=Path, help="no measuring: draw the plots of this results.json")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    file: Path = args.out / "results.json"
    if args.plots_of is not None:
        known = json.loads(args.plots_of.read_text(encoding="utf-8"))
    else:
        started = time.monotonic()
        model = Model(torch.device(args.device))
        subject = Subject.make(model, args.references)
        known = {"references": args.references, "steps": args.steps, "device": args.device, "results": []}

        def done(entry: dict[str, Any]) -> None:
            known["results"].append(entry)
            if entry["measure"] == "reference":
                _strip(evaluation, args.out / "strip.png")
            file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(
                f"{time.monotonic() - started:6.1f} s  {table([entry], args.references).splitlines()[-1]}", flush=True
            )

        evaluation = Evaluation(model, subject, args.steps, done)
        PARTS[args.only](evaluation)
    (args.out / "table.md").write_text(table(known["results"], known["references"]), encoding="utf-8")
    if args.only != "everything":  # what the plots compare isn't there
        return 0
    try:
        from .plots import plots
    except ImportError:
        print("matplotlib isn't there: draw the plots elsewhere with --plots-of results.json", flush=True)
        return 0
    plots(known, args.out)
    return 0


def _strip(evaluation: Evaluation, path: Path) -> None:
    """References, then what plus makes of them: weights from 0 up, decoupled; joint; half the schedule."""
    references = render(evaluation.subject.scenes, IMAGE_SIZE)[:SHOWN].cpu()
    wanted = [Steering("plus", "decoupled", weight) for weight in WEIGHTS[1:]]
    wanted += [Steering("plus", "joint"), replace(Steering("plus", "decoupled"), stop=0.5)]
    names = ["reference", *(f"reference {steering}" for steering in wanted)]
    if names[-1] == list(evaluation.shown)[-1]:  # the last of them has just been drawn
        rows = [F.interpolate(references, size=(128, 128), mode="area"), *(evaluation.shown[name] for name in names)]
        save_png(sheet(torch.cat(rows), SHOWN), path)


if __name__ == "__main__":
    sys.exit(main())

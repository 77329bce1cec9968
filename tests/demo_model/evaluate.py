"""What the trained model does, in numbers: ``python tests/demo_model/evaluate.py --out FOLDER``.

Pictures are drawn with the extension's engine and told by the judge. Written are ``results.json`` after every
measure, a table and plots. ``--plots-of FOLDER`` writes the last two anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.demo_model.captions import choose_phrases
from tests.demo_model.clip import ATTRIBUTES, IMAGE_SIZE
from tests.demo_model.files import save_png, sheet
from tests.demo_model.painter import STEPS, Painter, Reference, as_images, noise_of
from tests.demo_model.plots import write_report
from tests.demo_model.sampling import held_out_scenes
from tests.demo_model.scenes import Scenes, render, sample

SEED = 2026
WEIGHTS_TRIED = (0.25, 0.5, 0.75, 1.0, 1.25)
STOPS_TRIED = (0.25, 0.5, 0.75)
"""Between 0, which is no adapter, and 1, which is the whole."""
FORMULATIONS = ("decoupled", "joint")
SEEDS_EACH = 8
"""Pictures by one reference, for the diversity over seeds."""
SHOWN = 8
TOLD = ("shape", "colour", "texture", "background", "size", "place")

Row = dict[str, Any]


def right(painter: Painter, pictures: Tensor, scenes: Scenes) -> dict[str, Tensor]:
    """Of each attribute which pictures the judge finds to be like the scenes, booleans ``[B]`` on the CPU."""
    answers = [torch.cat(parts).argmax(1).cpu() for parts in zip(*map(painter.judge, pictures.split(256)), strict=True)]
    found = {name: answers[n] == getattr(scenes, name).cpu() for n, name in enumerate(ATTRIBUTES) if name in TOLD}
    found["shape and colour"] = found["shape"] & found["colour"]
    return found


def shares(found: dict[str, Tensor]) -> dict[str, float]:
    """The share of each."""
    return {name: round(float(each.float().mean()), 4) for name, each in found.items()}


def standard_error(share: float, count: int) -> float:
    """Of a share of ``count`` pictures. Never 0: as if one picture in two hundred were otherwise, at least."""
    share = min(max(share, 1 / 200), 199 / 200)
    return (share * (1 - share) / count) ** 0.5


@dataclass(frozen=True)
class Material:
    """References of held-out combinations, prompts and noise; the same on every device."""

    scenes: Scenes
    pictures: Tensor
    """As the encoder gets them, ``[N, 3, 224, 224]``."""
    noise: Tensor
    other: Scenes
    """What prompts speak of that have nothing to do with the references."""
    prompts: Tensor
    """Of ``other``."""
    agreeing: Tensor
    """Of ``scenes``."""
    empty: Tensor

    @staticmethod
    def of(painter: Painter, count: int, seed: int = SEED) -> Material:
        """``count`` of them."""
        generator = torch.Generator().manual_seed(seed)
        scenes = held_out_scenes(count, generator)
        other = sample(count, generator, simple=True)
        tokens = [painter.tokens(choose_phrases(each, generator, full=True)) for each in (other, scenes)]
        noise = noise_of(count, seed + 1)
        return Material(scenes, render(scenes, IMAGE_SIZE), noise, other, *tokens, painter.tokens.empty(count))

    def first(self, count: int) -> Material:
        """The first of them."""
        return Material(*(_first(getattr(self, f.name), count) for f in fields(self)))


def _first(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:count]
    return replace(value, **{f.name: getattr(value, f.name)[:count] for f in fields(value)})


class Evaluation:
    """All measures, one after the other.

    Args:
        painter: draws and judges.
        material: what by.
        steps: of the sampler.
        keep: is given all rows whenever there is a new one.
    """

    def __init__(
        self, painter: Painter, material: Material, steps: int = STEPS, keep: Callable[[list[Row]], None] | None = None
    ) -> None:
        self.painter, self.material, self.steps = painter, material, steps
        self.rows: list[Row] = []
        self.strips: dict[str, list[Tensor]] = {}
        self._keep = keep or (lambda rows: None)
        self._pictures = as_images(material.pictures)

    def reference(self, kind: str) -> Reference:
        """The references through an adapter, at weight 1."""
        adapter = self.painter.adapter(kind)
        conds = self.painter.image_kv(adapter, self._pictures)
        return Reference(conds, self.painter.no_image_kv(adapter, len(conds)))

    def draw(self, reference: Reference | None, tokens: Tensor | None = None) -> Tensor:
        """A picture for each reference, by an empty prompt unless one is given."""
        tokens = self.material.empty if tokens is None else tokens
        return self.painter.draw(tokens, self.material.noise, reference, self.steps)

    def note(self, group: str, told: Tensor, scenes: Scenes, **what: Any) -> Row:
        """A row of the table."""
        row = {"group": group, **what, "count": len(told), **shares(right(self.painter, told, scenes))}
        self.rows.append(row)
        self._keep(self.rows)
        facts = " ".join(f"{value}" for value in what.values())
        print(f"{group}: {facts}: shape and colour {row['shape and colour']:.3f}", flush=True)
        return row

    def all(self) -> None:
        """Everything."""
        self.judge_itself()
        nothing = self.draw(None)
        self.note("weight", nothing, self.material.scenes, adapter="", formulation="", weight=0.0, stop=1.0)
        self.text_alone()
        for kind in ("plus", "base"):
            reference = self.reference(kind)
            for formulation in FORMULATIONS:
                self.by_weight(kind, replace(reference, formulation=formulation), nothing)
                self.by_stop(kind, replace(reference, formulation=formulation), nothing)
                self.by_negative(kind, replace(reference, formulation=formulation))
                self.text_with(kind, replace(reference, formulation=formulation, weight=0.5))
        self.diversity()

    def judge_itself(self) -> None:
        """How often the judge is right on the references themselves, and after the VAE, which all pictures pass."""
        scenes, painter = self.material.scenes, self.painter
        drawn = render(scenes, 128).to(painter.device)
        self.note("judge", drawn, scenes, what="on the references themselves")
        with torch.no_grad():
            back = [painter.vae.decode(painter.vae.encode(part * 2 - 1)) / 2 + 0.5 for part in drawn.split(64)]
        self.note("judge", torch.cat(back).clamp(0, 1), scenes, what="on the references after VAE and back")

    def by_weight(self, kind: str, reference: Reference, nothing: Tensor) -> None:
        """Adherence to the reference."""
        strip = [_small(self.material.pictures), nothing[:SHOWN].cpu()]
        for weight in WEIGHTS_TRIED:
            pictures = self.draw(replace(reference, weight=weight))
            self._note("weight", pictures, kind, replace(reference, weight=weight))
            strip.append(pictures[:SHOWN].cpu())
        self.strips[f"{kind}, {reference.formulation}, weight 0 to 1.25"] = strip

    def by_stop(self, kind: str, reference: Reference, nothing: Tensor) -> None:
        """The same at weight 1, up to a part of the noise schedule."""
        strip = [_small(self.material.pictures), nothing[:SHOWN].cpu()]
        for stop in STOPS_TRIED:
            pictures = self.draw(replace(reference, stop=stop))
            self._note("stop", pictures, kind, replace(reference, stop=stop))
            strip.append(pictures[:SHOWN].cpu())
        self.strips[f"{kind}, {reference.formulation}, stop 0 to 0.75"] = strip

    def _note(self, group: str, pictures: Tensor, kind: str, r: Reference, **what: Any) -> None:
        facts = {"adapter": kind, "formulation": r.formulation, "weight": r.weight, "stop": r.stop}
        self.note(group, pictures, self.material.scenes, **facts, **what)

    def by_negative(self, kind: str, reference: Reference) -> None:
        """What the rows without the prompt see instead of no picture."""
        for name, unconds in wrong_negatives(reference.conds).items():
            self._note("negative", self.draw(replace(reference, unconds=unconds)), kind, reference, negative=name)

    def text_alone(self) -> None:
        """Adherence to a prompt."""
        m = self.material
        self.note("text", self.draw(None, m.prompts), m.other, what="any combination, no reference")
        self.note("text", self.draw(None, m.agreeing), m.scenes, what="held-out combinations, no reference")

    def text_with(self, kind: str, reference: Reference) -> None:
        """Adherence to a prompt while a reference acts that says the same, or something else."""
        m = self.material
        facts = {"adapter": kind, "formulation": reference.formulation, "weight": reference.weight}
        self.note("text", self.draw(reference, m.prompts), m.other, **facts, what="reference of something else")
        self.note("text", self.draw(reference, m.agreeing), m.scenes, **facts, what="reference of the same")

    def diversity(self) -> None:
        """How far pictures by one reference differ, from seed to seed."""
        every = torch.arange(len(self.material.noise)) // SEEDS_EACH * SEEDS_EACH
        self._note_diversity(self.draw(None), every, adapter="", formulation="", weight=0.0)
        for kind, formulation, weight in VARIED:
            found = self.reference(kind)
            conds = [found.conds[n] for n in every.tolist()]
            one = replace(found, conds=_apart(conds), formulation=formulation, weight=weight)
            facts = {"adapter": kind, "formulation": formulation, "weight": weight}
            self._note_diversity(self.draw(one), every, **facts)

    def _note_diversity(self, pictures: Tensor, every: Tensor, **facts: Any) -> None:
        scenes = self.material.scenes
        by_one = replace(scenes, **{f.name: getattr(scenes, f.name)[every] for f in fields(scenes)})
        whole = len(pictures) // SEEDS_EACH * SEEDS_EACH
        small = F.avg_pool2d(pictures[:whole], 4).unflatten(0, (-1, SEEDS_EACH))
        apart = (small[:, :, None] - small[:, None]).abs().mean((3, 4, 5)).sum((1, 2)) / SEEDS_EACH / (SEEDS_EACH - 1)
        row = self.note("diversity", pictures, by_one, **facts)
        row["difference"] = round(float(apart.mean()), 4)
        row["difference error"] = round(float(apart.std() / len(apart) ** 0.5), 4) if len(apart) > 1 else 0.0
        self._keep(self.rows)


VARIED = (
    ("plus", "decoupled", 0.5),
    ("plus", "decoupled", 1.0),
    ("plus", "decoupled", 1.25),
    ("plus", "joint", 1.0),
    ("base", "decoupled", 1.0),
)
"""Adapter, formulation and weight of the diversity's rows."""


def wrong_negatives(conds: Sequence[Any]) -> dict[str, list[Any]]:
    """K and V for the rows without the prompt that are not those of no picture."""
    return {
        "another picture": _apart([*conds[1:], conds[0]]),
        "the reference itself": _apart(conds),
        "none": [],
    }


def _apart(images: Sequence[Any]) -> list[Any]:
    """As objects of their own: the engine keeps what is one object once."""
    return [replace(image) for image in images]


def _small(pictures: Tensor) -> Tensor:
    return F.interpolate(pictures[:SHOWN], size=(128, 128), mode="area")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.demo_model.evaluate", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="the folder to write to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=200, help="held-out references")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the sampler")
    parser.add_argument("--plots-of", type=Path, help="write table and plots of an earlier run's folder anew")
    args = parser.parse_args(argv)
    if args.plots_of is not None:
        write_report(json.loads((args.plots_of / "results.json").read_text(encoding="utf-8")), args.plots_of)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    facts = {"count": args.count, "steps": args.steps, "seed": SEED, "torch": torch.__version__, "device": _name(args)}

    def keep(rows: list[Row]) -> None:
        seconds = round(time.perf_counter() - started, 1)
        text = json.dumps({**facts, "seconds": seconds, "rows": rows}, indent=1) + "\n"
        (args.out / "results.json").write_text(text, encoding="utf-8")

    painter = Painter(args.device)
    evaluation = Evaluation(painter, Material.of(painter, args.count), args.steps, keep)
    try:
        evaluation.all()
    finally:
        for name, strip in evaluation.strips.items():
            columns = min(SHOWN, args.count)
            save_png(sheet(torch.cat(strip), columns), args.out / f"{name.replace(', ', '-').replace(' ', '-')}.png")
        if evaluation.rows:
            write_report(json.loads((args.out / "results.json").read_text(encoding="utf-8")), args.out)
    return 0


def _name(args: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device


if __name__ == "__main__":
    sys.exit(main())

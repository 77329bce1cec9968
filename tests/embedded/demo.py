"""``dev.py demo``: the page of the embedded host, or one picture strip without a page.

The strip has three equal panels: the reference as the image encoder sees it, the picture without it, the picture with
it, both of the same seed. A JSON file beside it holds every setting and timing.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.pictures import prepare, read_picture
from lib_ipadapter.units import Unit
from tests.demo_model.install import NAME, install

from . import Host
from .demo_models import make_demo_models
from .shapes import SHAPES

TITLE = "IP-Adapter"
TRAINED = "trained"
WEIGHTS = Path(__file__).resolve().parent.parent / "demo_model" / "weights"
"""A checkpoint with its tokeniser, the image encoder and two adapters, trained on drawn scenes; see there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    page = parser.add_argument_group("with the page")
    page.add_argument("--port", type=int, default=7860, help="port of page and API; 0: a free one")
    page.add_argument("--address", default="127.0.0.1", help="address to listen on")
    strip = parser.add_argument_group("without a page")
    strip.add_argument("--image", type=Path, help="the reference picture")
    strip.add_argument("--prompt", default="", help="what to draw")
    strip.add_argument("--out", type=Path, default=Path("out.png"), help="where the strip goes, as a PNG")
    strip.add_argument("--negative-prompt", default="")
    strip.add_argument("--steps", type=int, default=20)
    strip.add_argument("--seed", type=int, default=1)
    strip.add_argument("--cfg-scale", type=float, default=4.0)
    strip.add_argument("--size", type=int, default=128, help="width and height of a panel, a multiple of 64")
    unit = parser.add_argument_group("the image prompt")
    unit.add_argument("--weight", type=float, default=1.0)
    unit.add_argument("--start", type=float, default=0.0)
    unit.add_argument("--stop", type=float, default=1.0)
    unit.add_argument(
        "--formulation", default="decoupled", help="the trained adapter was trained for the decoupled one"
    )
    unit.add_argument("--preparation", default="crop")
    unit.add_argument("--adapter", choices=("base", "plus"), default="plus", help="kind of the demo adapter")
    parser.add_argument(
        "--install", type=Path, metavar="WEBUI", help="put the trained model into this AUTOMATIC1111's folders, no more"
    )
    parser.add_argument(
        "--model",
        choices=(TRAINED, *sorted(SHAPES)),
        default=TRAINED,
        help="the trained one, which draws shapes, or random ones of SD1.5's or SDXL's layout",
    )
    args = parser.parse_args(argv)
    if args.size < 64 or args.size % 64:
        parser.error(f"--size is {args.size}; it must be a multiple of 64")
    if args.install is not None:
        return _install(args.install)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        models = Path(temporary, "models")
        try:
            return _page(args, models) if args.image is None else _strip(args, models)
        except (IPAdapterError, OSError) as error:
            print(f"dev.py demo: {error}", file=sys.stderr)
            return 1


def _install(webui: Path) -> int:
    try:
        written = install(webui)
    except (IPAdapterError, OSError) as error:
        print(f"dev.py demo: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"Wrote {path}.")
    print(f"Choose the checkpoint {NAME}, 128 x 128 pixels and CFG scale 4; in the accordion demo-plus and decoupled.")
    return 0


def trained_models(folder: Path) -> Path:
    """Puts the trained image encoder and adapters into a folder of models, where the extension finds them."""
    for source, place in (("demo-plus", "ipadapter"), ("demo-base", "ipadapter"), ("demo-vision", "clip_vision")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(WEIGHTS / f"{source}.safetensors", folder / place / f"{source}.safetensors")
    return folder


def make_host(model: str, folder: Path) -> Host:
    """The host with a model of the demo.

    Args:
        model: the trained one, or the shape of random ones.
        folder: an empty one, for the files of adapters and image encoder.
    """
    if model == TRAINED:
        checkpoint = WEIGHTS / "demo.safetensors"
        return Host(models_path=trained_models(folder), checkpoint=checkpoint, verbose=True)
    print("Making the small random models …", flush=True)
    return Host(model, models_path=make_demo_models(folder).models_path, verbose=True)


def _page(args: argparse.Namespace, models: Path) -> int:
    with make_host(args.model, models) as host:
        print(f"Open {host.launch(args.port, args.address)} in a browser (Ctrl+C ends it).", flush=True)
        if args.model == TRAINED:
            print(
                "It draws shapes, best at 128 x 128: 'a small red circle on blue', 'a heart' with a picture.",
                flush=True,
            )
            print(
                "Formulation 'decoupled', under Advanced, shows most of a picture: that is how it was trained.",
                flush=True,
            )
        else:
            print("The models are random: pictures show that a reference acts, not what it shows.", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return 0


def _strip(args: argparse.Namespace, models: Path) -> int:
    started = time.perf_counter()
    reference = read_picture(args.image)
    unit: dict[str, Any] = {
        "model": f"demo-{args.adapter}{'' if args.model == TRAINED else f'-{args.model}'}.safetensors",
        "images": [base64.b64encode(args.image.read_bytes()).decode()],
        "weight": args.weight,
        "start": args.start,
        "stop": args.stop,
        "formulation": args.formulation,
        "preparation": args.preparation,
    }
    Unit.from_json(unit)  # a wrong setting is said before anything is drawn
    request = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "steps": args.steps,
        "seed": args.seed,
        "cfg_scale": args.cfg_scale,
        "width": args.size,
        "height": args.size,
    }
    with make_host(args.model, models) as host:
        ready = time.perf_counter()
        print("Without the reference:", flush=True)
        plain = host.txt2img(**request)
        between = time.perf_counter()
        print("With the reference:", flush=True)
        steered = host.txt2img(**request, alwayson_scripts={TITLE: {"args": [True, unit]}})
        done = time.perf_counter()
    panels = [prepare(reference, args.preparation), plain.image, steered.image]
    strip = Image.new("RGB", (3 * args.size, args.size))
    for number, panel in enumerate(panels):
        strip.paste(
            panel.convert("RGB").resize((args.size, args.size), Image.Resampling.BICUBIC), (number * args.size, 0)
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    strip.save(args.out, format="PNG")
    report = {
        "image": str(args.image),
        "request": request,
        "unit": {**unit, "images": [f"{args.image.name}, {reference.width} x {reference.height}"]},
        "infotext": {"plain": plain.infotexts[0], "steered": steered.infotexts[0]},
        "seconds": {
            "start the host": round(ready - started, 3),
            "plain picture": round(between - ready, 3),
            "steered picture": round(done - between, 3),
        },
    }
    settings = args.out.with_suffix(".json")
    settings.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Wrote {args.out} and {settings}.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

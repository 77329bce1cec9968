"""What the first generation with a picture costs before sampling, and the second: files, encoder, projection, K/V."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn

from lib_ipadapter import references
from lib_ipadapter.clip_vision import load_clip_vision
from lib_ipadapter.refs import ImageRef
from lib_ipadapter.session import Session
from lib_ipadapter.units import Unit
from tests.adapter_files import save
from tests.checkpoints import image_encoder, write_random

from .unets import FAMILIES, make_unet
from .variants import BenchHost, job, random_adapter

MEGAPIXEL = (1024, 1024)
ROUNDS = 5
"""Of the first generation, each in a new session and followed by what it is compared with, and of the second; the
median is reported."""

_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


class CountingHost(BenchHost):
    """Counts what runs on the device."""

    runs = 0

    def run(self, module: nn.Module, function: Callable[[torch.device, torch.dtype], Any]) -> Any:
        """See :class:`.variants.BenchHost`."""
        self.runs += 1
        return super().run(module, function)


def _picture(number: int) -> str:
    """A photograph-like picture of one megapixel, uploaded; its hash."""
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(number))
    small = Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy())
    return references.add(small.resize(MEGAPIXEL, Image.Resampling.BICUBIC))


def measure_preparation(device: torch.device, small: bool) -> dict[str, Any]:
    """Milliseconds of the callbacks before sampling, by generation, and what each did."""
    global _opened
    sys.addaudithook(_audit)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    family = FAMILIES["small-sdxl" if small else "sdxl"]
    unet = make_unet(family, device, dtype, torch.device("meta"))
    results: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        host = CountingHost(device, dtype, Path(folder))
        info = host.unet_info(job(unet))
        tower = image_encoder(128, 2, 256, 128) if small else image_encoder()
        encoder, adapter = Path(folder) / "encoder.safetensors", Path(folder) / "adapter.safetensors"
        write_random(encoder, tower, seed=1)
        save(random_adapter(family, info), adapter, torch.float16)
        session = Session(host)
        _yardstick(encoder, adapter, device, dtype)  # the device's libraries start, the files are in memory

        def generation(
            name: str, pictures: tuple[int, ...], weight: float = 0.8, received: bool = False, decodes: bool = False
        ) -> None:
            global _opened
            shas = [_picture(number) for number in pictures]
            start = time.perf_counter()
            decoded = [references.get(sha) for sha in shas]
            decoding = (time.perf_counter() - start) * 1e3
            images = tuple(
                ImageRef(data=_base64(one)) if received else ImageRef(sha256=references.add(one)) for one in decoded
            )
            p = job(unet)
            p.sampler = SimpleNamespace(sample=lambda *_: None, sample_img2img=lambda *_: None)
            unit = Unit(model="adapter.safetensors", images=images, weight=weight)
            host.runs, _opened = 0, []
            spans = {}
            for step, function in (
                ("begin", lambda: session.begin(p)),
                ("prepare", lambda: session.prepare(p, [unit])),
                ("attach", lambda: session.attach(p)),
            ):
                _synchronize(device)
                start = time.perf_counter()
                with torch.inference_mode():
                    function()
                _synchronize(device)
                spans[step] = (time.perf_counter() - start) * 1e3
            session.end(p)
            opened, _opened = len(_opened), None
            total = sum(spans.values())
            results[name] = {
                **spans,
                "decoding": decoding,
                "without decoding": total - decoding if decodes else total,
                "runs of modules": host.runs,
                "files opened": opened,
            }
            if device.type == "cuda":
                results[name]["device bytes left"] = torch.cuda.memory_allocated()
            words = ", ".join(f"{key} {value:.1f}" for key, value in results[name].items())
            print(f"{name}: {words}", flush=True)

        first = []
        for n in range(ROUNDS):
            session = Session(host)
            generation("first", (1,), decodes=True)
            first.append({**results["first"], "yardstick": _yardstick(encoder, adapter, device, dtype)})
            times = first[-1]["without decoding"] / sum(first[-1]["yardstick"].values())
            first[-1]["times the yardstick"] = times
            words = ", ".join(f"{key} {value:.1f}" for key, value in first[-1]["yardstick"].items())
            print(f"yardstick: {words}; first: {times:.2f} times", flush=True)
            if n < ROUNDS - 1:
                session.close()
        results["first"] = sorted(first, key=lambda each: each["times the yardstick"])[ROUNDS // 2]
        results["first"]["all rounds"] = [each["times the yardstick"] for each in first]
        second = []
        for _ in range(ROUNDS):
            generation("second", (1,))
            second.append(results["second"])
        results["second"] = sorted(second, key=lambda each: each["without decoding"])[ROUNDS // 2]
        generation("same picture, other weight", (1,), 0.6)
        generation("same picture, as base64", (1,), received=True, decodes=True)
        generation("the same base64 again", (1,), received=True)
        generation("another picture", (2,), decodes=True)
        generation("four new pictures", (3, 4, 5, 6), decodes=True)
        generation("four pictures again", (3, 4, 5, 6))
        session.close()
    return results


def _base64(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


@torch.inference_mode()
def _yardstick(encoder: Path, adapter: Path, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of what no first generation can spare: both files read into new memory, and the encoder's forward.

    The forward is of the picture and of the one that stands for none; module and pixels are on the device before.
    """
    start = time.perf_counter()
    for path in (encoder, adapter):
        with path.open("rb") as file:
            data = torch.empty(path.stat().st_size, dtype=torch.uint8)
            assert file.readinto(data.numpy().data) == len(data)  # type: ignore[attr-defined]
        del data
    reading = time.perf_counter() - start
    tower = load_clip_vision(encoder).to(device, dtype)
    for block in tower.blocks:  # which otherwise come one by one, in the forward
        block.to(device, dtype)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(2):
        tower(pixels)
    _synchronize(device)
    return {"reading both files": reading * 1e3, "forward of the encoder, twice": (time.perf_counter() - start) * 1e3}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

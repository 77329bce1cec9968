"""What the first generation with a picture costs before sampling, and the second: files, encoder, projection, K/V."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn

from lib_ipadapter import uploads
from lib_ipadapter.session import Session
from lib_ipadapter.units import ImageRef, Unit
from tests.adapter_files import save
from tests.checkpoints import image_encoder, write_random

from .unets import FAMILIES, Sampling, make_unet
from .variants import BenchHost, job, random_adapter

MEGAPIXEL = (1024, 1024)

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
    return uploads.add(small.resize(MEGAPIXEL, Image.Resampling.BICUBIC))


def measure_preparation(device: torch.device, small: bool) -> dict[str, Any]:
    """Milliseconds of the callbacks before sampling, by generation, and what each did."""
    global _opened
    sys.addaudithook(_audit)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    family = FAMILIES["small-sdxl" if small else "sdxl" if device.type == "cuda" else "sd15-256"]
    sampling = Sampling(make_unet(family, device, dtype), family, 1)
    results: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        host = CountingHost(device, dtype, Path(folder))
        info = host.unet_info(job(sampling.unet))
        tower = image_encoder(128, 2, 256, 128) if small else image_encoder()
        write_random(Path(folder) / "encoder.safetensors", tower, seed=1)
        save(random_adapter(sampling, info), Path(folder) / "adapter.safetensors", torch.float16)
        session = Session(host)

        def generation(name: str, pictures: tuple[int, ...], weight: float = 0.8) -> None:
            global _opened
            shas = [_picture(number) for number in pictures]
            start = time.perf_counter()
            for sha in shas:
                uploads.get(sha)
            decoding = (time.perf_counter() - start) * 1e3
            p = job(sampling.unet)
            p.sampler = SimpleNamespace(sample=lambda *_: None, sample_img2img=lambda *_: None)
            unit = Unit(model="adapter.safetensors", images=tuple(ImageRef(sha256=sha) for sha in shas), weight=weight)
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
                "without decoding": total - decoding if host.runs else total,
                "runs of modules": host.runs,
                "files opened": opened,
            }
            if device.type == "cuda":
                results[name]["device bytes left"] = torch.cuda.memory_allocated()
            words = ", ".join(f"{key} {value:.1f}" for key, value in results[name].items())
            print(f"{name}: {words}", flush=True)

        generation("first", (1,))
        for _ in range(5):
            generation("second", (1,))
        generation("same picture, other weight", (1,), 0.6)
        generation("another picture", (2,))
        generation("four new pictures", (3, 4, 5, 6))
        generation("four pictures again", (3, 4, 5, 6))
        session.close()
    return results


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

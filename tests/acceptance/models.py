"""Random model files for an acceptance run, outside the WebUI. Files that are there already are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import checkpoints
from tests.adapter_files import base_adapter, plus_adapter, save
from tests.checkpoints import Layout, Shapes
from tests.ldm_yaml import ldm_yaml

BUILT_IN_ENCODER = "CLIP-ViT-H-14.safetensors"
"""The name under which Forge's built-in adapter looks for its image encoder."""


@dataclass(frozen=True)
class Models:
    """Folders of one family's files."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    @property
    def encoders(self) -> Path:
        return self.folder / "encoders"

    @property
    def flags(self) -> list[str]:
        """By which the extension finds adapters and encoders."""
        return ["--ip-adapter-models-path", str(self.adapters), "--ip-adapter-encoders-path", str(self.encoders)]

    @property
    def controlnet_flags(self) -> list[str]:
        """By which Forge's built-in adapter finds them."""
        return ["--controlnet-dir", str(self.adapters), "--controlnet-preprocessor-models-dir", str(self.encoders)]


def small_sd15(folder: Path) -> Models:
    """SD1.5 of small width, for AUTOMATIC1111, with a yaml of its own beside each checkpoint."""
    # The text tower keeps its full size: the WebUI builds it from a configuration of its own.
    layout = checkpoints.replace(checkpoints.SMALL_SD15, text_width=768, text_layers=12, context=768)
    models = _models(folder, {"a": checkpoints.sd15_checkpoint(layout), "b": checkpoints.sd15_checkpoint(layout)})
    text = ldm_yaml(layout.width, 768, layout.vae_width)
    for checkpoint in models.checkpoints.glob("*.safetensors"):
        checkpoint.with_suffix(".yaml").write_text(text, encoding="utf-8")
    encoder = checkpoints.image_encoder(width=128, layers=3, mlp=512, projection=128)
    _once(models.encoders / "encoder.safetensors", lambda path: checkpoints.write_random(path, encoder, 3))
    _adapters(models, layout, 768, embedding=128, hidden=128, dim=128, heads=2)
    return models


def full_sd15(folder: Path) -> Models:
    """SD1.5, ViT-H and adapters of true size."""
    shapes = checkpoints.sd15_checkpoint()
    models = _models(folder, {"a": shapes, "b": shapes})
    _vit_h(models)
    _adapters(models, checkpoints.SD15, 768, embedding=1024, hidden=1280, dim=768, heads=12)
    return models


def full_sdxl(folder: Path) -> Models:
    """SDXL, its refiner, ViT-H and adapters of true size."""
    base = checkpoints.sdxl_checkpoint()
    models = _models(folder, {"xl-a": base, "xl-b": base, "xl-refiner": checkpoints.sdxl_refiner_checkpoint()})
    _vit_h(models)
    _adapters(models, checkpoints.SDXL, 2048, embedding=1024, hidden=1280, dim=1280, heads=20)
    sd15: dict[str, Any] = base_adapter(checkpoints.SD15.attention_widths, 768, embedding=1024)
    _once(models.adapters / "acceptance-sd15.safetensors", lambda path: save(sd15, path, torch.float16))
    return models


def _models(folder: Path, made: Mapping[str, Shapes]) -> Models:
    models = Models(folder)
    models.adapters.mkdir(parents=True, exist_ok=True)
    for seed, (name, shapes) in enumerate(made.items(), 1):
        path = models.checkpoints / f"acceptance-{name}.safetensors"
        _once(path, lambda path, shapes=shapes, seed=seed: checkpoints.write_random(path, shapes, seed))  # type: ignore[misc]
    return models


def _vit_h(models: Models) -> None:
    _once(
        models.encoders / "encoder.safetensors",
        lambda path: checkpoints.write_random(path, checkpoints.image_encoder(), 3),
    )
    _once(models.encoders / BUILT_IN_ENCODER, lambda path: os.link(path.with_name("encoder.safetensors"), path))


def _adapters(
    models: Models, layout: Layout, context: int, *, embedding: int, hidden: int, dim: int, heads: int
) -> None:
    widths = layout.attention_widths
    made: dict[str, Callable[[], Any]] = {
        "base": lambda: base_adapter(widths, context, embedding=embedding),
        "plus": lambda: plus_adapter(widths, context, embedding=hidden, dim=dim, heads=heads),
    }
    for name, make in made.items():
        path = models.adapters / f"acceptance-{name}.safetensors"
        _once(path, lambda path, make=make: save(make(), path, torch.float16))  # type: ignore[misc]


def _once(path: Path, write: Callable[[Path], Any]) -> None:
    if not path.exists():
        print(f"making {path.name}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)

"""Many pictures of the trained model at once, every one by a reference of its own, with the extension's engine.

Encoder, adapter, weighing, plan and attention are the extension's. Each row of a batch has a role of its own, where a
WebUI has the two roles cond and uncond: so two hundred references take one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lib_ipadapter.attn2 import CurrentPlan, Replacement, make_replacement
from lib_ipadapter.clip_vision import load_clip_vision
from lib_ipadapter.encoding import LoadedAdapter, encode, image_kv, load_adapter, resolve_uncond, uncond_features
from lib_ipadapter.formulations import FORMULATIONS
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.layers import LAYOUTS, first_in_forward_order
from lib_ipadapter.pictures import clip_preprocess, prepare, to_pixels
from lib_ipadapter.plan import ImageKV, scaled_dot_product
from lib_ipadapter.progress import Window, progress_of_timestep
from lib_ipadapter.rows import Call
from lib_ipadapter.weighing import weigh

from .bpe import Tokenizer
from .captions import CaptionTokens
from .clip import Judge, TextSizes, TextTower
from .files import load_tensors
from .sampling import LATENT, ddim
from .store import BASE, CHECKPOINT, JUDGE, PLUS, PREFIXES, VISION
from .unet import UNet, UNetSizes
from .vae import VAE, VAESizes

WEIGHTS = Path(__file__).resolve().parent / "weights"
ADAPTERS = {"base": BASE, "plus": PLUS}
GUIDANCE, STEPS = 4.0, 20
T = TypeVar("T")


def as_images(pictures: Tensor) -> list[Image.Image]:
    """``[N, 3, S, S]`` in 0..1 as pictures."""
    pixels = (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(each)) for each in pixels]


@dataclass(frozen=True)
class Reference:
    """How a batch of references acts; one for every row of the batch."""

    conds: Sequence[ImageKV]
    unconds: Sequence[ImageKV]
    """Of the rows without the prompt; none: those have no image tokens."""
    formulation: str = "decoupled"
    weight: float = 1.0
    stop: float = 1.0


class Painter:
    """The trained model, the extension's encoder and adapters, and the judge."""

    def __init__(self, device: torch.device | str = "cpu", weights: Path = WEIGHTS) -> None:
        self.device = torch.device(device)
        self.weights = weights
        tokenizer = Tokenizer.load(weights / "tokenizer")
        self.tokens = CaptionTokens(tokenizer, "cpu")
        checkpoint = load_tensors(weights / CHECKPOINT)
        self.unet = self._filled(UNet(UNetSizes()), _under(PREFIXES["unet"], checkpoint))
        self.vae = self._filled(VAE(VAESizes()), _under(PREFIXES["vae"], checkpoint))
        text = TextTower(TextSizes(len(tokenizer.vocabulary)))
        self.text = self._filled(text, _under(PREFIXES["text"], checkpoint))
        self.judge = self._filled(Judge(), load_tensors(weights / JUDGE))
        self.keys = LAYOUTS[len(self.unet.layer_widths())]
        self.encoder = load_clip_vision(weights / VISION)
        self._call: _UNetCall | None = None
        blocks = {"input": self.unet.input_blocks, "output": self.unet.output_blocks}
        for number, key in enumerate(self.keys):
            block = self.unet.middle_block if key.block == "middle" else blocks[key.block][key.number]
            attention = block[1].transformer_blocks[key.depth].attn2
            attention.forward = partial(self._attend, attention, number)

    def _filled(self, module: Any, tensors: dict[str, Tensor]) -> Any:
        module.load_state_dict(tensors)
        return module.float().eval().requires_grad_(False).to(self.device)

    def run(self, module: nn.Module, function: Callable[[torch.device, torch.dtype], T]) -> T:
        """The extension's runner: here, in float32."""
        module.to(device=self.device, dtype=torch.float32)
        with torch.no_grad():
            return function(self.device, torch.float32)

    def adapter(self, kind: str) -> LoadedAdapter:
        """``base`` or ``plus``, read by the extension."""
        return load_adapter(self.weights / ADAPTERS[kind])

    def image_kv(self, adapter: LoadedAdapter, pictures: Sequence[Image.Image]) -> list[ImageKV]:
        """K and V of each picture."""
        size = self.encoder.kind.image_size
        pixels = clip_preprocess(to_pixels([prepare(picture, "crop", size) for picture in pictures]), size)
        return self._kv(adapter, encode(self.run, self.encoder, adapter.kind.output, [pixels]))

    def no_image_kv(self, adapter: LoadedAdapter, count: int, source: str = "auto") -> list[ImageKV]:
        """K and V of no picture, ``count`` times."""
        source = resolve_uncond(source, adapter.kind.variant)
        features = uncond_features(self.run, source, adapter.kind, self.encoder)
        return self._kv(adapter, [features.expand(count, *features.shape[1:])])

    def _kv(self, adapter: LoadedAdapter, features: list[Tensor]) -> list[ImageKV]:
        (pairs,) = image_kv(self.run, adapter.model, features)
        pairs = [pair.cpu() for pair in pairs]
        return [ImageKV.from_pairs([pair[n : n + 1] for pair in pairs]) for n in range(len(pairs[0]))]

    @torch.no_grad()
    def draw(self, tokens: Tensor, noise: Tensor, reference: Reference | None = None, steps: int = STEPS) -> Tensor:
        """Pictures ``[B, 3, 128, 128]`` in 0..1 on the device.

        Args:
            tokens: of the prompts, ``[B, 77]``, from anywhere.
            noise: ``[B, 4, 16, 16]``, from anywhere.
            reference: what acts; None: no adapter.
            steps: of the sampler.
        """
        count = len(tokens)
        tokens, empty, noise = (t.to(self.device) for t in (tokens, self.tokens.empty(1), noise))
        context = torch.cat([self.text(tokens), self.text(empty).expand(count, -1, -1)])
        terms = [] if reference is None or reference.weight == 0 else [_term(reference)]
        injection = Injection(terms, len(self.keys))
        current = CurrentPlan(injection, _UNetCall.of, _UNetCall.read, first_in_forward_order(self.keys))
        layers = [make_replacement(n, current, scaled_dot_product, None) for n in range(len(self.keys))]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            # no read of the device: the sampler's timesteps are known
            self._call = _UNetCall(layers, row_roles(count), progress_of_timestep(times.pop(0)))
            by_cond, by_uncond = self.unet(torch.cat([x, x]), torch.cat([t, t]), context).chunk(2)
            return by_uncond + GUIDANCE * (by_cond - by_uncond)

        times = torch.linspace(999, 0, steps + 1).round().tolist()
        try:
            latents = ddim(predict, noise, steps)
        finally:
            self._call = None
        return torch.cat([self.vae.decode(part) for part in latents.split(64)]).div(2).add(0.5).clamp(0, 1)

    def _attend(self, attention: Any, layer: int, x: Tensor, context: Tensor, image: None = None) -> Tensor:
        """In place of a cross-attention layer's own forward: as on a WebUI, between projections and output."""
        assert self._call is not None, "the UNet is called by Painter.draw alone"
        q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
        out = self._call.layers[layer](q, k, v, {"n_heads": attention.heads, "call": self._call})
        return attention.to_out[0](out)


@dataclass(frozen=True)
class _UNetCall:
    """What a call of the UNet tells the engine."""

    layers: Sequence[Replacement]
    roles: tuple[int, ...]
    progress: float

    @staticmethod
    def of(extra_options: Any) -> _UNetCall:
        """The marker of the engine."""
        return extra_options["call"]

    @staticmethod
    def read(marker: _UNetCall, extra_options: Any, layer: int, q: Tensor, k: Tensor) -> Call:
        """Rows and progress."""
        return Call(marker.roles, marker.progress)


def row_roles(count: int) -> tuple[int, ...]:
    """Of the rows of a batch: ``count`` with the prompts, then as many without; each has its own."""
    return tuple(range(2 * count))


def _term(reference: Reference) -> Term:
    images = [*reference.conds, *reference.unconds]
    prompts = {role: (image,) for role, image in enumerate(images)}
    formulation = FORMULATIONS[reference.formulation]
    weighed = weigh(prompts, formulation, reference.weight, (), int(images[0].keys[0].shape[2]), 0)
    return Term(formulation, Window(0.0, reference.stop), weighed)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def noise_of(count: int, seed: int) -> Tensor:
    """The same for every device."""
    return torch.randn(count, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(seed))

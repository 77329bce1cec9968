"""The small model steered by the extension's own engine, many pictures at once: each row of a batch by its reference.

A generation has a role for each row, with the K and V that this role gets. Here every reference has a role of its own,
so that hundreds of pictures are drawn side by side. Everything else is what the extension does in a WebUI: pictures are
prepared and encoded, projected, weighed, planned and attended to by its own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lib_ipadapter import layer_weights
from lib_ipadapter.clip_vision import CLIPVision, load_clip_vision
from lib_ipadapter.encoding import LoadedAdapter, encode, image_kv, load_adapter, resolve_uncond, uncond_features
from lib_ipadapter.formulations import FORMULATIONS
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.layers import SD15
from lib_ipadapter.pictures import clip_preprocess, prepare, to_pixels
from lib_ipadapter.plan import ImageKV, LayeredPlan, Plan, scaled_dot_product
from lib_ipadapter.progress import Window, progress_of_timestep
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.weighing import weigh

from .sampling import LATENT, ddim
from .store import BASE, PLUS, VISION, Store
from .unet import Attention

WEIGHTS = Path(__file__).parent / "weights"
FIRST_OWN_ROLE = 100
"""Of the first reference."""
GUIDANCE = 4.0


@dataclass(frozen=True)
class Steering:
    """How references act.

    Attributes:
        adapter: "base" or "plus".
        formulation, weight, stop: as a unit has them.
        negative: what the negative rows get: what the adapter was trained with ("auto"), or the reference itself
            ("reference"), which leaves guidance nothing to steer by.
        layers: as a unit has it.
    """

    adapter: str = "plus"
    formulation: str = "decoupled"
    weight: float = 1.0
    stop: float = 1.0
    negative: str = "auto"
    layers: str = layer_weights.ALL


@dataclass
class Model:
    """The committed files, ready to draw.

    Args:
        device: where all computes, in float32.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.store = Store(WEIGHTS, 7, self.device)
        self.store.load(WEIGHTS)
        for module in self.store.modules().values():
            module.float().eval().requires_grad_(False)
        self.encoder: CLIPVision = load_clip_vision(WEIGHTS / VISION)
        self.adapters: dict[str, LoadedAdapter] = {
            "base": load_adapter(WEIGHTS / BASE),
            "plus": load_adapter(WEIGHTS / PLUS),
        }
        self._plan: Plan | LayeredPlan | None = None
        self._known: dict[tuple[int, str], tuple[list[ImageKV], ImageKV]] = {}
        for number, layer in enumerate(self.store.unet.cross_attention()):
            layer.forward = partial(self._attend, layer, number)  # type: ignore[method-assign]

    def _run(self, module: nn.Module, function: Any) -> Any:
        module.to(self.device, torch.float32)
        return function(self.device, torch.float32)

    def _attend(self, layer: Attention, number: int, x: Tensor, context: Tensor, image: None = None) -> Tensor:
        q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
        plan = None if self._plan is None else self._plan.at(number)
        if plan is None or plan.idle:
            out = scaled_dot_product(q, k, v, layer.heads)
        else:
            out = plan.attend(number, q, k, v, layer.heads, scaled_dot_product, None)
        return layer.to_out[0](out)

    def features(self, pictures: Sequence[Image.Image], adapter: LoadedAdapter) -> Tensor:
        """What the image encoder says of pictures."""
        size = self.encoder.kind.image_size
        pixels = clip_preprocess(to_pixels([prepare(each, "crop", size) for each in pictures]), size)
        parts = list(pixels.split(64))
        return torch.cat(encode(self._run, self.encoder, adapter.kind.output, parts))

    def key_values(self, pictures: Sequence[Image.Image], name: str) -> tuple[list[ImageKV], ImageKV]:
        """Of each picture, and of none; remembered for the very list."""
        if (id(pictures), name) not in self._known:
            adapter = self.adapters[name]
            uncond = uncond_features(
                self._run, resolve_uncond("auto", adapter.kind.variant), adapter.kind, self.encoder
            )
            given = [self.features(pictures, adapter), uncond]
            made, none = image_kv(self._run, adapter.model, given)
            each = [ImageKV.from_pairs([t[n : n + 1] for t in made]) for n in range(len(pictures))]
            self._known[id(pictures), name] = each, ImageKV.from_pairs(none)
        return self._known[id(pictures), name]

    @torch.no_grad()
    def draw(
        self,
        seed: int,
        captions: Tensor | None,
        pictures: Sequence[Image.Image] | None,
        steering: Steering | None,
        count: int,
        steps: int = 25,
    ) -> Tensor:
        """Pictures ``[count, 3, 128, 128]`` in 0..1.

        Args:
            seed: of all noise; row n has the same whatever steers it.
            captions: tokens by row; None: an empty prompt.
            pictures: a reference for each row.
            steering: how they act; None: they don't.
        """
        store = self.store
        empty = store.text(store.tokens.empty(count))
        context = torch.cat([empty if captions is None else store.text(captions), empty])
        noise = torch.randn((count, 4, LATENT, LATENT), generator=torch.Generator().manual_seed(seed)).to(self.device)
        injection = None
        if steering is not None and steering.weight and pictures is not None:
            injection = self._injection(pictures, steering)
        roles = (*_own_roles(count), *[UNCOND] * count)
        if steering is not None and steering.negative == "reference":
            roles = (*roles[:count], *roles[:count])

        def predict(x: Tensor, t: Tensor) -> Tensor:
            progress = progress_of_timestep(float(t[0]))
            self._plan = None
            if injection is not None:
                self._plan = injection.plan(Call(roles, progress), context.shape[1], self.device, torch.float32)
            by_cond, by_uncond = store.unet(torch.cat([x, x]), torch.cat([t, t]), context).chunk(2)
            return by_uncond + GUIDANCE * (by_cond - by_uncond)

        latents = ddim(predict, noise, steps)
        self._plan = None
        parts = [store.vae.decode(part) for part in latents.split(64)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def _injection(self, pictures: Sequence[Image.Image], steering: Steering) -> Injection:
        conds, none = self.key_values(pictures, steering.adapter)
        own = _own_roles(len(conds))
        prompts = {role: (each,) for role, each in zip(own, conds, strict=True)} | {UNCOND: (none,)}
        formulation = FORMULATIONS[steering.formulation]
        widest = max(self.store.unet.layer_widths())
        layers = layer_weights.on_unet(steering.layers, SD15, steering.weight, None, 1)
        weighed = weigh(prompts, formulation, steering.weight, (), widest, UNCOND, layers)
        return Injection([Term(formulation, Window(0.0, steering.stop), weighed)], len(conds[0].keys))


def _own_roles(count: int) -> list[int]:
    """The role of each cond row; a single one is the prompt's, whose picture a layer type may give to uncond rows."""
    return [COND] if count == 1 else list(range(FIRST_OWN_ROLE, FIRST_OWN_ROLE + count))


def as_pictures(pictures: Tensor) -> list[Image.Image]:
    """``[N, 3, H, W]`` in 0..1 as what a person would drop into the page."""
    values = (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in values]

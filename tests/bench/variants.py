"""What is measured in one case: no adapter, ours by the way that a Forge takes, the baselines, the peers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lib_ipadapter.curves import ALWAYS, parse
from lib_ipadapter.formulations import DECOUPLED, JOINT, Formulation
from lib_ipadapter.hosts.base import UNetInfo
from lib_ipadapter.hosts.comfy import ComfyHost
from lib_ipadapter.hosts.compute import on_device
from lib_ipadapter.influence import Influence
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.layer_weights import ALL, on_unet
from lib_ipadapter.masks import of_template
from lib_ipadapter.packing import in_host_memory
from lib_ipadapter.plan import Attention, ImageKV
from lib_ipadapter.progress import Window
from lib_ipadapter.reweighing import Unweighed
from lib_ipadapter.rows import COND, UNCOND
from lib_ipadapter.weighing import Weighed, arrange, weigh
from tests.adapter_files import Nested, base_adapter, plus_adapter
from tests.embedded.attention import attention_function
from tests.embedded.patcher import UnetPatcher

from .peers import ForgeBuiltIn, IPAdapterPlus, Projections, diffusers_adapter
from .timing import Variant
from .unets import TEXT_TOKENS, Family, Sampling, Text

WEIGHT = 0.8
LONG = 2 * TEXT_TOKENS


class BenchHost(ComfyHost):
    """Forge, as far as the benchmark goes: its way into the UNet, its steps, its rule for memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype, folder: Path = Path()) -> None:
        super().__init__("backend")
        self._place, self._folder = (device, dtype), folder

    @property
    def attention(self) -> Attention:
        """Forge's with PyTorch's attention."""
        return attention_function

    def run(self, module: nn.Module, function: Callable[[torch.device, torch.dtype], Any]) -> Any:
        """The module goes to the device and off it again."""
        release = torch.cuda.empty_cache if self._place[0].type == "cuda" else lambda: None
        return on_device(module, *self._place, function, release)

    def adapter_folders(self) -> list[Path]:
        """The one folder."""
        return [self._folder]

    def encoder_folders(self) -> list[Path]:
        """The one folder."""
        return [self._folder]


def job(unet: UnetPatcher) -> Any:
    """A processing object of the host, as far as hosts' classes look at it."""
    return SimpleNamespace(
        sd_model=SimpleNamespace(forge_objects=SimpleNamespace(unet=unet)), extra_generation_params={}
    )


def random_adapter(family: Family, info: UNetInfo) -> Nested:
    """An adapter of true size for the UNet: plus on SDXL, base on SD1.5."""
    if family.tokens == 4:
        return base_adapter(info.widths, info.context_width, embedding=1024)
    small = info.context_width < 768
    return plus_adapter(
        info.widths, info.context_width, 128 if small else 1280, 128 if small else 1280, 2 if small else 20
    )


class Variants:
    """The variants of one case.

    Args:
        sampling: where they run.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        host = BenchHost(sampling.device, sampling.dtype)
        self.info = host.unet_info(job(sampling.unet))
        self.held: dict[str, int] = {}
        """Bytes of device memory that each keeps while it is in use; 0 on the CPU."""
        self.expected: dict[str, int] = {}
        """Bytes of K/V of each distinct picture and of uncond, once, for ours."""
        self.variants: dict[str, Variant] = {}
        self._text = sampling.text()
        sampling.step(sampling.unet, self._text)  # what libraries set aside at first use is no variant's
        self._stack = ExitStack()
        self.variants["no adapter"] = self._plain(self._text)
        self.variants["no adapter, again"] = self._plain(self._text)

    def close(self) -> None:
        """Leaves the UNet as it was."""
        self._stack.close()

    def _plain(self, text: Text, baseline: str = "no adapter") -> Variant:
        return Variant(lambda: self.sampling.step(self.sampling.unet, text), baseline)

    def _add(self, name: str, make: Callable[[], Variant]) -> None:
        before = self._allocated()
        variant = self.variants[name] = make()
        with variant.around():
            variant.step()
        self.held[name] = self._allocated() - before

    def _allocated(self) -> int:
        if self.sampling.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    # Baselines

    def add_tokens_in_the_text(self) -> None:
        """As many tokens more, in the text: what a picture must cost."""
        text = self.sampling.text(*[TEXT_TOKENS + self.sampling.family.tokens] * 2)
        self._add("tokens in the text", lambda: self._plain(text))

    def add_ready(self, pictures: int) -> None:
        """K and V of all rows ready on the device, concatenated, one attention: nothing could do with less."""

        def make() -> Variant:
            def replacement(keys: Tensor, values: Tensor) -> Callable[..., Tensor]:
                def attend(q: Tensor, k: Tensor, v: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
                    k, v = torch.cat((k, keys), dim=1), torch.cat((v, values), dim=1)
                    return attention_function(q, k, v, extra_options["n_heads"])

                return attend

            rows, tokens = 2 * self.sampling.batch, pictures * self.sampling.family.tokens
            return self._replaced(
                replacement(*(self.sampling.random(rows, tokens, width) for _ in "kv")) for width in self.info.widths
            )

        self._add(f"plain, {pictures}", make)

    def add_long_text(self) -> None:
        """No adapter, with prompts of 154 and 77 tokens."""
        self._long = self.sampling.text(TEXT_TOKENS, LONG)
        self._add("no adapter, 77/154", lambda: self._plain(self._long, "no adapter, 77/154"))

    # Ours

    def add_ours(
        self,
        name: str,
        pictures: int = 1,
        formulation: Formulation = JOINT,
        window: Window = Window(),  # noqa: B008
        unequal: bool = False,
        layers: str = ALL,
        curve: str = "",
        mask: str = "",
        influence: bool = False,
    ) -> None:
        """Ours, attached as a Forge does.

        Args:
            unequal: prompts of 154 and 77 tokens.
            layers, curve: as a unit has them.
            mask: a template's name, in every picture.
            influence: whether the influence map is made.
        """
        text = self._long if unequal else self._text
        images = [self._image() for _ in range(pictures + 1)]

        def make() -> Variant:
            prompts = {COND: tuple(images[1:]), UNCOND: (images[0],) * pictures}
            host = BenchHost(self.sampling.device, self.sampling.dtype)
            of_layers = on_unet(layers, self.info.keys, WEIGHT, None, pictures)
            weighed: Weighed | Unweighed
            if curve:
                laid_out = arrange(prompts, (), host.first_role)
                weighed = Unweighed(laid_out, formulation, WEIGHT, max(self.info.widths), of_layers)
            else:
                weighed = weigh(prompts, formulation, WEIGHT, (), max(self.info.widths), host.first_role, of_layers)
            where = {role: ((of_template(mask),),) * pictures for role in prompts} if mask else {}
            term = Term(formulation, window, weighed, parse(curve) if curve else ALWAYS, where=where)
            p = job(self.sampling.unet)
            injection = Injection([term], len(self.info.keys))
            latent = (self.sampling.family.latent,) * 2
            if influence:
                injection.influence = Influence(latent, [name], self.info.keys)
            host.attach(p, injection)

            def before(sigma: Tensor) -> None:
                assert host.check(p, injection, self.info.identity)
                params = SimpleNamespace(
                    x=self.sampling.x[: self.sampling.batch],
                    sigma=sigma,
                    text_cond=text.cond,
                    text_uncond=text.uncond,
                    denoiser=SimpleNamespace(sampler=None),
                )
                host.on_step(params)

            unet = p.sd_model.forge_objects.unet
            baseline = "no adapter, 77/154" if unequal else "no adapter"
            return Variant(lambda: self.sampling.step(unet, text, before), baseline)

        self._add(name, make)
        size = sum(2 * self.sampling.family.tokens * width for width in self.info.widths)
        self.expected[name] = size * self.sampling.dtype.itemsize * (pictures + 1)

    def _image(self) -> ImageKV:
        """Random K and V in host memory, where the preparation leaves them."""
        tokens, dtype = self.sampling.family.tokens, self.sampling.dtype
        kinds = ([torch.randn(1, tokens, width).to(dtype) for width in self.info.widths] for _ in "kv")
        return ImageKV(*(tuple(in_host_memory(kind)) for kind in kinds))

    # Peers

    def add_peers(self) -> None:
        """The peers with one picture."""
        device, dtype = self.sampling.device, self.sampling.dtype
        adapter = random_adapter(self.sampling.family, self.info)
        tokens = [self.sampling.random(1, self.sampling.family.tokens, self.info.context_width) for _ in range(2)]

        def layers() -> Iterator[Projections]:
            weights = adapter["ip_adapter"]
            for n in range(len(self.info.keys)):
                to_k, to_v = (_linear(weights[f"{2 * n + 1}.to_{kind}_ip.weight"], device, dtype) for kind in "kv")
                yield Projections(to_k, to_v, tokens[:1], tokens[1:])

        self._add("Forge built-in", lambda: self._replaced(map(ForgeBuiltIn, layers())))
        for mode, scales_k in (("V only", False), ("K+mean(V)", True)):
            self._add(
                f"ComfyUI_IPAdapter_plus, {mode}",
                lambda scales_k=scales_k: self._replaced(  # type: ignore[misc]
                    IPAdapterPlus(layer, scales_k) for layer in layers()
                ),
            )
        self._add("diffusers", lambda: self._diffusers(adapter))

    def _diffusers(self, adapter: Nested) -> Variant:
        unet = self.sampling.unet.model.diffusion_model.unet
        used = self._stack.enter_context(diffusers_adapter(unet, adapter))
        rows = 2 * self.sampling.batch
        projection = adapter["image_proj"]
        width = projection["proj_in.weight" if "latents" in projection else "proj.weight"].shape[1]
        embeds = self.sampling.random(rows, 1, *((257,) if "latents" in projection else ()), width)
        timestep = torch.tensor(500.0, device=self.sampling.device)

        def call(sigma: Tensor) -> Tensor:
            return unet(
                self.sampling.x,
                timestep,
                self._text.context,
                class_labels=self.sampling.y,
                added_cond_kwargs={"image_embeds": [embeds]},
                return_dict=False,
            )[0]

        return Variant(lambda: self.sampling.euler(call), around=used)

    def _replaced(self, replacements: Iterator[Callable[..., Tensor]] | Any) -> Variant:
        """A function in each layer, in the order of an adapter file."""
        unet = self.sampling.unet.clone()
        for key, replacement in zip(self.info.keys, replacements, strict=True):
            unet.set_model_attn2_replace(replacement, *key)
        return Variant(lambda: self.sampling.step(unet, self._text))


def _linear(weight: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
    return linear


JUDGED = ("no adapter", "no adapter, again", "plain, 1", "joint, 1", "no adapter, 77/154", "joint, 1, 77/154")
"""What a target needs in every case."""


def make_variants(sampling: Sampling, pictures: Sequence[int], peers: bool, judged: Collection[str]) -> Variants:
    """All that is measured in a case; what isn't ``judged`` by a target takes part in few rounds."""
    made = Variants(sampling)
    made.add_tokens_in_the_text()
    for n in (1, 4):
        if n in pictures:
            made.add_ready(n)
    for n in pictures:
        made.add_ours(f"joint, {n}", n)
    made.add_ours("decoupled, 1", formulation=DECOUPLED)
    made.add_ours("outside the window", window=Window(0.99, 1.0))
    if 1 in pictures:
        made.add_ours("joint, 1, style layers", layers="style")
        made.add_ours("joint, 1, new weight each step", curve="0.5@0, 1@1")
        made.add_ours("joint, 1, left half", mask="left half")
        made.add_ours("decoupled, 1, left half", formulation=DECOUPLED, mask="left half")
        made.add_ours("joint, 1, influence map", influence=True)
    made.add_long_text()
    made.add_ours("joint, 1, 77/154", unequal=True)
    if peers:
        made.add_peers()
    for name, variant in made.variants.items():
        made.variants[name] = replace(variant, few=name not in judged and name not in JUDGED)
    return made

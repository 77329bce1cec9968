"""The stages of training, in order; each takes the store as the stages before left it and trains its own part."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters import Adapter, weighted
from .captions import choose_phrases
from .clip import IMAGE_SIZE, at_end, attribute_labels, attribute_loss, normalised
from .sampling import LATENT, alphas, ddim, guided, held_out_scenes, judged
from .scenes import Scenes, rearranged, render, sample
from .store import Store
from .trainer import Batch, Budget, Trainer, working_copy
from .unet import ImageKV

PICTURE = 128


@dataclass(frozen=True)
class Scale:
    """How much is done at once, and how much is kept ready."""

    judge: int = 256
    vae: int = 64
    clip: int = 512
    unet: int = 1024
    adapter: int = 512
    chunk: int = 512
    """Pictures that go through a frozen network at once."""
    scenes: int = 262144
    """Kept ready as latents for the UNet."""
    pairs: int = 163840
    """Kept ready with what the image encoder says, for the adapters."""
    captions: int = 4
    """Of each of them."""
    measured: int = 256
    """Pictures behind a figure."""
    shown: int = 64
    steps: int = 25
    """Of a picture drawn."""


FULL = Scale()
SMOKE = Scale(4, 2, 4, 4, 4, 8, 16, 16, 2, 4, 4, 2)
"""A few pictures of each, to try the code."""

Figures = dict[str, object]

TEXT_DROPPED = 0.1
"""Share of captions that the UNet doesn't see, for guidance."""
ADAPTER_TEXT_DROPPED, IMAGE_DROPPED = 0.6, 0.05
LAYERS_FIRST = 0.5
"""Share of an adapter's training in which every layer learns for itself what text tells it."""
TAUGHT = 4.0
"""How much more it counts, for an adapter, what the UNet says to the complete caption than what the noise was. Both ask
for the same, but the noise says it with a deviation that hides most of it."""
MOVED, OTHER_BACKGROUND = 0.35, 0.2
"""Shares of references that are placed otherwise, and that stand before something else, than the picture to draw."""
GUIDANCE = 4.0


@dataclass
class Run:
    """What every stage is told."""

    store: Store
    scale: Scale
    generator: torch.Generator
    """On the device."""
    budget: Budget

    @property
    def device(self) -> torch.device:
        return self.store.device


def train_judge(run: Run) -> Figures:
    """The classifier that the figures are measured with."""
    store = run.store

    def loss(batch: Batch) -> dict[str, Tensor]:
        return {"loss": attribute_loss(store.judge(batch["pictures"]), batch["labels"], batch["asked"])}

    trainer = Trainer({"judge": store.judge}, loss, 1e-3, run.device, decay=0.995)
    dtype = next(store.judge.parameters()).dtype

    def batches() -> Batch:
        scenes = sample(run.scale.judge, run.generator, allow_held_out=True, simple=trainer.steps % 2 == 0)
        labels, asked = attribute_labels(scenes)
        pictures = _photographed(render(scenes, PICTURE), run.generator)
        return {"pictures": pictures.to(dtype), "labels": labels, "asked": asked}

    figures = trainer.run("judge", batches, run.budget)
    trainer.finish()
    return _with_figures(figures, lambda: _measure_judge(run))


def _measure_judge(run: Run) -> Figures:
    scenes = sample(run.scale.measured * 2, run.generator, allow_held_out=True, simple=True)
    return {"own accuracy": judged(run.store.judge, render(scenes, PICTURE), scenes)}


def _with_figures(final: dict[str, float], measure: Callable[[], Figures]) -> Figures:
    """A stage's figures. What was trained isn't lost if measuring fails; that is said instead."""
    try:
        return {"final": final, **measure()}
    except Exception as error:
        traceback.print_exc()
        return {"final": final, "measuring failed": f"{type(error).__name__}: {error}"[:500]}


def _photographed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Slightly blurred, noisy and of another brightness, each by its own amount: what a VAE or a camera may do."""
    n, device = len(pictures), pictures.device

    def number() -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=generator, device=device)

    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = torch.randn(pictures.shape, generator=generator, device=device)
    mixed = torch.lerp(pictures, soft, number()) * (0.92 + 0.16 * number()) + noise * number() ** 2 * 0.06
    return mixed.clamp(0, 1)


def train_vae(run: Run) -> Figures:
    """Absolute differences of pixels and of their neighbours', and a trace of the KL divergence."""
    vae = run.store.vae

    def loss(batch: Batch) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        mean, log_variance = vae.moments(pixels)
        log_variance = log_variance.float()
        latents = mean + (log_variance * 0.5).exp().to(mean.dtype) * batch["noise"]
        out = vae.decoder(vae.post_quant_conv(latents)).float()
        error = out - pixels.float()
        l1 = error.abs().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (mean.float() ** 2 + log_variance.exp() - 1 - log_variance).mean()
        return {"loss": l1 + 0.5 * edges + 0.5 * (error**2).mean() + 1e-4 * kl, "l1": l1, "kl": kl}

    trainer = Trainer({"vae": vae}, loss, 1e-3, run.device, decay=0.998)
    dtype = next(vae.parameters()).dtype
    side = PICTURE // 8

    def batches() -> Batch:
        scenes = sample(run.scale.vae, run.generator, allow_held_out=True)
        pixels = (render(scenes, PICTURE) * 2 - 1).to(dtype)
        noise = torch.randn((len(pixels), 4, side, side), generator=run.generator, device=run.device, dtype=dtype)
        return {"pixels": pixels, "noise": noise}

    figures = trainer.run("vae", batches, run.budget)
    trainer.finish()
    if run.budget.done(trainer.steps):
        _normalise_vae(run)
    return _with_figures(figures, lambda: _measure_vae(run))


@torch.no_grad()
def _normalise_vae(run: Run) -> None:
    """Let what the UNet will see have mean 0 and deviation 1 in every channel."""
    vae = run.store.vae
    found = []
    for _ in range(16):
        scenes = sample(max(run.scale.chunk // 4, 2), run.generator, allow_held_out=True)
        found.append(vae.moments(render(scenes, PICTURE) * 2 - 1)[0])
    std, mean = torch.std_mean(torch.cat(found), dim=(0, 2, 3))
    vae.normalise(mean, std)


@torch.no_grad()
def _measure_vae(run: Run) -> Figures:
    store = run.store
    scenes = sample(run.scale.measured, run.generator, allow_held_out=True)
    pictures = render(scenes, PICTURE)
    parts = (pictures * 2 - 1).split(max(run.scale.chunk // 4, 1))
    back = torch.cat([store.vae.decode(store.vae.encode(part)) for part in parts]) / 2 + 0.5
    back = back.clamp(0, 1)
    shown = run.scale.shown // 2
    store.show("vae", torch.cat([pictures[:shown], back[:shown]]))
    mse = ((back - pictures) ** 2).mean()
    return {"PSNR": round(float(-10 * mse.log10()), 2), "judge after decoding": judged(store.judge, back, scenes)}


def train_clip(run: Run) -> Figures:
    """Both towers by the contrastive loss; heads for the attributes make the image tower learn in minutes."""
    store = run.store
    end = store.tokens.end

    def loss(batch: Batch) -> dict[str, Tensor]:
        embeds, penultimate = store.vision(batch["pixels"])
        states = at_end(store.text(batch["tokens"]), batch["tokens"], end)
        image = F.normalize(embeds.float(), dim=-1)
        text = F.normalize(store.extras.text_projection(states).float(), dim=-1)
        logits = image @ text.t() * store.extras.logit_scale.float().clamp(max=4.6).exp()
        target = torch.arange(len(logits), device=logits.device)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
        heads = attribute_loss(store.extras.heads(embeds), batch["labels"], batch["asked"])
        pooled = penultimate[:, 1:].mean(1)
        patches = attribute_loss(store.extras.patch_heads(pooled), batch["labels"], batch["asked"])
        # keeps the embedding's size near that of the states, whatever the contrastive loss leaves open
        size = (embeds.float() ** 2).mean()
        total = contrast + heads + 0.5 * patches + 0.01 * (size - 1) ** 2
        return {
            "loss": total,
            "contrast": contrast,
            "heads": heads,
            "matched": (logits.argmax(1) == target).float().mean(),
        }

    modules = {"vision": store.vision, "text": store.text, "extras": store.extras}
    trainer = Trainer(modules, loss, 1e-3, run.device, decay=0.998, warm_up=300)
    dtype = next(store.vision.parameters()).dtype

    def batches() -> Batch:
        scenes = sample(run.scale.clip, run.generator, allow_held_out=True)
        pictures = _photographed(render(scenes, IMAGE_SIZE), run.generator)
        full = trainer.steps % 4 != 0
        labels, asked = attribute_labels(scenes)
        return {
            "pixels": normalised(pictures).to(dtype),
            "tokens": store.tokens(choose_phrases(scenes, run.generator, full=full)),
            "labels": labels,
            "asked": asked,
        }

    figures = trainer.run("clip", batches, run.budget)
    trainer.finish()
    return {"final": figures}


# --- the UNet ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bank:
    """Scenes kept ready: latents ``[N, 4, 16, 16]`` and captions ``[N, captions, 77]``."""

    latents: Tensor
    tokens: Tensor
    embeds: Tensor | None = None
    penultimate: Tensor | None = None
    """Of references to the scenes, ``[N, 257, width]``."""
    complete: Tensor | None = None
    """Captions that leave nothing out of what scene and reference have in common, ``[N, 77]``."""


@torch.no_grad()
def make_bank(run: Run, count: int, references: bool) -> Bank:
    """Draw and encode scenes of training; with ``references`` also other pictures of them."""
    store = run.store
    vae, vision = (working_copy(m, run.device) for m in (store.vae, store.vision))
    dtype = next(vae.parameters()).dtype
    parts: dict[str, list[Tensor]] = {"latents": [], "tokens": [], "embeds": [], "penultimate": [], "complete": []}
    for start in range(0, count, run.scale.chunk):
        scenes = sample(min(run.scale.chunk, count - start), run.generator)
        pixels = render(scenes, PICTURE) * 2 - 1
        parts["latents"].append(vae.encode(pixels.to(dtype)))
        rows = [store.tokens(choose_phrases(scenes, run.generator)) for _ in range(run.scale.captions)]
        parts["tokens"].append(torch.stack(rows, 1).to(torch.int16))
        if references:
            other = rearranged(scenes, run.generator, MOVED, OTHER_BACKGROUND)
            pictures = _photographed(render(other, IMAGE_SIZE), run.generator)
            embeds, penultimate = vision(normalised(pictures).to(dtype))
            parts["embeds"].append(embeds)
            parts["penultimate"].append(penultimate)
            complete = store.tokens(choose_phrases(scenes, run.generator, full=True, like=other))
            parts["complete"].append(complete.to(torch.int16))
    return Bank(**{name: torch.cat(each) for name, each in parts.items() if each})


def _noise_weights(device: torch.device) -> Tensor:
    """Of the loss by timestep: the signal-to-noise ratio counts up to 5 (Hang et al., arXiv 2303.09556)."""
    a = alphas(device)
    ratio = a / (1 - a)
    return ratio.clamp(max=5.0) / ratio


def _noisy(batch: Batch, table: Tensor) -> Tensor:
    a = table[batch["times"]][:, None, None, None]
    return (a.sqrt() * batch["latents"].float() + (1 - a).sqrt() * batch["noise"].float()).to(batch["latents"].dtype)


def _drawn(run: Run, bank: Bank, count: int, dropped: float) -> Batch:
    """A random batch of the bank with noise and timesteps."""
    generator, device = run.generator, run.device
    rows = torch.randint(len(bank.latents), (count,), generator=generator, device=device)
    caption = torch.randint(bank.tokens.shape[1], (count,), generator=generator, device=device)
    tokens = bank.tokens[rows, caption].long()
    drop = torch.rand(count, 1, generator=generator, device=device) < dropped
    batch = {
        "latents": bank.latents[rows],
        "tokens": torch.where(drop, run.store.tokens.empty(1), tokens),
        "times": torch.randint(1000, (count,), generator=generator, device=device),
        "noise": torch.randn((count, 4, LATENT, LATENT), generator=generator, device=device).to(bank.latents.dtype),
    }
    if bank.complete is not None:
        batch |= {"rows": rows, "complete": bank.complete[rows].long()}
    return batch


def train_unet(run: Run) -> Figures:
    """The noise predictor, and the text tower with it."""
    store = run.store
    table, weights = alphas(run.device), _noise_weights(run.device)

    def loss(batch: Batch) -> dict[str, Tensor]:
        context = store.text(batch["tokens"])
        out = store.unet(_noisy(batch, table), batch["times"], context)
        error = ((out.float() - batch["noise"].float()) ** 2).mean((1, 2, 3))
        return {"loss": (error * weights[batch["times"]]).mean(), "mse": error.mean()}

    bank = make_bank(run, run.scale.scenes, references=False)
    trainer = Trainer(
        {"unet": store.unet, "text": store.text}, loss, 1.2e-3, run.device, decay=0.999, slow={"text": 0.5}
    )
    figures = trainer.run("unet", lambda: _drawn(run, bank, run.scale.unet, TEXT_DROPPED), run.budget)
    trainer.finish()
    return _with_figures(figures, lambda: measure_text(run))


@torch.no_grad()
def measure_text(run: Run) -> Figures:
    """How often the judge sees in a picture what its prompt says; of seen and of held-out combinations."""
    store, count = run.store, run.scale.measured
    result: Figures = {}
    for name, scenes in (
        ("seen", sample(count, run.generator, simple=True)),
        ("held out", held_out_scenes(count, run.generator)),
    ):
        tokens = store.tokens(choose_phrases(scenes, run.generator, full=True))
        pictures = _draw_pictures(run, tokens, None, None)
        result[f"text adherence, {name}"] = judged(store.judge, pictures, scenes)
        store.show(f"unet {name}", pictures[: run.scale.shown // 2])
    return result


def _draw_pictures(run: Run, tokens: Tensor, images: list[ImageKV] | None, none: list[ImageKV] | None) -> Tensor:
    """Pictures 0..1 of prompts, with image tokens if there are any."""
    store = run.store
    context = store.text(tokens)
    uncond = store.text(store.tokens.empty(len(tokens)))
    noise = torch.randn((len(tokens), 4, LATENT, LATENT), generator=run.generator, device=run.device)
    latents = ddim(guided(store.unet, context, uncond, GUIDANCE, images, none), noise, run.scale.steps)
    dtype = next(store.vae.parameters()).dtype
    parts = [store.vae.decode(part.to(dtype)).float() for part in latents.split(max(1, run.scale.chunk // 4))]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


# --- adapters ---------------------------------------------------------------------------------------------------------


def train_base(run: Run) -> Figures:
    """Four tokens from the projected embedding; no picture is an embedding of zeros."""
    return _train_adapter(run, "base", run.store.base)


def train_plus(run: Run) -> Figures:
    """Sixteen tokens from the penultimate states; no picture is the states of pixels that are zero."""
    return _train_adapter(run, "plus", run.store.plus)


def _nothing(run: Run, kind: str) -> Tensor:
    """What stands for no picture, one row."""
    store = run.store
    dtype = next(store.vision.parameters()).dtype
    with torch.no_grad():
        embeds, penultimate = store.vision(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=run.device, dtype=dtype))
    return torch.zeros_like(embeds) if kind == "base" else penultimate


def _train_adapter(run: Run, kind: str, adapter: Adapter) -> Figures:
    store = run.store
    table, weights = alphas(run.device), _noise_weights(run.device)
    if run.budget.spent == 0.0:
        adapter.begin_with(store.unet)
    unet, text = (working_copy(m, run.device) for m in (store.unet, store.text))
    if store.pairs is None:
        store.pairs = make_bank(run, run.scale.pairs, references=True)
    bank = store.pairs
    nothing = _nothing(run, kind).to(bank.latents.dtype)
    features = bank.embeds if kind == "base" else bank.penultimate
    assert features is not None

    def loss(batch: Batch) -> dict[str, Tensor]:
        noisy = _noisy(batch, table)
        with torch.no_grad():
            taught = unet(noisy, batch["times"], batch["complete"])
        out = unet(noisy, batch["times"], batch["context"], adapter(batch["features"])).float()
        error = ((out - batch["noise"].float()) ** 2).mean((1, 2, 3))
        apart = ((out - taught.float()) ** 2).mean((1, 2, 3))
        by_time = weights[batch["times"]]
        return {
            "loss": ((error + TAUGHT * apart) * by_time).mean(),
            "mse": error.mean(),
            "apart": apart.mean(),
        }

    def batches() -> Batch:
        batch = _drawn(run, bank, run.scale.adapter, ADAPTER_TEXT_DROPPED)
        drop = torch.rand(run.scale.adapter, generator=run.generator, device=run.device) < IMAGE_DROPPED
        with torch.no_grad():
            batch["context"] = text(batch.pop("tokens"))
            # no picture, nothing to learn from it: the UNet as it is
            batch["complete"] = torch.where(drop[:, None, None], batch["context"], text(batch["complete"]))
        found = features[batch.pop("rows")]
        batch["features"] = torch.where(drop.view(-1, *[1] * (found.ndim - 1)), nothing, found)
        return batch

    layers = unet.cross_attention()

    def loss_of_layers(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            unet(_noisy(batch, table), batch["times"], batch["complete"])
        apart = []
        for layer, (k, v) in zip(layers, adapter(batch["features"]), strict=True):
            assert layer.heard is not None
            q, told = layer.heard
            with torch.no_grad():
                context = batch["context"]
                missing = told - layer.attend(q, layer.to_k(context), layer.to_v(context))
            error = (layer.attend(q, k, v).float() - missing.float()) ** 2
            apart.append(error.mean() / (missing.float() ** 2).mean())
        return {"loss": torch.stack(apart).mean()}

    first = replace(run.budget, seconds=run.budget.seconds * LAYERS_FIRST)
    if not first.done(0):
        for layer in layers:
            layer.listens = True
        trainer = Trainer({kind: adapter}, loss_of_layers, 1e-3, run.device, decay=0.998)
        trainer.run(f"{kind}, layers", batches, first)
        trainer.finish()
        for layer in layers:
            layer.listens, layer.heard = False, None
    trainer = Trainer({kind: adapter}, loss, 1e-3, run.device, decay=0.998)
    figures = trainer.run(kind, batches, run.budget)
    trainer.finish()
    return _with_figures(figures, lambda: measure_reference(run, kind, adapter))


@torch.no_grad()
def measure_reference(run: Run, kind: str, adapter: Adapter) -> Figures:
    """How often a picture drawn without a prompt shows what a held-out reference shows, by weight."""
    store, count = run.store, run.scale.measured
    scenes = held_out_scenes(count, run.generator)
    dtype = next(store.vision.parameters()).dtype
    references = render(scenes, IMAGE_SIZE)
    said = [store.vision(normalised(part).to(dtype)) for part in references.split(run.scale.chunk)]
    features = torch.cat([part[0 if kind == "base" else 1] for part in said])
    images, none = adapter(features), adapter(_nothing(run, kind))
    tokens = store.tokens.empty(count)
    result: Figures = {}
    rows = [F.interpolate(references[: run.scale.shown // 4], size=(PICTURE, PICTURE), mode="area")]
    for weight in (0.0, 0.5, 0.75, 1.0, 1.25):
        pictures = _draw_pictures(run, tokens, weighted(images, weight), weighted(none, weight))
        result[f"reference adherence, weight {weight}"] = judged(store.judge, pictures, scenes)
        rows.append(pictures[: run.scale.shown // 4])
    store.unet.set_joint(True)
    try:
        pictures = _draw_pictures(run, tokens, images, none)
    finally:
        store.unet.set_joint(False)
    result["reference adherence, joint, weight 1.0"] = judged(store.judge, pictures, scenes)
    rows.append(pictures[: run.scale.shown // 4])
    # the prompt says one thing, the reference another
    other = sample(count, run.generator, simple=True)
    spoken = store.tokens(choose_phrases(other, run.generator, full=True))
    pictures = _draw_pictures(run, spoken, weighted(images, 0.5), weighted(none, 0.5))
    result["text adherence against a reference at weight 0.5"] = judged(store.judge, pictures, other)
    agreed = replace(scenes, background=other.background, background_kind=other.background_kind)
    spoken = store.tokens(choose_phrases(agreed, run.generator, full=True))
    pictures = _draw_pictures(run, spoken, weighted(images, 0.5), weighted(none, 0.5))
    result["text adherence with an agreeing reference at weight 0.5"] = judged(store.judge, pictures, agreed)
    rows.append(pictures[: run.scale.shown // 4])
    store.show(kind, torch.cat(rows), columns=max(1, run.scale.shown // 4))
    return result


STAGES: dict[str, tuple[float, Callable[[Run], Figures]]] = {
    "judge": (0.03, train_judge),
    "vae": (0.14, train_vae),
    "clip": (0.12, train_clip),
    "unet": (0.30, train_unet),
    "base": (0.13, train_base),
    "plus": (0.22, train_plus),
}
"""In order, each with its share of the whole time; the rest is for figures and files."""

__all__ = ["FULL", "SMOKE", "STAGES", "Run", "Scale", "Scenes"]

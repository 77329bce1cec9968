"""The networks of the small model are the true ones, and training works as it says."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from lib_ipadapter.clip_vision import load_clip_vision
from lib_ipadapter.encoding import uncond_pixels
from lib_ipadapter.recognise import DEMO, encoder_needed, recognise_adapter
from lib_ipadapter.tensorfile import open_tensors
from tests.demo_model import sampling, stages, trainer
from tests.demo_model import train as training
from tests.demo_model.clip import ATTRIBUTES, at_end, attribute_labels, normalised
from tests.demo_model.scenes import sample
from tests.demo_model.store import BASE, CHECKPOINT, PLUS, VISION, Store
from tests.demo_model.trainer import Budget, Trainer, learning_rate
from tests.embedded import Host
from tests.embedded.predictor import Predictor
from tests.embedded.trained import TrainedNetworks, load_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """All models with random weights, no layer of them zero, and their files."""
    store = Store(tmp_path_factory.mktemp("model"), 3, CPU)
    torch.manual_seed(4)
    for module in store.modules().values():
        for parameter in module.parameters():
            with torch.no_grad():
                # as files hold them
                parameter.copy_((parameter + torch.randn_like(parameter) * 0.05).half())
        module.eval()
    store.save()
    store.save_tokenizer(store.folder / "tokenizer")
    return store


@pytest.fixture(scope="module")
def trained(store: Store) -> TrainedNetworks:
    return load_trained(store.folder / CHECKPOINT)


@torch.no_grad()
def test_the_host_runs_what_was_trained(store: Store, trained: TrainedNetworks) -> None:
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.randn(2, 77, 64)
    ours = store.unet(x, t, context)
    assert float(ours.std()) > 0.05
    torch.testing.assert_close(trained.unet(x, t, context).sample, ours, rtol=1e-4, atol=1e-4)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = store.vae.encode(pixels)
    torch.testing.assert_close(trained.vae.encode(pixels).latent_dist.mode() * trained.scale, latents)
    torch.testing.assert_close(
        trained.vae.decode(latents / trained.scale).sample, store.vae.decode(latents), rtol=1e-3, atol=1e-4
    )
    tokens = torch.tensor([store.tokenizer.rows("a green striped triangle")])
    torch.testing.assert_close(trained.text(tokens).last_hidden_state, store.text(tokens))
    assert trained.tokenizer.vocabulary == store.tokenizer.vocabulary
    # and in training the tower computes the same in another way
    store.text.train()
    torch.testing.assert_close(trained.text(tokens).last_hidden_state, store.text(tokens))
    pooled = at_end(store.text(tokens), tokens, store.tokenizer.end)
    store.text.eval()
    torch.testing.assert_close(trained.text(tokens).pooler_output, pooled)


@torch.no_grad()
def test_the_extension_takes_the_encoder_and_the_adapters(store: Store) -> None:
    encoder = load_clip_vision(store.folder / VISION).float()
    pixels = torch.randn(2, 3, 224, 224)
    embeds, penultimate = store.vision(pixels)
    said = encoder(pixels)
    torch.testing.assert_close(said.image_embeds, embeds)
    torch.testing.assert_close(said.penultimate, penultimate)
    assert torch.equal(uncond_pixels("zero pixels", 224), torch.zeros(1, 3, 224, 224))
    for file, tokens in ((BASE, 4), (PLUS, 16)):
        kind = recognise_adapter(open_tensors(store.folder / file).tensors)
        assert (kind.family, kind.tokens, kind.context_width) == ("sd15", tokens, 64)
        assert encoder_needed(kind) == DEMO
        assert kind.layer_widths == tuple(store.unet.layer_widths()) and len(kind.layer_widths) == 16


def test_files_stay_within_their_limits(store: Store) -> None:
    sizes = [(store.folder / name).stat().st_size for name in (CHECKPOINT, VISION, BASE, PLUS)]
    assert max(sizes) <= 12_000_000 and sum(sizes) <= 30_000_000
    assert sum(p.numel() for p in store.vae.parameters()) <= 1_500_000
    files = [path for path in store.folder.iterdir() if path.is_file()]
    assert len(files) <= 8 and all(path.stat().st_size <= 16 * 2**20 for path in files)


def test_the_tokeniser_folder_serves_transformers(store: Store) -> None:
    folder = store.folder / "tokenizer"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    assert config["vocab_size"] == len(tokenizer) == 1000


def test_the_host_draws_with_a_checkpoint_and_its_words_count(store: Store) -> None:
    with Host(extensions=[], checkpoint=store.folder / CHECKPOINT) as host:
        request = {"steps": 2, "seed": 1, "width": 64, "height": 64, "cfg_scale": 4.0}
        first, again, other = (
            host.txt2img(prompt=prompt, **request).image.tobytes()
            for prompt in ("a red circle", "a red circle", "two blue stars")
        )
        assert first == again != other
        assert host.sd_model.kmodel.predictor.prediction_type == "epsilon"
        assert host.sd_model.sd_checkpoint_info.name == "demo"


def test_an_epsilon_predictor_that_is_right_gives_the_clean_latents() -> None:
    predictor = Predictor(prediction_type="epsilon")
    clean, noise, sigma = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.5, 9.0])
    noisy = clean + noise * sigma[:, None, None, None]
    torch.testing.assert_close(predictor.calculate_denoised(sigma, noise, noisy), clean, atol=1e-5, rtol=1e-5)


def test_sampling_with_a_right_predictor_ends_at_the_clean_latents() -> None:
    clean = torch.randn(2, 4, 16, 16)
    table = sampling.alphas()

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = table[t][:, None, None, None]
        return (x - a.sqrt() * clean) / (1 - a).sqrt()

    found = sampling.ddim(predict, torch.randn(2, 4, 16, 16), 5)
    torch.testing.assert_close(found, clean, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_normalising_the_latents_changes_no_picture(store: Store) -> None:
    vae = stages.working_copy(store.vae, CPU)
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    before = vae.decode(vae.encode(pixels))
    std, mean = torch.std_mean(vae.moments(pixels)[0], dim=(0, 2, 3))
    vae.normalise(mean, std)
    latents = vae.encode(pixels)
    torch.testing.assert_close(vae.decode(latents), before, atol=1e-4, rtol=1e-3)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    torch.testing.assert_close(std, torch.ones(4))
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)


def test_image_tokens_go_to_the_layers_that_the_file_names(store: Store) -> None:
    """Each layer's image tokens reach only that layer: in order of the file, inputs, outputs, middle."""
    layers = [
        *(block[1] for block in store.unet.input_blocks if len(block) > 1),
        *(block[1] for block in list(store.unet.output_blocks)[3:]),
        store.unet.middle_block[1],
    ]
    seen: list[int] = []
    hooks = [
        layer.transformer_blocks[0].attn2.register_forward_pre_hook(
            lambda module, args, n=n: seen.append(n) if float(args[2][0].mean()) == n else None
        )
        for n, layer in enumerate(layers)
    ]
    kv = [(torch.full((1, 2, 64), float(n)), torch.zeros(1, 2, 64)) for n in range(16)]
    with torch.no_grad():
        store.unet(torch.randn(1, 4, 16, 16), torch.tensor([1]), torch.randn(1, 77, 64), kv)
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == list(range(16))


# --- the trainer ------------------------------------------------------------------------------------------------------


def straight(peak: float = 0.05) -> tuple[nn.Linear, Trainer]:
    torch.manual_seed(0)
    line = nn.Linear(3, 1)
    target = torch.tensor([[1.0, -2.0, 0.5]])

    def loss(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": ((line(batch["x"]) - batch["x"] @ target.t() - 3.0) ** 2).mean()}

    return line, Trainer({"line": line}, loss, peak, CPU, decay=0.9, weight_decay=0.0, warm_up=5)


def steps(count: int) -> Budget:
    return Budget(1e9, 0.0, math.inf, count)


def test_training_finds_a_straight_line() -> None:
    line, made = straight()
    generator = torch.Generator().manual_seed(1)
    figures = made.run("line", lambda: {"x": torch.randn(64, 3, generator=generator)}, steps(400))
    made.finish()
    assert figures["loss"] < 0.05
    torch.testing.assert_close(line.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=0.02, rtol=0)
    torch.testing.assert_close(line.bias, torch.tensor([3.0]), atol=0.02, rtol=0)
    assert not line.weight.requires_grad


def test_training_goes_back_when_numbers_overflow() -> None:
    line, made = straight()
    made.run("line", lambda: {"x": torch.randn(8, 3)}, steps(20))
    good = [weight.clone() for weight in made.masters]
    made.step({"x": torch.full((8, 3), math.nan)}, 0.5)
    assert not all(bool(weight.isfinite().all()) for weight in made.masters)
    made._restore()
    assert all(torch.equal(a, b) for a, b in zip(made.masters, good, strict=True))
    assert made.penalty == 0.5 and torch.equal(line.weight.detach(), good[0])


def test_the_rate_follows_the_share_of_time_over_all_calls() -> None:
    rates = [learning_rate(share, 500, 1.0, 100) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0.99 and rates[-1] < 1e-6
    assert learning_rate(0.0, 0, 1.0, 100) < 0.02
    budget = Budget(100.0, 75.0, math.inf)
    assert budget.share(0) == pytest.approx(0.75, abs=0.01) and not budget.over(0)
    assert Budget(100.0, 100.0, math.inf).over(0)
    assert Budget(100.0, 0.0, time.monotonic() - 1).over(0), "the call must end"


def test_what_a_stage_only_uses_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "everywhere_bfloat16", True)
    line = nn.Linear(2, 2)
    before = line.weight.detach().clone()
    assert trainer.working_copy(line, CPU).weight.dtype == torch.bfloat16
    assert torch.equal(line.weight, before)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: stages.Run) -> dict[str, object]:
        with torch.no_grad():
            next(run.store.vae.parameters()).fill_(math.nan)
        raise RuntimeError("out of luck")

    monkeypatch.setitem(training.STAGES, "vae", (0.2, broken))
    options = ["--smoke", "--steps", "1", "--device", "cpu"]
    assert training.main(["--out", str(tmp_path / "a"), *options, "--only", "judge", "vae", "clip"]) == 1
    assert "out of luck" in capsys.readouterr().err
    report = json.loads((tmp_path / "a" / "report.json").read_text(encoding="utf-8"))
    assert (
        report["stages"]["judge"]["done"] and report["stages"]["clip"]["done"] and not report["stages"]["vae"]["done"]
    )
    assert "out of luck" in report["stages"]["vae"]["failed"]
    first = Store(tmp_path / "b", 7, CPU)
    first.load(tmp_path / "a")
    assert all(bool(p.isfinite().all()) for p in first.vae.parameters())

    # another call goes on from what there is
    monkeypatch.undo()
    again = ["--out", str(tmp_path / "b"), "--resume", str(tmp_path / "a"), *options, "--only", "judge", "base"]
    assert training.main(again) == 0
    second = Store(tmp_path / "b", 7, CPU)
    second.load(tmp_path / "b")
    for part, same in (("judge", True), ("vision", True), ("base", False)):
        pairs = zip(getattr(first, part).parameters(), getattr(second, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is same, part


def test_what_is_asked_of_a_picture_makes_sense() -> None:
    scenes = sample(200, torch.Generator().manual_seed(2))
    labels, asked = attribute_labels(scenes)
    names = list(ATTRIBUTES)
    blurry, alone = scenes.background_kind == 2, scenes.relation == 0
    assert not asked[blurry][:, names.index("shape")].any() and asked[blurry][:, names.index("background_kind")].all()
    assert not asked[alone][:, names.index("shape_2")].any()
    assert int(labels[:, names.index("count")].max()) == 2 and int(labels.min()) == 0
    assert float(normalised(torch.full((1, 3, 2, 2), 0.45)).abs().max()) < 0.2

"""Acceptance run in an installed WebUI: ``python tests/real_host.py --webui DIR [--python EXE]``.

Links the extension and a probe into the WebUI, makes random model files in a folder of its own, starts the WebUI on
loopback, drives every case through its HTTP API and prints a table. A case passes if the reference changes the picture,
its sentence is in the answer where one is due, and the plain picture afterwards is bit for bit what it was.
At the end the links are gone again, and settings files of the WebUI were never written.

AUTOMATIC1111 gets a small SD1.5 with a yaml of its own, Forge and its relatives the full size.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import checkpoints  # noqa: E402
from tests.adapter_files import base_adapter, plus_adapter, save  # noqa: E402

EXTENSION, PROBE = "sd-webui-ip-adapter-acceptance", "sd-webui-ip-adapter-acceptance-probe"
TITLE, PROBE_TITLE = "IP-Adapter", "Acceptance probe"
START_SECONDS, REQUEST_SECONDS = 600, 1800

SMALL_YAML = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {{image_size: 32, in_channels: 4, out_channels: 4, model_channels: {width},
        attention_resolutions: [4, 2, 1],
        num_res_blocks: 2, channel_mult: [1, 2, 4, 4], num_heads: 8, use_spatial_transformer: true,
        transformer_depth: 1, context_dim: {context}, use_checkpoint: false, legacy: false}}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig: {{double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: {vae_width},
          ch_mult: [1, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}}
        lossconfig: {{target: torch.nn.Identity}}
    cond_stage_config: {{target: ldm.modules.encoders.modules.FrozenCLIPEmbedder}}
"""


@dataclass(frozen=True)
class WebUI:
    """An installed WebUI and what differs between them."""

    folder: Path
    python: str

    @property
    def is_a1111(self) -> bool:
        return not (self.folder / "modules_forge").is_dir()

    @property
    def name(self) -> str:
        if self.is_a1111:
            return "AUTOMATIC1111"
        return "Forge" if (self.folder / "backend").is_dir() else "Forge on ldm_patched"

    @property
    def flags(self) -> list[str]:
        cpu = ["--use-cpu", "all", "--no-half", "--no-half-vae"] if self.is_a1111 else ["--always-cpu"]
        return cpu if not torch.cuda.is_available() else []


@dataclass(frozen=True)
class Models:
    """Random model files, outside the WebUI."""

    checkpoints: Path
    adapters: Path
    encoders: Path


def make_models(folder: Path, small: bool) -> Models:
    """Two checkpoints, a base and a plus adapter, and the encoder that both need."""
    layout = checkpoints.SMALL_SD15 if small else checkpoints.SD15
    models = Models(folder / "checkpoints", folder / "adapters", folder / "encoders")
    models.adapters.mkdir(parents=True, exist_ok=True)
    for name, seed in (("acceptance-a", 1), ("acceptance-b", 2)):
        path = models.checkpoints / f"{name}.safetensors"
        if not path.exists():
            print(f"making {path.name}", flush=True)
            # The text tower keeps its full size: WebUIs build it from a configuration of their own.
            whole = checkpoints.replace(layout, text_width=768, text_layers=12, context=768) if small else layout
            checkpoints.write_random(path, checkpoints.sd15_checkpoint(whole), seed)
        if small:
            text = SMALL_YAML.format(width=layout.width, context=768, vae_width=layout.vae_width)
            path.with_suffix(".yaml").write_text(text, encoding="utf-8")
    widths = layout.attention_widths
    encoder = models.encoders / "encoder.safetensors"
    if not encoder.exists():
        print("making the image encoder", flush=True)
        sizes = {"width": 128, "layers": 3, "mlp": 512, "projection": 128} if small else {}
        checkpoints.write_random(encoder, checkpoints.image_encoder(**sizes), 3)
    width, projection = (128, 128) if small else (1280, 1024)
    heads, dim = (2, 128) if small else (12, 768)
    for name, made in (
        ("acceptance-base", base_adapter(widths, 768, embedding=projection)),
        ("acceptance-plus", plus_adapter(widths, 768, embedding=width, dim=dim, heads=heads)),
    ):
        save(made, models.adapters / f"{name}.safetensors", torch.float16)
    return models


@contextmanager
def linked(webui: WebUI) -> Iterator[None]:
    """The extension and the probe in the WebUI's folder ``extensions``, for as long as the block runs."""
    others = [path.parent.parent for path in webui.folder.glob("extensions/*/scripts/ip_adapter.py")]
    if others:
        raise SystemExit(
            f"The WebUI has the extension already, in {others[0]}: move it out of extensions, then try again."
        )
    links = {EXTENSION: ROOT, PROBE: ROOT / "tests" / "real_host_probe"}
    made = []
    try:
        for name, target in links.items():
            link = webui.folder / "extensions" / name
            link.symlink_to(target, target_is_directory=True)
            made.append(link)
        yield
    finally:
        for link in made:
            link.unlink()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Server:
    """A running WebUI."""

    url: str
    plain: dict[str, Any] = field(default_factory=dict)

    def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a request; GET without a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            try:
                return error.code, json.loads(text)
            except ValueError:
                return error.code, {"detail": text[:300]}


@contextmanager
def started(webui: WebUI, models: Models, folder: Path, more: list[str]) -> Iterator[Server]:
    """The WebUI, started on loopback with settings files of our own."""
    port = free_port()
    command = [webui.python, "launch.py", "--api", "--nowebui", "--port", str(port), "--server-name", "127.0.0.1"]
    command += ["--skip-prepare-environment", "--skip-install", "--skip-torch-cuda-test", "--skip-python-version-check"]
    command += ["--skip-version-check", "--ckpt-dir", str(models.checkpoints)]
    command += ["--ckpt", str(models.checkpoints / "acceptance-a.safetensors")]
    command += ["--ui-settings-file", str(folder / "config.json"), "--ui-config-file", str(folder / "ui-config.json")]
    log = folder / "server.log"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *webui.flags, *more], cwd=webui.folder, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    try:
        server = Server(f"http://127.0.0.1:{port}")
        end = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(
                    f"{webui.name} did not start; the end of its log:\n{log.read_text(errors='replace')[-3000:]}"
                )
            try:
                if server.call("/sdapi/v1/sd-models")[0] == 200:
                    break
            except OSError:
                time.sleep(2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def photograph() -> str:
    """A seeded picture with structure, as base64: stripes, a disc, noise."""
    y, x = np.mgrid[0:300, 0:400].astype(np.float64)
    rng = np.random.default_rng(0)
    disc = ((x - 260) ** 2 + (y - 120) ** 2 < 70**2) * 120
    picture = np.stack([127 + 90 * np.sin(x / 18), 60 + disc, 127 + 80 * np.cos(y / 25)], -1) + rng.normal(
        0, 12, (300, 400, 1)
    )
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PHOTOGRAPH = photograph()


def unit(adapter: str = "plus", **fields: Any) -> dict[str, Any]:
    return {"model": f"acceptance-{adapter}.safetensors", "images": [PHOTOGRAPH], **fields}


@dataclass(frozen=True)
class Case:
    """A request with the extension on, held against the same request with it off."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    units: tuple[dict[str, Any], ...] = (unit(),)
    endpoint: str = "txt2img"
    probe: str = ""
    sentence: str = ""
    """What a refusal must say; empty: the request succeeds."""
    status: int = 200
    compare: bool = True
    """Whether the same request without units is drawn too, and must differ."""


IMG2IMG: dict[str, Any] = {"init_images": [PHOTOGRAPH], "denoising_strength": 0.75, "steps": 4}


def half_mask() -> str:
    mask = np.zeros((300, 400), np.uint8)
    mask[80:220, 100:300] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


INPAINT = {**IMG2IMG, "mask": half_mask(), "inpainting_fill": 1}
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
FORGE_HIRES = {"hr_additional_modules": ["Use same choices"], "hr_cfg": 7.0}
LONG = "a lighthouse on a cliff above the stormy sea in the evening light, " * 7


def cases(webui: WebUI) -> list[Case]:
    """Everything that an API can reach, for this WebUI."""
    hires = HIRES if webui.is_a1111 else {**HIRES, **FORGE_HIRES}
    return [
        Case("base, decoupled", units=(unit("base"),)),
        Case("plus, joint"),
        Case("base, joint", units=(unit("base", formulation="joint"),)),
        Case("plus, decoupled", units=(unit(formulation="decoupled"),)),
        Case("joint, no uncond", units=(unit(uncond="none"),)),
        Case("two units, negative weight", units=(unit(), unit("base", weight=-0.5))),
        Case("batch of 2, count 2", {"batch_size": 2, "n_iter": 2}),
        Case("AND", {"prompt": "a lighthouse AND a ship :0.7", "batch_size": 2}),
        Case("long prompt", {"prompt": LONG}),
        Case("long negative", {"negative_prompt": LONG}),
        Case("CFG 1", {"cfg_scale": 1.0}),
        Case("Heun", {"sampler_name": "Heun"}),
        Case("DPM++ 2M Karras", {"sampler_name": "DPM++ 2M", "scheduler": "Karras"}),
        Case("DDIM", {"sampler_name": "DDIM", "steps": 3}),
        Case("odd size", {"width": 136, "height": 200}),
        Case("hires fix", hires),
        Case("hires fix, other checkpoint", {**hires, "hr_checkpoint_name": "acceptance-b.safetensors"}),
        Case("refiner", {"refiner_checkpoint": "acceptance-b.safetensors", "refiner_switch_at": 0.5, "steps": 4}),
        Case("checkpoint in the request", {"override_settings": {"sd_model_checkpoint": "acceptance-b.safetensors"}}),
        Case("img2img", IMG2IMG, endpoint="img2img"),
        Case("inpaint, whole picture", {**INPAINT, "inpaint_full_res": False}, endpoint="img2img"),
        Case("inpaint, only masked", {**INPAINT, "inpaint_full_res": True}, endpoint="img2img"),
        Case("a job inside the job", probe="nested"),
        Case("interrupt", {"steps": 4}, probe="interrupt", compare=False),
        Case("exception inside sampling", {"steps": 4}, probe="fail", status=500, compare=False),
        Case("no picture", units=(unit() | {"images": []},), status=422, sentence="picture"),
        Case("unknown model", units=(unit() | {"model": "nowhere"},), status=422, sentence="nowhere"),
        Case("path as model", units=(unit() | {"model": "../acceptance-a"},), status=422, sentence="There is no"),
        Case("unknown field", units=(unit() | {"wieght": 1},), status=422, sentence="wieght"),
        Case(
            "stop behind the first step",
            {**IMG2IMG, "denoising_strength": 0.5},
            (unit(stop=0.2),),
            "img2img",
            status=422,
            sentence="would never act",
        ),
    ]


PLAIN: dict[str, Any] = {
    "prompt": "a lighthouse on a cliff",
    "negative_prompt": "blurry",
    "steps": 2,
    "width": 128,
    "height": 128,
    "seed": 12345,
    "cfg_scale": 7.0,
    "sampler_name": "Euler",
    "save_images": False,
    # WebUIs without a settings file keep a request's overrides, so every request says which checkpoint it means.
    "override_settings": {"sd_model_checkpoint": "acceptance-a.safetensors"},
    "send_images": True,
}


def request(case: Case, units: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    scripts: dict[str, Any] = {}
    if units:
        scripts[TITLE] = {"args": [True, *units]}
    if case.probe:
        scripts[PROBE_TITLE] = {"args": [case.probe]}
    return {**PLAIN, **case.fields, **({"alwayson_scripts": scripts} if scripts else {})}


def pixels(answer: dict[str, Any]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(i))).convert("RGB")) for i in answer.get("images", [])]


def run_case(server: Server, case: Case, reference: list[np.ndarray]) -> str:
    """What went wrong; empty if nothing did."""
    path = f"/sdapi/v1/{case.endpoint}"
    without = server.call(path, request(case, ())) if case.compare and case.status == 200 else None
    status, answer = server.call(path, request(case, case.units))
    if status != case.status:
        return f"answered {status}: {str(answer.get('detail') or answer.get('errors') or answer.get('message'))[:200]}"
    if case.sentence and case.sentence not in str(answer.get("detail")):
        return f"the sentence is {answer.get('detail')!r}"
    if without is not None:
        if without[0] != 200:
            return f"without the extension it answered {without[0]}: {str(without[1])[:200]}"
        before, after = pixels(without[1]), pixels(answer)
        if len(before) != len(after) or not after:
            return f"{len(after)} pictures, {len(before)} without"
        same = [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if np.array_equal(a, b)]
        if same:
            return f"the reference changed nothing in picture {same[0]}"
        if f"{TITLE} 1" not in json.loads(answer["info"])["infotexts"][0]:
            return "the picture's parameters don't name the unit"
    status, answer = server.call("/sdapi/v1/txt2img", PLAIN)
    if status != 200:
        return f"the plain picture afterwards answered {status}"
    if not all(np.array_equal(a, b) for a, b in zip(reference, pixels(answer), strict=True)):
        return "the plain picture afterwards is another one"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--webui", type=Path, required=True, help="folder of the installed WebUI")
    parser.add_argument("--python", default=sys.executable, help="the Python that the WebUI runs on")
    parser.add_argument("--models", type=Path, help="folder for the random models, kept; default: a temporary one")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("more", nargs="*", help="further flags for the WebUI, after --")
    args = parser.parse_args()
    webui = WebUI(args.webui.resolve(), args.python)
    rows: list[tuple[str, str, float]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        models = make_models(args.models.resolve() if args.models else folder / "models", webui.is_a1111)
        with started(webui, models, folder, ["--disable-extra-extensions", *args.more]) as server:
            status, answer = server.call("/sdapi/v1/txt2img", PLAIN)
            if status != 200:
                raise SystemExit(f"The plain picture without the extension answered {status}: {str(answer)[:500]}")
            reference = pixels(answer)
        ours = ["--ip-adapter-models-path", str(models.adapters), "--ip-adapter-encoders-path", str(models.encoders)]
        with linked(webui), started(webui, models, folder, [*ours, *args.more]) as server:
            drawn = pixels(server.call("/sdapi/v1/txt2img", PLAIN)[1])
            same = all(np.array_equal(a, b) for a, b in zip(reference, drawn, strict=True))
            rows.append(("installed and off is not installed", "" if same else "another picture", 0.0))
            reference = drawn
            for case in cases(webui):
                if args.only in case.name:
                    begin = time.monotonic()
                    rows.append(
                        (
                            case.name,
                            _guarded(lambda case=case: run_case(server, case, reference)),
                            time.monotonic() - begin,
                        )
                    )
                    print(f"{case.name}: {rows[-1][1] or 'pass'}", flush=True)
    print(f"\n{webui.name}, {webui.folder.name}\n")
    for name, problem, seconds in rows:
        print(f"| {name:36} | {'pass' if not problem else 'FAIL: ' + problem} | {seconds:.0f} s |")
    failed = sum(bool(problem) for _, problem, _ in rows)
    print(f"\n{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _guarded(run: Callable[[], str]) -> str:
    try:
        return run()
    except (OSError, KeyError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())

"""The extension once through, beside whatever libraries this Python has; what came out is printed as JSON.

Run by ``tests.version_sets`` beside the oldest and the newest of them. It needs nothing but what every WebUI ships:
torch, numpy, Pillow, safetensors, gradio and fastapi.

    python -m tests.version_smoke
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lib_ipadapter.encoding import NEGATIVE_KEY
from tests.adapter_files import base_adapter, plus_adapter, save
from tests.bare_model import SD15_LAYERS, BareModel
from tests.checkpoints import image_encoder, write_random

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = "sd_image_prompt"
LIBRARIES = ("torch", "numpy", "pillow", "safetensors", "gradio", "pydantic", "fastapi")


def modules() -> list[str]:
    """Dotted names of every module of the package, without the package's own."""
    files = (
        path.relative_to(ROOT / "lib_ipadapter").with_suffix("") for path in (ROOT / "lib_ipadapter").rglob("*.py")
    )
    return sorted(".".join(part for part in file.parts if part != "__init__") for file in files if file.parts)


def import_all(package: str) -> int:
    """Import every module under a package's name; how many there are."""
    names = [name for name in modules() if name]
    for name in names:
        importlib.import_module(f"{package}.{name}")
    return len(names)


def model_files(folder: Path) -> None:
    """Random adapters, as safetensors and as ``torch.save`` writes them, an encoder and a negative."""
    widths = [width for _, width in SD15_LAYERS]
    (folder / "ipadapter").mkdir(parents=True)
    (folder / "clip_vision").mkdir()
    save(base_adapter(widths, 64), folder / "ipadapter" / "base.safetensors")
    torch.save(plus_adapter(widths, 64), folder / "ipadapter" / "plus.bin")
    torch.save(base_adapter(widths, 64), folder / "ipadapter" / "old.bin", _use_new_zipfile_serialization=False)
    save_file({NEGATIVE_KEY: torch.zeros(1, 4, 64)}, folder / "ipadapter" / "negative.safetensors")
    write_random(folder / "clip_vision" / "tiny.safetensors", image_encoder(128, 3, 512, 128), 0)


def picture() -> np.ndarray[Any, Any]:
    """Noise under a slope, larger than an encoder's input and not square: uint8 ``[300, 400, 3]``."""
    noise = np.random.default_rng(0).integers(0, 200, (300, 400, 3))
    return (noise + np.linspace(0, 55, 400)[None, :, None]).astype(np.uint8)


def pictures_read() -> dict[str, str]:
    """Hashes of the encoder's inputs made of one picture in several file formats and modes."""
    from PIL import Image

    from lib_ipadapter.pictures import prepare, read_picture

    image = Image.fromarray(picture())
    transparent = image.convert("RGBA")
    transparent.putalpha(image.convert("L"))
    deep = Image.fromarray(picture()[..., 0].astype(np.uint16) * 257)
    sources: dict[str, Any] = {"array": picture()}
    for name, made in (("RGB", image), ("RGBA", transparent), ("16 bit", deep), ("palette", image.quantize(16))):
        file = io.BytesIO()
        made.save(file, "PNG")
        sources[name] = file.getvalue()
    read = {name: read_picture(source) for name, source in sources.items()}
    return {
        f"{name}, {preparation}": sha256(np.asarray(prepare(each, preparation)).tobytes()).hexdigest()[:16]
        for name, each in read.items()
        for preparation in ("crop", "squash", "pad")
        # how colours are chosen for a palette is Pillow's affair, and may change
        if name != "palette"
    }


def attention(models: Path) -> list[float]:
    """A few numbers out of a patched layer, for each kind of adapter file and both ways of weighting."""
    from lib_ipadapter import load_ip_adapter, patch_model, preprocess

    numbers = []
    for name in ("base.safetensors", "plus.bin", "old.bin"):
        adapter = str(models / "ipadapter" / name)
        load_ip_adapter(str(models / "clip_vision" / "tiny.safetensors"), None, adapter)
        conds = preprocess(picture(), adapter)
        patched = patch_model(BareModel(0.1), [(conds, 0.9, 0.8)])
        key, width = SD15_LAYERS[0]
        q, k, v = torch.randn(3, 2, 9, width, generator=torch.Generator().manual_seed(1))
        options = {"n_heads": 8, "cond_or_uncond": [1, 0], "block": key[:2], "block_index": key[2]}
        out = patched.replacements[key](q, k, v, options)
        assert out.shape == q.shape and bool(out.isfinite().all())
        numbers += [round(float(x), 6) for x in out[:, 0, :3].flatten()]
    return numbers


class Script:
    """A WebUI's ``modules.scripts.Script``, as far as ours uses it."""

    def elem_id(self, name: str) -> str:
        """An element's id."""
        return f"smoke_{name}"


def in_a_webui(models: Path) -> dict[str, Any]:
    """The script in a stand-in of AUTOMATIC1111's modules: loaded twice, its page built, its route asked."""
    import gradio as gr
    from fastapi import FastAPI

    class InputAccordion:
        """Holds a checkbox, in place of the accordion that is one (deriving it would make gradio write files)."""

        def __init__(self, value: bool, label: str, elem_id: str) -> None:
            self.checkbox = gr.Checkbox(value=value, label=label, elem_id=elem_id)
            self.label = label

        def __enter__(self) -> InputAccordion:
            return self

        def __exit__(self, *caught: object) -> None: ...

    def registrar(event: str) -> Callable[[Callable[..., Any]], None]:
        return lambda callback: registered.__setitem__(event, callback)

    registered: dict[str, Callable[..., Any]] = {}
    parts: dict[str, dict[str, Any]] = {
        "scripts": {"Script": Script, "AlwaysVisible": object()},
        "script_callbacks": {
            f"on_{e}": registrar(e)
            for e in ("app_started", "before_ui", "cfg_denoiser", "script_unloaded", "ui_settings")
        },
        "ui_components": {"InputAccordion": InputAccordion, "ToolButton": gr.Button},
        "sd_hijack": {},
        "paths": {"models_path": str(models)},
        "shared": {"cmd_opts": SimpleNamespace(), "opts": SimpleNamespace()},
    }
    sys.modules["modules"] = ModuleType("modules")
    for name, values in parts.items():
        module = sys.modules[f"modules.{name}"] = ModuleType(f"modules.{name}")
        vars(module).update(values)
        setattr(sys.modules["modules"], name, module)
    path = ROOT / "scripts" / "ip_adapter.py"
    for _ in range(2):  # the second time is 'Reload UI'
        namespace: dict[str, Any] = {"__name__": "ip_adapter.py", "__file__": str(path)}
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    assert namespace["session"] is not None
    under_private_name = import_all(PRIVATE)
    with gr.Blocks() as blocks:
        components = namespace["IPAdapterScript"]().ui(False)
    labels = [component.label for component in components]
    assert json.loads(json.dumps(blocks.get_config_file(), default=str))["components"]
    app = FastAPI()
    app.add_api_route("/sdapi/v1/sd-models", _host_route)  # the host's API, beside which ours stands
    registered["app_started"](blocks, app)
    return {
        "modules": under_private_name,
        "labels": labels,
        "listed": asyncio.run(ask(app, "GET", "/ip-adapter/models")),
        "asked": routes_asked(app),
        "with a login": behind_gradios_login(blocks, registered["app_started"]),
    }


def routes_asked(app: Any) -> list[Any]:
    """Status and the beginning of the answer of every kind of route."""
    unit = {"model": "base.safetensors", "images": [base64_of(picture())]}
    return [
        asyncio.run(ask(app, "POST", "/ip-adapter/check", {"unit": unit, "steps": 4})),
        asyncio.run(ask(app, "POST", "/ip-adapter/check", {"unit": {**unit, "weight": 9}})),
        asyncio.run(ask(app, "POST", "/ip-adapter/check", {"unit": unit}, kind=b"text/plain")),
        asyncio.run(ask(app, "GET", "/ip-adapter/references/1")),
        asyncio.run(ask(app, "GET", "/ip-adapter/encoders", host=b"a.b")),
    ]


def base64_of(array: np.ndarray[Any, Any]) -> str:
    """A picture as an API client sends it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def behind_gradios_login(blocks: Any, started: Callable[..., Any]) -> list[int]:
    """Statuses of a route of ours in gradio's own app with a login: without it, with a wrong one, with it."""
    from gradio.routes import App

    app = App.create_app(blocks)
    app.auth = {"somebody": "secret"}
    app.tokens["right"] = "somebody"
    app.add_api_route("/sdapi/v1/sd-models", _host_route)
    started(blocks, app)
    names = ["access-token", f"access-token-{getattr(app, 'cookie_id', '')}"]  # of gradio 3, of gradio 4
    cookies = [b"", *("; ".join(f"{name}={value}" for name in names).encode() for value in ("wrong", "right"))]
    return [asyncio.run(ask(app, "GET", "/ip-adapter/encoders", cookie=cookie))[0] for cookie in cookies]


def _host_route() -> list[str]:
    return []


async def ask(
    app: Any,
    method: str,
    path: str,
    fields: Any = None,
    host: bytes = b"127.0.0.1",
    kind: bytes = b"application/json",
    cookie: bytes = b"",
) -> tuple[int, Any]:
    """Status and JSON that an app answers, without a server and without a client of any version."""
    sent: list[dict[str, Any]] = []
    body = b"" if fields is None else json.dumps(fields).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", host), (b"content-type", kind), (b"cookie", cookie)],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def main() -> None:
    """Print everything as one line of JSON, the last of the output."""
    torch.set_num_threads(1)
    # A warning out of our own modules is a fault here, as in the tests.
    warnings.filterwarnings("error", module=f"lib_ipadapter|{PRIVATE}")
    with tempfile.TemporaryDirectory() as temporary:
        models = Path(temporary, "models")
        model_files(models)
        found = {
            "versions": {name: metadata.version(name) for name in LIBRARIES},
            "modules": import_all("lib_ipadapter"),
            "pictures": pictures_read(),
            "attention": attention(models),
            "webui": in_a_webui(models),
        }
    assert torch.__version__.split("+")[0] == found["versions"]["torch"].split("+")[0]
    print(json.dumps(found))


if __name__ == "__main__":
    main()

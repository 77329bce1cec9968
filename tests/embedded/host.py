"""The embedded host: one small WebUI with its model, settings, scripts, API and page."""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from fastapi import FastAPI
from PIL import Image

from . import jobs, loader, webui
from .api import Api
from .callbacks import Callbacks
from .extra_networks import ExtraNetworks
from .page import Page
from .processing import Processed, process_images
from .record import UNetCall
from .reports import Report, Reports
from .runner import ScriptRunner
from .sd_model import SDModel
from .server import Server
from .state import Options, State

PROJECT_ROOT = Path(__file__).resolve().parents[2]
"""The folder of the extension that this host comes with."""

_active: list[Host] = []


@dataclass(frozen=True)
class Result:
    """What a request gave."""

    images: list[Image.Image]
    infotexts: list[str]
    info: dict[str, Any]
    """The API's ``info``, parsed."""
    parameters: dict[str, Any]

    @property
    def image(self) -> Image.Image:
        return self.images[0]


class Host:
    """A WebUI in this process. Only one is active at a time; a new one takes the place of the old.

    ``extensions``: extension folders in load order; None means this project alone, an empty list none.
    ``models_path``: the folder that ``modules.paths.models_path`` names.
    ``row_order``: ``"forge"`` (uncond rows first, AND parts reversed) or ``"a1111"`` (cond rows first).
    ``split_calls``: one UNet call per chunk, as on a machine short of memory.
    ``settings``: options set before scripts are loaded. ``command_line``: flags as on a host's command line, its own
    (``--data-dir``, ``--models-dir``) and those of extensions' ``preload.py``.
    ``checkpoint``: a trained SD1.5 model, with its tokeniser's folder beside it, instead of random networks.
    """

    def __init__(
        self,
        shape: str = "sd15",
        extensions: Sequence[str | Path] | None = None,
        models_path: str | Path | None = None,
        *,
        row_order: Literal["forge", "a1111"] = "forge",
        split_calls: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        settings: dict[str, Any] | None = None,
        command_line: Sequence[str] = (),
        verbose: bool = False,
        checkpoint: Path | None = None,
    ) -> None:
        folders = [PROJECT_ROOT] if extensions is None else [Path(folder).resolve() for folder in extensions]
        self.extensions = [loader.Extension(folder) for folder in folders]
        self.models_path = Path(models_path).resolve() if models_path is not None else PROJECT_ROOT / "models"
        # Beside models that were given, else in a folder that goes with the host: never in the project.
        self._temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._data_dir = self._temporary.name if models_path is None else str(self.models_path.parent)
        self.row_order = row_order
        self.split_calls = split_calls
        self.verbose = verbose
        self.seed, self.device, self.dtype = seed, torch.device(device), dtype
        self.checkpoint = checkpoint
        self.reports = Reports()
        self.cmd_opts = loader.command_line_options(self.extensions, command_line, self._parser(), self.reports)
        self.cmd_opts.webui_is_non_local = self.cmd_opts.listen
        self.callbacks = Callbacks(self.reports)
        self.state = State()
        self.opts = Options()
        self.opts.data.update(settings or {})
        self.queue_lock = threading.RLock()
        self.unet_calls: list[UNetCall] = []
        self.extra_networks = ExtraNetworks()
        self.basedir: str | None = None
        self.scripts_data: list[loader.ScriptClassData] = []
        self._running: list[Any] = []
        self._server: Server | None = None
        self._modules: dict[str, ModuleType] = {}
        self._names_before: set[str] = set()
        self.Txt2Img = type("StableDiffusionProcessingTxt2Img", (jobs.Txt2Img,), {"host": self})
        self.Img2Img = type("StableDiffusionProcessingImg2Img", (jobs.Img2Img,), {"host": self})
        self.runners = {"txt2img": ScriptRunner(self.reports), "img2img": ScriptRunner(self.reports)}
        self.sd_model = self._make_model(shape)
        self.activate()

    # -- life -------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Enter the stand-in modules, load the scripts and build page and API; an active host is closed first."""
        while _active:
            _active[-1].close()
        _active.append(self)
        self._names_before = set(sys.modules)
        self._path_before = list(sys.path)
        self._modules = webui.make_modules(self)
        self._shadowed = {name: sys.modules[name] for name in self._modules if name in sys.modules}
        sys.modules.update(self._modules)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        def set_basedir(folder: str | None) -> None:
            self.basedir = folder

        self.callbacks.clear()
        classes = self.scripts_data
        loader.load_scripts(self.extensions, self.reports, set_basedir, classes)
        for tab, runner in self.runners.items():
            runner.initialize_scripts(tab == "img2img", classes)
        self.callbacks.run("ui_settings")
        self.callbacks.run("before_ui")
        self.page = Page(self)
        self.api = Api(self)
        self.app: FastAPI = self.api.app
        self.callbacks.run("app_started", self.page.blocks, self.app)
        self.page.mount(self.app)
        self.callbacks.run("model_loaded", self.sd_model)

    def reload_ui(self) -> None:
        """'Reload UI': scripts are told, loaded anew and rebuilt; ``sys.modules`` and the model stay as they are."""
        served = self._server
        self.stop()
        self.callbacks.run("script_unloaded")
        self._start()
        if served is not None:
            self._server = Server(self.app, served.address, served.port)

    def close(self) -> None:
        """Stop the server, tell the scripts, take all stand-ins out of ``sys.modules``, restore ``sys.path``."""
        if self not in _active:
            return
        self.stop()
        self.callbacks.run("script_unloaded")
        self.callbacks.clear()
        _active.remove(self)
        for name in self._modules:
            sys.modules.pop(name, None)
        sys.modules.update(self._shadowed)
        self._drop_private_modules()
        sys.path[:] = self._path_before

    deactivate = close

    def _drop_private_modules(self) -> None:
        """Forget modules that extensions entered under names of their own, which no import could find again."""
        roots = [Path(e.path) for e in self.extensions]
        for name in set(sys.modules) - self._names_before:
            file = getattr(sys.modules[name], "__file__", None)
            top = name.partition(".")[0]
            inside = file is not None and any(root in Path(file).parents for root in roots)
            if inside and not any((root / top).exists() or (root / f"{top}.py").exists() for root in roots):
                sys.modules.pop(name, None)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser("embedded host")
        parser.add_argument("--data-dir", default=self._data_dir)
        parser.add_argument("--models-dir", default=str(self.models_path))
        for flag in ("--nowebui", "--api-log", "--listen", "--freeze-settings"):
            parser.add_argument(flag, action="store_true")
        parser.set_defaults(api=True, share=False, ngrok=None, server_name=None)
        return parser

    # -- model ------------------------------------------------------------------------------------------------

    def _make_model(self, shape: str) -> SDModel:
        model = SDModel(shape, self.seed, self.device, self.dtype, self.checkpoint)
        model.kmodel.recorder = self._record
        self.opts.data["sd_model_checkpoint"] = model.sd_checkpoint_info.title
        return model

    def load_model(self, shape: str) -> None:
        """Load another checkpoint; scripts are told by ``on_model_loaded``."""
        self.sd_model = self._make_model(shape)
        self.callbacks.run("model_loaded", self.sd_model)

    # -- jobs -------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, p: Any) -> Iterator[None]:
        """Marks ``p`` as the job whose UNet calls are recorded; the outermost job empties the record."""
        if not self._running:
            self.unet_calls.clear()
        self._running.append(p)
        try:
            yield
        finally:
            self._running.pop()

    def _record(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        options: dict[str, Any],
    ) -> None:
        p = self._running[-1] if self._running else None
        denoiser = getattr(getattr(p, "sampler", None), "model_wrap_cfg", None)
        self.unet_calls.append(
            UNetCall(
                pass_name=_pass_name(p),
                depth=len(self._running) - 1,
                iteration=getattr(p, "iteration", 0),
                denoiser_step=getattr(denoiser, "step", 0),
                cond_or_uncond=tuple(options.get("cond_or_uncond", ())),
                batch_size=len(options["sigmas"]) if "sigmas" in options else 1,
                shape=tuple(x.shape),
                context_tokens=context.shape[1],
                sigma_tensor=sigma[:1].clone(),
                timestep_tensor=timestep[:1].clone(),
            )
        )

    def report_step(self) -> None:
        """Say how far the job is, if the host was asked to."""
        if self.verbose:
            state = self.state
            job = f"{state.job}: " if state.job.startswith("Batch") else ""
            print(
                f"\r{job}step {state.sampling_step + 1} of {state.sampling_steps} ", end="", file=sys.stderr, flush=True
            )
            if state.sampling_step + 1 >= state.sampling_steps:
                print(file=sys.stderr)

    def process(self, p: Any) -> Processed:
        """Run a prepared job alone on this host, as API and page do."""
        with self.queue_lock:
            self.state.begin(job=_pass_name(p))
            try:
                processed = p.scripts.run(p, *p.script_args) if p.scripts is not None else None
                return process_images(p) if processed is None else processed
            finally:
                self.state.end()
                p.close()

    def txt2img(self, **fields: Any) -> Result:
        """Run a txt2img request (the API's fields) in this thread; exceptions of the job come through as they are."""
        return self._request("txt2img", fields)

    def img2img(self, **fields: Any) -> Result:
        """Run an img2img request; ``init_images`` may hold PIL pictures."""
        pictures = fields.get("init_images", [])
        fields["init_images"] = [_encoded(x) if isinstance(x, Image.Image) else x for x in pictures]
        return self._request("img2img", fields)

    def _request(self, tab: str, fields: dict[str, Any]) -> Result:
        answer = self.api.run(tab, fields)
        info = json.loads(answer["info"])
        decoded: list[Image.Image] = [Image.open(io.BytesIO(base64.b64decode(x))) for x in answer["images"]]
        for image in decoded:
            image.load()
        return Result(decoded, info["infotexts"], info, answer["parameters"])

    # -- server -----------------------------------------------------------------------------------------------

    def launch(self, port: int = 0, address: str = "127.0.0.1") -> str:
        """Serve page and API in a thread; the address (port 0: a free one)."""
        if self._server is None:
            self._server = Server(self.app, address, port)
        return self._server.url

    def stop(self) -> None:
        """End the server, if it runs."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def errors(self) -> list[Report]:
        """Exceptions of scripts and callbacks that were swallowed, oldest first."""
        return self.reports.entries


def _pass_name(p: Any) -> str:
    if isinstance(p, jobs.Img2Img):
        return "img2img"
    return "hires" if getattr(p, "is_hr_pass", False) else "txt2img"


def _encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()

"""An installed WebUI: linking the extension into it, starting it on loopback, calling its HTTP API."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
EXTENSION, PROBE = "sd-webui-ip-adapter-acceptance", "sd-webui-ip-adapter-acceptance-probe"
START_SECONDS, REQUEST_SECONDS = 600, 1800
START_ATTEMPTS = 4
STARTED = "Startup time"
"""What a WebUI with its page writes into its log when it is up, also after 'Reload UI'."""
SETTINGS = {"live_previews_enable": False, "samples_save": False, "grid_save": False}
"""Of the run. Previews of SDXL would need a small decoder that WebUIs download; grids are saved unasked."""
WRITTEN = ("params.txt", "cache.json", "cache")
"""What a WebUI writes into its own folder whatever its settings say."""


@dataclass(frozen=True)
class WebUI:
    """An installed WebUI and what differs between them."""

    folder: Path
    python: str

    @property
    def is_a1111(self) -> bool:
        return not (self.folder / "modules_forge").is_dir()

    @property
    def is_backend(self) -> bool:
        """Forge or Neo, rather than a relative on ``ldm_patched``."""
        return (self.folder / "backend").is_dir()

    @property
    def kind(self) -> str:
        if self.is_a1111:
            return "AUTOMATIC1111"
        if self.is_neo:
            return "Forge Neo"
        return "Forge" if self.is_backend else "Forge on ldm_patched"

    @cached_property
    def commit(self) -> str:
        """Of its git checkout, shortened."""
        command = ["git", "-C", str(self.folder), "rev-parse", "--short", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        return answer.stdout.strip() or "no git checkout"

    @cached_property
    def is_neo(self) -> bool:
        """Forge Neo, which calls some flags by other names."""
        arguments = self.folder / "backend" / "args.py"
        return self.is_backend and "--always-cpu" not in arguments.read_text(encoding="utf-8")

    @property
    def flags(self) -> list[str]:
        """By which it computes on this machine."""
        if torch.cuda.is_available():
            return []
        if self.is_a1111:
            return ["--use-cpu", "all", "--no-half", "--no-half-vae"]
        return ["--cpu"] if self.is_neo else ["--always-cpu"]


@contextmanager
def linked(webui: WebUI, names: Sequence[str] = (EXTENSION, PROBE)) -> Iterator[None]:
    """The extension and the probe in the WebUI's folder ``extensions``, for as long as the block runs."""
    for name in names:
        stale = webui.folder / "extensions" / name
        if stale.is_symlink():  # of a run that was killed
            stale.unlink()
    others = [path.parent.parent for path in webui.folder.glob("extensions/*/scripts/ip_adapter.py")]
    if others:
        raise SystemExit(
            f"The WebUI has the extension already, in {others[0]}: move it out of extensions, then try again."
        )
    targets = {EXTENSION: ROOT, PROBE: ROOT / "tests" / "real_host_probe"}
    made = []
    try:
        for name in names:
            link = webui.folder / "extensions" / name
            link.symlink_to(targets[name], target_is_directory=True)
            made.append(link)
        yield
    finally:
        for link in made:
            link.unlink()


@contextmanager
def left_as_found(webui: WebUI, backup: Path) -> Iterator[None]:
    """Puts back what the WebUI has written into its own folder when the block is over."""

    def copy(source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.exists():
            shutil.copy2(source, target)

    backup.mkdir(parents=True)
    for name in WRITTEN:
        copy(webui.folder / name, backup / name)
    try:
        yield
    finally:
        for name in WRITTEN:
            path = webui.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            copy(backup / name, path)


@dataclass
class Server:
    """A running WebUI."""

    url: str
    log: Path

    def call(
        self, path: str, body: dict[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of a request; GET without a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            try:
                return error.code, json.loads(text)
            except ValueError:
                return error.code, {"detail": text[:300]}

    @cached_property
    def always_on(self) -> list[str]:
        """Lower-case titles of the always-on scripts of txt2img."""
        scripts = self.call("/sdapi/v1/script-info")[1]
        return [s["name"] for s in scripts if s["is_alwayson"] and not s["is_img2img"]]

    def reload(self) -> None:
        """'Reload UI', to its end: routes answer before scripts have their default arguments.

        Raises:
            TimeoutError: if it doesn't end.
        """
        before = self._starts()
        self.call("/acceptance/reload", {})
        end = time.monotonic() + START_SECONDS
        while self._starts() == before:
            if time.monotonic() > end:
                raise TimeoutError(f"'Reload UI' didn't end within {START_SECONDS} s.")
            time.sleep(1)

    def _starts(self) -> int:
        return self.log.read_text(errors="replace").count(STARTED)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def started(
    webui: WebUI, checkpoints: Path, first: str, folder: Path, flags: Sequence[str], page: bool = False
) -> Iterator[Server]:
    """The WebUI on loopback, with settings files of our own in ``folder``; the page is served only if asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    command = [webui.python, "launch.py", "--api", "--port", str(port), "--server-name", "127.0.0.1"]
    command += [] if page else ["--nowebui"]
    command += ["--skip-prepare-environment", "--skip-install", "--skip-torch-cuda-test", "--skip-python-version-check"]
    command += ["--skip-version-check", "--ckpt-dir", str(checkpoints), "--ckpt", str(checkpoints / first)]
    command += ["--ui-settings-file", str(folder / "config.json"), "--ui-config-file", str(folder / "ui-config.json")]
    log = folder / "server.log"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "PYTHONUNBUFFERED": "1",
        "no_proxy": "127.0.0.1,localhost",
        **({"IGNORE_CMD_ARGS_ERRORS": "1"} if webui.is_neo else {}),  # it refuses flags that the others need
    }
    for attempt in range(START_ATTEMPTS):
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *webui.flags, *flags],
                cwd=webui.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        try:
            server = Server(f"http://127.0.0.1:{port}", log)
            if not _is_up(webui, process, server, page) and attempt < START_ATTEMPTS - 1:
                print(f"{webui.kind} lost its API's thread while starting; starting it again", flush=True)
                continue
            server.call("/sdapi/v1/options", SETTINGS)
            yield server
            return
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_up(webui: WebUI, process: subprocess.Popen[bytes], server: Server, page: bool) -> bool:
    """Waits for a server; False if its API's thread died.

    reForge's does now and then: the main thread collects garbage while it builds the routes.
    """
    end = time.monotonic() + START_SECONDS
    while True:
        text = server.log.read_text(errors="replace")
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"{webui.kind} did not start; the end of its log:\n{text[-3000:]}")
        if "SystemError" in text and "api_only_worker" in text:
            return False
        # A request before a page is up can end the server, so the log comes first.
        if not page or STARTED in text:
            try:
                if server.call("/sdapi/v1/sd-models")[0] == 200:
                    return True
            except OSError:
                pass
        time.sleep(1)

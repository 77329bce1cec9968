"""Acceptance run in an installed WebUI: ``python tests/real_host.py --webui DIR [--python EXE]``.

Links the extension and a probe into the WebUI, makes random model files in a folder of its own, starts the WebUI on
loopback, drives every case through its HTTP API and prints a table. A case passes if the reference changes the picture,
its sentence is in the answer where one is due, and the plain picture afterwards is bit for bit what it is without the
extension. At the end the links are gone again, and settings files of the WebUI were never written.

AUTOMATIC1111 gets a small SD1.5 with a yaml of its own and one case in full size, Forge and its relatives the full
size, with ``--sdxl`` also SDXL and its refiner (22 GB of files).
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.acceptance.axes import axes_problem, listing_problem
from tests.acceptance.cases import (
    IMG2IMG,
    PHOTOGRAPH,
    PLAIN,
    TITLE,
    Case,
    NotRun,
    Pictures,
    pixels,
    plain_request,
    run_case,
    same,
    sd15_cases,
    sdxl_cases,
    unit,
)
from tests.acceptance.models import Models, full_sd15, full_sdxl, small_sd15
from tests.acceptance.routes import LOGIN_FLAGS, login_problem, routes_problem
from tests.acceptance.soak import WARM, soak
from tests.acceptance.webui import EXTENSION, PROBE, Server, WebUI, left_as_found, linked, started

BUILT_IN_MODULE = "CLIP-ViT-H (IPAdapter)"


@dataclass
class Table:
    """What is printed at the end."""

    only: str
    rows: list[tuple[str, str, float]] = field(default_factory=list)
    version: str = ""

    def wants(self, name: str) -> bool:
        return re.search(self.only, name) is not None

    def run(self, name: str, case: Callable[[], str]) -> None:
        """Runs a case that was asked for; it returns what went wrong."""
        if not self.wants(name):
            return
        begin = time.monotonic()
        try:
            problem = case()
            result = f"FAIL: {problem}" if problem else "pass"
        except NotRun as reason:
            result = f"not run: {reason}"
        except (OSError, HTTPException, KeyError, ValueError, IndexError, SystemExit) as error:
            result = f"FAIL: {type(error).__name__}: {error}"
        self.add(name, result, time.monotonic() - begin)

    def add(self, name: str, result: str, seconds: float = 0.0) -> None:
        if self.wants(name):
            self.rows.append((name, result, seconds))
            print(f"{name}: {result} ({seconds:.0f} s)", flush=True)

    @property
    def failed(self) -> int:
        return sum(result.startswith("FAIL") for _, result, _ in self.rows)

    def __str__(self) -> str:
        lines = [f"| {name:44} | {result} | {seconds:.0f} s |" for name, result, seconds in self.rows]
        passed = sum(result == "pass" for _, result, _ in self.rows)
        left = len(self.rows) - passed - self.failed
        return "\n".join([*lines, "", f"{passed} passed, {self.failed} failed, {left} not run"])


@dataclass
class Run:
    """One WebUI with its models."""

    webui: WebUI
    folder: Path
    """For settings files and logs."""
    flags: list[str]
    """The caller's own."""
    table: Table
    keep: Path | None
    starts: int = 0

    @contextmanager
    def server(
        self, models: Models, first: str, flags: list[str], extension: bool = True, page: bool = False
    ) -> Iterator[Server]:
        """The WebUI with these models, with or without the extension."""
        self.starts += 1
        folder = self.folder / str(self.starts)
        if extension:
            with linked(self.webui), self._started(models, first, folder, [*models.flags, *flags], page) as server:
                yield server
        else:
            with self._started(models, first, folder, flags, page) as server:
                yield server

    def _started(self, models: Models, first: str, folder: Path, flags: list[str], page: bool) -> Any:
        return started(self.webui, models.checkpoints, first, folder, [*flags, *self.flags], page)

    def cases(self, models: Models, first: str, cases: list[Case], flags: list[str], group: str = "") -> None:
        """Draws references without the extension, then every case with it."""
        cases = [case for case in cases if self.table.wants(case.name)]
        plain = plain_request(first)
        built_in = not group and not self.webui.is_a1111 and self.table.wants(BUILT_IN_CASE)
        ours = {AXES_CASE: axes_problem, ROUTES_CASE: routes_problem} if not group else {}
        ours = {name: problem for name, problem in ours.items() if self.table.wants(name)}
        if not cases and not built_in and not ours:
            return
        if built_in:
            flags = [*flags, *models.controlnet_flags]
        with self.server(models, first, flags, extension=False) as server:
            reference = _drawn(server, plain)
            of_built_in = _drawn(server, _built_in(server, plain)) if built_in else []
            self.table.version = _version(server, plain)
        with self.server(models, first, flags) as server:
            self.table.run(f"{group}installed and off", lambda: _differs(reference, _drawn(server, plain)))
            for case in cases:
                self.table.run(case.name, lambda case=case: run_case(server, case, plain, reference, self.keep))  # type: ignore[misc]
            if built_in:
                self.table.run(BUILT_IN_CASE, lambda: _beside_built_in(server, plain, reference, of_built_in))
            for name, problem in ours.items():
                self.table.run(name, lambda problem=problem: problem(server, plain))  # type: ignore[misc]
            if not group:
                self.table.run(CLIENT_CASE, lambda: _client(server, first, reference))

    def reload(self, models: Models, first: str, flags: list[str]) -> None:
        """'Reload UI', which only a WebUI with its page can do."""
        plain = plain_request(first)

        def case() -> str:
            with self.server(models, first, flags, page=True) as server:
                before, steered = _drawn(server, plain), _drawn(server, _steered(plain))
                for _ in range(2):
                    server.reload()
                    problem = (
                        _differs(steered, _drawn(server, _steered(plain)))
                        or _differs(before, _drawn(server, plain))
                        or listing_problem(server)
                    )
                    if problem:
                        return problem
                return "" if not same(before, steered) else "the reference changed nothing"

        self.table.run("Reload UI, twice", case)

    def login(self, models: Models, first: str) -> None:
        """The page's login, which the WebUI's own API doesn't ask for."""

        def case() -> str:
            with self.server(models, first, LOGIN_FLAGS, page=True) as server:
                return login_problem(server)

        self.table.run("our routes behind the page's login", case)

    def soak(self, models: Models, first: str, flags: list[str], generations: int) -> None:
        """A second process, started before the extension is linked in, runs without it."""

        def case() -> str:
            self.starts += 2
            with linked(self.webui, [PROBE]):
                folder = self.folder / f"{self.starts}-without"
                with started(self.webui, models.checkpoints, first, folder, [*flags, *self.flags]) as without:
                    others = plain_request(first) | {"width": 64, "height": 64}
                    return self._soak_beside(without, models, first, flags, others, generations)

        self.table.run(f"soak, {generations} generations", case)

    def _soak_beside(
        self, without: Server, models: Models, first: str, flags: list[str], wanted: dict[str, Any], generations: int
    ) -> str:
        with (
            linked(self.webui, [EXTENSION]),
            started(
                self.webui,
                models.checkpoints,
                first,
                self.folder / f"{self.starts}-with",
                [*models.flags, *flags, *self.flags],
            ) as steered,
        ):
            return soak(steered, without, wanted, generations)


BUILT_IN_CASE = "the built-in IP-Adapter unit"
CLIENT_CASE = "the client webuiapi"
AXES_CASE = "our axes of X/Y/Z grids"
ROUTES_CASE = "our routes"


def _drawn(server: Server, wanted: dict[str, Any]) -> Pictures:
    status, answer = server.call("/sdapi/v1/txt2img", wanted)
    if status != 200:
        raise ValueError(f"txt2img answered {status}: {str(answer)[:500]}")
    return pixels(answer)


def _differs(a: Pictures, b: Pictures) -> str:
    return "" if same(a, b) else "another picture"


def _steered(plain: dict[str, Any]) -> dict[str, Any]:
    return plain | {"alwayson_scripts": {TITLE: {"args": [True, unit()]}}}


def _version(server: Server, plain: dict[str, Any]) -> str:
    answer = server.call("/sdapi/v1/txt2img", plain)[1]
    return str(json.loads(answer["info"])["infotexts"][0].rpartition("Version: ")[2])


def _built_in(server: Server, plain: dict[str, Any]) -> dict[str, Any]:
    """The request with an IP-Adapter unit of the WebUI's own ControlNet."""
    names = server.call("/controlnet/model_list?update=true")[1]["model_list"]
    (name,) = (each for each in names if each.startswith("acceptance-base"))
    one = {"enabled": True, "module": BUILT_IN_MODULE, "model": name, "image": PHOTOGRAPH, "weight": 1.0}
    return plain | {"alwayson_scripts": {"ControlNet": {"args": [one]}}}


def _beside_built_in(server: Server, plain: dict[str, Any], reference: Pictures, alone: Pictures) -> str:
    wanted = _built_in(server, plain)
    if not same(alone, _drawn(server, wanted)):
        return "it draws another picture with the extension installed and off"
    both = wanted | {"alwayson_scripts": wanted["alwayson_scripts"] | {TITLE: {"args": [True, unit()]}}}
    ours, together = _drawn(server, _steered(plain)), _drawn(server, both)
    if np.array_equal(together[0], alone[0]) or np.array_equal(together[0], ours[0]):
        return "of the built-in unit and ours only one acts when both are on"
    return _differs(reference, _drawn(server, plain)) and "the plain picture afterwards is another one"


def _client(server: Server, first: str, reference: Pictures) -> str:
    """The public client draws what the bare API draws."""
    try:
        import webuiapi
    except ImportError as error:
        raise NotRun("it isn't installed in this Python") from error
    host, _, port = server.url.rpartition("/")[2].partition(":")
    api = webuiapi.WebUIApi(host=host, port=int(port))
    plain = plain_request(first)
    fields = {key: plain[key] for key in PLAIN if key not in ("send_images", "save_images")}
    fields |= {"override_settings": plain["override_settings"], "save_images": False}
    scripts = {TITLE: {"args": [True, unit()]}}
    text = api.txt2img(**fields, alwayson_scripts=scripts)
    if not same([np.asarray(text.image.convert("RGB"))], _drawn(server, _steered(plain))):
        return "its txt2img differs from the bare API's"
    photo = Image.open(io.BytesIO(base64.b64decode(PHOTOGRAPH)))
    image = {**fields, "steps": IMG2IMG["steps"], "denoising_strength": IMG2IMG["denoising_strength"]}
    on, off = (np.asarray(api.img2img(images=[photo], **image, **s).image) for s in ({"alwayson_scripts": scripts}, {}))
    if np.array_equal(on, off):
        return "the reference changed nothing in its img2img"
    return _differs(reference, _drawn(server, plain)) and "the plain picture afterwards is another one"


def _run(run: Run, args: argparse.Namespace) -> None:
    """All groups of cases."""
    webui, table, first = run.webui, run.table, "acceptance-a.safetensors"
    models = args.models.resolve() if args.models else run.folder / "models"
    usual = small_sd15(models / "small") if webui.is_a1111 else full_sd15(models / "full")
    run.cases(usual, first, sd15_cases(webui), [])
    run.reload(usual, first, [])
    run.login(usual, first)
    if webui.is_a1111:
        full = Case("full-size SD1.5: plus, joint")
        if table.wants(full.name):
            run.cases(full_sd15(models / "full"), first, [full], [], "full-size SD1.5: ")
        table.add("SDXL", "not run: it takes more than 24 GB on a CPU without half precision")
    elif args.sdxl:
        xl = "acceptance-xl-a.safetensors"
        run.cases(full_sdxl(models / "sdxl"), xl, sdxl_cases(webui), ["--unet-in-fp16"], "SDXL: ")
    else:
        table.add("SDXL", "not run: not asked for with --sdxl")
    if args.soak:
        run.soak(usual, first, [], args.soak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--webui", type=Path, required=True, help="folder of the installed WebUI")
    parser.add_argument("--python", default=sys.executable, help="the Python that the WebUI runs on")
    parser.add_argument("--models", type=Path, help="folder for the random models, kept; default: a temporary one")
    parser.add_argument("--only", default="", help="run only cases whose name matches this expression")
    parser.add_argument("--sdxl", action="store_true", help="SDXL cases too (not in AUTOMATIC1111)")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="N generations in a row, in two processes")
    parser.add_argument("--pictures", type=Path, help="folder where the pictures of all cases are left")
    parser.add_argument("more", nargs="*", help="further flags for the WebUI, after --")
    args = parser.parse_args()
    if 0 < args.soak < 2 * WARM:
        parser.error(f"--soak {args.soak}: a soak needs {2 * WARM} generations or more, or 0 for none.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is put back
    webui, table = WebUI(args.webui.resolve(), args.python), Table(args.only)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        with left_as_found(webui, folder / "as-found"):
            _run(Run(webui, folder, args.more, table, args.pictures), args)
    print(f"\n{webui.kind} {table.version}, commit {webui.commit}\n\n{table}")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())

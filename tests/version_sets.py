"""The extension beside the oldest and the newest libraries that WebUIs ship: ``tests.version_smoke`` with each set.

A set is a folder of packages laid over this environment's own. It is made once, inside the environment, and needs no
network after that. torch stays the one at hand, for another would be hundreds of megabytes.

    python -m tests.version_sets
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
"""Of numbers out of an attention layer, which are around 0.1."""


@dataclass(frozen=True)
class VersionSet:
    """Packages, the MB that they are to download, and the first torch that goes with them."""

    pins: tuple[str, ...]
    download_mb: int
    first_torch: tuple[int, int] = (2, 1)


def pins_of(lock: Path) -> tuple[str, ...]:
    """The pins of a lock file, without its comments."""
    lines = (line.strip() for line in lock.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


GRADIO_3 = VersionSet(pins_of(ROOT / "tests" / "requirements-gradio3.lock"), 50)
"""Beside which the embedded host runs with its page: diffusers refuses the oldest safetensors."""

SETS = {
    "oldest": VersionSet((*GRADIO_3.pins, "safetensors==0.4.2"), 50),
    # Newer than any host ships, so that a host's next step finds us ready; of gradio the last 4.
    "newest": VersionSet(
        (
            "numpy==2.2.6 ; python_version < '3.11'",
            "numpy==2.4.6 ; python_version >= '3.11'",
            "pillow==12.3.0 ; python_version < '3.11'",
            "pillow==13.0.0 ; python_version >= '3.11'",
            "safetensors==0.8.0",
            "gradio==4.44.1",
            "pydantic==2.14.4",
            "fastapi==0.162.5 ; python_version < '3.11'",
            "fastapi==0.165.0 ; python_version >= '3.11'",
            "gradio-client==1.3.0",
            "pydantic-core==2.50.5",
            "typing-inspection==0.4.5",
            "starlette==1.7.0 ; python_version < '3.11'",
            "starlette==1.10.0 ; python_version >= '3.11'",
            "opentelemetry-api==1.45.2",
        ),
        50,
        first_torch=(2, 3),  # builds before it can't take numpy 2
    ),
}


def made(name: str, folder: Path, wanted: VersionSet | None = None) -> Path:
    """The folder of a set, filled if that wasn't done before.

    Raises:
        RuntimeError: if pip couldn't; the sentence says so.
    """
    wanted = wanted or SETS[name]
    stamp, text = folder / "made-from.txt", "\n".join((platform.python_version(), *wanted.pins))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == text:
        return folder
    print(f"To download for the {name} libraries: up to {wanted.download_mb} MB.", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *wanted.pins]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(
            f"The {name} libraries could not be installed into {folder.name}, and pip's own words are above: connect "
            "this machine to the network, then try again."
        )
    stamp.write_text(text, encoding="utf-8")
    return folder


def made_gradio_3() -> Path:
    """The folder of :data:`GRADIO_3`, for the tests of the page."""
    return made("gradio 3", Path(sys.prefix, "version-sets", "gradio3"), GRADIO_3)


def smoke(folder: Path | None) -> dict[str, Any]:
    """What ``tests.version_smoke`` tells beside the libraries in a folder, or beside the environment's own.

    Raises:
        RuntimeError: if it failed; its own words are on the terminal.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    environment["PYTHONPATH"] = str(folder) if folder else ""
    command = [sys.executable, "-m", "tests.version_smoke"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError("The extension fails beside these libraries; the traceback is above.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What came out otherwise than beside the environment's own libraries, as sentences."""
    said = [
        f"{what} differs: {found[what]} instead of {expected[what]}."
        for what in ("modules", "pictures", "webui")
        if found[what] != expected[what]
    ]
    pairs = list(zip(found["attention"], expected["attention"], strict=True))
    worst = max(abs(a - b) for a, b in pairs)
    if not worst <= TOLERANCE:
        said.append(f"attention differs by {worst:g} and at most {TOLERANCE:g} is allowed.")
    return said


def not_acting(found: dict[str, Any], folder: Path) -> list[str]:
    """The libraries of a set that the run had in another version, as sentences."""
    laid_over = {each.name.lower(): each.version for each in metadata.distributions(path=[str(folder)])}
    return [
        f"{name} was {version} and the set has {laid_over.get(name, 'none')}."
        for name, version in found["versions"].items()
        if name != "torch" and laid_over.get(name) != version
    ]


def main() -> int:
    """Run everything; 0 if all is the same beside every set, else 1."""
    if sys.prefix == sys.base_prefix:
        print("tests.version_sets needs an environment to put packages into: run it through dev.py test.")
        return 1
    failed = False
    try:
        expected = smoke(None)
        torch = expected["versions"]["torch"]
        for name, wanted in SETS.items():
            if tuple(map(int, torch.split(".")[:2])) < wanted.first_torch:
                print(f"{name}: passed over, for torch {torch} can't go with these libraries.", flush=True)
                continue
            folder = made(name, Path(sys.prefix, "version-sets", name))
            found = smoke(folder)
            said = not_acting(found, folder) + differences(found, expected)
            versions = ", ".join(f"{library} {version}" for library, version in found["versions"].items())
            print(f"{name} ({versions}): {' '.join(said) or 'everything is the same.'}", flush=True)
            failed = failed or bool(said)
        made_gradio_3()  # now, when what it downloads is seen, and not in the middle of the tests
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

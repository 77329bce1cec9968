"""Two commands for a fresh machine: ``python dev.py demo`` and ``python dev.py test``.

Both make ``.venv`` beside this file when it is missing or its lock file has changed, from the Python that started
them (3.10 to 3.12). Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
REFERENCE_LOCK = ROOT / "requirements-reference.lock"
STAMP = VENV / "made-from.txt"
TORCH = "torch==2.13.0"
SUPPORTED = ((3, 10), (3, 12))

# Downloads in MB, rounded up. PyPI's torch for Linux on x86-64 brings CUDA along; a torch that is already there saves it.
PACKAGES_MB = 230
TORCH_MB = {"Linux x86_64": 3000, "Linux aarch64": 150, "Windows": 120, "Darwin": 90}
DISK_MB = 2500


class SetupError(Exception):
    """Setting up can't go on; the text is one sentence for whoever typed the command."""


def python_problem(version: Sequence[int]) -> str | None:
    """Why this Python can't be used; None if it can."""
    low, high = SUPPORTED
    if low <= tuple(version[:2]) <= high:
        return None
    return (
        f"Python {version[0]}.{version[1]} started this, and the pinned packages are made for {low[0]}.{low[1]} to "
        f"{high[0]}.{high[1]}: start dev.py with one of those."
    )


def has_torch() -> bool:
    """Whether the Python that started this has a torch of its own."""
    return importlib.util.find_spec("torch") is not None


def torch_download_mb(system: str, machine: str) -> int:
    """About how much torch is to download on a platform, in MB."""
    key = f"{system} {'aarch64' if machine.lower() in ('aarch64', 'arm64') else 'x86_64'}" if system == "Linux" else system
    return TORCH_MB.get(key, max(TORCH_MB.values()))


def download_text(own_torch: bool, system: str, machine: str) -> str:
    """What is said before anything is downloaded."""
    if own_torch:
        return f"Setting up .venv: about {PACKAGES_MB} MB to download (the torch of this Python is used)."
    torch = torch_download_mb(system, machine)
    return (
        f"Setting up .venv: up to {PACKAGES_MB + torch} MB to download, of which torch is {torch} MB. "
        "A Python that has torch saves that."
    )


def stamp_text(own_torch: bool) -> str:
    """What the environment depends on: the lock files, the Python, and whose torch it is."""
    locks = hashlib.sha256(LOCK.read_bytes() + REFERENCE_LOCK.read_bytes()).hexdigest()
    torch = f"that of {sys.prefix}" if own_torch else TORCH
    return f"{locks}\n{sys.version}\n{torch}\n"


def venv_python() -> Path:
    """The environment's Python."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure_venv() -> None:
    """Makes the environment where it is missing or made from something else.

    Raises:
        SetupError: for a Python, a disk or a network that doesn't do.
    """
    problem = python_problem(sys.version_info)
    if problem:
        raise SetupError(problem)
    own_torch = has_torch()
    wanted = stamp_text(own_torch)
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == wanted and venv_python().exists():
        return
    print(download_text(own_torch, platform.system(), platform.machine()), flush=True)
    free_mb = shutil.disk_usage(ROOT).free // 2**20
    if free_mb < DISK_MB:
        raise SetupError(f"{ROOT} has {free_mb} MB free and the environment needs {DISK_MB} MB: make room, then try again.")
    try:
        venv.EnvBuilder(with_pip=True, clear=True, system_site_packages=own_torch).create(VENV)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(
            f"Python could not make the environment .venv ({error}): install its venv module (Debian: python3-venv)."
        ) from error
    if not own_torch:
        _pip("install", TORCH)
    # The starting Python's own packages are out of sight here, so that the pinned ones are installed in any case.
    _pip("install", "--ignore-installed", "--no-deps", "-r", str(LOCK))
    _pip("install", "--ignore-installed", "--no-deps", "-r", str(REFERENCE_LOCK))
    STAMP.write_text(wanted, encoding="utf-8")


def _pip(*args: str) -> None:
    code = subprocess.call([str(venv_python()), "-m", "pip", *args, "--disable-pip-version-check"], cwd=ROOT)
    if code:
        raise SetupError(
            f"pip {args[0]} ended with code {code} (its words are above): check the network connection and the free disk "
            "space, then run the same command again."
        )


def checks(pytest_args: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The commands of ``test`` by heading, as arguments of the environment's Python; pytest's summary comes last."""
    return [
        ("ruff check", ["-m", "ruff", "check", "."]),
        ("ruff format", ["-m", "ruff", "format", "--check", "."]),
        ("mypy", ["-m", "mypy"]),
        ("pytest", ["-m", "pytest", *pytest_args]),
    ]


def run_tests(pytest_args: Sequence[str]) -> int:
    """Runs every check, also after one has failed; the exit code is 1 if any did."""
    failed = []
    for heading, args in checks(pytest_args):
        print(f"\n== {heading} ==", flush=True)
        if subprocess.call([str(venv_python()), *args], cwd=ROOT):
            failed.append(heading)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def run_demo(args: Sequence[str]) -> int:
    """Starts the embedded host, or draws one strip; the arguments are those of ``tests.embedded.demo``.

    Relative file names mean what they mean where the command was typed.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    return subprocess.call([str(venv_python()), "-m", "tests.embedded.demo", *args], env=env)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("command", choices=("demo", "test"), help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for demo: see demo --help; for test: pytest's")
    args = parser.parse_args(argv)
    try:
        ensure_venv()
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 2
    try:
        return run_tests(args.arguments) if args.command == "test" else run_demo(args.arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

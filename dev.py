"""The commands for a fresh machine.

    python dev.py demo [arguments]     start the embedded host, a small WebUI (demo --help tells the arguments)
    python dev.py test [arguments]     run every check; the arguments go to pytest
    python dev.py bench [arguments]    measure what an image prompt costs (bench --help tells the arguments)

All first make ``.venv`` beside this file where it is missing, or bring it up to date where a lock file has changed,
with the Python that started them (3.10 to 3.12). A torch which that Python can import is used, not downloaded.
Only the standard library is needed, on Linux, macOS and Windows.
"""

# No `from __future__ import annotations`, and annotations in quotes where they need it: so that a Python as old as
# 3.6 gets far enough to say that it is too old.

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "made-by-dev.json"
LOCK = ROOT / "requirements.lock"
TORCH_LOCK = ROOT / "requirements-torch.lock"
CUDA_LOCK = ROOT / "requirements-cuda.lock"
REFERENCE_LOCK = ROOT / "requirements-reference.lock"

OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 12)
# what the locked transformers asks for
OLDEST_TORCH = (2, 2)

# Without this much room on the disk, in MB, there is no point in beginning. Of torch the smallest build counts, since
# only pip finds out which one it gets.
PACKAGES_DISK_MB = 1000
TORCH_DISK_MB = 1200

# Names of platforms in the lock files' download figures, by what the platform module tells of system and machine.
PLATFORMS = {
    ("linux", "x86_64"): "linux-x86_64",
    ("linux", "aarch64"): "linux-aarch64",
    ("darwin", "arm64"): "macos-arm64",
    ("windows", "amd64"): "windows-amd64",
}

# The folder in .venv with links to a torch found elsewhere, and the file that puts it on the path there. Links to just
# that torch, because the rest of the other Python's packages would be visible too otherwise: its pytest plugins would
# be loaded, its xformers and torchvision imported, none of them pinned.
FOUND_TORCH = "found-torch"
FOUND_TORCH_PTH = "found_torch.pth"


class SetupError(Exception):
    """The environment can't be made; the text is for the person at the terminal."""


class Torch(NamedTuple):
    """A torch that the Python which started this can import.

    Attributes:
        version: as torch tells it, e.g. "2.13.0+cpu".
        paths: folders and files which belong to it: torch itself, the libraries it brought along, their metadata.
    """

    version: str
    paths: "tuple[str, ...]"


class Stamp(NamedTuple):
    """What an environment was made from, as kept inside it.

    Attributes:
        python: minor version, e.g. "3.11".
        locks: hash over the lock files.
        torch: "" if it was installed from the lock, else the version found.
        ready: False from the first change until all is installed.
    """

    python: str
    locks: str
    torch: str
    ready: bool


# ---------------------------------------------------------------------------------------------------------------------
# decisions, without side effects


def python_problem(version: "tuple[int, ...]", bits: int = 64) -> "str | None":
    """Why a Python can't be used, or None."""
    names = f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} to {NEWEST_PYTHON[0]}.{NEWEST_PYTHON[1]}"
    if tuple(version[:2]) < OLDEST_PYTHON:
        age = "too old"
    elif tuple(version[:2]) > NEWEST_PYTHON:
        age = "too new for the pinned packages"
    elif bits < 64:
        return f"This is a {bits}-bit Python, for which torch has no build: start dev.py with a 64-bit one."
    else:
        return None
    found = ".".join(str(part) for part in version[:3])
    return f"Python {found} started dev.py and is {age}: start it with Python {names}."


def platform_key(system: str, machine: str) -> str:
    """The name of a platform in the lock files' download figures; for one that isn't there, a name all the same.

    Args:
        system: as ``platform.system()`` tells it.
        machine: as ``platform.machine()`` tells it.
    """
    pair = (system.lower(), machine.lower())
    return PLATFORMS.get(pair, "-".join(pair))


def download_mb(lock_text: str, platform_name: str) -> "int | None":
    """The MB that a lock file says it downloads on a platform; None where it names no figure for it."""
    line = re.search(r"^# download MB: (.*)$", lock_text, re.MULTILINE)
    figures = dict(entry.split() for entry in line.group(1).split(",")) if line else {}
    return int(figures[platform_name]) if platform_name in figures else None


def download_text(packages_mb: "int | None", torch_mb: "int | None", system: str) -> str:
    """What is said before a download begins.

    Args:
        packages_mb: of the packages; None if unknown on this platform.
        torch_mb: of torch; None if it isn't downloaded.
        system: as ``platform.system()`` tells it.
    """
    packages = "about 200 MB" if packages_mb is None else f"{packages_mb} MB"
    rest = "What pip has in its cache, or finds on this machine, it doesn't download again."
    if torch_mb is None:
        return f"To download: up to {packages} of packages.\n{rest}"
    text = f"To download: up to {packages} of packages and {torch_mb:,} MB of torch.\n{rest}"
    if system == "Linux":
        text += (
            "\nFor Linux the package index has torch as a CUDA build with its libraries, several GB on the disk."
            "\nA Python that already has a torch (a CPU build will do) spares you that: start dev.py with it."
        )
    return text


def torch_problem(version: str) -> "str | None":
    """Why a torch that was found can't be used, or None."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers.group(1)), int(numbers.group(2))) >= OLDEST_TORCH:
        return None
    return (
        f"The torch of this Python is {version}, and {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} is the oldest that will do: "
        "another is installed in .venv, and yours stays as it is."
    )


def locks_hash(texts: "list[str]") -> str:
    """One hash over lock files, that doesn't see how lines end or what comments say."""
    pins = [
        line.strip()
        for text in texts
        for line in [*text.splitlines(), "--"]
        if line.strip() and not line.startswith("#")
    ]
    return hashlib.sha256("\n".join(pins).encode("utf-8")).hexdigest()


def work_needed(stamp: "Stamp | None", python: str, locks: str, works: bool) -> str:
    """What has to be done to an environment: "nothing", "packages" or "everything".

    Args:
        stamp: what it was made from; None if there is none.
        python: minor version wanted.
        locks: hash of the lock files now.
        works: whether its Python, and a torch linked into it, are still where they were.
    """
    if stamp is None or not works or stamp.python != python:
        return "everything"
    return "nothing" if stamp.ready and stamp.locks == locks else "packages"


def pip_problem(words: str) -> str:
    """One sentence on why pip failed, from what it wrote to stderr."""
    if re.search(r"No space left|not enough space on the disk|Errno 28\b|WinError 112|Disk quota exceeded", words):
        return (
            "the disk, or the folder for temporary files, is full: make room (TMPDIR, on Windows TEMP, names another "
            "folder for temporary files), then run the same command again"
        )
    if re.search(r"CERTIFICATE_VERIFY_FAILED|SSLError|SSLCertVerificationError", words):
        return (
            "the package index's certificate was not accepted: tell pip about your network's own (pip's `cert` "
            "setting), then run the same command again"
        )
    if re.search(
        r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|Max retries exceeded|ProxyError|"
        r"Connection (refused|aborted|reset|broken)|Network is unreachable|getaddrinfo failed|timed out|"
        r"Temporary failure in name resolution|Failed to establish a new connection",
        words,
    ):
        return (
            "the package index could not be reached: connect this machine to the network, or tell pip about your proxy "
            "(pip's `proxy` setting), then run the same command again"
        )
    missing = re.search(r"No matching distribution found for (\S+)", words)
    if missing:
        # an index out of reach and one without a fitting build look the same where pip was told not to retry
        return (
            f"it found no {missing.group(1)}: check that this machine reaches the package index; if it does, there is "
            f"no build for this system and Python, so use Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} to "
            f"{NEWEST_PYTHON[0]}.{NEWEST_PYTHON[1]} on 64-bit Linux, Windows, or macOS 14 or newer with an Apple "
            "processor"
        )
    if re.search(r"PermissionError|Permission denied|WinError 5\b|WinError 32\b", words):
        return "a file in .venv could not be written: end the programs that use it, then run the same command again"
    return "its own words are above; put right what they say, then run the same command again"


def split_arguments(argv: "list[str]") -> "tuple[str, list[str]]":
    """The command and what goes through to it untouched.

    Raises:
        SetupError: for no command, or one that doesn't exist.
    """
    if not argv:
        raise SetupError("Say what to do: python dev.py demo, python dev.py test, or python dev.py bench.")
    if argv[0] in ("-h", "--help", "help"):
        return "help", []
    if argv[0] not in ("demo", "test", "bench"):
        raise SetupError(f"dev.py has no command {argv[0]!r}: it has demo, test and bench.")
    return argv[0], argv[1:]


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser_commands(programs: "set[str]", is_root: bool) -> "list[list[str]]":
    """What gets the browser that tests of the page need; nothing where there is one, or none can be had.

    Args:
        programs: those of BROWSERS and apt-get that are on the path.
        is_root: whether packages may be installed.
    """
    if programs & set(BROWSERS) or "apt-get" not in programs or not is_root:
        return []
    return [["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium"]]


def checks(pytest_arguments: "list[str]") -> "list[tuple[str, list[str]]]":
    """Heading and arguments for the environment's Python of each check; pytest is last, so its summary ends it all."""
    return [
        ("ruff check", ["-m", "ruff", "check", "."]),
        ("ruff format", ["-m", "ruff", "format", "--check", "."]),
        ("mypy", ["-m", "mypy"]),
        ("oldest and newest libraries", ["-m", "tests.version_sets"]),
        ("pytest", ["-m", "pytest", *pytest_arguments]),
    ]


def module_arguments(module: str, root: Path, arguments: "list[str]") -> "list[str]":
    """Arguments for the environment's Python that run one of the project's modules.

    The project's folder takes the place of the current one on the path, so the module is the same from whichever
    folder it is started, and the file names in its arguments still count from there.
    """
    run = (
        "import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
    )
    return ["-c", run.format(module), str(root), *arguments]


def child_environment(environment: "dict[str, str]") -> "dict[str, str]":
    """Environment variables for everything that runs in ``.venv``: its own packages only, and no visits to hubs."""
    kept = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {
        **kept,
        "PYTHONNOUSERSITE": "1",
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }


# ---------------------------------------------------------------------------------------------------------------------
# a torch that is already there


def describe_torch(pinned: "set[str]") -> Torch:
    """The torch of the running Python, with the libraries that came with it.

    Args:
        pinned: names of the distributions that the lock installs anyway, in lower case with hyphens.

    Raises:
        ImportError: there is none, or it doesn't load.
        importlib.metadata.PackageNotFoundError: it has no metadata, without which other packages don't see it.
    """
    from importlib import metadata

    import torch

    paths = {str(Path(torch.__file__).resolve().parent)}
    distributions, seen = [metadata.distribution("torch")], {"torch", *pinned}
    for distribution in distributions:
        for file in distribution.files or ():
            top = file.parts[0]
            # ".." leads to scripts; .pth files and caches are of no use elsewhere
            if top not in ("..", "__pycache__") and not top.endswith(".pth"):
                paths.add(str(distribution.locate_file(top)))
        for requirement in distribution.requires or ():
            name = re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]).lower()
            if name in seen or re.search(r"\bextra\b", requirement):
                continue
            seen.add(name)
            with contextlib.suppress(metadata.PackageNotFoundError):  # it may be for another platform
                distributions.append(metadata.distribution(name))
    return Torch(str(torch.__version__), tuple(sorted(path for path in paths if os.path.exists(path))))


def find_torch() -> "Torch | None":
    """Looks for a torch that this Python can import; says so if there is one that can't be used.

    It is imported in a process of its own, because one that is there may still fail to load.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import dev; "
        "print(json.dumps(dev.describe_torch(set(sys.argv[2].split()))))"
    )
    pinned = " ".join(re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(encoding="utf-8"), re.MULTILINE))
    # its words go by the last line: torch, or something it imports, may print
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), pinned], capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        say(f"The torch of this Python can't be used ({' '.join(last)}): another is installed in .venv.")
        return None
    version, paths = json.loads(done.stdout.decode("utf-8").strip().splitlines()[-1])
    problem = torch_problem(version)
    if problem:
        say(problem)
        return None
    return Torch(version, tuple(paths))


def link_torch(torch: Torch, site_packages: Path, folder: Path) -> None:
    """Makes a torch found elsewhere importable in an environment, and nothing else that lies beside it.

    Args:
        torch: what was found.
        site_packages: the environment's own.
        folder: where the links go; made here.

    Raises:
        OSError: the file system has no links.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in map(Path, torch.paths):
        link = folder / path.name
        if not path.is_dir():
            shutil.copy2(str(path), str(link))
        elif sys.platform == "win32":
            import _winapi

            # a junction, for which no privilege is needed
            _winapi.CreateJunction(str(path), str(link))
        else:
            link.symlink_to(path, target_is_directory=True)
    relative = os.path.relpath(str(folder), str(site_packages))
    (site_packages / FOUND_TORCH_PTH).write_text(relative + "\n", encoding="utf-8")


def links_work(folder: Path) -> bool:
    """Whether all that ``link_torch`` linked is still where it was; a torch that was upgraded since is not."""
    return not folder.is_dir() or all(link.exists() for link in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# the environment


def say(text: str) -> None:
    """Prints at once, so that the words of programs started next come after."""
    print(text, flush=True)


def venv_python(venv: Path = VENV) -> Path:
    """Where an environment's Python lies."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_site_packages(venv: Path = VENV) -> Path:
    """Where an environment of the running Python's version has its packages."""
    if os.name == "nt":
        return venv / "Lib" / "site-packages"
    return venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def read_stamp(path: Path = STAMP) -> "Stamp | None":
    """What an environment was made from; None if that isn't known."""
    try:
        return Stamp(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(stamp: Stamp, path: Path = STAMP) -> None:
    """Keeps what an environment is made from."""
    path.write_text(json.dumps(stamp._asdict(), indent=1), encoding="utf-8")


def run(command: "list[str]", **options: Any) -> int:
    """Runs a program to its end and returns its exit code.

    Ctrl-C reaches the program too; it is given the time to end in its own way, and then this one ends as well.
    """
    with subprocess.Popen(command, **options) as program:
        interrupted = False
        while True:
            try:
                code = program.wait()
            except KeyboardInterrupt:
                interrupted = True
            else:
                break
    if interrupted:
        raise KeyboardInterrupt
    return code


def pip_install(*arguments: str) -> None:
    """Runs pip in the environment, its progress shown as it comes.

    Raises:
        SetupError: it failed.
    """
    command = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    environment = {**os.environ, "PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)
    # The progress goes to stdout, which stays the terminal; stderr is shown and kept, for the reason of a failure.
    words = []
    with subprocess.Popen(command, cwd=str(ROOT), env=environment, stderr=subprocess.PIPE) as pip:
        assert pip.stderr is not None
        for line in pip.stderr:
            words.append(line.decode("utf-8", "replace"))
            sys.stderr.write(words[-1])
            sys.stderr.flush()
    if pip.returncode:
        raise SetupError(f"pip could not install the packages: {pip_problem(''.join(words))}.")


def check_making() -> None:
    """Refuses what would fail, or destroy something, before anything is downloaded.

    Raises:
        SetupError: this Python makes no environments, or a folder named .venv is someone else's.
    """
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"This Python comes without its {module} module, which makes .venv: install it (on Debian and Ubuntu "
                f"the package python{sys.version_info[0]}.{sys.version_info[1]}-venv), then run the same command again."
            )
    if os.path.lexists(str(VENV)) and not STAMP.is_file():
        raise SetupError(f"{VENV} was not made by dev.py, which leaves it alone: rename or delete it, then try again.")


def make_venv() -> None:
    """Makes an empty environment where there is none, or in place of an earlier one made here.

    Raises:
        SetupError: an earlier one is in use, or Python could not make it.
    """
    if os.path.lexists(str(VENV)):
        try:
            shutil.rmtree(str(VENV))
        except OSError as error:
            with contextlib.suppress(OSError):  # the stamp may be among what is gone already
                write_stamp(Stamp("", "", "", False))
            raise SetupError(
                f"{VENV} can't be replaced ({error}): end the programs that use it, then try again."
            ) from error
    # The stamp comes first, so that an environment half made is known as ours when it is next seen.
    VENV.mkdir()
    write_stamp(Stamp("", "", "", False))
    if run([sys.executable, "-m", "venv", str(VENV)]):
        raise SetupError(
            "Python could not make the environment .venv; its own words are above (on Debian and Ubuntu the package "
            f"python{sys.version_info[0]}.{sys.version_info[1]}-venv may be missing)."
        )


def ensure_venv() -> None:
    """Makes ``.venv``, or brings it up to date; does nothing and says nothing where it is as it should be.

    Raises:
        SetupError: in one sentence, why that can't be done.
    """
    problem = python_problem(sys.version_info[:3], 64 if sys.maxsize > 2**32 else 32)
    if problem:
        raise SetupError(problem)
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    texts = [path.read_text(encoding="utf-8") for path in (LOCK, TORCH_LOCK, CUDA_LOCK, REFERENCE_LOCK)]
    stamp = read_stamp()
    works = venv_python().exists() and links_work(VENV / FOUND_TORCH)
    needed = work_needed(stamp, python, locks_hash(texts), works)
    if needed == "nothing":
        return

    if needed == "everything":
        check_making()
        say(f"Setting up {VENV} with Python {platform.python_version()}.")
    else:
        say(f"Bringing {VENV} up to date; what it has already is not downloaded again.")
    torch = find_torch() if needed == "everything" else None
    if torch:
        say(f"The torch {torch.version} of this Python is used.")
    installs_torch = torch is None and not (needed == "packages" and stamp and stamp.torch)
    here = platform_key(platform.system(), platform.machine())
    packages_mb, torch_mb = (download_mb(text, here) for text in texts[:2])
    if installs_torch and torch_mb is None:
        raise SetupError(
            f"torch has no build for {platform.system()} on {platform.machine()}: start dev.py with a Python that has "
            f"torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, or on another machine."
        )
    say(download_text(packages_mb, torch_mb if installs_torch else None, platform.system()))
    found = torch.version if torch else stamp.torch if stamp and not installs_torch else ""
    made = Stamp(python, locks_hash(texts), found, False)
    if needed == "everything":
        check_disk(shutil.disk_usage(str(ROOT)).free // 1_000_000, installs_torch)
        make_venv()
    if torch:
        try:
            link_torch(torch, venv_site_packages(), VENV / FOUND_TORCH)
        except OSError as error:
            raise SetupError(
                f"The torch of this Python can't be linked into .venv ({error}): move the project to a disk that has "
                "links, or start dev.py with a Python without torch."
            ) from error
    write_stamp(made)
    # --no-deps: the lock has everything, and pip must not weigh a found torch's own wishes against it.
    pip_install("--no-deps", "-r", str(LOCK))
    pip_install("--no-deps", "-r", str(REFERENCE_LOCK))
    if installs_torch:
        pip_install("-r", str(TORCH_LOCK), "-c", str(CUDA_LOCK), "-c", str(LOCK))
    write_stamp(made._replace(ready=True))
    say(f"{VENV} is ready.")


def check_disk(free: int, installs_torch: bool) -> None:
    """Refuses to begin what the disk has no room for.

    Args:
        free: MB free.
        installs_torch: whether torch comes too.

    Raises:
        SetupError: there is too little.
    """
    least = PACKAGES_DISK_MB + (TORCH_DISK_MB if installs_torch else 0)
    if free < least:
        raise SetupError(
            f"The disk with {ROOT} has {free:,} MB free and setting up needs at least {least:,} MB: make room, then "
            "run the same command again."
        )


# ---------------------------------------------------------------------------------------------------------------------
# the commands


def get_browser(environment: "dict[str, str]") -> None:
    """Installs the browser that tests of the page need, where that can be done; without it they are skipped."""
    programs = {name for name in (*BROWSERS, "apt-get") if shutil.which(name)}
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    for command in browser_commands(programs, is_root):
        say(f"\n== {' '.join(command)} ==")
        if run(command, env={**environment, "DEBIAN_FRONTEND": "noninteractive"}):
            say("Chromium could not be installed.")
            return
    if not any(shutil.which(name) for name in BROWSERS):
        say("There is no Chromium, so the tests of the page in a browser are skipped: install it to run them.")


def run_tests(pytest_arguments: "list[str]") -> int:
    """Runs every check, the later ones also when an earlier one failed; 0 if all passed, else 1."""
    environment = child_environment(dict(os.environ))
    get_browser(environment)
    failed = []
    for heading, arguments in checks(pytest_arguments):
        say(f"\n== {heading} ==")
        if run([str(venv_python()), *arguments], cwd=str(ROOT), env=environment):
            failed.append(heading)
    if failed:
        say(f"Failed: {', '.join(failed)}.")
    return 1 if failed else 0


# What the commands other than test run, in the folder where they were typed.
MODULES = {"demo": "tests.embedded.demo", "bench": "tests.bench"}


def run_module(command: str, arguments: "list[str]") -> int:
    """Runs the embedded host or the benchmark; its exit code."""
    module = module_arguments(MODULES[command], ROOT, arguments)
    return run([str(venv_python()), *module], env=child_environment(dict(os.environ)))


def main(argv: "list[str]") -> int:
    """Runs the command line; 2 if setting up failed, 130 if interrupted."""
    try:
        command, arguments = split_arguments(argv)
        if command == "help":
            say((__doc__ or "").strip())
            return 0
        ensure_venv()
        return run_tests(arguments) if command == "test" else run_module(command, arguments)
    except SetupError as error:
        sys.stdout.flush()
        print(f"dev.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def started_from_venv() -> "str | None":
    """The Python that .venv was made from, if .venv's own Python runs this and so can't replace itself."""
    if sys.prefix == sys.base_prefix or Path(sys.prefix).resolve() != VENV.resolve():
        return None
    base = getattr(sys, "_base_executable", None)
    return str(base) if base else None


if __name__ == "__main__":
    base_python = started_from_venv()
    if base_python:
        sys.exit(run([base_python, str(Path(__file__).resolve()), *sys.argv[1:]]))
    sys.exit(main(sys.argv[1:]))

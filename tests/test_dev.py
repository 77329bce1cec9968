"""What dev.py decides, without making environments; the torch it links is the one that runs the tests."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dev

ROOT = Path(dev.__file__).resolve().parent
READY = dev.Stamp(python="3.11", locks="abc", torch="", ready=True)


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 12, 1)])
def test_pythons_that_do(version: tuple[int, int, int]) -> None:
    assert dev.python_problem(version) is None


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ((3, 6, 15), "Python 3.6.15 started dev.py and is too old: start it with Python 3.10 to 3.12."),
        ((3, 9, 18), "too old"),
        ((3, 13, 0), "too new"),
        ((4, 0, 0), "too new"),
    ],
)
def test_pythons_that_do_not(version: tuple[int, int, int], words: str) -> None:
    problem = dev.python_problem(version)
    assert problem is not None
    assert words in problem


def test_a_32_bit_python_is_refused() -> None:
    assert "32-bit" in (dev.python_problem((3, 11, 7), bits=32) or "")


@pytest.mark.parametrize(
    ("system", "machine", "name"),
    [
        ("Linux", "x86_64", "linux-x86_64"),
        ("Linux", "aarch64", "linux-aarch64"),
        ("Darwin", "arm64", "macos-arm64"),
        ("Windows", "AMD64", "windows-amd64"),
        ("Darwin", "x86_64", "darwin-x86_64"),
    ],
)
def test_platform_names(system: str, machine: str, name: str) -> None:
    assert dev.platform_key(system, machine) == name


@pytest.mark.parametrize("path", [dev.LOCK, dev.TORCH_LOCK])
def test_the_locks_say_how_much_each_platform_downloads(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    figures = {name: dev.download_mb(text, name) for name in dev.PLATFORMS.values()}
    assert all(isinstance(figure, int) and figure > 50 for figure in figures.values()), figures
    assert dev.download_mb(text, "darwin-x86_64") is None
    assert dev.download_mb("numpy==1.26.4\n", "linux-x86_64") is None


def test_download_text_names_both_figures_and_warns_of_cuda_on_linux_only() -> None:
    linux = dev.download_text(195, 2730, "Linux")
    assert "195 MB" in linux
    assert "2,730 MB" in linux
    assert "CUDA" in linux
    assert "CUDA" not in dev.download_text(180, 125, "Windows")


def test_download_text_with_a_torch_that_is_there() -> None:
    text = dev.download_text(195, None, "Linux")
    assert "195 MB" in text
    assert "torch" not in text
    assert "about 200 MB" in dev.download_text(None, None, "FreeBSD")


@pytest.mark.parametrize("version", ["2.2.0", "2.13.0+cpu", "2.4.0a0+gitabc", "3.0"])
def test_torches_that_do(version: str) -> None:
    assert dev.torch_problem(version) is None


@pytest.mark.parametrize("version", ["2.1.2+cu121", "1.13.1", "unknown"])
def test_torches_that_do_not(version: str) -> None:
    assert version in (dev.torch_problem(version) or "")


def test_stamp_is_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "stamp.json"
    dev.write_stamp(READY, path)
    assert dev.read_stamp(path) == READY


@pytest.mark.parametrize("text", ["", "{", "[]", '{"python": "3.11"}', '{"something": "else"}', "3"])
def test_a_stamp_that_is_damaged_counts_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stamp.json"
    path.write_text(text, encoding="utf-8")
    assert dev.read_stamp(path) is None
    assert dev.read_stamp(tmp_path / "missing.json") is None


@pytest.mark.parametrize(
    ("stamp", "python", "locks", "works", "needed"),
    [
        (None, "3.11", "abc", True, "everything"),
        (READY, "3.11", "abc", True, "nothing"),
        (READY, "3.11", "def", True, "packages"),
        (READY._replace(ready=False), "3.11", "abc", True, "packages"),
        (READY, "3.12", "abc", True, "everything"),
        (READY, "3.11", "abc", False, "everything"),
        (dev.Stamp("", "", "", False), "3.11", "abc", True, "everything"),
    ],
)
def test_work_needed(stamp: dev.Stamp | None, python: str, locks: str, works: bool, needed: str) -> None:
    assert dev.work_needed(stamp, python, locks, works) == needed


def test_hash_of_the_locks_sees_pins_and_nothing_else() -> None:
    plain = dev.locks_hash(["a==1\nb==2\n", "c==3\n"])
    assert dev.locks_hash(["# words\na==1\r\nb==2\r\n\r\n", "c==3"]) == plain
    assert dev.locks_hash(["a==1\nb==3\n", "c==3\n"]) != plain
    assert dev.locks_hash(["a==1\n", "b==2\nc==3\n"]) != plain


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "is full"),
        ("OSError: [WinError 112] There is not enough space on the disk", "is full"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError('<...>: Failed to establish a new "
            "connection: [Errno -2] Name or service not known')': /simple/x/\n"
            "ERROR: No matching distribution found for x==1",
            "could not be reached",
        ),
        ("NameResolutionError: Failed to resolve (getaddrinfo failed)", "could not be reached"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))", "certificate"),
        ("ERROR: No matching distribution found for torch==2.13.0", "found no torch==2.13.0"),
        ("PermissionError: [WinError 5] Access is denied", "could not be written"),
        ("ERROR: something new", "its own words"),
    ],
)
def test_reasons_for_pip_to_fail(words: str, reason: str) -> None:
    assert reason in dev.pip_problem(words)


@pytest.mark.parametrize(("free", "installs_torch"), [(999, False), (2199, True)])
def test_a_full_disk_is_refused_before_anything_is_made(free: int, installs_torch: bool) -> None:
    with pytest.raises(dev.SetupError, match=f"{free:,} MB free"):
        dev.check_disk(free, installs_torch)
    dev.check_disk(free + 1, installs_torch)


def test_arguments_go_through_untouched() -> None:
    assert dev.split_arguments(["test", "-k", "a or b", "--", "-x"]) == ("test", ["-k", "a or b", "--", "-x"])
    assert dev.split_arguments(["demo", "--help"]) == ("demo", ["--help"])
    assert dev.split_arguments(["bench", "--gpu"]) == ("bench", ["--gpu"])
    assert dev.split_arguments(["--help"]) == ("help", [])


@pytest.mark.parametrize("argv", [[], ["tests"], ["--port", "1"]])
def test_other_commands_are_refused_with_the_names_of_those_there_are(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dev.main(argv) == 2
    words = capsys.readouterr().err
    assert "demo" in words
    assert "test" in words


HEADINGS = ["ruff check", "ruff format", "mypy", "oldest and newest libraries", "pytest"]


def test_pytest_runs_last_with_the_arguments_given() -> None:
    commands = dev.checks(["-k", "x y"])
    assert [heading for heading, _ in commands] == HEADINGS
    assert commands[-1][1] == ["-m", "pytest", "-k", "x y"]


def test_a_browser_is_installed_only_where_it_can_and_must_be() -> None:
    assert dev.browser_commands({"chromium", "apt-get"}, True) == []
    assert dev.browser_commands({"google-chrome"}, True) == []
    assert dev.browser_commands({"apt-get"}, False) == []
    assert dev.browser_commands(set(), True) == []
    commands = dev.browser_commands({"apt-get"}, True)
    assert [command[:2] for command in commands] == [["apt-get", "update"], ["apt-get", "install"]]
    assert commands[-1][-1] == "chromium"


@pytest.mark.parametrize(("codes", "expected"), [([0, 0, 0, 0, 0], 0), ([1, 0, 0, 0, 0], 1), ([0, 0, 0, 0, 5], 1)])
def test_all_checks_run_even_when_one_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], codes: list[int], expected: int
) -> None:
    left = list(codes)
    seen: list[list[str]] = []

    def run(command: list[str], **_: object) -> int:
        seen.append(command)
        return left.pop(0)

    monkeypatch.setattr(dev, "run", run)
    monkeypatch.setattr(dev, "get_browser", lambda environment: None)
    assert dev.run_tests(["-x"]) == expected
    assert len(seen) == 5
    words = capsys.readouterr().out
    headings = [words.index(f"== {heading} ==") for heading in HEADINGS]
    assert headings == sorted(headings)
    assert ("Failed: " in words) == bool(expected)


def test_demo_runs_the_project_from_any_folder_and_leaves_its_arguments_alone(tmp_path: Path) -> None:
    """The folder where it is typed may have a package `tests` of its own, and a name with a space."""
    project, elsewhere = tmp_path / "a project", tmp_path / "else where"
    for folder, word in ((project, "ours"), (elsewhere, "theirs")):
        embedded = folder / "tests" / "embedded"
        embedded.mkdir(parents=True)
        (folder / "tests" / "__init__.py").touch()
        (embedded / "__init__.py").touch()
        (embedded / "demo.py").write_text(
            f"import json, os, sys\nprint(json.dumps([{word!r}, __name__, sys.argv[1:], os.getcwd()]))",
            encoding="utf-8",
        )
    arguments = ["--image", "my photo.jpg", "--prompt", 'a "quoted" cat', "--out", "o.png"]
    done = subprocess.run(
        [sys.executable, *dev.module_arguments("tests.embedded.demo", project, arguments)],
        cwd=elsewhere,
        capture_output=True,
        check=True,
    )
    word, name, seen, folder = json.loads(done.stdout)
    assert (word, name, seen) == ("ours", "__main__", arguments)
    assert Path(folder).resolve() == elsewhere.resolve()


def test_environment_of_what_runs_in_the_venv() -> None:
    made = dev.child_environment({"PATH": "p", "PYTHONPATH": "x", "PYTHONHOME": "y"})
    assert made["PATH"] == "p"
    assert "PYTHONPATH" not in made
    assert "PYTHONHOME" not in made
    assert (made["HF_HUB_OFFLINE"], made["GRADIO_ANALYTICS_ENABLED"], made["PYTHONUTF8"]) == ("1", "False", "1")


def test_the_torch_that_is_there_is_described() -> None:
    found = dev.describe_torch({"numpy", "sympy", "networkx", "jinja2", "filelock", "fsspec", "typing-extensions"})
    assert found.version == torch.__version__
    names = {Path(path).name for path in found.paths}
    assert "torch" in names
    assert any(name.startswith("torch-") and name.endswith(".dist-info") for name in names)
    assert not names & {"numpy", "sympy", "networkx", "jinja2", "bin", "..", "__pycache__", "pip"}
    assert all(os.path.exists(path) for path in found.paths)


def test_only_what_belongs_to_a_torch_is_described(tmp_path: Path) -> None:
    """Libraries it needs come along; extras, pinned packages, scripts and .pth files stay where they are."""
    requires = ["nvidia.lib (==1.0) ; platform_system != 'x'", "numpy>=1", "optree ; extra == 'optree'", "not-here"]
    contents = {
        "torch": ["torch/__init__.py", "torch.pth", "../bin/torchrun", "__pycache__/x.pyc"],
        "nvidia_lib": ["nvidia/lib/__init__.py"],
        "numpy": ["numpy/__init__.py"],
        "optree": ["optree/__init__.py"],
    }
    for name, files in contents.items():
        info = f"{name}-1.0.dist-info"
        for file in [*files, f"{info}/METADATA"]:
            (tmp_path / "lib" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "lib" / file).write_text("__version__ = '2.9'" if file == "torch/__init__.py" else "")
        lines = [f"Name: {name}", "Version: 1.0"]
        lines += [f"Requires-Dist: {line}" for line in requires if name == "torch"]
        (tmp_path / "lib" / info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (tmp_path / "lib" / info / "RECORD").write_text(
            "".join(f"{file},,\n" for file in [*files, f"{info}/METADATA"]), encoding="utf-8"
        )
    code = "import json, sys; sys.path[:0] = sys.argv[1:]; import dev; print(json.dumps(dev.describe_torch({'numpy'})))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path / "lib"), str(ROOT)], capture_output=True, check=True
    )
    version, paths = json.loads(done.stdout)
    assert version == "2.9"
    assert {Path(path).name for path in paths} == {
        "nvidia",
        "nvidia_lib-1.0.dist-info",
        "torch",
        "torch-1.0.dist-info",
    }


def test_find_torch_describes_the_same_from_a_process_of_its_own() -> None:
    found = dev.find_torch()
    assert found is not None
    assert found.version == torch.__version__


def test_a_torch_that_does_not_load_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1 is missing')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert dev.find_torch() is None
    assert "libgomp.so.1 is missing" in capsys.readouterr().out


def test_a_linked_torch_is_seen_by_python_and_by_what_asks_for_its_version(tmp_path: Path) -> None:
    """Nothing that lies beside it comes into sight, and removing the links leaves what they point to."""
    beside = tmp_path / "other python"
    for name in ("torch", "torch-9.9.dist-info", "pytest_surprise"):
        (beside / name).mkdir(parents=True)
    (beside / "torch" / "__init__.py").write_text("__version__ = '9.9'", encoding="utf-8")
    (beside / "torch-9.9.dist-info" / "METADATA").write_text("Name: torch\nVersion: 9.9\n", encoding="utf-8")
    (beside / "single.py").write_text("x = 1", encoding="utf-8")
    site_packages, folder = tmp_path / "my venv" / "lib", tmp_path / "my venv" / "found-torch"
    site_packages.mkdir(parents=True)
    paths = tuple(str(beside / name) for name in ("single.py", "torch", "torch-9.9.dist-info"))

    dev.link_torch(dev.Torch("9.9", paths), site_packages, folder)

    code = (
        "import site, sys; site.addsitedir(sys.argv[1]); import torch, single; "
        "import importlib.metadata as m, importlib.util as u; "
        "print(torch.__version__, m.version('torch'), u.find_spec('pytest_surprise'))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(site_packages)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["9.9", "9.9", "None"]
    assert dev.links_work(folder)
    (beside / "torch-9.9.dist-info").rename(beside / "torch-9.10.dist-info")
    assert not dev.links_work(folder)
    dev.shutil.rmtree(tmp_path / "my venv")
    assert (beside / "torch" / "__init__.py").is_file()


def test_a_folder_that_dev_py_did_not_make_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / ".venv"
    mine.mkdir()
    (mine / "precious").touch()
    monkeypatch.setattr(dev, "VENV", mine)
    monkeypatch.setattr(dev, "STAMP", mine / "made-by-dev.json")
    with pytest.raises(dev.SetupError, match=r"was not made by dev\.py"):
        dev.check_making()
    assert (mine / "precious").is_file()


def test_a_python_without_the_venv_module_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dev.importlib.util.find_spec
    monkeypatch.setattr(dev.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else real(name))
    with pytest.raises(dev.SetupError, match="ensurepip module.*-venv"):
        dev.check_making()


def test_exit_code_of_a_program_comes_back() -> None:
    assert dev.run([sys.executable, "-c", "raise SystemExit(7)"]) == 7


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_lets_the_program_end_in_its_own_way(tmp_path: Path) -> None:
    """Both get the signal, as from a terminal; the one inside takes its time and is not killed."""
    inner = (
        "import signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(1)\n"
        f"    open({str(tmp_path / 'ended')!r}, 'w').close()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "print('on', flush=True)\n"
        "time.sleep(60)\n"
    )
    outer = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dev; dev.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline().strip() == b"on"
        os.killpg(program.pid, signal.SIGINT)
        program.communicate(timeout=60)
    assert (tmp_path / "ended").is_file()
    assert program.returncode != 0


def test_the_reference_package_is_found_without_importing_it() -> None:
    files = importlib.metadata.files("ip-adapter") or []
    resampler = [file for file in files if file.name == "resampler.py"]
    assert len(resampler) == 1
    assert Path(str(resampler[0].locate())).is_file()
    assert "ip_adapter" not in sys.modules

"""House rules that a reader can't see from one file: who imports what, what is never called, what is pinned."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lib_ipadapter"

# top-level names that only a WebUI has
WEBUI = {"modules", "modules_forge", "backend", "ldm_patched", "ldm", "sgm", "k_diffusion", "packages_3rdparty"}
# each runs whatever code a file holds
UNSAFE_CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.serialization.load",
    "torch.hub.load",
    "pickle.load",
    "pickle.loads",
    "_pickle.load",
    "_pickle.loads",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "pandas.read_pickle",
}
# the official text as the Free Software Foundation publishes it
AGPL_3_SHA256 = "0d96a4ff68ad6d4b6f1f30f713b18d5184912ba8dd389f86aa7710db079abcb0"
# what the engine may import beside the standard library, and what torch itself imports
ENGINE_DISTRIBUTIONS = {"torch", "numpy", "pillow", "safetensors"}
TORCH_DISTRIBUTIONS = {"filelock", "typing-extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec"}


def project_files(*suffixes: str) -> list[Path]:
    """The project's own files: those git knows or would add, else all that don't lie in a hidden or cache folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        files = [
            path
            for path in ROOT.rglob("*")
            if not any(part == "__pycache__" or re.match(r"\.(?!ci)", part) for part in path.relative_to(ROOT).parts)
        ]
    return sorted(path for path in files if path.is_file() and (not suffixes or path.suffix in suffixes))


def python_files(*folders: str) -> list[Path]:
    """The project's Python files under some of its folders, or all of them."""
    files = project_files(".py", ".pyi")
    return [path for path in files if not folders or any(path.is_relative_to(ROOT / folder) for folder in folders)]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def absolute_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every absolute import anywhere in a file, those through importlib included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            if isinstance(first, ast.JoinedStr) and first.values:
                first = first.values[0]
            if (
                called in ("import_module", "__import__", "find_spec")
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
                and not first.value.startswith(".")
            ):
                yield node.lineno, first.value


def imports_of(paths: list[Path], top_levels: set[str]) -> list[str]:
    return [
        f"{name_of(path)}:{line} imports {name}"
        for path in paths
        for line, name in absolute_imports(tree_of(path))
        if name.partition(".")[0] in top_levels
    ]


def test_only_hosts_and_scripts_import_a_webui() -> None:
    others = [path for path in python_files("lib_ipadapter") if not path.is_relative_to(PACKAGE / "hosts")]
    assert len(others) > 20
    assert imports_of([*others, ROOT / "install.py", ROOT / "preload.py", ROOT / "dev.py"], WEBUI) == []
    # the same reading does find them where they belong
    assert imports_of(python_files("scripts", "lib_ipadapter/hosts"), WEBUI)


def test_only_ui_and_scripts_import_gradio() -> None:
    others = [path for path in python_files("lib_ipadapter") if not path.is_relative_to(PACKAGE / "ui")]
    assert imports_of([*others, ROOT / "install.py", ROOT / "preload.py", ROOT / "dev.py"], {"gradio"}) == []
    assert imports_of(python_files("lib_ipadapter/ui"), {"gradio"})


def test_imports_inside_the_package_are_relative() -> None:
    """The package runs under a private name in a WebUI, where the name it has on disk is a built-in extension's."""
    names = {path.stem for path in PACKAGE.rglob("*.py")} | {"lib_ipadapter", "sd_image_prompt"}
    clashes = names & sys.stdlib_module_names
    assert clashes == set(), f"{clashes} would be read as the standard library's in one place and as ours in another"
    assert imports_of(python_files("lib_ipadapter"), names) == []


def test_no_module_has_a_name_that_the_built_in_extension_uses() -> None:
    taken = {"resampler", "ipadapterplus"}
    assert [name_of(path) for path in PACKAGE.iterdir() if path.stem.lower() in taken] == []


def test_engine_imports_with_torch_numpy_pillow_and_safetensors_alone() -> None:
    allowed = ENGINE_DISTRIBUTIONS | TORCH_DISTRIBUTIONS
    blocked = {
        file.parts[0].removesuffix(".py")
        for distribution in metadata.distributions()
        if re.sub(r"[-_.]+", "-", distribution.name).lower() not in allowed
        and not re.match("nvidia|cuda|triton", distribution.name)
        for file in distribution.files or ()
        if file.suffix == ".py" and file.parts[0] not in ("..", "__pycache__")
    }
    # a file of theirs may lie in a folder of torch's or of the standard library's name
    blocked -= {"torch", "numpy", "PIL", "safetensors"} | sys.stdlib_module_names
    blocked |= WEBUI
    assert {"gradio", "transformers", "diffusers", "scipy", "einops", "pydantic"} <= blocked
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in python_files("lib_ipadapter")
        if path.suffix == ".py" and not {"hosts", "ui"} & set(path.parts) and path.name != "__init__.py"
    ]
    assert len(modules) > 15
    code = f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(blocked)!r}:
            raise ModuleNotFoundError(f"{{name}} is out of reach", name=name)

sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    importlib.import_module(name)
import lib_ipadapter
for name in lib_ipadapter.__all__:
    getattr(lib_ipadapter, name)
print("imported", len({modules!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"imported {len(modules)}"


def test_importing_the_package_loads_nothing_else() -> None:
    code = "import sys, lib_ipadapter; print(sorted({'torch', 'numpy', 'PIL', 'gradio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def unsafe_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of every mention of a function that runs code from files, under whatever name it goes here."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}" in UNSAFE_CALLS:
                    yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            full = f"{known.get(first, first)}.{rest}"
            if full in UNSAFE_CALLS:
                yield node.lineno, full


def test_nothing_runs_code_from_files() -> None:
    paths = python_files("lib_ipadapter", "scripts")
    assert [f"{name_of(path)}:{line} {name}" for path in paths for line, name in unsafe_calls(tree_of(path))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "import torch as t\nread = t.jit.load",
        "from torch import load as read",
        "from torch import jit\njit.load('x')",
        "import torch.jit\ntorch.jit.load('x')",
        "import pickle\ndef f():\n    return pickle.loads(b'')",
        "from pickle import load",
        "import pickle as p\np.load(open('x', 'rb'))",
    ],
)
def test_the_check_for_unsafe_calls_sees_each_way_to_write_one(source: str) -> None:
    assert list(unsafe_calls(ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["import json\njson.loads('1')", "def load(x): ...\nload(1)", "import torch\ntorch.ones(1)"]
)
def test_the_check_for_unsafe_calls_leaves_others_alone(source: str) -> None:
    assert list(unsafe_calls(ast.parse(source))) == []


def test_every_module_of_the_package_says_what_it_is() -> None:
    assert [name_of(path) for path in python_files("lib_ipadapter") if not ast.get_docstring(tree_of(path))] == []


def test_everything_is_python_3_10() -> None:
    files = python_files()
    assert len(files) > 50
    for path in files:
        ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path), feature_version=(3, 10))


def test_dev_py_gets_far_enough_on_an_old_python_to_say_so() -> None:
    tree = ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    evaluated = [
        ast.unparse(annotation)
        for node in ast.walk(tree)
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if isinstance(annotation, ast.Subscript | ast.BinOp)
    ]
    assert evaluated == [], "these annotations are evaluated, and older Pythons can't: put them in quotes"


def test_no_file_names_a_registry_or_a_place_on_one_machine() -> None:
    registries = [
        "pypi" + r"\.org",
        "python" + "hosted",
        "download" + r"\.pytorch",
        "registry" + r"\.npmjs",
        "conda" + r"\.anaconda",
    ]
    places = [r"(?<![\w.])/" + place for place in ("work/", "root/", "opt/", "home/", "Users/", "mnt/")]
    places.append(r"\b[A-Z]:\\+" + "Users")
    wrong = re.compile("|".join(registries + places))
    found = []
    for path in project_files():
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if path != Path(__file__).resolve() and wrong.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()}")
    assert found == []


def test_ci_only_runs_the_tests_as_a_person_does() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        "set -eu",
        'cd "$(dirname "$0")/.."',
        "exec python3 dev.py test",
    ]


def test_licence_is_the_agpl() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")  # whose line ends a checkout may have changed
    assert hashlib.sha256(text.encode("utf-8")).hexdigest() == AGPL_3_SHA256
    assert re.search(
        r'^license = "AGPL-3.0-or-later"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_changelog_begins_with_the_version_of_the_project() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == version.group(1)
    assert len(headings) == len(set(headings))


def pins(name: str) -> dict[str, str]:
    """Requirement lines of a lock file, by normalised name: version and marker."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+( ; .+)?)", line)
            assert match, f"{name}: {line!r} is not pinned"
            found[re.sub(r"[-_.]+", "-", match.group(1)).lower()] = match.group(2)
    return found


def test_every_lock_file_pins_every_line_once() -> None:
    names = [path.name for path in ROOT.glob("requirements*.lock")]
    assert len(names) == 4
    together = [pin for name in names for pin in pins(name)]
    assert len(together) == len(set(together))


def test_the_lock_holds_all_that_is_asked_for() -> None:
    asked = re.findall(r"^([A-Za-z0-9_.-]+)", (ROOT / "requirements.in").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(asked) > 15
    assert {name.replace("_", "-").lower() for name in asked} <= set(pins("requirements.lock"))


@pytest.mark.skipif(Path(sys.prefix).resolve() != ROOT / ".venv", reason="runs in another environment than .venv")
def test_the_environment_is_the_locked_one() -> None:
    locked = pins("requirements.lock") | pins("requirements-reference.lock")
    expected = {name: version for name, version in locked.items() if ";" not in version}
    assert {name: metadata.version(name) for name in expected} == expected


def test_installing_the_extension_does_nothing() -> None:
    done = subprocess.run([sys.executable, "install.py"], cwd=ROOT, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
    tree = tree_of(ROOT / "install.py")
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


def test_metadata_names_the_extension_in_lower_case() -> None:
    import configparser

    parser = configparser.ConfigParser()
    parser.read(ROOT / "metadata.ini", encoding="utf-8")
    assert parser.sections() == ["Extension"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", parser["Extension"]["Name"])


def test_preload_adds_two_flags_that_default_to_nothing() -> None:
    import argparse

    import preload

    parser = argparse.ArgumentParser()
    preload.preload(parser)
    given = parser.parse_args(["--ip-adapter-models-path", "a b", "--ip-adapter-encoders-path", "c"])
    assert (given.ip_adapter_models_path, given.ip_adapter_encoders_path) == ("a b", "c")
    assert vars(parser.parse_args([])) == {"ip_adapter_models_path": None, "ip_adapter_encoders_path": None}

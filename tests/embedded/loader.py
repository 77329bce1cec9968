"""Finds and loads the scripts of extensions the way the Forge line does."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .reports import Reports
from .scripts_api import Script


class ScriptFile(NamedTuple):
    basedir: str
    filename: str
    path: str


class ScriptClassData(NamedTuple):
    script_class: type[Script]
    path: str
    basedir: str
    module: ModuleType


class Extension:
    """One extension folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.name = self.canonical_name = path.name
        self.is_builtin = False
        self.enabled = True

    def list_files(self, subdir: str, suffix: str) -> list[ScriptFile]:
        """Files directly in ``subdir`` with that suffix, sorted by name."""
        folder = Path(self.path, subdir)
        if not folder.is_dir():
            return []
        names = sorted(f.name for f in folder.iterdir() if f.is_file() and f.suffix.lower() == suffix)
        return [ScriptFile(self.path, name, str(folder / name)) for name in names]


def load_module(path: str) -> ModuleType:
    """Execute a file as a module named after it. Like the hosts, doesn't enter it in ``sys.modules``."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_line_options(
    extensions: Sequence[Extension], arguments: Sequence[str], parser: argparse.ArgumentParser, reports: Reports
) -> argparse.Namespace:
    """The host's command line, with the flags that extensions add in ``preload.py``."""
    for extension in extensions:
        file = Path(extension.path, "preload.py")
        if not file.is_file():
            continue
        try:
            module = load_module(str(file))
            if hasattr(module, "preload"):
                module.preload(parser)
        except Exception as error:
            reports.report(f"Error running preload() for {file}", error)
    return parser.parse_args(list(arguments))


def load_scripts(
    extensions: Sequence[Extension],
    reports: Reports,
    set_basedir: Callable[[str | None], None],
    found: list[ScriptClassData],
) -> None:
    """Load ``scripts/*.py`` of all extensions; every Script subclass in a file's namespace counts, imported ones too.

    All extension roots go on ``sys.path`` before the first script runs and stay there. A script that raises is
    reported and left out. ``set_basedir`` is told whose turn it is (``modules.scripts.basedir()``). ``found`` is filled
    as they are loaded: a script sees those before it (``modules.scripts.scripts_data``).
    """
    files = [f for e in extensions for f in e.list_files("scripts", ".py")]
    for file in files:
        if file.basedir not in sys.path:
            sys.path.insert(0, file.basedir)
    found.clear()
    for file in files:
        before = sys.path
        try:
            # the hosts put the root in front once more while its script is loaded
            sys.path = [file.basedir, *sys.path]
            set_basedir(file.basedir)
            module = load_module(file.path)
            classes = [v for v in vars(module).values() if inspect.isclass(v) and issubclass(v, Script)]
            found += [ScriptClassData(c, file.path, file.basedir, module) for c in classes]
        except Exception as error:
            reports.report(f"Error loading script: {file.filename}", error)
        finally:
            sys.path = before
            set_basedir(None)

"""Adds axes to X/Y/Z plot, a script that WebUIs load and import under no name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from ..axes import Axis


def add(axes: Sequence[Axis], prefix: str) -> None:
    """Adds them to every X/Y/Z plot that is loaded, in place of any whose label begins with ``prefix``.

    Where the list of axes lives on after 'Reload UI', ours of the load before are still in it.
    """
    for module in _modules():
        others = [each for each in module.axis_options if not each.label.startswith(prefix)]
        made = [module.AxisOption(**{field.name: getattr(axis, field.name) for field in fields(axis)}) for axis in axes]
        module.axis_options[:] = [*others, *made]


def _modules() -> Iterator[Any]:
    scripts: Any = import_module("modules.scripts")
    seen: list[Any] = []
    for each in getattr(scripts, "scripts_data", ()):
        module = each.module
        if (
            Path(each.path).stem == "xyz_grid"
            and hasattr(module, "axis_options")
            and not any(module is other for other in seen)
        ):
            seen.append(module)
            yield module

"""Makes a name known to the host as an extra network, so that it doesn't call the tags of this name unknown.

Hosts cut ``<name:…>`` out of prompts whatever the name is.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def register(name: str) -> None:
    """Registers an extra network of this name that does nothing, in place of one of the load before."""
    try:
        module: Any = import_module("modules.extra_networks")
    except ImportError:
        return

    class Stripped(module.ExtraNetwork):  # type: ignore[misc]  # a WebUI has no type information
        def activate(self, p: Any, params_list: Any) -> None:
            """What the tags ask for is read in the script's own hooks."""

        def deactivate(self, p: Any) -> None:
            """There is nothing to undo."""

    module.register_extra_network(Stripped(name))

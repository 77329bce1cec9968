"""``modules.extra_networks``: tags in prompts, with the hosts' names and rules."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

_TAG = re.compile(r"<(\w+):([^>]+)>")


class ExtraNetworkParams:
    def __init__(self, items: list[str]) -> None:
        self.items = items


class ExtraNetwork:
    """Base class of what acts on tags of its name."""

    def __init__(self, name: str) -> None:
        self.name = name


Data = dict[str, list[ExtraNetworkParams]]


class ExtraNetworks:
    """The registry of a host."""

    def __init__(self) -> None:
        self.registry: dict[str, Any] = {}
        self.unknown: list[str] = []
        """Names of tags that nobody had registered, which hosts only log."""

    def register(self, network: Any) -> None:
        self.registry[network.name] = network

    def activate(self, p: Any, data: Data) -> None:
        """Every registered network is called, with the first prompt's tags of its name."""
        self.unknown += [name for name in data if name not in self.registry]
        for name, network in self.registry.items():
            network.activate(p, data.get(name, []))


def parse_prompts(prompts: list[str]) -> tuple[list[str], Data]:
    """All prompts without their tags, and the tags of the first."""
    data: Data = defaultdict(list)
    for name, items in _TAG.findall(prompts[0]) if prompts else ():
        data[name].append(ExtraNetworkParams(items.split(":")))
    return [_TAG.sub("", prompt) for prompt in prompts], dict(data)

"""Nothing is left behind by generations, however many there are; ``tests.soak`` runs more of them."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import engine_soak, soak
from tests.embedded import Host
from tests.embedded_hosts import request, unit


def test_what_lives_does_not_grow(host: Host) -> None:
    first, *others = soak.run(host, 24, 8)
    assert len(others) == 3
    assert others == [first] * 3


def test_what_is_kept_would_be_seen(host: Host) -> None:
    before = soak.alive(host)
    kept = torch.zeros(1)
    assert soak.alive(host) == soak.Alive(before.tensors + 1, before.hooks, before.allocated)
    assert kept.numel() == 1
    host.txt2img(**request(unit()))
    assert soak.alive(host).hooks == before.hooks


def test_the_engine_alone_leaves_nothing_behind(tmp_path: Path) -> None:
    seen = engine_soak.run(tmp_path, "sd15", torch.device("cpu"), 5)
    assert seen[2:] == [seen[1]] * 3

"""Damaged and hostile files: each gets a sentence or works, within hard limits, and nothing in them is ever run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.tricks import CANARY, TRICKS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are Linux's")


@pytest.mark.parametrize("trick", TRICKS)
def test_a_trick_works_on_an_unpickler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trick: str) -> None:
    """Otherwise it would prove nothing that our reader isn't taken in."""
    monkeypatch.chdir(tmp_path)
    code = "import pickle, sys, time\ntry: pickle.loads(sys.stdin.buffer.read())\nfinally: time.sleep(0.2)"
    subprocess.run([sys.executable, "-c", code], input=TRICKS[trick], capture_output=True, check=False, timeout=300)
    assert (tmp_path / CANARY).exists()


def test_every_file_gets_a_sentence_or_works(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutations", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = Counter(json.loads(done.stdout))
    assert found["valid worked"] == 12 and found["valid refused"] == 0
    assert sum(found.values()) >= 500

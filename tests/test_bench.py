"""The benchmark runs, and its arithmetic is right. How long anything takes is nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.__main__ import GPU_CASES, Case, main, targets
from tests.bench.timing import over, points, summarise

TIMES = {
    "no adapter": [10.0, 20.0, 10.0],
    "plain": [11.0, 22.0, None],
    "ours": [11.5, 23.0, 12.0],
}


def test_ratios_are_taken_round_by_round() -> None:
    assert over(TIMES, "plain", "no adapter").median == pytest.approx(10)
    assert over(TIMES, "plain", "no adapter").rounds == 2
    ours = over(TIMES, "ours", "no adapter")
    assert (ours.median, ours.low, ours.high) == pytest.approx((15, 15, 20))
    assert points(TIMES, "ours", "plain", "no adapter").median == pytest.approx(5)


def test_the_interval_holds_the_median_and_shrinks_with_rounds() -> None:
    few, many = (summarise([1.0, 2.0, 3.0] * n) for n in (3, 60))
    assert few.low <= few.median <= few.high
    assert many.high - many.low <= few.high - few.low


@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
def test_every_target_is_of_something_measured(case: Case) -> None:
    measured = {f"joint, {n}" for n in case.pictures} | {"decoupled, 1", "outside the window"}
    assert set(targets(case)) <= measured


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--small", "--cases", "small-sd15-b2,preparation", "--rounds", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    variants = results["cases"]["small-sd15-b2"]["variants"]
    assert {"joint, 4", "decoupled, 1", "outside the window", "joint, 1, 77/154", "plain, 1", "diffusers"} <= set(
        variants
    )
    assert variants["joint, 1"]["percent"]["rounds"] == 2
    assert results["cases"]["small-sd15-b2"]["finite"]
    assert results["preparation"]["second"]["runs of modules"] == 0
    assert results["preparation"]["second"]["files opened"] == 0
    assert results["preparation"]["four new pictures"]["runs of modules"] == 2  # the encoder once, the adapter once
    assert (tmp_path / "bench.png").stat().st_size
    assert "| joint, 4 |" in (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "small-sd15-b2" in capsys.readouterr().out

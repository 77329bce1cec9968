"""A run's numbers as Markdown, for README.md beside this file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MOST_TIMES = 1.3
"""What the first generation's callbacks may take, in times of reading the files and the encoder's forward."""


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of ``bench.json``'s content."""
    about = f"{results['device']}, torch {results['torch']}, diffusers {results['diffusers']}"
    lines = [about]
    for name, case in results["cases"].items():
        lines += ["", f"### {name}", "", *_case(case), "", *_targets(case)]
    if "preparation" in results:
        lines += ["", "### Before sampling, ms", "", *_preparation(results["preparation"])]
    return "\n".join(lines) + "\n"


def _case(case: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "| | ms/step | over no adapter, % | above plain, points | rounds | device busy, ms | kernels | waits "
        "| held, MB (K/V) |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, row in case["variants"].items():
        asked = row.get("a step on the device", {})
        held = f"{row['held bytes'] / 1e6:.1f}" if row.get("held bytes") else ""
        if held and "K/V bytes" in row:
            held += f" ({row['K/V bytes'] / 1e6:.1f})"
        cells = [
            name,
            f"{row['ms']:.2f}",
            "" if row["over"] == name else _interval(row["percent"]),
            _interval(row["above plain"]) if "above plain" in row else "",
            row["percent"]["rounds"],
            f"{asked['device ms']:.1f}" if asked else "",
            asked.get("kernels", ""),
            asked.get("waits", ""),
            held,
        ]
        yield f"| {' | '.join(map(str, cells))} |"


def _targets(case: Mapping[str, Any]) -> Iterator[str]:
    for target in case["targets"]:
        above = f"above '{target['above']}'" if target["above"] else "over no adapter"
        word = "met" if target["met"] else "not met"
        high, median = target["found"]["high"], target["found"]["median"]
        yield (
            f"- {target['variant']}: at most {target['most']:+.1f} {above}: "
            f"**{word}** ({median:+.2f}, upper end {high:+.2f})"
        )


def _preparation(spans: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    columns = ("begin", "prepare", "attach", "without decoding", "runs of modules", "files opened")
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in spans.items():
        yield f"| {name} | {' | '.join(f'{row[column]:.1f}' for column in columns)} |"
    yardstick = spans["first"]["yardstick"]
    words = ", ".join(f"{name} {ms:.1f} ms" for name, ms in yardstick.items())
    times = spans["first"]["times the yardstick"]
    word = "met" if times <= MOST_TIMES else "not met"
    yield ""
    yield f"- first: at most {MOST_TIMES} times its yardstick ({words}): **{word}** ({times:.2f})"


def _interval(summary: Mapping[str, float]) -> str:
    return f"{summary['median']:+.2f} [{summary['low']:+.2f}, {summary['high']:+.2f}]"

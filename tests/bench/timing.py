"""Variants run in turn, round after round, and what the rounds say of each beside another."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from torch import Tensor

LEAST_ROUNDS = 9
RESAMPLES = 4000


@dataclass(frozen=True)
class Variant:
    """Something that can be run step by step."""

    step: Callable[[], Tensor]
    baseline: str = "no adapter"
    """The variant that its ratio is taken to."""
    few: bool = False
    """Takes part in the first ``LEAST_ROUNDS`` rounds alone: no target is set for it, or it is far off."""
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered around the steps, outside of the measured time."""


Times = Mapping[str, Sequence[float | None]]
"""Milliseconds a step for each round, by variant; None where a round passed it over."""


@dataclass(frozen=True)
class Summary:
    """The median over rounds, and the 95 % interval of the median by bootstrap."""

    median: float
    low: float
    high: float
    rounds: int


@contextmanager
def on_one_core() -> Iterator[None]:
    """Keeps this thread, which launches what a GPU does, where it is, so that moving it doesn't scatter the times."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(
    variants: Mapping[str, Variant],
    rounds: int,
    steps: int,
    synchronize: Callable[[], None],
    seconds: float,
) -> Times:
    """Times every variant once a round, in an order drawn anew each round.

    Args:
        rounds, steps: how many, and UNet calls in each.
        synchronize: waits for the device.
        seconds: when they are over, the round that runs is the last, but ``LEAST_ROUNDS`` are run in any case.
    """
    for variant in variants.values():
        with variant.around():
            variant.step()
            variant.step()
    times: dict[str, list[float | None]] = {name: [] for name in variants}
    shuffle = random.Random(0).shuffle
    collecting, began = gc.isenabled(), time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
                break
            names = list(variants)
            shuffle(names)
            for name in names:
                variant = variants[name]
                passed_over = variant.few and done >= LEAST_ROUNDS
                times[name].append(None if passed_over else _milliseconds(variant, steps, synchronize))
    finally:
        if collecting:
            gc.enable()
    return times


def _milliseconds(variant: Variant, steps: int, synchronize: Callable[[], None]) -> float:
    with variant.around():
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            variant.step()
        synchronize()
        return (time.perf_counter() - start) * 1e3 / steps


def summarise(values: Sequence[float]) -> Summary:
    """Median and its interval of one value a round."""
    array = np.asarray(values)
    draws = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(np.median(array[draws], axis=1), [2.5, 97.5])
    return Summary(float(np.median(array)), float(low), float(high), len(array))


def over(times: Times, name: str, baseline: str) -> Summary:
    """What a variant costs over another, in percent of it, round by round."""
    pairs = _pairs(times, name, baseline)
    return summarise([(a / b - 1) * 100 for a, b in pairs])


def points(times: Times, name: str, other: str, baseline: str) -> Summary:
    """How much more a variant costs than another one, in percent of a baseline, round by round."""
    triples = [
        (a, b, c)
        for a, b, c in zip(times[name], times[other], times[baseline], strict=True)
        if a is not None and b is not None and c is not None
    ]
    return summarise([(a - b) / c * 100 for a, b, c in triples])


def _pairs(times: Times, one: str, other: str) -> list[tuple[float, float]]:
    both = zip(times[one], times[other], strict=True)
    return [(a, b) for a, b in both if a is not None and b is not None]

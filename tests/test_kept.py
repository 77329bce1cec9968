"""What is kept between generations stays within its limit, the least recently used going first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_ipadapter import IPAdapterError
from lib_ipadapter.kept import Kept, limit_bytes


class Sized:
    """A value of some bytes."""

    def __init__(self, key: int, size: int) -> None:
        self.key, self.size = key, size


def size_of(value: Sized) -> int:
    return value.size


Steps = st.lists(st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.booleans()), max_size=30)


@given(limit=st.integers(0, 20), sizes=st.lists(st.integers(1, 25), min_size=6, max_size=6), steps=Steps)
def test_it_is_a_least_recently_used_store_bounded_by_bytes(limit: int, sizes: list[int], steps: Steps) -> None:
    kept = Kept(lambda: limit, size_of)
    model: list[int] = []  # keys that are kept, the one used last at the end
    for keys, trim in steps:
        asked: list[int] = []

        def make(missing: Sequence[int], asked: list[int] = asked) -> list[Sized]:
            asked += missing
            return [Sized(key, sizes[key]) for key in missing]

        values = kept.get_all(keys, make)
        assert [value.key for value in values] == keys
        expected = [key for key in dict.fromkeys(keys) if key not in model]
        assert asked == expected
        used = [*(key for key in dict.fromkeys(keys) if key in model), *expected]
        model = [*(key for key in model if key not in used), *used]
        if expected:
            model = shrunk(model, sizes, limit, expected)
        if trim:
            kept.trim()
            model = shrunk(model, sizes, limit, [])
            assert sum(sizes[key] for key in model) <= limit
    again: list[int] = []
    kept.get_all(range(6), lambda missing: again.extend(missing) or [Sized(key, 0) for key in missing])
    assert set(again) == set(range(6)) - set(model)


def shrunk(model: list[int], sizes: list[int], limit: int, stay: list[int]) -> list[int]:
    """The rule in other words: what is too large alone goes; of the others, the most recent that fit together stay."""
    model = [key for key in model if sizes[key] <= limit or key in stay]
    going = [key for key in model if key not in stay]
    while going and sum(sizes[key] for key in model if sizes[key] <= limit) > limit:
        model.remove(going.pop(0))
    return model


def test_one_that_is_too_large_is_used_and_puts_out_no_others() -> None:
    kept = Kept(lambda: 10, size_of)
    small = kept.get("small", lambda: Sized(0, 9))
    large = kept.get("large", lambda: Sized(1, 11))
    assert kept.get("large", lambda: Sized(2, 11)) is large
    kept.trim()
    assert kept.get("small", lambda: Sized(3, 9)) is small
    assert kept.get("large", lambda: Sized(4, 11)) is not large


def test_the_limit_may_change_and_a_value_may_grow() -> None:
    limit = 10
    kept = Kept(lambda: limit, size_of)
    first, second = (kept.get(key, lambda: Sized(0, 5)) for key in "ab")
    second.size = 6  # as a module that ran in float32
    kept.trim()
    assert kept.get("b", lambda: Sized(0, 5)) is second
    limit = 0
    kept.trim()
    assert kept.get("b", lambda: Sized(0, 5)) is not second
    assert kept.get("a", lambda: Sized(0, 5)) is not first


def test_making_may_ask_for_others() -> None:
    kept = Kept(lambda: 10, size_of)
    inner: list[Sized] = []

    def make() -> Sized:
        inner.append(kept.get("inner", lambda: Sized(0, 8)))
        return Sized(1, 8)

    outer = kept.get("outer", make)
    assert kept.get("outer", make) is outer
    assert kept.get("inner", lambda: Sized(2, 8)) is not inner[0]  # both together were too much


def test_a_failure_keeps_nothing() -> None:
    kept = Kept(lambda: 10, size_of)
    with pytest.raises(ZeroDivisionError):
        kept.get("a", lambda: Sized(1 // 0, 1))
    kept.trim()
    assert kept.get("a", lambda: Sized(7, 1)).key == 7


def test_the_setting_is_a_number_of_gigabytes() -> None:
    assert limit_bytes(4) == 4 * 2**30
    assert limit_bytes(0) == 0
    assert limit_bytes(0.5) == 2**29


@pytest.mark.parametrize("value", [-1, "4", None, True, math.inf, math.nan, [4]])
def test_anything_else_is_refused_with_a_sentence(value: object) -> None:
    with pytest.raises(IPAdapterError, match="can be a number of gigabytes from 0: correct it in Settings"):
        limit_bytes(value)

"""Which rows the UNet sees, call by call: what was read off a real Forge and a real A1111."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.embedded import Host
from tests.embedded.cond_batch import a1111_spans
from tests.embedded.probe import PROBE_EXTENSION, record, run

LONG = "a fox in a very large forest, " * 4
"""Two chunks of text."""
VERY_LONG = "a fox in a very large forest, " * 11
"""Five chunks of text."""


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    with Host(request.param, [PROBE_EXTENSION]) as made:
        yield made


def calls(host: Host) -> list[tuple[tuple[int, ...], int, int]]:
    """(roles of the chunks, rows, text tokens) of the UNet calls of the first denoiser call."""
    return [(c.cond_or_uncond, c.rows, c.context_tokens) for c in host.unet_calls if c.denoiser_step == 0]


CASES: dict[str, tuple[dict[str, Any], list[tuple[tuple[int, ...], int, int]]]] = {
    "normal": ({}, [((1, 0), 2, 77)]),
    "cfg 1": ({"cfg_scale": 1.0}, [((0,), 1, 77)]),
    "AND": ({"prompt": "a AND b:0.7"}, [((1, 0, 0), 3, 77)]),
    "AND, cfg 1": ({"prompt": "a AND b AND c", "cfg_scale": 1.0}, [((0, 0, 0), 3, 77)]),
    "batch 2": ({"batch_size": 2}, [((1, 0), 4, 77)]),
    "AND, batch 2": ({"prompt": "a AND b", "batch_size": 2}, [((1, 0, 0), 6, 77)]),
    "AND in the negative": ({"negative_prompt": "x AND y"}, [((1, 0), 2, 77)]),
    "two chunks": ({"prompt": LONG}, [((1, 0), 2, 154)]),
    "two chunks, negative": ({"negative_prompt": LONG}, [((1, 0), 2, 154)]),
    "two and three chunks": ({"prompt": LONG, "negative_prompt": LONG + " BREAK b"}, [((1, 0), 2, 462)]),
    "five chunks": ({"prompt": VERY_LONG}, [((0,), 1, 385), ((1,), 1, 77)]),
    "two chunks AND one": ({"prompt": f"{LONG} AND b"}, [((1, 0, 0), 3, 154)]),
}


@pytest.mark.parametrize("name", CASES)
def test_forge_rows(host: Host, name: str) -> None:
    fields, expected = CASES[name]
    run(host, wanted={}, **fields)
    assert calls(host) == expected
    assert len(host.unet_calls) == 2 * len(expected)
    params = record().denoiser[0]
    assert (params.text_uncond is None) == (fields.get("cfg_scale") == 1.0)


def test_split_calls(host: Host) -> None:
    together = run(host, prompt="a AND b").image
    host.split_calls = True
    try:
        apart = run(host, prompt="a AND b").image
        assert calls(host) == [((1,), 1, 77), ((0,), 1, 77), ((0,), 1, 77)]
    finally:
        host.split_calls = False
    difference = [abs(a - b) for a, b in zip(together.tobytes(), apart.tobytes(), strict=True)]
    assert max(difference) <= 2


def test_contents_of_rows(host: Host) -> None:
    """uncond first, AND parts in reverse, the shorter text repeated whole."""
    seen: list[torch.Tensor] = []
    model = host.sd_model.kmodel.diffusion_model
    hook = model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["context"]), with_kwargs=True)
    try:
        run(host, prompt=f"{LONG} AND b", negative_prompt="n", batch_size=2, steps=1)
        encode = host.sd_model.text_encoder.encode
        (context,) = seen
        rows = [encode(text)[0] for text in ("n", " b", LONG + " ")]
        assert torch.allclose(context[0], rows[0].repeat(2, 1), atol=1e-5)
        assert torch.allclose(context[2, :77], rows[1], atol=1e-5)
        assert torch.allclose(context[4], rows[2], atol=1e-5)
        for first in (0, 2, 4):
            assert torch.equal(context[first], context[first + 1])
        # an AND part is brought to length by its last token, not by repeating
        assert torch.equal(context[2, 77:], context[2, 76:77].expand(77, -1))
    finally:
        hook.remove()


def test_options_of_a_call(host: Host) -> None:
    key = ["input", 4, 0]
    run(host, wanted={"replace": "plain", "keys": [key]}, prompt="a AND b", batch_size=2, steps=1, width=96, height=64)
    (options,) = record().options
    assert options["cond_or_uncond"] == [1, 0, 0]
    assert options["sigmas"].shape == (2,)
    assert options["sigmas"][0] == pytest.approx(14.6146, abs=1e-3)
    assert options["cond_mark"].tolist() == [1, 1, 0, 0, 0, 0]
    assert options["uncond_indices"] == [0, 1]
    assert options["cond_indices"] == [2, 3, 4, 5]
    assert options["original_shape"] == [6, 4, 8, 12]
    assert options["block"] == ("input", 4)
    assert len(options) == 11


def test_skip_early_cond(host: Host) -> None:
    host.opts.set("skip_early_cond", 0.25)
    try:
        run(host, steps=4)
        assert [c.cond_or_uncond for c in host.unet_calls] == [(0,), (0,), (1, 0), (1, 0)]
    finally:
        host.opts.set("skip_early_cond", 0.0)


def test_a_weight_of_a_part_counts(host: Host) -> None:
    whole = run(host, prompt="a AND b", steps=4).image
    assert run(host, prompt="a AND b:0.2", steps=4).image.tobytes() != whole.tobytes()
    assert run(host, prompt="a AND b:1.0", steps=4).image.tobytes() == whole.tobytes()


def test_a1111_spans() -> None:
    def spans(n_cond: int, batch: int, same: bool = True, split: bool = False) -> list[tuple[int, int]]:
        return a1111_spans(n_cond, batch, batch, same, split)

    assert spans(1, 1) == [(0, 2)]
    assert spans(4, 2) == [(0, 6)]
    assert spans(1, 1, split=True) == [(0, 1), (1, 2)]
    assert spans(4, 2, split=True) == [(0, 2), (2, 4), (4, 6)]
    # a call may mix roles and be short
    assert spans(3, 2, split=True) == [(0, 2), (2, 4), (4, 5)]
    assert spans(1, 1, same=False) == [(0, 1), (1, 2)]
    assert spans(6, 2, same=False) == [(0, 4), (4, 6), (6, 8)]


def test_a1111_row_order(host: Host) -> None:
    host.row_order = "a1111"
    try:
        run(host, prompt="a AND b", negative_prompt="n", batch_size=2, steps=1, wanted={})
        (call,) = host.unet_calls
        assert call.roles == (0, 0, 0, 0, 1, 1)
        assert record().denoiser[0].x.shape[0] == 6
        run(host, cfg_scale=1.0, steps=1)
        assert host.unet_calls[0].roles == (0, 1)
        run(host, prompt=LONG, steps=1)
        assert [(c.roles, c.context_tokens) for c in host.unet_calls] == [((0,), 154), ((1,), 77)]
        host.split_calls = True
        run(host, steps=1, batch_size=2)
        assert [c.roles for c in host.unet_calls] == [(0, 0), (1, 1)]
        host.split_calls = False
        first = run(host, prompt="a AND b:0.5").image
    finally:
        host.row_order, host.split_calls = "forge", False
    second = run(host, prompt="a AND b:0.5").image
    assert max(abs(a - b) for a, b in zip(first.tobytes(), second.tobytes(), strict=True)) <= 2

"""Telling rows by their text, alone and in whole generations where another extension calls the UNet once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.rows import COND, UNCOND
from lib_ipadapter.texts import roles_by_text
from tests.embedded import Host
from tests.embedded.cond_batch import Chunk, denoise_forge
from tests.embedded_hosts import request, unit

LONG = "a fox in a very large forest, " * 4


def text(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(rows, tokens, 6, generator=torch.Generator().manual_seed(seed))


@given(
    st.lists(st.sampled_from([COND, UNCOND]), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
def test_each_row_is_found(roles: list[int], cond: int, uncond: int, repeats: int, half: bool) -> None:
    texts = {COND: text(cond, 4, 0), UNCOND: text(uncond, 8, 1)}
    length = 8 * repeats
    rows = [texts[role][n % texts[role].shape[0]] for n, role in enumerate(roles)]
    called = torch.stack([row.repeat(length // row.shape[0], 1) for row in rows])
    assert roles_by_text(called.half() if half else called, texts) == tuple(roles)


@pytest.mark.parametrize("labels", [(COND, UNCOND), (UNCOND, COND)])
def test_where_prompt_and_negative_are_the_same_a_label_counts_and_nothing_is_guessed(labels: tuple[int, int]) -> None:
    same = text(1, 4, 0)
    assert roles_by_text(same.expand(2, -1, -1), {COND: same, UNCOND: same}, labels) == labels
    with pytest.raises(IPAdapterError, match="prompt and negative prompt are the same"):
        roles_by_text(same, {COND: same, UNCOND: same})


def test_a_first_token_that_is_large_in_every_text_hides_no_difference() -> None:
    """Text encoders give the start token values far beyond those of the words."""
    texts = {COND: text(1, 4, 0), UNCOND: text(1, 4, 1)}
    for each in texts.values():
        each[:, 0] = 600.0
    assert roles_by_text(texts[UNCOND], texts) == (UNCOND,)


@pytest.mark.parametrize("texts", [{}, {COND: text(1, 4, 0), UNCOND: text(1, 4, 1)}])
def test_another_text_is_refused(texts: dict[int, Tensor]) -> None:
    with pytest.raises(IPAdapterError, match="neither the prompt nor the negative"):
        roles_by_text(text(1, 4, 2), texts)


# In a generation


@pytest.fixture
def after_step(host: Host) -> Iterator[Callable[[Callable[[Any, Any], None]], None]]:
    """Registers ``function(params of the step, params after it)``, to be called behind every step's own UNet calls."""
    steps: list[Any] = []
    registered: list[Callable[..., Any]] = []

    def register(function: Callable[[Any, Any], None]) -> None:
        for event, callback in (("cfg_denoiser", steps.append), ("cfg_after_cfg", lambda a: function(steps[-1], a))):
            host.callbacks.add(event, callback)
            registered.append(callback)

    yield register
    for callback in registered:
        host.callbacks.remove_callbacks_for_function(callback)


def once_more(host: Host, params: Any, rows: Tensor, labels: Sequence[int], model_options: Any = None) -> list[Tensor]:
    """What the UNet makes of these texts under these labels."""
    unet = host.sd_model.forge_objects.unet
    chunks = [Chunk(role, 1.0, rows, None) for role in labels]
    options = unet.model_options if model_options is None else model_options
    out = denoise_forge(unet.model, params.x, params.sigma, chunks, options, True)
    return [out[role] for role in labels]


@pytest.mark.parametrize("formulation", ["joint", "decoupled"])
@pytest.mark.parametrize("fields", [{}, {"batch_size": 2}, {"prompt": LONG}, {"prompt": f"a house AND {LONG}"}])
def test_an_uncond_text_called_cond_gets_the_image_tokens_of_uncond(
    host: Host, after_step: Any, formulation: str, fields: dict[str, Any]
) -> None:
    """As Forge's self-attention guidance calls the UNet."""
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def guide(params: Any, _: Any) -> None:
        (mislabelled,) = once_more(host, params, params.text_uncond, [COND])
        (right,) = once_more(host, params, params.text_uncond, [UNCOND])
        (plain,) = once_more(host, params, params.text_uncond, [COND], {})
        cond = params.text_cond[: params.x.shape[0]]  # perturbed-attention guidance does this
        seen.append((mislabelled, right, plain, once_more(host, params, cond, [COND])[0]))

    after_step(guide)
    host.txt2img(**request(unit("plus", formulation=formulation), negative_prompt="blurry", **fields))
    assert len(seen) == 2
    for mislabelled, right, plain, cond in seen:
        assert torch.equal(mislabelled, right)
        assert (mislabelled - plain).abs().max() > 1e-3
        assert (cond - right).abs().max() > 1e-3


def test_a_text_that_the_step_does_not_have_is_refused(host: Host, after_step: Any) -> None:
    refusals: list[pytest.ExceptionInfo[ValueError]] = []

    def guide(params: Any, _: Any) -> None:
        with pytest.raises(ValueError, match="neither the prompt nor the negative") as refusal:
            once_more(host, params, params.text_cond.flip(-1), [COND])
        refusals.append(refusal)

    after_step(guide)
    host.txt2img(**request(unit("plus")))
    assert len(refusals) == 2

"""What hosts with ``patches_replace`` need beyond what whole generations show."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_ipadapter.attn2 import CurrentPlan
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.hosts.comfy import ComfyHost, _chained, _not_ours
from lib_ipadapter.hosts.compute import on_device
from lib_ipadapter.injection import Injection
from lib_ipadapter.plan import scaled_dot_product
from lib_ipadapter.rows import Call


class BuiltIn:
    """Stands for the built-in adapter's patch object."""

    def __init__(self, factor: float) -> None:
        self.factors = [factor]

    def set_new_condition(self, factor: float) -> None:
        self.factors.append(factor)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: Any) -> torch.Tensor:
        return scaled_dot_product(q, k, v, extra_options["n_heads"]) * sum(self.factors)


def replacement(previous: Any) -> Any:
    current = CurrentPlan(Injection([], 16), lambda _: None, lambda *_: Call((0,), 0.5), 0)
    return _chained(0, current, scaled_dot_product, previous, False)


@pytest.mark.parametrize("there_before", [True, False])
def test_the_built_in_adapter_can_add_itself_to_our_replacement(
    there_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(CrossAttentionPatch=BuiltIn)
    monkeypatch.setitem(sys.modules, "lib_ipadapter.IPAdapterPlus", module)  # type: ignore[arg-type]
    previous = BuiltIn(1.0) if there_before else None
    ours = replacement(previous)
    ours.set_new_condition(factor=3.0)
    q = torch.randn(1, 5, 8)
    plain = scaled_dot_product(q, q, q, 2)
    out = ours(q, q, q, {"n_heads": 2, "cond_or_uncond": [0]})
    assert torch.allclose(out, plain * (4.0 if there_before else 3.0))
    assert isinstance(_not_ours(ours), BuiltIn)


@pytest.mark.parametrize(
    ("namespace", "is_api", "raises"),
    [("backend", True, True), ("backend", False, True), ("ldm_patched", True, True), ("ldm_patched", False, False)],
)
def test_failing_reaches_page_and_api(
    namespace: str, is_api: bool, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SimpleNamespace(state=SimpleNamespace(interrupted=False))
    monkeypatch.setitem(sys.modules, "modules.shared", shared)  # type: ignore[arg-type]
    said: list[str] = []
    p = SimpleNamespace(is_api=is_api, sampler=None, comment=said.append, init=lambda: None)
    ComfyHost(namespace).fail(p, "It can't be done.")
    if raises:
        with pytest.raises(IPAdapterError, match="can't be done"):
            p.init()
        assert not shared.state.interrupted
    else:  # the page there loses an exception's text but shows comments
        assert said == ["It can't be done."]
        assert shared.state.interrupted
        assert p.do_not_save_grid


def test_a_module_that_does_not_fit_on_the_device_is_off_it_again() -> None:
    moves: list[Any] = []

    class Module(torch.nn.Module):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            moves.append(args or kwargs["device"].type)
            if kwargs:
                raise torch.OutOfMemoryError("out of memory")
            return self

    with pytest.raises(torch.OutOfMemoryError):
        on_device(Module(), torch.device("cuda"), torch.float16, lambda *_: None, lambda: moves.append("released"))
    assert moves == ["cuda", ("cpu",), "released"]

"""What hosts with ``patches_replace`` need beyond what whole generations show."""

from __future__ import annotations

import sys
from contextlib import nullcontext
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
from lib_ipadapter.session import Session


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


class Job:
    """The host's processing object."""

    def __init__(self, is_api: bool = False, sampler: Any = None) -> None:
        self.is_api, self.sampler = is_api, sampler
        self.comments: list[str] = []
        self.extra_generation_params: dict[str, str] = {}
        self.comment = self.comments.append

    def init(self) -> None:
        """What hosts call behind the hook ``process``."""


@pytest.fixture
def webui(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    parts = {
        "shared": SimpleNamespace(state=SimpleNamespace(interrupted=False, skipped=False)),
        "processing": SimpleNamespace(StableDiffusionProcessing=Job, Processed=type("Processed", (), {})),
    }
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, f"modules.{name}", part)  # type: ignore[arg-type]
    return SimpleNamespace(**parts)


def process_images(p: Any, hook: Any) -> None:
    """A host's function of this name, in whose frames a job is known."""
    process_images_inner(p, hook)


def process_images_inner(p: Any, hook: Any) -> None:
    hook()
    p.init()


KINDS = [("backend", True), ("backend", False), ("ldm_patched", True), ("ldm_patched", False)]
LOST = ("ldm_patched", False)
"""The page of these hosts loses an exception's text but shows comments."""


@pytest.mark.parametrize("kind", KINDS)
def test_failing_before_sampling_reaches_page_and_api(kind: tuple[str, bool], webui: SimpleNamespace) -> None:
    host, p = ComfyHost(kind[0]), Job(kind[1])
    if kind == LOST:
        process_images(p, lambda: host.fail(p, "It can't be done."))
        assert p.comments == ["It can't be done."]
        assert webui.shared.state.interrupted
        assert p.do_not_save_grid  # type: ignore[attr-defined]
        assert host.was_ended_by_comment(p)
    else:
        with pytest.raises(IPAdapterError, match="can't be done"):
            process_images(p, lambda: host.fail(p, "It can't be done."))
        assert not webui.shared.state.interrupted
        assert not host.was_ended_by_comment(p)
        assert not p.comments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "inside"])
def test_failing_in_a_pass_reaches_page_and_api(kind: tuple[str, bool], when: str, webui: SimpleNamespace) -> None:
    def sample(p: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        if when == "inside":
            raise IPAdapterError("It can't be done.")
        return x

    host, p = ComfyHost(kind[0]), Job(kind[1], SimpleNamespace(sample=sample))
    latent = torch.randn(2, 4, 8, 8)
    results: list[torch.Tensor] = []

    def run() -> None:
        if when == "before":
            host.fail(p, "It can't be done.")
        else:
            host.around_sampling(p, lambda: None)
        results.append(p.sampler.sample(p, latent))

    if kind == LOST:
        process_images(p, run)
        assert torch.equal(results[0], torch.zeros_like(latent))
        pictures = ["decoded"]
        Session(host).drop_blank(p, pictures)
        assert pictures == []
        assert p.comments == ["It can't be done."]
        assert host.was_ended_by_comment(p)
        assert p.extra_generation_params == {"IP-Adapter error": "It can't be done."}
        assert webui.shared.state.interrupted
    else:
        with pytest.raises(IPAdapterError, match="can't be done"):
            process_images(p, run)
        pictures = ["decoded"]
        Session(host).drop_blank(p, pictures)
        assert pictures == ["decoded"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_inside_a_job_raises_and_tells_the_outer_one(kind: tuple[str, bool], webui: SimpleNamespace) -> None:
    host, outer, inner = ComfyHost(kind[0]), Job(kind[1]), Job()

    def detailer() -> None:
        with pytest.raises(IPAdapterError, match="can't be done"):
            process_images(inner, lambda: host.fail(inner, "It can't be done."))

    process_images(outer, detailer)
    assert outer.comments == ["It can't be done."]
    assert outer.extra_generation_params == {"IP-Adapter error": "It can't be done."}
    assert not inner.comments
    assert not webui.shared.state.interrupted


def test_a_cell_of_a_grid_raises_and_its_result_so_far_knows(webui: SimpleNamespace) -> None:
    host, p, cell = ComfyHost("ldm_patched"), Job(), Job()
    cell.extra_generation_params = p.extra_generation_params
    first = webui.processing.Processed()
    first.comments, first.extra_generation_params = "", {"IP-Adapter 1": "model: one"}

    def run(p: Any) -> None:
        processed_result = first
        with pytest.raises(IPAdapterError, match="can't be done"):
            process_images(cell, lambda: host.fail(cell, "It can't be done."))
        assert processed_result.comments == "It can't be done.\n"

    run(p)
    assert p.comments == ["It can't be done."]
    assert p.extra_generation_params["IP-Adapter error"] == "It can't be done."
    assert first.extra_generation_params["IP-Adapter error"] == "It can't be done."


class Moving(torch.nn.Linear):
    """Two weights of which moving to a device makes copies; the device has room for ``room`` of them."""

    def __init__(self, room: int) -> None:
        super().__init__(3, 3)
        self.room = room
        self.moves: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            return super().to(**kwargs)
        self.moves.append(str(args[0]))
        if args[0] != "cpu":
            for parameter in list(self.parameters())[: self.room]:
                parameter.data = parameter.data.clone()
            if self.room < 2:
                raise torch.OutOfMemoryError("out of memory")
        return self


@pytest.mark.parametrize("room", [1, 2])
def test_a_module_is_off_the_device_again_and_nothing_is_copied_back(room: int) -> None:
    module = Moving(room)
    places = [parameter.data_ptr() for parameter in module.parameters()]
    seen: list[int] = []

    def function(device: torch.device, dtype: torch.dtype) -> None:
        seen.extend(parameter.data_ptr() for parameter in module.parameters())

    fits = nullcontext() if room == 2 else pytest.raises(torch.OutOfMemoryError)
    with fits:
        on_device(module, torch.device("cuda"), torch.float32, function, lambda: module.moves.append("released"))
    assert module.moves == ["cuda", "cpu", "released"]
    assert [parameter.data_ptr() for parameter in module.parameters()] == places
    assert not set(seen) & set(places)

"""What the way through the layers may do: counted operation by operation, on the meta device, in whole UNet calls.

Time is not measured here (tests/bench does that); but an operation, a transfer or an allocation that comes with the
number of steps, pictures or rows is what makes time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib_ipadapter import plan as plan_module
from lib_ipadapter.attn2 import CurrentPlan, Replacement
from lib_ipadapter.curves import parse
from lib_ipadapter.formulations import DECOUPLED, JOINT, Formulation
from lib_ipadapter.hosts import a1111
from lib_ipadapter.hosts.base import UNetInfo
from lib_ipadapter.hosts.comfy import _chained
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.layers import LAYOUTS, first_in_forward_order
from lib_ipadapter.masks import Canvas, Mask, Where, grids, of_template
from lib_ipadapter.plan import ImageKV, Plan
from lib_ipadapter.progress import Window
from lib_ipadapter.reweighing import Unweighed
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.weighing import Weighed, arrange, weigh
from tests.bare_model import LAYERS
from tests.bench.unets import FAMILIES, Sampling, make_unet
from tests.bench.variants import Variants

META = torch.device("meta")
TEXT, QUERIES, TOKENS = 77, 8, 4

# Operations that move something between devices, or wait for one.
TRAFFIC = {"_to_copy", "copy_", "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"}


READ = "item"


class Operations(TorchDispatchMode):
    """The operations that run inside, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        """Their names, of those that are no views."""
        self.allocated = 0
        """Elements of all results that aren't views."""

    @property
    def counts(self) -> Counter[str]:
        """How often each ran."""
        return Counter(self.order)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            [each for each in tree_leaves(tree) if isinstance(each, Tensor)] for tree in ((args, kwargs), result)
        )
        places = {each.untyped_storage()._cdata for each in given}
        new = [each for each in made if each.untyped_storage()._cdata not in places]
        if new or not made or func._schema.is_mutable:
            self.order.append(func.overloadpacket.__name__)
            self.allocated += sum(each.numel() for each in new)
        return result


def picture(layout: str) -> ImageKV:
    return ImageKV(*(tuple(torch.randn(1, TOKENS, width) for _, width in LAYERS[layout]) for _ in "kv"))


def injection(
    layout: str,
    formulation: Formulation,
    pictures: int,
    window: Window = Window(),  # noqa: B008
    first: int = UNCOND,
    places: tuple[Where, ...] = (),
) -> Injection:
    prompts = {COND: tuple(picture(layout) for _ in range(pictures)), UNCOND: (picture(layout),) * pictures}
    weighed = weigh(prompts, formulation, 0.7, (), 1280, first)
    where = dict.fromkeys(prompts, places) if places else {}
    return Injection([Term(formulation, window, weighed, where=where)], len(LAYERS[layout]))


def on_a_curve(layout: str, formulation: Formulation, pictures: int, curve: str, first: int = UNCOND) -> Injection:
    """As a :class:`.preparer.PreparedUnit` makes it: weighed where the curve has one value, else unweighed."""
    prompts = {COND: tuple(picture(layout) for _ in range(pictures)), UNCOND: (picture(layout),) * pictures}
    parsed = parse(curve)
    weighed: Weighed | Unweighed
    if parsed.only:
        weighed = weigh(prompts, formulation, 0.7 * parsed.only, (), 1280, first)
    else:
        weighed = Unweighed(arrange(prompts, (), first), formulation, 0.7, 1280)
    return Injection([Term(formulation, Window(), weighed, parsed)], len(LAYERS[layout]))


def no_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The host's own attention is none of our operations."""
    return q


class ComfyUNet:
    """Calls our replacements as a UNet of the ComfyUI line calls them; counts what they do."""

    def __init__(self, layout: str, made: Injection, call: Call) -> None:
        self.layout = layout
        self._rows = len(call.roles)
        self._tokens = max((call.text_tokens or {COND: TEXT}).values())
        keys = LAYOUTS[len(LAYERS[layout])]
        current = CurrentPlan(made, lambda extra: extra["sigmas"], lambda *_: call, first_in_forward_order(keys))
        self._layers: list[tuple[int, Replacement]] = [
            (LAYERS[layout][n][1], _chained(n, current, no_attention, None, False)) for n in range(len(keys))
        ]

    def step(self) -> Operations:
        inputs = {
            width: [torch.empty(self._rows, n, width, device=META) for n in (QUERIES, self._tokens, self._tokens)]
            for width, _ in self._layers
        }
        sigmas = object()
        with torch.no_grad(), Operations() as operations:
            for width, replacement in self._layers:
                replacement(*inputs[width], {"n_heads": 8, "cond_or_uncond": [1, 0], "sigmas": sigmas})
        return operations


def steady(layout: str, made: Injection, call: Call) -> Operations:
    """What a UNet call does in the middle of sampling: the same from step to step."""
    unet = ComfyUNet(layout, made, call)
    unet.step()
    operations = unet.step()
    for _ in range(3):
        again = unet.step()
        assert again.counts == operations.counts
        assert again.allocated == operations.allocated
    return operations


LATENT = (2, 4)
"""Has 8 queries, as all layers here."""
LEFT, RIGHT = (of_template("left half"),), (of_template("right half"),)


@pytest.fixture
def masked_attention_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``attention_is_one``, also with a bias."""
    monkeypatch.setattr(plan_module, "scaled_dot_product", lambda q, k, v, heads, bias=None: q.neg())


@pytest.mark.usefixtures("masked_attention_is_one")
@pytest.mark.parametrize("batch", [1, 4])
def test_a_masked_picture_is_an_attention_and_a_sum_of_products(batch: int) -> None:
    made = injection("sdxl", DECOUPLED, 1, places=(LEFT,))
    operations = steady("sdxl", made, Call(rows(batch), 0.5, EQUAL, latent=LATENT))
    assert operations.counts == {"neg": 70, "addcmul": 70}


@pytest.mark.usefixtures("masked_attention_is_one")
@pytest.mark.parametrize("places", [(LEFT,), (LEFT, RIGHT), (LEFT, (), LEFT)])
@pytest.mark.parametrize("batch", [1, 4])
def test_masks_in_the_softmax_are_a_copy_and_an_attention(places: tuple[Where, ...], batch: int) -> None:
    made = injection("sdxl", JOINT, len(places), places=places)
    operations = steady("sdxl", made, Call(rows(batch), 0.5, EQUAL, latent=LATENT))
    assert operations.counts["cat"] == operations.counts["neg"] == 70
    assert set(operations.counts) <= {"cat", "neg", "clone"}
    assert not TRAFFIC & set(operations.counts)


def test_masks_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the whole pass, whatever kinds of calls it has."""
    made = injection("sdxl", JOINT, 2, places=(LEFT, RIGHT))
    made.canvas = Canvas(LATENT)
    calls: list[int] = []
    original = Mask.on
    monkeypatch.setattr(Mask, "on", lambda self, *args: calls.append(1) or original(self, *args))  # type: ignore[func-returns-value]
    for batch in (1, 2, 3):
        plan = made.plan(Call(rows(batch), 0.5, EQUAL, latent=LATENT), TEXT, torch.device("cpu"), torch.float32)
        q, k, v = (torch.zeros(2 * batch, n, 640) for n in (QUERIES, TEXT, TEXT))
        for _ in range(2):
            plan.attend(0, q, k, v, 8, plan_module.scaled_dot_product, None)
    assert len(calls) == 2 * len(grids(*LATENT))


def rows(batch: int) -> tuple[int, ...]:
    return (UNCOND,) * batch + (COND,) * batch


EQUAL = {COND: TEXT, UNCOND: TEXT}
UNEQUAL = {COND: TEXT, UNCOND: 2 * TEXT}


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
@pytest.mark.parametrize("pictures", [1, 2, 4, 16])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_joint_is_one_copy_of_k_and_v(layout: str, pictures: int, batch: int) -> None:
    """The one uncond of several pictures is repeated before, once for all rows."""
    operations = steady(layout, injection(layout, JOINT, pictures), Call(rows(batch), 0.5, EQUAL))
    layers, widths = len(LAYERS[layout]), sum(width for _, width in LAYERS[layout])
    repeated = pictures > 1
    assert operations.counts == ({"cat": layers, "clone": layers} if repeated else {"cat": layers})
    tokens = 2 * batch * (TEXT + pictures * TOKENS) + (pictures * TOKENS if repeated else 0)
    assert operations.allocated == 2 * tokens * widths


@pytest.mark.parametrize("pictures", [1, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_unequal_prompts_take_a_constant_number_of_operations(pictures: int, batch: int) -> None:
    operations = steady("sdxl", injection("sdxl", JOINT, pictures), Call(rows(batch), 0.5, UNEQUAL))
    # K and V of both groups together, and their outputs into one batch
    assert operations.counts["cat"] == 2 * 70
    assert operations.counts["clone"] == (70 if pictures > 1 else 0)
    assert set(operations.counts) <= {"cat", "clone"}


@pytest.fixture
def attention_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts an attention of ours as one operation, ``neg``; the meta device has none that is."""
    monkeypatch.setattr(plan_module, "scaled_dot_product", lambda q, k, v, heads: q.neg())


@pytest.mark.usefixtures("attention_is_one")
@pytest.mark.parametrize("batch", [1, 4])
def test_decoupled_is_an_attention_and_a_sum(batch: int) -> None:
    operations = steady("sdxl", injection("sdxl", DECOUPLED, 1), Call(rows(batch), 0.5, EQUAL))
    assert operations.counts == {"neg": 70, "add": 70}


@pytest.mark.usefixtures("attention_is_one")
@pytest.mark.parametrize("pictures", [2, 4, 16])
@pytest.mark.parametrize("batch", [1, 4])
def test_decoupled_with_more_pictures_is_one_for_each_role(pictures: int, batch: int) -> None:
    """Uncond has the tokens of one picture then, and both sums go into the batch."""
    operations = steady("sdxl", injection("sdxl", DECOUPLED, pictures), Call(rows(batch), 0.5, EQUAL))
    assert operations.counts == dict.fromkeys(("neg", "add", "clone", "copy_"), 2 * 70)


@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
@pytest.mark.parametrize("text_tokens", [EQUAL, UNEQUAL])
@pytest.mark.usefixtures("attention_is_one")
def test_nothing_is_moved_or_read_in_any_layer(formulation: Formulation, text_tokens: dict[int, int]) -> None:
    operations = steady("sdxl", injection("sdxl", formulation, 2), Call(rows(2), 0.5, text_tokens))
    assert not TRAFFIC & set(operations.counts) - ({"copy_"} if formulation is DECOUPLED else set())


@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
def test_outside_its_window_a_unit_does_nothing_at_all(formulation: Formulation) -> None:
    made = injection("sdxl", formulation, 2, Window(0.6, 0.8))
    operations = steady("sdxl", made, Call(rows(2), 0.5, EQUAL))
    assert operations.counts == {}
    assert made.acted == [False]


# A weight that changes


@pytest.mark.parametrize("curve", ["0.7@0", "0.7@0.2, 0.7@0.8", "0.7@0.9, 0@0.9", "0.2@0, 0.7@0.3, 0.7@0.6, 0@1"])
@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
@pytest.mark.usefixtures("attention_is_one")
def test_a_curve_adds_nothing_where_its_value_stays(formulation: Formulation, curve: str) -> None:
    plain = steady("sdxl", injection("sdxl", formulation, 2), Call(rows(2), 0.5, EQUAL))
    curved = steady("sdxl", on_a_curve("sdxl", formulation, 2, curve), Call(rows(2), 0.5, EQUAL))
    assert (curved.order, curved.allocated) == (plain.order, plain.allocated)


@pytest.mark.usefixtures("attention_is_one")
def test_a_curve_does_nothing_where_it_is_zero() -> None:
    made = on_a_curve("sdxl", JOINT, 2, "0@0.6, 1@1")
    assert steady("sdxl", made, Call(rows(2), 0.5, EQUAL)).counts == {}
    assert made.acted == [False]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("pictures", [1, 4, 16])
@pytest.mark.parametrize(
    ("formulation", "operations"),
    [
        (JOINT, {"mean": 1, "mul": 2, "sub": 1, "add": 1, "copy_": 2}),
        (DECOUPLED, {"mul": 1, "copy_": 1}),
    ],
)
@pytest.mark.usefixtures("attention_is_one")
def test_a_changed_weight_takes_a_few_large_operations_for_each_width(
    formulation: Formulation, operations: dict[str, int], pictures: int, batch: int
) -> None:
    """All 70 layers, all pictures and both roles together; no plan is made anew, and the layers do what they did."""
    call = Call(rows(batch), 0.1, EQUAL)
    made = on_a_curve("sdxl", formulation, pictures, "0@0, 1@1")
    unet = ComfyUNet("sdxl", made, call)
    unet.step()
    same = unet.step()
    plans = dict(made._plans)
    for progress in (0.3, 0.6):
        object.__setattr__(call, "progress", progress)
        changed = unet.step()
        assert changed.counts - same.counts == Counter({name: 2 * count for name, count in operations.items()})
        assert changed.order[-len(same.order) :] == same.order  # before the first layer
        assert not ({"_to_copy", READ} & set(changed.counts))
        assert made._plans == plans


def storages(images: ImageKV) -> set[int]:
    return {t.untyped_storage()._cdata for kind in (images.keys, images.values) for t in kind}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("pictures", [1, 3])
def test_rows_are_views_and_memory_does_not_grow_with_the_batch(batch: int, pictures: int) -> None:
    made = injection("sdxl", JOINT, pictures)
    with torch.inference_mode():
        plan = made.plan(Call(rows(batch), 0.5, EQUAL), TEXT, torch.device("cpu"), torch.float32)
    kept = {s for images in made._prompts[0].values() for image in images for s in storages(image)}
    assert len(kept) == 2  # one for each width
    held: dict[int, int] = {}
    for view in tree_leaves(plan.images):
        held[view.untyped_storage()._cdata] = view.untyped_storage().nbytes()
    assert set(held) == kept
    assert sum(held.values()) == 2 * (pictures + 1) * TOKENS * 4 * sum(width for _, width in LAYERS["sdxl"])


# Reads of the device


def waits_for_nothing() -> float:
    raise AssertionError("The progress was found out.")


def test_where_every_unit_always_acts_nobody_asks_for_the_progress() -> None:
    made = injection("sdxl", JOINT, 1)
    steady("sdxl", made, Call(rows(1), waits_for_nothing, EQUAL))
    with pytest.raises(AssertionError, match="found out"):
        steady("sdxl", injection("sdxl", JOINT, 1, Window(0.0, 0.9)), Call(rows(1), waits_for_nothing, EQUAL))
    with pytest.raises(AssertionError, match="found out"):
        made.progress_seen()


@pytest.mark.parametrize(
    ("window", "reads"), [(Window(), 0), (Window(0.0, 0.9), 1), (Window(0.2, 1.0), 1), (Window(0.9, 1.0), 1)]
)
def test_a_step_reads_the_noise_level_before_the_unet_or_not_at_all(window: Window, reads: int) -> None:
    """Through the class that runs in a Forge. Once the UNet has begun, a read would wait for what it has begun."""
    family = FAMILIES["small-sd15"]
    variants = Variants(Sampling(make_unet(family, torch.device("cpu"), torch.float32), family, 1))
    variants.add_ours("ours", window=window)
    with Operations() as operations:
        variants.variants["ours"].step()
    before = operations.order.index("cat")  # the noise levels of both chunks, for the UNet
    assert operations.order[:before].count(READ) == operations.counts[READ] == reads


# The other kind of host


class Attention(torch.nn.Module):
    """As much of an attn2 as A1111's hooks touch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 8
        self.to_q, self.to_k, self.to_v = (torch.nn.Identity() for _ in range(3))
        self.to_out = torch.nn.ModuleList([torch.nn.Identity()])
        self.width = width

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.to_q(q)
        self.to_k(k)
        self.to_v(v)
        return self.to_out[0](q)


@pytest.fixture
def a1111_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Injection, int], Operations]]:
    """A UNet call through A1111's hooks."""
    keys = LAYOUTS[70]
    layers = {key: Attention(width) for key, (_, width) in zip(keys, LAYERS["sdxl"], strict=True)}
    unet = torch.nn.Identity()
    monkeypatch.setattr(a1111, "cross_attention", lambda _: layers.items())
    widths = tuple(layer.width for layer in layers.values())
    info = UNetInfo(unet, keys, widths, 2048, META, torch.float32)
    hooks: list[Any] = []

    def step(made: Injection, batch: int) -> Operations:
        if not hooks:
            hooks.append(a1111._Hooks(info, made))
        text = torch.zeros(batch, TEXT, 8)
        hooks[0].begin_step({COND: text, UNCOND: text})
        inputs = {w: [torch.empty(2 * batch, n, w, device=META) for n in (QUERIES, TEXT, TEXT)] for w in set(widths)}
        with torch.no_grad():
            rows = (torch.empty(2 * batch, 4, *LATENT), torch.full((2 * batch,), 500.0), torch.cat((text, text)))
            hooks[0]._before_unet(unet, rows, {})
            with Operations() as operations:
                for layer in layers.values():
                    layer(*inputs[layer.width])
        return operations

    yield step
    hooks[0].remove()


@pytest.mark.parametrize("pictures", [1, 4])
def test_hooks_do_no_more(a1111_step: Callable[[Injection, int], Operations], pictures: int) -> None:
    made = injection("sdxl", JOINT, pictures, first=COND)
    a1111_step(made, 2)
    operations = a1111_step(made, 2)
    assert operations.counts == {"cat": 2 * 70} | ({"clone": 2 * 70} if pictures > 1 else {})
    assert a1111_step(made, 2).counts == operations.counts


def test_hooks_outside_a_window_do_nothing(a1111_step: Callable[[Injection, int], Operations]) -> None:
    made = injection("sdxl", JOINT, 2, Window(0.9, 1.0), first=COND)
    a1111_step(made, 2)
    assert a1111_step(made, 2).counts == {}


@pytest.mark.usefixtures("masked_attention_is_one")
@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
def test_masks_through_hooks_move_and_read_nothing(
    a1111_step: Callable[[Injection, int], Operations], formulation: Formulation
) -> None:
    made = injection("sdxl", formulation, 2, first=COND, places=(LEFT, RIGHT))
    a1111_step(made, 2)
    operations = a1111_step(made, 2)
    assert operations.counts == a1111_step(made, 2).counts
    # Logits are summed in float32, to which tensors of that type aren't moved.
    assert not TRAFFIC & set(operations.counts)


# Would it be seen?

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a transfer": lambda t: torch.zeros(t.shape).to(META) + t,
    "a copy": lambda t: t.clone(),
    "arithmetic on K and V": lambda t: t * 0.7,
    "one operation a picture": lambda t: torch.cat([part.clone() for part in t.split(TOKENS, dim=-2)], dim=-2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_layers_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Plan.extended

    def faulty(self: Plan, *args: Any) -> Any:
        return [tuple(FAULTS[fault](t) for t in kinds) for kinds in original(self, *args)]

    monkeypatch.setattr(Plan, "extended", faulty)
    with pytest.raises(AssertionError):
        test_joint_is_one_copy_of_k_and_v("sdxl", 2, 1)


def test_growth_from_step_to_step_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace(calls=0)
    original = Plan.extended

    def slower(self: Plan, layer: int, which: slice, *texts: Tensor) -> Any:
        seen.calls += 1
        for _ in range(seen.calls // 70):
            texts = tuple(text.clone() for text in texts)
        return original(self, layer, which, *texts)

    monkeypatch.setattr(Plan, "extended", slower)
    with pytest.raises(AssertionError):
        steady("sdxl", injection("sdxl", JOINT, 1), Call(rows(1), 0.5, EQUAL))


@pytest.mark.usefixtures("attention_is_one")
@pytest.mark.parametrize("text_tokens", [EQUAL, UNEQUAL])
def test_pictures_of_single_items_are_still_laid_out_by_one_copy(text_tokens: dict[int, int]) -> None:
    """Each row's own image tokens come from where they lie; a third unit beside them changes nothing."""
    made = [injection("sdxl", JOINT, 1), injection("sdxl", JOINT, 1)]
    terms = [Term(JOINT, Window(), each.terms[0].weighed, items=frozenset({n})) for n, each in enumerate(made)]
    call = Call(rows(2), 0.5, text_tokens, items=(0, 1, 0, 1))
    operations = steady("sdxl", Injection(terms, 70), call)
    assert operations.counts == {"cat": 70 if text_tokens is EQUAL else 140}
    for_all = injection("sdxl", JOINT, 1).terms[0]
    assert steady("sdxl", Injection([*terms, for_all], 70), call).counts == operations.counts


@pytest.mark.usefixtures("attention_is_one")
def test_decoupled_pictures_of_single_items_are_an_attention_for_each_and_role() -> None:
    made = [injection("sdxl", DECOUPLED, 1), injection("sdxl", DECOUPLED, 1)]
    terms = [Term(DECOUPLED, Window(), each.terms[0].weighed, items=frozenset({n})) for n, each in enumerate(made)]
    operations = steady("sdxl", Injection(terms, 70), Call(rows(2), 0.5, EQUAL, items=(0, 1, 0, 1)))
    assert operations.counts["neg"] == 4 * 70
    assert not TRAFFIC & set(operations.counts) - {"copy_"}

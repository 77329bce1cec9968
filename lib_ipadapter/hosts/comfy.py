"""Forge and its relatives: hosts whose UNet has ``patches_replace``, on ``backend.*`` or on ``ldm_patched.*``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..attn2 import CurrentPlan, ExtraOptions, ReadCall, Replacement, make_replacement
from ..errors import ERROR_KEY, IPAdapterError
from ..injection import Injection
from ..layers import LayerKey, first_in_forward_order
from ..masks import Region
from ..plan import Attention
from ..progress import SigmaSchedule, executed, scaled_linear_schedule
from ..resident import bytes_there
from ..rows import COND, UNCOND, Call, items_in_order, items_of_rows, roles_of_rows
from ..texts import known_parts, parts_of_items, roles_by_text, step_texts
from .base import UNetInfo
from .compute import on_device
from .folders import ModelFolders
from .job import drawn_region, fail, is_inside_another, is_nested, queue, skip_sampling, wrap_sampler
from .unet import cross_attention, describe

T = TypeVar("T")

# Attribute of the host's processing object.
_ENDED_BY_COMMENT = "image_prompt_ended_by_comment"

# Function attribute by which our replacements are known again: what stood in the layer before.
REPLACES = "image_prompt_replaces"
# And whether it stood at the shorter of the two keys that a layer can have.
FROM_SHORTER_KEY = "image_prompt_from_shorter_key"


class ComfyHost(ModelFolders):
    """One class for both name spaces; they differ in module names only.

    Args:
        namespace: ``backend`` or ``ldm_patched``.
    """

    first_role = UNCOND

    def __init__(self, namespace: str) -> None:
        self.name = {"backend": "Forge", "ldm_patched": "Forge (ldm_patched)"}[namespace]
        self._namespace = namespace
        self._step = _Step({}, {})
        self._schedule = scaled_linear_schedule
        """The model's, read off the device when it is first asked for."""
        self._asks_progress = False
        self._asks_items = False
        self._placed: Mapping[tuple[Any, ...], Any] = {}
        """All replacements as our last attaching left them."""

    # Files and memory

    @property
    def _memory(self) -> Any:
        names = {"backend": "backend.memory_management", "ldm_patched": "ldm_patched.modules.model_management"}
        return import_module(names[self._namespace])

    @property
    def attention(self) -> Attention:
        """The host's own attention."""
        if self._namespace == "backend":
            return import_module("backend.attention").attention_function
        return import_module("ldm_patched.ldm.modules.attention").optimized_attention

    def run(self, module: nn.Module, function: Callable[[torch.device, torch.dtype], T]) -> T:
        """See :class:`.base.Host`. The host frees what room is needed; nothing of ours is left for it to manage."""
        memory = self._memory
        device = torch.device(memory.get_torch_device())
        dtype = torch.float16 if memory.should_use_fp16(device) else torch.float32
        if device.type != "cpu":
            memory.free_memory(bytes_there(module, dtype) * 1.2 + WORKING_MEMORY, device)
        return on_device(module, device, dtype, function, memory.soft_empty_cache)

    def alone(self) -> AbstractContextManager[Any]:
        """See :class:`.base.Host`."""
        return queue()

    # The UNet

    def unet_info(self, p: Any) -> UNetInfo:
        """See :class:`.base.Host`."""
        return _unet_info(_unet(p))

    def attach(self, p: Any, injection: Injection) -> None:
        """See :class:`.base.Host`. The host resets the UNet's options before every pass, so this is called in each."""
        unet = _unet(p).clone()
        info = _unet_info(unet)
        injection.to(info.device, info.dtype)
        predictor: Any = getattr(unet.model, "predictor", None) or unet.model.model_sampling
        self._schedule = cache(lambda: SigmaSchedule(predictor.sigmas.tolist()))
        self._asks_progress, self._asks_items = injection.asks_progress, injection.asks_items
        current = CurrentPlan(
            injection,
            lambda extra_options: extra_options["sigmas"],
            self._reader(unet.model.diffusion_model, info.keys),
            first_in_forward_order(info.keys),
        )
        there = _replacements(unet)
        for layer, key in enumerate(info.keys):
            replacement = _chained(layer, current, self.attention, *_previous(there, tuple(key)))
            unet.set_model_attn2_replace(replacement, *key)
        p.sd_model.forge_objects.unet = unet
        self._placed = dict(_replacements(unet))

    def detach(self, p: Any) -> None:
        """See :class:`.base.Host`."""
        self._step = _Step({}, {})
        self._placed = {}
        objects = getattr(getattr(p, "sd_model", None), "forge_objects", None)
        unet = getattr(objects, "unet", None)
        if objects is None or unet is None:
            return
        there = _replacements(unet)
        if not any(_is_ours(each) for each in there.values()):
            return
        unet = unet.clone()
        options = unet.model_options["transformer_options"] = dict(unet.model_options["transformer_options"])
        replace = options["patches_replace"] = dict(options["patches_replace"])
        kept = {key: _not_ours(each) for key, each in there.items()}
        replace["attn2"] = {key: each for key, each in kept.items() if each is not None}
        objects.unet = unet

    def check(self, p: Any, injection: Injection, identity: object) -> bool:
        """See :class:`.base.Host`."""
        unet = _unet(p)
        if unet.model.diffusion_model is not identity:
            return False
        there = _replacements(unet)
        if there and there == self._placed:  # the very functions, in all but a few steps: a comparison of addresses
            return True
        for key in map(tuple, _unet_info(unet).keys):
            ours = there.get(key)
            if not _is_ours(ours) or getattr(ours, REPLACES)() is not _previous(there, key)[0]:
                self.attach(p, injection)
                break
        return True

    def on_step(self, params: Any) -> None:
        """See :class:`.base.Host`. These hosts repeat the shorter of two prompts; here is how long each really is."""
        texts, sigmas = step_texts(params), params.sigma
        progress = self._progress(sigmas) if self._asks_progress else None
        self._step = _Step(texts, {COND: _and_parts(params), UNCOND: 1}, sigmas, progress, executed(params))
        if self._asks_items:
            self._step.items = items_in_order(tuple(texts), parts_of_items(params))

    def _reader(self, diffusion_model: nn.Module, keys: Sequence[LayerKey]) -> ReadCall:
        # It holds no patcher, whose options hold it: in a ring, a job's K/V would wait for the garbage collector.
        first_layer = first_in_forward_order(keys)

        def read(sigmas: Tensor, extra_options: ExtraOptions, layer: int, q: Tensor, k: Tensor) -> Call:
            chunks = extra_options["cond_or_uncond"]
            images = int(sigmas.shape[0])
            unet_rows, *_, rows, columns = map(int, extra_options["original_shape"])
            roles = roles_of_rows(chunks, images, q.shape[0], unet_rows)
            tiles = max(1, unet_rows // max(1, len(chunks) * images))
            step = self._step
            if layer == first_layer:
                step.count(chunks)
            items = None
            if self._asks_items:
                items = step.items_of(chunks, images, q.shape[0], unet_rows)
            if step.beyond and len(set(chunks)) == 1 and step.texts:
                to_k: Any = dict(cross_attention(diffusion_model))[keys[layer]].to_k
                texts = {role: to_k(text.to(k.device, k.dtype)) for role, text in step.texts.items()}
                roles = roles_by_text(k, texts)
            # Here the device still has the UNet's first blocks to do: known since the step began, it costs no wait.
            known = step.progress if sigmas is step.sigmas else None
            progress = (lambda: self._progress(sigmas)) if known is None else known
            return Call(roles, progress, step.text_tokens, step.executed, items, (rows, columns), tiles)

        return read

    def _progress(self, sigmas: Tensor) -> float:
        return self._schedule().progress(float(sigmas[0]))

    # The job

    def region(self, p: Any) -> Region:
        """See :class:`.base.Host`."""
        return drawn_region(p)

    def around_sampling(self, p: Any, after: Callable[[], None]) -> None:
        """See :class:`.base.Host`."""
        wrap_sampler(p, after, end_by_comment=lambda message: self._end_by_comment(p, message))

    def fail(self, p: Any, message: str) -> None:
        """See :class:`.base.Host`."""
        if self._end_by_comment(p, message):
            skip_sampling(p)
        else:
            fail(p, message)

    def _end_by_comment(self, p: Any, message: str) -> bool:
        """Ends ``p`` with a comment where an exception's text would be lost: in the page of hosts on ``ldm_patched``.

        There the job has to run to its end for its comments to be seen, so it is interrupted and its pictures are
        dropped.
        """
        if self._namespace == "backend" or getattr(p, "is_api", False) or is_inside_another(p):
            return False
        self.comment(p, message)
        p.extra_generation_params[ERROR_KEY] = message
        import_module("modules.shared").state.interrupted = True
        p.do_not_save_grid = True  # there is nothing to make one of
        setattr(p, _ENDED_BY_COMMENT, True)
        return True

    def was_ended_by_comment(self, p: Any) -> bool:
        """See :class:`.base.Host`."""
        return getattr(p, _ENDED_BY_COMMENT, False)

    def fail_in_sampling(self, p: Any, message: str) -> None:
        """See :class:`.base.Host`. Raises around the UNet, not in its layers, since it may be one without any."""

        def raiser(*args: Any, **kwargs: Any) -> Tensor:
            raise IPAdapterError(message)

        unet = _unet(p).clone()
        unet.model_options = {**unet.model_options, "model_function_wrapper": raiser}
        p.sd_model.forge_objects.unet = unet

    def is_nested(self, p: Any) -> bool:
        """See :class:`.base.Host`."""
        return is_nested(p)

    def comment(self, p: Any, message: str) -> None:
        """See :class:`.base.Host`."""
        p.comment(message)


WORKING_MEMORY = 256 * 2**20
"""Room in bytes for what the image encoder computes for a few pictures."""


def _unet(p: Any) -> Any:
    unet = getattr(getattr(p.sd_model, "forge_objects", None), "unet", None)
    if unet is None:
        raise IPAdapterError("No checkpoint is loaded: choose a Stable Diffusion 1.x, 2.x or SDXL checkpoint.")
    return unet


def _unet_info(unet: Any) -> UNetInfo:
    dtype = getattr(unet.model, "computation_dtype", None) or getattr(unet.model, "manual_cast_dtype", None)
    return describe(unet.model.diffusion_model, torch.device(unet.load_device), dtype or unet.model.get_dtype())


def _replacements(unet: Any) -> Mapping[tuple[Any, ...], Any]:
    options = unet.model_options.get("transformer_options", {})
    return options.get("patches_replace", {}).get("attn2", {})


def _is_ours(replacement: Any) -> bool:
    return hasattr(replacement, REPLACES)


def _not_ours(replacement: Any) -> Any:
    """What stands in a layer without us."""
    while _is_ours(replacement):
        replacement = getattr(replacement, REPLACES)()
    return replacement


def _previous(there: Mapping[tuple[Any, ...], Any], key: tuple[Any, ...]) -> tuple[Any, bool]:
    """What the host would call in a layer without us, and whether it stands at the block's shorter key.

    Ours stand at ``(block, number, depth)``, which hides ``(block, number)``. Someone may have written to the shorter
    key after us.
    """
    here = there.get(key)
    if here is not None and not (_is_ours(here) and getattr(here, FROM_SHORTER_KEY)):
        return _not_ours(here), False
    return _not_ours(there.get(key[:2])), True


def _chained(
    layer: int, current: CurrentPlan, attention: Attention, previous: Replacement | None, from_shorter_key: bool
) -> Replacement:
    """Our replacement for a layer, marked so that it is known again, and open to Forge's built-in adapter.

    The built-in calls ``set_new_condition`` on whatever it finds in a layer where it wants to add itself.
    """
    chain: list[Any] = [previous]

    def call_previous(q: Tensor, k: Tensor, v: Tensor, extra_options: ExtraOptions) -> Tensor:
        return chain[0](q, k, v, extra_options)

    with_previous = make_replacement(layer, current, attention, call_previous)
    alone = make_replacement(layer, current, attention, None)

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra_options: ExtraOptions) -> Tensor:
        return (alone if chain[0] is None else with_previous)(q, k, v, extra_options)

    def set_new_condition(*args: Any, **kwargs: Any) -> None:
        if hasattr(chain[0], "set_new_condition"):
            chain[0].set_new_condition(*args, **kwargs)
        else:
            built_in = sys.modules.get("lib_ipadapter.IPAdapterPlus")
            if chain[0] is None and built_in is not None:
                chain[0] = built_in.CrossAttentionPatch(*args, **kwargs)

    setattr(replacement, REPLACES, lambda: chain[0])
    setattr(replacement, FROM_SHORTER_KEY, from_shorter_key)
    replacement.set_new_condition = set_new_condition  # type: ignore[attr-defined]
    return replacement


def _and_parts(params: Any) -> int:
    """Cond chunks of a step: pictures with fewer AND parts than others cut the others' short."""
    parts = known_parts(params)
    if parts:
        return min(parts)
    return int(params.text_cond.shape[0]) // max(1, int(params.x.shape[0]))  # a sampler of another extension


@dataclass
class _Step:
    """What the sampler announced for the UNet calls of one denoiser call."""

    texts: Mapping[int, Tensor]
    """By role, ``[rows, M, C]``; empty before the first step."""
    left: dict[int, int]
    """Chunks of each role that are still to come."""
    sigmas: Tensor | None = None
    """Noise levels of the step's UNet calls, the very tensor."""
    progress: float | None = None
    """What follows from them; None: it isn't asked for."""
    executed: float | None = None
    """See :class:`..rows.Call`."""
    items: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """By role, the item of the batch that each row of the step belongs to, if that is asked for."""
    past: dict[int, int] = field(default_factory=dict)
    """Chunks of each role that the running call and those before it had."""
    beyond: bool = False
    """Whether the running call has more chunks of a role than that: another extension makes it, and may mislabel it."""

    @property
    def text_tokens(self) -> Mapping[int, int] | None:
        """Text tokens of each role before the host repeats the shorter."""
        return {role: int(text.shape[1]) for role, text in self.texts.items()} or None

    def count(self, chunks: Sequence[int]) -> None:
        """A UNet call begins."""
        for role in chunks:
            self.left[role] = self.left.get(role, 0) - 1
            self.past[role] = self.past.get(role, 0) + 1
        self.beyond = any(self.left[role] < 0 for role in chunks)

    def items_of(self, chunks: Sequence[int], images: int, rows: int, unet_rows: int) -> tuple[int, ...] | None:
        """The item of every row of the running call; None where that can't be told.

        Some samplers describe a call row by row, as chunks of one row; these come in the order of the step's rows.
        """
        batch = len(self.items.get(UNCOND, self.items.get(COND, ())))
        if images > 1 or len(set(self.items.get(COND, ()))) <= 1 or not batch:
            return items_of_rows(chunks, images, rows, unet_rows)
        start = {role: self.past[role] - list(chunks).count(role) for role in set(chunks)}
        found = []
        for place, role in enumerate(chunks):
            number = start[role] + list(chunks[:place]).count(role)
            of_role = self.items.get(role, ())
            if rows != len(chunks) or number >= len(of_role):
                return None
            found.append(of_role[number])
        return tuple(found)

"""AUTOMATIC1111: no patch point, so forward hooks on the projections of every cross-attention layer.

Every attention optimiser calls ``to_q``, ``to_k``, ``to_v`` and ``to_out[0]`` once as modules. Image tokens are
appended to what ``to_k`` and ``to_v`` return, so the optimiser the user chose does the attention; the decoupled
formulation catches q behind ``to_q`` and adds its output before ``to_out[0]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import IPAdapterError
from ..injection import Injection
from ..layout import KEYS, VALUES
from ..masks import Region
from ..plan import LayeredPlan, Plan
from ..progress import Progress, executed, known, progress_of_timestep
from ..rows import COND, Call, items_in_order
from ..texts import parts_of_items, roles_by_text, step_texts
from .base import UNetInfo
from .compute import on_device
from .folders import ModelFolders
from .job import drawn_region, fail, is_nested, queue, wrap_sampler
from .unet import cross_attention, describe

T = TypeVar("T")


class A1111Host(ModelFolders):
    """AUTOMATIC1111 1.10. Hooks live on modules that stay loaded, so they are removed at every end of sampling."""

    name = "AUTOMATIC1111"
    first_role = COND

    def __init__(self) -> None:
        self._hooks: _Hooks | None = None
        self._raisers: list[RemovableHandle] = []

    # Files and memory

    def run(self, module: nn.Module, function: Callable[[torch.device, torch.dtype], T]) -> T:
        """See :class:`.base.Host`."""
        devices: Any = import_module("modules.devices")
        lowvram: Any = import_module("modules.lowvram")
        device = torch.device(devices.device)
        dtype = torch.float32 if device.type == "cpu" else devices.dtype
        if device.type != "cpu" and lowvram.is_enabled(import_module("modules.shared").sd_model):
            lowvram.send_everything_to_cpu()
        return on_device(module, device, dtype, function, devices.torch_gc)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """See :class:`.base.Host`."""
        with queue():
            # Its start loads the checkpoint in a thread that holds no queue, with torch's load_state_dict replaced by
            # one that our modules can't be loaded with. Asking for the model waits for that.
            _ = import_module("modules.shared").sd_model
            yield

    # The UNet

    def unet_info(self, p: Any) -> UNetInfo:
        """See :class:`.base.Host`."""
        if getattr(import_module("modules.sd_unet"), "current_unet", None) is not None:
            raise IPAdapterError(
                "The WebUI's SD Unet setting replaces the UNet (TensorRT, say), whose layers can't be reached: set SD "
                "Unet to None in Settings, or switch IP-Adapter off."
            )
        model = p.sd_model
        if getattr(model, "cond_stage_key", "") == "edit":
            raise IPAdapterError(
                "The loaded checkpoint edits pictures by instruction and has three kinds of rows, which IP-Adapter "
                "doesn't support: choose an ordinary checkpoint."
            )
        diffusion_model = getattr(getattr(model, "model", None), "diffusion_model", None)
        devices: Any = import_module("modules.devices")
        return describe(diffusion_model, torch.device(devices.device), devices.dtype_unet)

    def attach(self, p: Any, injection: Injection) -> None:
        """See :class:`.base.Host`."""
        self.detach(p)
        info = self.unet_info(p)
        injection.to(info.device, info.dtype)
        self._hooks = _Hooks(info, injection)

    def detach(self, p: Any) -> None:
        """See :class:`.base.Host`."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        for handle in self._raisers:
            handle.remove()
        self._raisers.clear()

    def check(self, p: Any, injection: Injection, identity: object) -> bool:
        """See :class:`.base.Host`. Others' hooks stand beside ours, so there is nothing to attach again."""
        return self._hooks is not None and p.sd_model.model.diffusion_model is identity

    def on_step(self, params: Any) -> None:
        """See :class:`.base.Host`. UNet calls consume the step's rows in order: all cond rows, then all uncond rows."""
        if self._hooks is not None:
            parts = parts_of_items(params) if self._hooks.asks_items else ()
            self._hooks.begin_step(step_texts(params), executed(params), parts)

    # The job

    def region(self, p: Any) -> Region:
        """See :class:`.base.Host`."""
        return drawn_region(p)

    def around_sampling(self, p: Any, after: Callable[[], None]) -> None:
        """See :class:`.base.Host`."""
        wrap_sampler(p, after, lambda: self.detach(p))

    def fail(self, p: Any, message: str) -> None:
        """See :class:`.base.Host`."""
        fail(p, message)

    def fail_in_sampling(self, p: Any, message: str) -> None:
        """See :class:`.base.Host`."""

        def raiser(*_: Any) -> None:
            raise IPAdapterError(message)

        self._raisers.append(p.sd_model.model.diffusion_model.register_forward_pre_hook(raiser))

    def was_ended_by_comment(self, p: Any) -> bool:
        """See :class:`.base.Host`. The page shows exceptions here."""
        return False

    def is_nested(self, p: Any) -> bool:
        """See :class:`.base.Host`."""
        return is_nested(p)

    def comment(self, p: Any, message: str) -> None:
        """See :class:`.base.Host`."""
        p.comment(message)


class _Hooks:
    """All hooks of one injection on one UNet."""

    def __init__(self, info: UNetInfo, injection: Injection) -> None:
        self._injection = injection
        self._texts: Mapping[int, Tensor] = {}
        self._roles: tuple[int, ...] = ()
        self._items: tuple[int, ...] = ()
        self.asks_items = injection.asks_items
        """Whether it has to be known which item of the batch a row belongs to."""
        self._cursor = 0
        self._executed: float | None = None
        self._call: Call | None = None
        self._plan: Plan | LayeredPlan | None = None
        self._q: dict[int, Tensor] = {}
        self._k: dict[int, Tensor] = {}
        self._text_tokens = 0
        layers = dict(cross_attention(info.identity))
        unet: Any = info.identity
        self._handles = [unet.register_forward_pre_hook(self._before_unet, with_kwargs=True)]
        for number, key in enumerate(info.keys):
            if injection.influence is not None:
                self._watch_layer(number, layers[key])
            self._hook_layer(number, layers[key])

    def begin_step(self, texts: Mapping[int, Tensor], executed: float | None = None, parts: Sequence[int] = ()) -> None:
        """Before a step's UNet calls: the texts of all its rows by role, cond first; see :class:`..rows.Call`.

        ``parts``: of each item of the batch, the parts of its prompt, if the items of rows have to be known.
        """
        self._texts, self._cursor, self._executed = texts, 0, executed
        self._roles = tuple(role for role, text in texts.items() for _ in range(text.shape[0]))
        if self.asks_items:
            self._items = tuple(item for each in items_in_order(tuple(texts), parts).values() for item in each)

    def remove(self) -> None:
        """Takes every hook out."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._q.clear()
        self._k.clear()

    def _before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
        rows = int(x.shape[0])
        context = args[2] if len(args) > 2 else kwargs["context"]
        roles = self._roles[self._cursor : self._cursor + rows]
        items = self._items_of(rows) if self.asks_items else None
        if len(roles) != rows:  # another extension calls the UNet once more than the step
            roles = roles_by_text(context, self._texts, self._roles if rows == len(self._roles) else ())
        else:
            if self._cursor and self._cursor == self._roles.count(COND):
                # This would be uncond; but the host may have left that out of this step, and an extension be calling.
                with suppress(IPAdapterError):
                    roles = roles_by_text(context, self._texts, roles)
            self._cursor += rows
        progress: Progress = lambda: progress_of_timestep(float(timesteps[0]))  # noqa: E731
        # Found out here if at all: the device has less to do before the UNet's first layers are launched than after.
        progress = known(progress) if self._injection.asks_progress else progress
        latent = (int(x.shape[-2]), int(x.shape[-1]))
        self._call = Call(roles, progress, executed=self._executed, items=items, latent=latent)
        self._plan = None

    def _items_of(self, rows: int) -> tuple[int, ...] | None:
        """The item of every row of the UNet call that begins, before its rows are counted; None: it can't be told.

        Calls beyond the step's own repeat all of its rows, or have one row for each item.
        """
        items = self._items[self._cursor : self._cursor + rows]
        batch = len(set(self._items))
        if len(items) == rows and len(self._items) == len(self._roles):
            return items
        if rows == len(self._items) == len(self._roles):
            return self._items
        return tuple(range(batch)) if rows == batch else None

    def _current(self, layer: int, text: Tensor) -> Plan:
        """The plan of this UNet call, for a layer whose projected text is ``text [R, M, C]``."""
        rows = len(self._call.roles) if self._call is not None else 0
        if self._call is None or text.shape[0] != rows:
            raise IPAdapterError(
                f"A cross-attention layer sees {text.shape[0]} rows where the UNet was called with {rows}, so it can't "
                "be told which of them are cond: switch off the extension that changes the batch, or IP-Adapter."
            )
        if self._plan is None:
            self._plan = self._injection.plan(self._call, text.shape[1], text.device, text.dtype)
        return self._plan.at(layer)

    def _watch_layer(self, layer: int, attn2: Any) -> None:
        """Shows the influence map what the layer projects, before anything of ours is in it."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def after(module: nn.Module, args: Any, out: Tensor) -> None:
                seen[name] = out

            return after

        def before_out(module: nn.Module, args: tuple[Any, ...]) -> None:
            q, k, v = (seen.pop(name) for name in "qkv")
            self._injection.see(layer, q, k, v, attn2.heads)

        for name in "qkv":
            self._handles.append(getattr(attn2, f"to_{name}").register_forward_hook(keep(name)))
        self._handles.append(attn2.to_out[0].register_forward_pre_hook(before_out))

    def _hook_layer(self, layer: int, attn2: Any) -> None:
        def after_q(module: nn.Module, args: Any, q: Tensor) -> None:
            self._q[layer] = q

        def after_k(module: nn.Module, args: Any, k: Tensor) -> Tensor | None:
            plan = self._current(layer, k)
            if plan.joined and not plan.uniform:
                self._k[layer] = k
            return plan.extended(layer, KEYS, k)[0][0] if plan.uniform else None

        def after_v(module: nn.Module, args: Any, v: Tensor) -> Tensor | None:
            plan = self._current(layer, v)
            return plan.extended(layer, VALUES, v)[0][0] if plan.uniform else None

        def before_out(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            q = self._q.pop(layer)
            plan = None if self._plan is None else self._plan.at(layer)
            if plan is None or plan.idle or (plan.uniform and not plan.added):
                return None
            out = args[0]
            if plan.joined and not plan.uniform:
                out = plan.gate(layer, q, self._k.pop(layer), out, attn2.heads)
            return (plan.add(layer, q, out, attn2.heads), *args[1:])

        self._handles += [
            attn2.to_q.register_forward_hook(after_q),
            attn2.to_k.register_forward_hook(after_k),
            attn2.to_v.register_forward_hook(after_v),
            attn2.to_out[0].register_forward_pre_hook(before_out),
        ]

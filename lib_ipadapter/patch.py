"""``patch_model``: the joint formulation on any model of the ComfyUI line, with no WebUI around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attn2 import CurrentPlan, ExtraOptions, Replacement, heads_of, make_replacement
from .errors import IPAdapterError
from .formulations import JOINT
from .injection import Injection, Term
from .layers import LAYOUTS, WIDEST_LAYER, LayerKey, first_in_forward_order
from .plan import ImageKV, scaled_dot_product
from .progress import Window, progress_of_timestep, scaled_linear_schedule
from .rows import COND, UNCOND, Call, roles_of_rows
from .weighing import weigh

Task = tuple[tuple[Sequence[Tensor], Sequence[Tensor]], float, float]
"""``((ip_conds, ip_unconds), stop, weight)``."""


def sdp(q: Tensor, k: Tensor, v: Tensor, extra_options: ExtraOptions) -> Tensor:
    """Scaled dot product attention, ``q [B, N, C]``, ``k`` and ``v`` ``[B, M, C]`` to ``[B, N, C]``.

    ``extra_options["n_heads"]`` is the number of heads, side by side in C.
    """
    return scaled_dot_product(q, k, v, heads_of(extra_options))


def patch_model(model: Any, tasks: Sequence[Task]) -> Any:
    """A clone of ``model`` whose cross-attention sees the pictures of ``tasks``; ``model`` stays as it is.

    Args:
        model: has ``clone()`` and ``model_options`` and, usually, ``model.diffusion_model.current_step``.
        tasks: ``((ip_conds, ip_unconds), stop, weight)`` of every picture, K/V lists as :func:`preprocess` gives them:
            K of layer i at 2i, V at 2i + 1, ``[1, T, C]`` each, layers in the adapter file's order (16 or 70). A
            picture acts while the progress of the UNet call is below ``stop`` (1.0: to the very end), 0 at pure noise.

    Raises:
        IPAdapterError: for K/V of neither layout, or a stop or weight that is no number.

    The progress of a UNet call is ``model.model.diffusion_model.current_step``, else what follows from
    ``extra_options``' ``timesteps``, else from its ``sigmas``. A replacement that already stands in a layer is kept
    and given the extended K and V.
    """
    terms = [term for task in tasks if (term := _term(*task)) is not None]
    new_model = model.clone()
    new_model.model_options = dict(new_model.model_options)  # a clone may share it
    if not terms:
        return new_model
    layers = sum(map(len, terms[0].weighed.layers))
    keys = LAYOUTS[layers]
    injection = Injection(terms, layers)
    _move_to(injection, new_model)
    reader = _BareModel(new_model)
    current = CurrentPlan(injection, reader.marker, reader.call, first_in_forward_order(keys))

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return sdp(q, k, v, {"n_heads": heads})

    def make_attn_patcher(ip_index: int, previous: Replacement | None) -> Replacement:
        return make_replacement(ip_index, current, attention, previous)

    def set_model_patch_replace(model: Any, number: int, key: LayerKey) -> None:
        options = model.model_options["transformer_options"] = model.model_options.get("transformer_options", {}).copy()
        replace = options["patches_replace"] = options.get("patches_replace", {}).copy()
        attn2 = replace["attn2"] = replace.get("attn2", {}).copy()
        attn2[tuple(key)] = make_attn_patcher(number, attn2.get(tuple(key)) or attn2.get(tuple(key)[:2]))

    for number, key in enumerate(keys):
        set_model_patch_replace(new_model, number, key)
    return new_model


def _term(kv: tuple[Sequence[Tensor], Sequence[Tensor]], stop: float, weight: float) -> Term | None:
    conds, unconds = kv
    for name, tensors in (("ip_conds", conds), ("ip_unconds", unconds)):
        if len(tensors) % 2 or len(tensors) // 2 not in LAYOUTS:
            raise IPAdapterError(
                f"{name} has {len(tensors)} tensors; it must have K and V of {' or '.join(map(str, LAYOUTS))} "
                "cross-attention layers: pass what preprocess returned."
            )
    if not (weight == weight and abs(weight) != float("inf")) or stop != stop:
        raise IPAdapterError(f"A task has stop {stop} and weight {weight}; both must be finite numbers.")
    prompts = {COND: (ImageKV.from_pairs(conds),), UNCOND: (ImageKV.from_pairs(unconds),)}
    if weight == 0:
        return None
    return Term(JOINT, Window(0.0, stop), weigh(prompts, JOINT, weight, (), WIDEST_LAYER, UNCOND))


def _move_to(injection: Injection, model: Any) -> None:
    """Brings K/V to the model's device and dtype now, where they can be told; else its first call does."""
    diffusion_model = getattr(getattr(model, "model", None), "diffusion_model", None)
    parameters = getattr(diffusion_model, "parameters", None)
    parameter = next(iter(parameters()), None) if callable(parameters) else None
    if isinstance(parameter, Tensor) and parameter.is_floating_point():
        device = getattr(model, "load_device", None)
        injection.to(device if isinstance(device, torch.device) else parameter.device, parameter.dtype)


class _BareModel:
    """Reads rows and progress of a UNet call where no WebUI says them."""

    def __init__(self, model: Any) -> None:
        # Not the model itself, whose options hold this: in a ring, K/V would wait for the garbage collector.
        self._inner = getattr(model, "model", None)

    def marker(self, extra_options: ExtraOptions) -> Any:
        """What carries the noise level: the model's current step, or the call's timesteps or sigmas."""
        step = getattr(getattr(self._inner, "diffusion_model", None), "current_step", None)
        if step is not None:
            return step
        timesteps = extra_options.get("timesteps")
        return extra_options.get("sigmas") if timesteps is None else timesteps

    def call(self, marker: Any, extra_options: ExtraOptions, layer: int, q: Tensor, k: Tensor) -> Call:
        """Rows and progress of the call; one device read at most."""
        roles = extra_options.get("cond_or_uncond")
        if not roles or q.shape[0] % len(roles):
            raise IPAdapterError(
                f"A cross-attention layer sees {q.shape[0]} rows for the chunks {roles}, so it can't be told which of "
                "them are cond: extra_options needs cond_or_uncond with one entry for each chunk of rows."
            )
        rows, images = int(q.shape[0]), int(q.shape[0]) // len(roles)
        sigmas, unet_rows = extra_options.get("sigmas"), rows
        if isinstance(sigmas, Tensor) and sigmas.ndim == 1 and rows % (len(roles) * sigmas.shape[0]) == 0:
            images = int(sigmas.shape[0])  # one for each image: more rows than that are tiles
            unet_rows = int((extra_options.get("original_shape") or (rows,))[0])
        return Call(roles_of_rows(roles, images, rows, unet_rows), self._progress(marker, extra_options))

    def _progress(self, marker: Any, extra_options: ExtraOptions) -> float:
        if marker is None:
            raise IPAdapterError(
                "The model doesn't say how far sampling is; set model.model.diffusion_model.current_step (0 to 1), or "
                "pass timesteps or sigmas in extra_options."
            )
        value = float(marker.reshape(-1)[0]) if isinstance(marker, Tensor) else float(_first(marker))
        if marker is extra_options.get("timesteps"):
            return progress_of_timestep(value)
        if marker is extra_options.get("sigmas"):
            return self._progress_of_sigma(value)
        return value

    def _progress_of_sigma(self, sigma: float) -> float:
        schedule = getattr(self._inner, "predictor", None) or getattr(self._inner, "model_sampling", None)
        if schedule is None:
            return scaled_linear_schedule().progress(sigma)
        return progress_of_timestep(float(schedule.timestep(torch.tensor(sigma))))


def _first(value: Any) -> Any:
    """The first of a list or array of one value a row, or the one value itself."""
    return value[0] if hasattr(value, "__len__") and getattr(value, "ndim", 1) != 0 else value

"""Model patchers with the names and habits of Forge's: ``clone()`` deep-copies the options, sets are copy-on-write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .ldm import DiffusionModel
from .predictor import Predictor


class ModelPatcher:
    """A module together with the device it computes on and options that extensions may set on a clone."""

    def __init__(
        self,
        model: nn.Module,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        current_device: torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        self.model: Any = model
        self.load_device = load_device
        self.offload_device = offload_device
        self.current_device = offload_device if current_device is None else current_device
        self.size = size or sum(t.numel() * t.element_size() for t in model.state_dict().values())
        self.object_patches: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        return self._clone_into(
            ModelPatcher(self.model, self.load_device, self.offload_device, self.size, self.current_device)
        )

    def _clone_into(self, other: Any) -> Any:
        other.object_patches = self.object_patches.copy()
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def is_clone(self, other: Any) -> bool:
        return getattr(other, "model", None) is self.model

    def model_size(self) -> int:
        return self.size

    def set_model_patch(self, patch: Callable[..., Any], name: str) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def set_model_attn1_patch(self, patch: Callable[..., Any]) -> None:
        self.set_model_patch(patch, "attn1_patch")

    def set_model_attn2_patch(self, patch: Callable[..., Any]) -> None:
        self.set_model_patch(patch, "attn2_patch")

    def set_model_attn1_output_patch(self, patch: Callable[..., Any]) -> None:
        self.set_model_patch(patch, "attn1_output_patch")

    def set_model_attn2_output_patch(self, patch: Callable[..., Any]) -> None:
        self.set_model_patch(patch, "attn2_output_patch")

    def set_model_patch_replace(
        self, patch: Callable[..., Any], name: str, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        """Register one replacement under a 2-tuple key, or under a 3-tuple key if ``transformer_index`` is given."""
        options = dict(self.model_options["transformer_options"])
        replace = {kind: dict(by_key) for kind, by_key in options.get("patches_replace", {}).items()}
        key = (block_name, number) if transformer_index is None else (block_name, number, transformer_index)
        replace.setdefault(name, {})[key] = patch
        options["patches_replace"] = replace
        self.model_options["transformer_options"] = options

    def set_model_attn1_replace(
        self, patch: Callable[..., Any], block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        self.set_model_patch_replace(patch, "attn1", block_name, number, transformer_index)

    def set_model_attn2_replace(
        self, patch: Callable[..., Any], block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        self.set_model_patch_replace(patch, "attn2", block_name, number, transformer_index)

    def set_model_unet_function_wrapper(self, unet_wrapper_function: Callable[..., Any]) -> None:
        self.model_options["model_function_wrapper"] = unet_wrapper_function


class KModel(nn.Module):
    """The denoiser around the UNet: scales the input, finds the timestep, turns the output into a denoised latent."""

    def __init__(self, diffusion_model: DiffusionModel, predictor: Predictor) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.predictor = predictor
        self.storage_dtype = diffusion_model.dtype
        self.computation_dtype = diffusion_model.dtype
        self.recorder: Callable[..., None] | None = None
        """Told of every call of the UNet before it is made; the shell's own, extensions don't know it."""

    def get_dtype(self) -> torch.dtype:
        return self.computation_dtype

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_crossattn: torch.Tensor,
        y: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Denoised latents for ``x [B, 4, H, W]`` at the sigmas ``t [B]``, by one call of the UNet."""
        dtype = self.computation_dtype
        timestep = self.predictor.timestep(t).float()
        if self.recorder is not None:
            self.recorder(x, t, timestep, c_crossattn, transformer_options or {})
        output = self.diffusion_model(
            self.predictor.calculate_input(t, x).to(dtype),
            timestep,
            context=c_crossattn.to(dtype),
            y=None if y is None else y.to(dtype),
            control=control,
            transformer_options=transformer_options,
        )
        return self.predictor.calculate_denoised(t, output.float(), x)


class UnetPatcher(ModelPatcher):
    """Patcher of the UNet; what extensions clone, patch and put back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.controlnet_linked_list: Any = None
        self.extra_preserved_memory_during_sampling = 0
        self.extra_model_patchers_during_sampling: list[ModelPatcher] = []
        self.extra_concat_condition: Any = None

    def clone(self) -> UnetPatcher:
        other = self._clone_into(
            UnetPatcher(self.model, self.load_device, self.offload_device, self.size, self.current_device)
        )
        other.controlnet_linked_list = self.controlnet_linked_list
        other.extra_preserved_memory_during_sampling = self.extra_preserved_memory_during_sampling
        other.extra_model_patchers_during_sampling = list(self.extra_model_patchers_during_sampling)
        other.extra_concat_condition = self.extra_concat_condition
        return other

    def add_extra_preserved_memory_during_sampling(self, memory_in_bytes: int) -> None:
        self.extra_preserved_memory_during_sampling += memory_in_bytes

    def add_extra_model_patcher_during_sampling(self, model_patcher: ModelPatcher) -> None:
        self.extra_model_patchers_during_sampling.append(model_patcher)

    def set_transformer_option(self, k: str, v: Any) -> None:
        self.model_options["transformer_options"][k] = v


@dataclass
class ForgeObjects:
    """The parts of a loaded checkpoint that extensions may exchange for one job."""

    unet: UnetPatcher
    clip: Any
    vae: Any
    clipvision: Any

    def shallow_copy(self) -> ForgeObjects:
        return ForgeObjects(self.unet, self.clip, self.vae, self.clipvision)

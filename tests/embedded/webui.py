"""Stand-ins for ``modules``, ``modules_forge`` and ``backend``, which extensions import on the Forge line."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import (
    attention,
    callbacks,
    components,
    extra_networks,
    images,
    infotext,
    patcher,
    predictor,
    processing,
    prompts,
    scripts_api,
    state,
)
from .denoiser import CFGDenoiser, InterruptedException
from .jobs import LATENT_UPSCALERS
from .samplers import SAMPLERS, SAMPLERS_BY_NAME
from .sampling import Sampler, create_sampler
from .schedules import SCHEDULES, SCHEDULES_BY_NAME

if TYPE_CHECKING:
    from .host import Host


class _Live(ModuleType):
    """A module some of whose attributes are looked up at the host each time (the live model, for one)."""

    def __init__(self, name: str, live: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__["_live"] = live

    def __getattr__(self, key: str) -> Any:
        live = self.__dict__["_live"]
        if key in live:
            return live[key]()
        raise AttributeError(f"module {self.__name__!r} has no attribute {key!r}")


def make_modules(host: Host) -> dict[str, ModuleType]:
    """All stand-in modules by name, packages included, ready for ``sys.modules``."""
    contents = _modules(host) | _backend(host)
    made: dict[str, ModuleType] = {}
    for name, values in contents.items():
        live = {k[1:]: v for k, v in values.items() if k.startswith("*")}
        made[name] = _Live(name, live)
        vars(made[name]).update({k: v for k, v in values.items() if not k.startswith("*")})
    for name in list(made):
        parts = name.split(".")
        for i in range(1, len(parts)):
            made.setdefault(".".join(parts[:i]), _Live(".".join(parts[:i]), {}))
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if any(other.startswith(f"{name}.") for other in made):
            module.__path__ = []  # a package, with nothing to find on disk
        if parent:
            setattr(made[parent], child, module)
    return made


def _modules(host: Host) -> dict[str, dict[str, Any]]:
    models, root = str(host.models_path), str(host.models_path.parent)
    paths = {
        "models_path": models,
        "data_path": str(host.cmd_opts.data_dir),
        "script_path": root,
        "modules_path": root,
        "extensions_dir": root,
        "extensions_builtin_dir": root,
    }
    extension_list = {
        "extensions": host.extensions,
        "active": lambda: [e for e in host.extensions if e.enabled],
        "Extension": type(host.extensions[0]) if host.extensions else None,
    }
    runners = host.runners
    script_names = {
        name: getattr(scripts_api, name)
        for name in [
            "AlwaysVisible",
            "Script",
            "OnComponent",
            "PostSampleArgs",
            "PostprocessImageArgs",
            "PostProcessMaskOverlayArgs",
            "PostprocessBatchListArgs",
            "MaskBlendArgs",
        ]
    }
    param_names = ["CFGDenoiserParams", "CFGDenoisedParams", "AfterCFGCallbackParams", "ImageSaveParams"]
    info = {
        "quote": infotext.quote,
        "unquote": infotext.unquote,
        "parse_generation_parameters": infotext.parse_generation_parameters,
        "PasteField": components.PasteField,
    }
    return {
        "modules.scripts": {
            **script_names,
            "basedir": lambda: host.basedir or root,
            "scripts_data": host.scripts_data,
            "scripts_txt2img": runners["txt2img"],
            "scripts_img2img": runners["img2img"],
            "ScriptRunner": type(runners["txt2img"]),
        },
        "modules.script_callbacks": {
            **host.callbacks.registrars(),
            **{name: getattr(callbacks, name) for name in param_names},
            "remove_callbacks_for_function": host.callbacks.remove_callbacks_for_function,
        },
        "modules.shared": {
            "opts": host.opts,
            "cmd_opts": host.cmd_opts,
            "state": host.state,
            "OptionInfo": state.OptionInfo,
            "options_templates": host.opts.data_labels,
            "options_section": components.options_section,
            "*sd_model": lambda: host.sd_model,
            "device": host.device,
            "latent_upscale_modes": LATENT_UPSCALERS,
            "latent_upscale_default_mode": "Latent",
            "sd_upscalers": [],
            "total_tqdm": components.NoProgressBar(),
            "*demo": lambda: host.page.blocks,
        },
        "modules.shared_state": {"State": state.State},
        "modules.options": {"OptionInfo": state.OptionInfo, "options_section": components.options_section},
        "modules.errors": {
            "report": lambda message, *, exc_info=False: host.reports.report(
                message, sys.exc_info()[1] if exc_info else None
            ),
            "display": lambda e, task, **kwargs: host.reports.report(task, e),
        },
        "modules.ui_components": {name: getattr(components, name) for name in components.FORM_NAMES},
        "modules.ui": {"plaintext_to_html": components.plaintext_to_html},
        "modules.paths": paths,
        "modules.paths_internal": paths,
        "modules.processing": {
            "StableDiffusionProcessing": processing.Processing,
            "StableDiffusionProcessingTxt2Img": host.Txt2Img,
            "StableDiffusionProcessingImg2Img": host.Img2Img,
            "Processed": processing.Processed,
            "process_images": processing.process_images,
            "opt_C": 4,
            "opt_f": processing.OPT_F,
        },
        "modules.api.api": {
            "decode_base64_to_image": images.decode_base64_to_image,
            "encode_pil_to_base64": images.encode_pil_to_base64,
        },
        "modules.images": {"resize_image": components.resize_image, "image_grid": images.image_grid},
        "modules.infotext_utils": info,
        "modules.generation_parameters_copypaste": info,
        "modules.extensions": extension_list,
        "modules.devices": {
            "cpu": torch.device("cpu"),
            "device": host.device,
            "dtype": host.dtype,
            "dtype_unet": host.dtype,
            "dtype_vae": torch.float32,
            "get_optimal_device": lambda: host.device,
            "get_device_for": lambda task: host.device,
            "torch_gc": lambda: None,
            "autocast": lambda disable=False: nullcontext(),
            "without_autocast": lambda disable=False: nullcontext(),
        },
        "modules.prompt_parser": {
            name: getattr(prompts, name)
            for name in [
                "SdConditioning",
                "ScheduledPromptConditioning",
                "ComposableScheduledPromptConditioning",
                "MulticondLearnedConditioning",
                "DictWithShape",
                "get_learned_conditioning",
                "get_multicond_learned_conditioning",
                "reconstruct_cond_batch",
                "reconstruct_multicond_batch",
            ]
        },
        "modules.sd_models": {"*model_data": lambda: components.ModelData(host.sd_model)},
        "modules.sd_samplers": {
            "all_samplers": list(SAMPLERS),
            "all_samplers_map": SAMPLERS_BY_NAME,
            "samplers": list(SAMPLERS),
            "create_sampler": lambda name, model=None: create_sampler(host, name),
        },
        "modules.sd_samplers_timesteps": {"samplers_data_timesteps": [each for each in SAMPLERS if each.timesteps]},
        "modules.sd_samplers_common": {"InterruptedException": InterruptedException, "Sampler": Sampler},
        "modules.sd_samplers_cfg_denoiser": {"CFGDenoiser": CFGDenoiser},
        "modules.sd_schedulers": {"schedulers": list(SCHEDULES), "schedulers_map": SCHEDULES_BY_NAME},
        "modules.call_queue": {"queue_lock": host.queue_lock},
        "modules.extra_networks": {
            "ExtraNetwork": extra_networks.ExtraNetwork,
            "ExtraNetworkParams": extra_networks.ExtraNetworkParams,
            "extra_network_registry": host.extra_networks.registry,
            "parse_prompts": extra_networks.parse_prompts,
            "register_extra_network": host.extra_networks.register,
        },
        "modules_forge.shared": {
            "controlnet_dir": str(host.models_path / "ControlNet"),
            "preprocessor_dir": str(host.models_path / "ControlNetPreprocessor"),
        },
    }


def _backend(host: Host) -> dict[str, dict[str, Any]]:
    cpu = torch.device("cpu")

    def load_models_gpu(models: list[Any], memory_required: int = 0, hard_memory_preservation: int = 0) -> None:
        for model in models:
            model.model.to(model.load_device)
            model.current_device = model.load_device

    def should_use_fp16(
        device: Any = None, model_params: int = 0, prioritize_performance: bool = True, manual_cast: bool = False
    ) -> bool:
        return host.device.type == "cuda"

    def module_size(module: nn.Module, *args: Any, **kwargs: Any) -> int:
        return sum(t.numel() * t.element_size() for t in module.state_dict().values())

    return {
        "backend.memory_management": {
            "get_torch_device": lambda: host.device,
            "cpu": cpu,
            "should_use_fp16": should_use_fp16,
            "should_use_bf16": lambda *args, **kwargs: False,
            "load_model_gpu": lambda model: load_models_gpu([model]),
            "load_models_gpu": load_models_gpu,
            "soft_empty_cache": lambda force=False: None,
            "intermediate_device": lambda: cpu,
            "text_encoder_device": lambda: host.device,
            "text_encoder_offload_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
            "vae_offload_device": lambda: cpu,
            "unload_all_models": lambda: None,
            "free_memory": lambda memory_required, device, keep_loaded=(): None,
            "get_free_memory": lambda dev=None, torch_free_too=False: 2**33,
            "module_size": module_size,
            "current_loaded_models": [],
        },
        "backend.patcher.base": {"ModelPatcher": patcher.ModelPatcher},
        "backend.patcher.unet": {"UnetPatcher": patcher.UnetPatcher},
        "backend.attention": {
            "attention_function": attention.attention_function,
            "attention_pytorch": attention.attention_function,
        },
        "backend.modules.k_model": {"KModel": patcher.KModel},
        "backend.modules.k_prediction": {"Prediction": predictor.Predictor},
    }

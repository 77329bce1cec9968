"""A test extension: writes down every hook and callback, and does on request what extensions may do to a host.

Args: on/off, and a JSON text with what to do (``{"replace": "plain"}`` and so on).
"""

from __future__ import annotations

import json
from copy import copy
from typing import Any

import gradio as gr
import torch
from backend.attention import attention_function
from modules import script_callbacks, scripts, shared
from modules.processing import StableDiffusionProcessingTxt2Img, process_images
from modules.ui_components import InputAccordion


class UserError(Exception):
    def __init__(self, message: str, status: int | None = 422) -> None:
        super().__init__(message)
        if status is not None:
            self.status_code = status
            self.detail = message


class Record:
    """What was seen, for the tests; ``shared.probe`` once the script is loaded."""

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.details: list[tuple[str, dict[str, Any]]] = []
        self.options: list[dict[str, Any]] = []
        self.k_tokens: list[int] = []
        self.ui_calls: list[str] = []
        self.denoiser: list[Any] = []
        self.models: list[Any] = []
        self.wanted: dict[str, Any] = {}
        self.nested: Any = None

    def hook(self, name: str, **details: Any) -> None:
        self.hooks.append(name)
        self.details.append((name, details))


RECORD = shared.probe = Record()
SEEN: tuple[str, ...] = (
    "after_extra_networks_activate",
    "before_process_batch",
    "process_batch",
    "before_hr",
    "post_sample",
)
SEEN += ("postprocess_batch", "postprocess_batch_list", "postprocess_image", "postprocess_maskoverlay")
SEEN += ("postprocess_image_after_composite",)


def raiser(error: Exception) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


class ProbeScript(scripts.Script):
    def title(self) -> str:
        return "Probe"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        RECORD.ui_calls.append("img2img" if is_img2img else "txt2img")
        with InputAccordion(False, label="Probe", elem_id=self.elem_id("enable")) as enabled:
            wanted = gr.Textbox("{}", label="What to do", elem_id=self.elem_id("wanted"))
        count = gr.Slider(0, 10, 3, step=1, label="A number", visible=False)
        self.infotext_fields = [(enabled, lambda d: "Probe" in d), (wanted, "Probe")]
        return [enabled, wanted, count]

    def before_process(self, p: Any, *args: Any) -> None:
        on = bool(args and args[0])
        RECORD.wanted = json.loads(args[1]) if on else {}
        RECORD.hook("before_process", args=args)
        if "raise in before_process" in RECORD.wanted:
            raise RuntimeError("raised in before_process")

    def process(self, p: Any, *args: Any) -> None:
        RECORD.hook("process", grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled())
        wanted = RECORD.wanted
        if wanted:
            p.extra_generation_params["Probe"] = args[1]
            p.extra_generation_params["Probe list"] = ["first", "second"]
            p.extra_generation_params["Probe text"] = 'äöü, "quoted": back\\slash\nnew line 日本'
            p.extra_generation_params["Probe nothing"] = None
        if "init" in wanted:
            p.init = raiser(UserError(wanted["init"], wanted.get("status", 422)))
        if "comment" in wanted:
            p.comment(wanted["comment"])
        if "interrupt in process" in wanted:
            shared.state.interrupted = True

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        unet = p.sd_model.forge_objects.unet
        replaced = unet.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        RECORD.hook(
            "process_before_every_sampling",
            patched=bool(replaced),
            shape=tuple(kwargs["x"].shape),
            uc=kwargs["uc"],
            inference=torch.is_inference_mode_enabled(),
            hires=p.is_hr_pass,
        )
        wanted = RECORD.wanted
        if "sampler" in wanted:
            p.sampler.sample = p.sampler.sample_img2img = raiser(UserError(wanted["sampler"]))
        if "replace" in wanted:
            clone = unet.clone()
            for key in wanted.get("keys", [["input", 1, 0], ["middle", 0, 0]]):
                clone.set_model_attn2_replace(self.replacement(wanted["replace"]), *key)
            p.sd_model.forge_objects.unet = clone
        if "tiles" in wanted:
            clone = unet.clone()
            clone.set_model_unet_function_wrapper(self.tiled)
            p.sd_model.forge_objects.unet = clone

    @staticmethod
    def tiled(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        return apply(args["input"], args["timestep"], **args["c"])

    @staticmethod
    def replacement(kind: str) -> Any:
        def replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
            RECORD.options.append(dict(extra))
            RECORD.k_tokens.append(k.shape[1])
            if kind == "raise":
                raise UserError("raised inside attention")
            out = attention_function(q, k, v, extra["n_heads"])
            return out * 0.5 if kind == "half" else out

        return replace

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        RECORD.hook("postprocess", images=len(processed.images), interrupted=shared.state.interrupted)
        if RECORD.wanted.get("nested") and not hasattr(p, "is_nested"):
            wanted = copy(RECORD.wanted)
            inner = StableDiffusionProcessingTxt2Img(
                sd_model=p.sd_model, prompt="nested", seed=5, steps=2, width=64, height=64, sampler_name="Euler"
            )
            inner.is_nested = True
            inner.scripts, inner.script_args = p.scripts, p.script_args
            RECORD.nested = process_images(inner)
            RECORD.wanted = wanted
            processed.images.append(RECORD.nested.images[0])


def _seen(name: str) -> Any:
    def hook(self: Any, p: Any, *args: Any, **kwargs: Any) -> None:
        RECORD.hook(name)

    return hook


for _name in SEEN:
    setattr(ProbeScript, _name, _seen(_name))


def on_cfg_denoiser(params: Any) -> None:
    RECORD.hook("cfg_denoiser")
    RECORD.denoiser.append(params)
    if RECORD.wanted.get("interrupt at") == params.denoiser.step:
        shared.state.interrupted = True
    if "raise in callback" in RECORD.wanted:
        raise RuntimeError("raised in a callback")


def on_app_started(demo: Any, app: Any) -> None:
    @app.get("/probe/ping")
    def ping() -> str:
        return "pong"


script_callbacks.on_cfg_denoiser(on_cfg_denoiser, name="probe")
script_callbacks.on_app_started(on_app_started)
script_callbacks.on_model_loaded(lambda model: RECORD.models.append(model))
script_callbacks.on_script_unloaded(lambda: RECORD.hook("script_unloaded"))
script_callbacks.on_ui_settings(
    lambda: shared.opts.add_option("probe_option", shared.OptionInfo(7, "Probe option", section=("probe", "Probe")))
)

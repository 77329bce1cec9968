"""Linked into a WebUI by ``tests/real_host.py``: on request it runs a job inside the job, fails in its hooks or in the
middle of sampling, interrupts, skips, and tells what lives in the process. Its one argument says which; empty, it does
nothing."""

import gc
import os

import gradio as gr
import torch
from modules import img2img, processing, script_callbacks, scripts, shared

wanted = ""
drawn = None
"""What the img2img batch has drawn so far; None outside one."""

HOOKS = (
    "before_process",
    "process",
    "before_process_batch",
    "after_extra_networks_activate",
    "process_batch",
    "process_before_every_sampling",
    "post_sample",
    "postprocess_batch",
    "postprocess_batch_list",
    "postprocess_image",
    "postprocess",
)


class AcceptanceProbe(scripts.Script):
    inside = False

    def title(self):
        return "Acceptance probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("", visible=False)]

    def hook(self, name, p, args, rest):
        global wanted
        what = args[0] if args else ""
        if name == "before_process":
            wanted = what
        if name == "postprocess_image":
            if drawn is not None:
                drawn.append(rest[0].image)
            if what.startswith("nested") and not AcceptanceProbe.inside:
                self.nested(p, rest[0], what)
        if what == "raise":
            raise RuntimeError(f"The probe raises in {name}, as it was told.")

    def nested(self, p, pp, what):
        AcceptanceProbe.inside = True
        try:
            inner = processing.StableDiffusionProcessingImg2Img(
                sd_model=shared.sd_model,
                outpath_samples=p.outpath_samples,
                outpath_grids=p.outpath_grids,
                prompt=p.prompt,
                negative_prompt=p.negative_prompt,
                sampler_name=p.sampler_name,
                seed=p.seed,
                steps=4,
                cfg_scale=p.cfg_scale,
                width=p.width,
                height=p.height,
                init_images=[pp.image],
                denoising_strength=0.75,
                do_not_save_samples=True,
                do_not_save_grid=True,
            )
            inner.scripts, inner.script_args = p.scripts, list(p.script_args)
            if what == "nested unit":  # the units are for the inner job alone
                inner.script_args = [True if a is False and is_unit(b) else a for a, b in pairs(p.script_args)]
            pp.image = processing.process_images(inner).images[0]
        finally:
            AcceptanceProbe.inside = False


def pairs(args):
    return zip(args, [*args[1:], None], strict=True)


def is_unit(value):
    return isinstance(value, dict) and "images" in value


def make_hook(name):
    def hook(self, p, *args, **kwargs):
        # The hooks that get something beside p have it first.
        rest = args[:1] if name in ("postprocess", "postprocess_image", "postprocess_batch_list", "post_sample") else ()
        self.hook(name, p, args[len(rest) :], rest)

    return hook


for each in HOOKS:
    setattr(AcceptanceProbe, each, make_hook(each))


class AcceptanceBatch(scripts.Script):
    """Runs the page's img2img batch over the request's picture and its mirror image."""

    def title(self):
        return "Acceptance batch"

    def show(self, is_img2img):
        return is_img2img

    def run(self, p, *args):
        global drawn
        import tempfile

        from PIL import ImageOps

        picture = p.init_images[0]
        with tempfile.TemporaryDirectory() as folder:
            picture.save(os.path.join(folder, "1.png"))
            ImageOps.mirror(picture).save(os.path.join(folder, "2.png"))
            drawn = []
            try:
                img2img.process_batch(p, folder, "", "", [0, *p.script_args[1:]])
                return processing.Processed(p, drawn, p.seed, "", infotexts=[infotext(p)] * len(drawn))
            finally:
                drawn = None


def infotext(p):
    return processing.create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds)


def loaded_unet():
    unet = getattr(getattr(shared.sd_model, "model", None), "diffusion_model", None)
    return unet if unet is not None else shared.sd_model.forge_objects.unet.model.diffusion_model


def fail_next_call(module):
    def raiser(*args):
        handle.remove()
        raise RuntimeError("The probe fails in the middle of sampling, as it was told.")

    handle = module.register_forward_pre_hook(raiser)


def on_cfg_denoiser(params):
    if wanted == "interrupt" and params.sampling_step >= 1:
        shared.state.interrupted = True
    if wanted == "skip" and params.sampling_step >= 1:
        shared.state.skipped = True
    if wanted == "fail" and params.sampling_step >= 1:
        fail_next_call(loaded_unet())
    if wanted == "raise":
        raise RuntimeError("The probe raises in the denoiser callback, as it was told.")


def state():
    """What lives in the process: resident memory in bytes, tensors, hooks on the UNet's modules."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded_unet().modules())
    tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    return {"resident": resident, "tensors": tensors, "hooks": hooks}


def reload():
    shared.state.request_restart()
    return {}


def on_app_started(demo, app):
    app.add_api_route("/acceptance/state", state, methods=["GET"])
    app.add_api_route("/acceptance/reload", reload, methods=["POST"])


script_callbacks.on_cfg_denoiser(on_cfg_denoiser)
script_callbacks.on_app_started(on_app_started)

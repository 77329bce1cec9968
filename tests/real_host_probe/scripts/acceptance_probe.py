"""Linked into a WebUI by ``tests/real_host.py``: on request it runs a job inside the job, fails in the middle of
sampling, or interrupts. Its one argument says which; empty, it does nothing."""

import gradio as gr
from modules import processing, script_callbacks, scripts, shared

wanted = ""


class AcceptanceProbe(scripts.Script):
    inside = False

    def title(self):
        return "Acceptance probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("", visible=False)]

    def process(self, p, what="", *args):
        global wanted
        wanted = what

    def postprocess_image(self, p, pp, what="", *args):
        if what != "nested" or AcceptanceProbe.inside:
            return
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
            inner.scripts, inner.script_args = p.scripts, p.script_args
            pp.image = processing.process_images(inner).images[0]
        finally:
            AcceptanceProbe.inside = False


def on_cfg_denoiser(params):
    if wanted == "interrupt" and params.sampling_step >= 1:
        shared.state.interrupted = True
    if wanted == "fail" and params.sampling_step >= 1:
        params.x = params.x[:, :, :1, :1, None]  # no UNet takes this


script_callbacks.on_cfg_denoiser(on_cfg_denoiser)

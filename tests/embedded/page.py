"""The page: txt2img and img2img tabs with the scripts' accordions, in gradio 4."""

from __future__ import annotations

import html
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from .components import plaintext_to_html
from .gradio_compat import GRADIO_3, gr
from .infotext import parse_generation_parameters
from .jobs import LATENT_UPSCALERS
from .samplers import SAMPLERS
from .schedules import SCHEDULES

if TYPE_CHECKING:
    from .host import Host

ASSETS = Path(__file__).parent / "assets"


class Tab:
    """Components of one tab."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: dict[str, Any] = {}
        """Components whose values are fields of the job, by field name."""
        self.script_inputs: list[Any] = []
        self.labels: dict[str, str] = {}
        """Infotext label by field name."""


class Page:
    """The gradio blocks of one host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.tabs: dict[str, Tab] = {}
        # as on Forge, jobs of the page run in another thread than gradio's: toasts have no effect there
        self._worker = ThreadPoolExecutor(1)
        with (
            gr.Blocks(
                title="Embedded host", css=self._css(), analytics_enabled=False, **self._own_head()
            ) as self.blocks,
            gr.Tabs(elem_id="tabs"),
        ):
            for name in ("txt2img", "img2img"):
                with gr.Tab(name, id=name, elem_id=f"tab_{name}"):
                    self._tab(name)
            with gr.Tab("PNG Info", id="pnginfo", elem_id="tab_pnginfo"):
                self._png_info()
            for extra in host.callbacks.run("ui_tabs"):
                for blocks, title, ident in extra or []:
                    with gr.Tab(title, id=ident, elem_id=f"tab_{ident}"):
                        blocks.render()

    def mount(self, app: FastAPI) -> None:
        """Serve the page, and under ``/file=`` the data folder, at the root of an app that has its other routes.

        On the hosts gradio has set the paths before extensions may add to them; here it does so last.
        """
        blocked, data = list(self.blocks.blocked_paths), str(self.host.cmd_opts.data_dir)
        if GRADIO_3:
            self.blocks.allowed_paths = [data]
            gr.mount_gradio_app(app, self.blocks, path="/")
        else:
            gr.mount_gradio_app(app, self.blocks, path="/", allowed_paths=[data], blocked_paths=blocked)

    def _own_head(self) -> dict[str, Any]:
        """Gradio 4 takes what stands in the page's head; gradio 3 doesn't, so its template is given it."""
        if not GRADIO_3:
            return {"head": self._head()}
        from gradio import routes

        made, head = routes.templates.TemplateResponse, self._head()

        def template(*args: Any, **kwargs: Any) -> Any:
            answer = made(*args, **kwargs)
            answer.body = answer.body.replace(b"</head>", f"{head}</head>".encode(), 1)
            answer.init_headers()
            return answer

        routes.templates.TemplateResponse = template
        return {}

    def _head(self) -> str:
        scripts = [ASSETS / "script.js", *self._files("javascript", ".js", ".mjs")]
        return "\n".join(
            f"<script{' type=module' if f.suffix == '.mjs' else ''}>\n{f.read_text('utf-8')}\n</script>"
            for f in scripts
        )

    def _css(self) -> str:
        styles = [ASSETS / "style.css", *(Path(e.path, "style.css") for e in self.host.extensions)]
        return "\n".join(f.read_text("utf-8") for f in styles if f.is_file())

    def _files(self, folder: str, *suffixes: str) -> list[Path]:
        return [Path(f.path) for e in self.host.extensions for s in suffixes for f in e.list_files(folder, s)]

    def _tab(self, name: str) -> None:
        tab = self.tabs[name] = Tab(name)

        def add(field: str, component: Any, label: str | None = None) -> None:
            tab.fields[field] = component
            if label is not None:
                tab.labels[field] = label

        with gr.Row():
            with gr.Column(scale=6):
                add("prompt", gr.Textbox("", label="Prompt", lines=3, elem_id=f"{name}_prompt"), "Prompt")
                negative = gr.Textbox("", label="Negative prompt", lines=2, elem_id=f"{name}_neg_prompt")
                add("negative_prompt", negative, "Negative prompt")
            with gr.Column(scale=1, min_width=120):
                generate = gr.Button("Generate", variant="primary", elem_id=f"{name}_generate")
                interrupt = gr.Button("Interrupt", elem_id=f"{name}_interrupt")
                paste = gr.Button("↙", elem_id=f"{name}_paste", elem_classes=["tool"])
        runner = self.host.runners[name]
        runner.prepare_ui()
        with gr.Row():
            with gr.Column(elem_id=f"{name}_settings"):
                if name == "img2img":
                    add(
                        "init_images",
                        gr.Image(
                            label="Image",
                            type="pil",
                            elem_id="img2img_image",
                            **({} if GRADIO_3 else {"sources": ["upload"]}),
                        ),
                    )
                with gr.Row():
                    choices = [s.name for s in SAMPLERS]
                    add(
                        "sampler_name",
                        gr.Dropdown(choices, value=choices[0], label="Sampling method", elem_id=f"{name}_sampling"),
                        "Sampler",
                    )
                    labels = [s.label for s in SCHEDULES]
                    add(
                        "scheduler",
                        gr.Dropdown(labels, value=labels[0], label="Schedule type", elem_id=f"{name}_scheduler"),
                        "Schedule type",
                    )
                    steps = gr.Slider(1, 150, 8, step=1, label="Sampling steps", elem_id=f"{name}_steps")
                    add("steps", steps, "Steps")
                runner.setup_ui_for_section("sampler")
                if name == "txt2img":
                    self._hires(add)
                with gr.Row():
                    add("width", gr.Slider(64, 1024, 256, step=8, label="Width", elem_id=f"{name}_width"), "Size-1")
                    add("height", gr.Slider(64, 1024, 256, step=8, label="Height", elem_id=f"{name}_height"), "Size-2")
                    count = gr.Slider(1, 8, 1, step=1, label="Batch count", elem_id=f"{name}_batch_count")
                    add("n_iter", count)
                    size = gr.Slider(1, 8, 1, step=1, label="Batch size", elem_id=f"{name}_batch_size")
                    add("batch_size", size)
                runner.setup_ui_for_section("dimensions")
                with gr.Row():
                    cfg = gr.Slider(1, 30, 7, step=0.5, label="CFG Scale", elem_id=f"{name}_cfg_scale")
                    add("cfg_scale", cfg, "CFG scale")
                    if name == "img2img":
                        strength = gr.Slider(
                            0, 1, 0.75, step=0.01, label="Denoising strength", elem_id="img2img_denoising_strength"
                        )
                        add("denoising_strength", strength, "Denoising strength")
                    add("seed", gr.Number(-1, label="Seed", precision=0, elem_id=f"{name}_seed"), "Seed")
                # scripts' own sections come last, and only a setting that this host hasn't moves them
                for section in dict.fromkeys(("cfg", "seed", *(each.section for each in runner.alwayson_scripts))):
                    if section not in (None, "sampler", "dimensions"):
                        runner.setup_ui_for_section(section)
                tab.script_inputs = runner.setup_ui()
            with gr.Column(elem_id=f"{name}_results"):
                gallery = gr.Gallery(
                    label="Output",
                    elem_id=f"{name}_gallery",
                    columns=4,
                    height=512,
                    **({} if GRADIO_3 else {"format": "png"}),
                )
                gr.Row(elem_id=f"image_buttons_{name}", elem_classes=["image-buttons"])
                info = gr.Textbox(visible=False, elem_id=f"generation_info_{name}")
                html_info = gr.HTML(elem_id=f"html_info_{name}", elem_classes=["infotext"])
                html_log = gr.HTML(elem_id=f"html_log_{name}")
        inputs = [*tab.fields.values(), *tab.script_inputs]
        outputs = [gallery, info, html_info, html_log]
        generate.click(self._generate(name), inputs, outputs, api_name=False)
        interrupt.click(self.host.state.interrupt, [], [], api_name=False, queue=False)
        pasted = [component for component, _ in self.paste_fields(name)]
        paste.click(lambda text: self._paste(name, text), [tab.fields["prompt"]], pasted, api_name=False)

    def _png_info(self) -> None:
        """The parameters that a picture's file has in it, and the buttons that paste them into a tab."""
        sources = {} if GRADIO_3 else {"sources": ["upload"]}
        image = gr.Image(label="Source", type="pil", elem_id="pnginfo_image", **sources)
        text = gr.Textbox(label="Parameters", elem_id="pnginfo_generation_info", interactive=False)
        image.change(lambda file: file.info.get("parameters", "") if file else "", [image], [text], api_name=False)
        with gr.Row(elem_classes=["image-buttons"]):
            for name in self.tabs:
                send = gr.Button(f"Send to {name}", elem_id=f"{name}_tab")
                pasted = [component for component, _ in self.paste_fields(name)]
                js = {"_js" if GRADIO_3 else "js": f"(...values) => {{ switch_to_{name}(); return values; }}"}
                send.click(partial(self._paste, name), [text], pasted, api_name=False, **js)

    def _hires(self, add: Callable[..., None]) -> None:
        from .components import InputAccordion

        with InputAccordion(False, label="Hires. fix", elem_id="txt2img_hr") as enable:
            add("enable_hr", enable)
            with gr.Row():
                names = list(LATENT_UPSCALERS)
                add("hr_upscaler", gr.Dropdown(names, value=names[0], label="Upscaler", elem_id="txt2img_hr_upscaler"))
                add("hr_scale", gr.Slider(1, 4, 2, step=0.05, label="Upscale by", elem_id="txt2img_hr_scale"))
                steps = gr.Slider(0, 150, 0, step=1, label="Hires steps", elem_id="txt2img_hires_steps")
                add("hr_second_pass_steps", steps)
            with gr.Row():
                strength = gr.Slider(0, 1, 0.7, step=0.01, label="Denoising strength", elem_id="txt2img_denoise")
                add("denoising_strength", strength, "Denoising strength")
                add("hr_cfg", gr.Slider(1, 30, 7, step=0.5, label="Hires CFG Scale", elem_id="txt2img_hr_cfg"))

    def _generate(self, name: str) -> Callable[..., Any]:
        fields = list(self.tabs[name].fields)

        def generate(*values: Any) -> Any:
            job = dict(zip(fields, values, strict=False))
            return self._worker.submit(self.generate, name, job, values[len(fields) :]).result()

        return generate

    def generate(self, name: str, job: dict[str, Any], script_args: tuple[Any, ...]) -> tuple[Any, str, str, str]:
        """Run a job of the page: pictures, info (JSON), infotext and log as HTML. An exception becomes the log."""
        host, begun = self.host, time.perf_counter()
        try:
            if name == "img2img":
                image = job.pop("init_images")
                job["init_images"] = [] if image is None else [image]
            p = (host.Txt2Img if name == "txt2img" else host.Img2Img)(**job)
            p.scripts = host.runners[name]
            p.script_args = script_args
            done = host.process(p)
            pictures = [*done.images, *done.extra_images]
            result = (pictures, done.js(), plaintext_to_html(done.info), plaintext_to_html(done.comments, "comments"))
        except Exception as error:
            traceback.print_exc()
            message = html.escape(f"{type(error).__name__}: {error}")
            result = ([], "", "", f"<div class='error'>{message}</div>")
        finally:
            host.state.skipped = host.state.interrupted = host.state.stopping_generation = False
        taken = f"<div class='performance'><p class='time'>Time taken: {time.perf_counter() - begun:.3f} sec.</p></div>"
        return (*result[:3], result[3] + taken)

    def paste_fields(self, name: str) -> list[tuple[Any, Any]]:
        """Components that an infotext fills, with their label or function: the tab's own, then the scripts'."""
        tab = self.tabs[name]
        own = [(tab.fields[field], label) for field, label in tab.labels.items()]
        return [*own, *((entry[0], entry[1]) for entry in self.host.runners[name].infotext_fields)]

    def _paste(self, name: str, text: str) -> Any:
        updates = [update for _, update in self.pasted(name, text)]
        return updates if len(updates) > 1 else updates[0]

    def pasted(self, name: str, text: str) -> list[tuple[Any, Any]]:
        """What pasting an infotext into a tab sets: (component, update) pairs, by the hosts' casting rules."""
        params = parse_generation_parameters(text)
        self.host.callbacks.run("infotext_pasted", text, params)
        return [(component, self._update(component, key, params)) for component, key in self.paste_fields(name)]

    def _update(self, component: Any, key: Any, params: dict[str, Any]) -> Any:
        try:
            value = key(params) if callable(key) else params.get(key)
        except Exception as error:
            self.host.reports.report(f"Error executing {key}", error)
            value = None
        if value is None:
            return gr.update()
        if isinstance(value, dict) and value.get("__type__") == "update":
            return value
        kind = type(component.value)
        try:
            if kind is bool and value == "False":
                return gr.update(value=False)
            return gr.update(value=float(value) if kind is int else kind(value))
        except (TypeError, ValueError):
            return gr.update()

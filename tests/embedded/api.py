"""The HTTP API under ``/sdapi/v1``."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from typing import TYPE_CHECKING, Any, get_type_hints

from fastapi import FastAPI, HTTPException, Request
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError, create_model

from .images import decode_base64_to_image, encode_pil_to_base64
from .infotext import parse_generation_parameters
from .samplers import SAMPLERS
from .sampling import resolve
from .schedules import SCHEDULES

if TYPE_CHECKING:
    from .host import Host

COMMON_FIELDS: dict[str, Any] = {
    "sampler_index": (str, "Euler"),
    "script_name": (str | None, None),
    "script_args": (list[Any], []),
    "send_images": (bool, True),
    "save_images": (bool, False),
    "alwayson_scripts": (dict[str, Any], {}),
    "infotext": (str | None, None),
}
"""Fields of a request that aren't fields of the job."""

IMG2IMG_FIELDS: dict[str, Any] = {
    "init_images": (list[str] | None, None),
    "mask": (str | None, None),
    "include_init_images": (bool, False),
}

_HIDDEN = {"sd_model", "outpath_samples", "outpath_grids", "init_images"}
_ANNOTATIONS = {"prompt": str, "negative_prompt": str}


def request_model(name: str, job: type, extra: dict[str, Any]) -> type[BaseModel]:
    """The request's model: the job's fields with their defaults, and the API's own; unknown fields are ignored."""
    hints = get_type_hints(job)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(job):
        if field.name not in _HIDDEN:
            fields[field.name] = (_ANNOTATIONS.get(field.name, hints[field.name]), field.default)
    made: type[BaseModel] = create_model(name, **fields, **COMMON_FIELDS, **extra)
    return made


def handle_exception(request: Request, error: Exception) -> JSONResponse:
    """An exception of a job as the hosts answer it: its ``status_code`` and ``detail`` if it has them, else 500."""
    known = vars(error)
    content = {
        "error": type(error).__name__,
        "detail": known.get("detail", ""),
        "body": known.get("body", ""),
        "message": str(error),
    }
    return JSONResponse(status_code=int(known.get("status_code", 500)), content=jsonable_encoder(content))


class Api:
    """Routes over one host. Jobs run in the request's thread, one at a time."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.app = FastAPI(title="Embedded host", exception_handlers={Exception: handle_exception})
        self.models = {
            "txt2img": request_model("Txt2ImgRequest", host.Txt2Img, {}),
            "img2img": request_model("Img2ImgRequest", host.Img2Img, IMG2IMG_FIELDS),
        }
        self.default_script_args = {tab: runner.default_script_args() for tab, runner in host.runners.items()}
        self._routes()

    def _routes(self) -> None:
        app, host = self.app, self.host

        @app.post("/sdapi/v1/txt2img")
        def txt2img(request: Request, fields: dict[str, Any]) -> Any:
            return self._answer(request, "txt2img", fields)

        @app.post("/sdapi/v1/img2img")
        def img2img(request: Request, fields: dict[str, Any]) -> Any:
            return self._answer(request, "img2img", fields)

        @app.get("/sdapi/v1/scripts")
        def scripts() -> Any:
            return {tab: [s.name for s in r.scripts if s.name is not None] for tab, r in host.runners.items()}

        @app.get("/sdapi/v1/script-info")
        def script_info() -> Any:
            runners = host.runners.values()
            return [s.api_info for r in runners for s in r.scripts if s.api_info is not None]

        @app.get("/sdapi/v1/options")
        def get_options() -> Any:
            return jsonable_encoder(host.opts.data)

        @app.post("/sdapi/v1/options")
        def set_options(values: dict[str, Any]) -> None:
            for key, value in values.items():
                host.opts.set(key, value, is_api=True)

        @app.get("/sdapi/v1/samplers")
        def samplers() -> Any:
            return [
                {"name": s.name, "aliases": s.aliases, "options": {k: str(v) for k, v in s.options.items()}}
                for s in SAMPLERS
            ]

        @app.get("/sdapi/v1/schedulers")
        def schedulers() -> Any:
            return [{"name": s.name, "label": s.label} for s in SCHEDULES]

        @app.get("/sdapi/v1/progress")
        def progress() -> Any:
            state = host.state
            return {
                "progress": state.progress,
                "eta_relative": 0.0,
                "state": state.dict(),
                "current_image": None,
                "textinfo": state.textinfo,
            }

        @app.post("/sdapi/v1/interrupt")
        def interrupt() -> Any:
            host.state.interrupt()
            return {}

        @app.post("/sdapi/v1/skip")
        def skip() -> None:
            host.state.skip()

        @app.get("/sdapi/v1/sd-models")
        def sd_models() -> Any:
            info = host.sd_model.sd_checkpoint_info
            entry = {"title": info.title, "model_name": info.name, "hash": info.shorthash, "sha256": None}
            return [{**entry, "filename": info.filename, "config": None}]

        @app.post("/sdapi/v1/png-info")
        def png_info(fields: dict[str, Any]) -> Any:
            image = decode_base64_to_image(fields["image"].strip())
            text = str(image.info.get("parameters", ""))
            params = parse_generation_parameters(text)
            host.callbacks.run("infotext_pasted", text, params)
            items = {k: v for k, v in image.info.items() if isinstance(v, str)}
            return {"info": text, "items": items, "parameters": params}

    def _answer(self, request: Request, tab: str, fields: dict[str, Any]) -> Any:
        try:
            return self.run(tab, fields)
        except ValidationError as error:
            return JSONResponse(status_code=422, content={"detail": jsonable_encoder(error.errors(include_url=False))})
        except HTTPException:
            raise
        except Exception as error:
            if "status_code" in vars(error):
                print(f"API error: {request.method}: {request.url} {type(error).__name__}: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            return handle_exception(request, error)

    def run(self, tab: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Do one request; the answer's fields ``images`` (base64 PNG), ``parameters`` and ``info`` (JSON text)."""
        host, runner = self.host, self.host.runners[tab]
        request = self.models[tab](**fields)
        values = {
            key: getattr(request, key)
            for key in getattr(type(request), "model_fields", None) or type(request).__fields__
        }
        if values["infotext"]:
            raise HTTPException(422, "this small WebUI does not read the field 'infotext': send the values themselves")
        script_args = self._script_args(tab, values)
        sampler, scheduler = values["sampler_name"] or values["sampler_index"], values["scheduler"]
        if resolve(sampler, scheduler)[0] not in sampler:
            raise HTTPException(status_code=400, detail="Sampler not found")
        job_fields = {f.name for f in dataclasses.fields(host.Txt2Img if tab == "txt2img" else host.Img2Img)} - _HIDDEN
        job: dict[str, Any] = {key: value for key, value in values.items() if key in job_fields}
        job.update(sampler_name=resolve(sampler, scheduler)[0], scheduler=resolve(sampler, scheduler)[1])
        job.update(do_not_save_samples=not values["save_images"], do_not_save_grid=not values["save_images"])
        if tab == "img2img":
            if values["init_images"] is None:
                raise HTTPException(status_code=404, detail="Init image not found")
            if values["mask"]:
                raise HTTPException(422, "this small WebUI does no inpainting: leave out the field 'mask'")
            job["init_images"] = [decode_base64_to_image(x) for x in values["init_images"]]
        p = (host.Txt2Img if tab == "txt2img" else host.Img2Img)(**job)
        p.is_api = True
        p.scripts = runner
        p.script_args = tuple(script_args)
        processed = host.process(p)
        pictures = [*processed.images, *processed.extra_images] if values["send_images"] else []
        parameters = dict(values)
        if tab == "img2img" and not values["include_init_images"]:
            parameters["init_images"] = None
        return {
            "images": [encode_pil_to_base64(image).decode() for image in pictures],
            "parameters": jsonable_encoder(parameters),
            "info": processed.js(),
        }

    def _script_args(self, tab: str, values: dict[str, Any]) -> list[Any]:
        """Args of all scripts: defaults, with the request's in their places (positional, cut to the shorter)."""
        runner = self.host.runners[tab]
        args = list(self.default_script_args[tab])
        if values["script_name"]:
            script = runner.script_by_title(values["script_name"])
            if script is None or script.alwayson:
                raise HTTPException(status_code=422, detail=f"Script '{values['script_name']}' not found")
            args[0] = runner.selectable_scripts.index(script) + 1
            args[script.args_from : script.args_to] = values["script_args"]
        for name, given in values["alwayson_scripts"].items():
            script = runner.script_by_title(name)
            if script is None:
                raise HTTPException(status_code=422, detail=f"Script '{name}' not found")
            if not script.alwayson:
                raise HTTPException(422, "Cannot have a selectable script in the always on scripts params")
            assert script.args_from is not None
            assert script.args_to is not None
            for i, value in enumerate(given.get("args", [])[: script.args_to - script.args_from]):
                args[script.args_from + i] = value
        return args

"""Our routes in an installed WebUI, and behind its page's login."""

from __future__ import annotations

import base64
import io
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from PIL import Image

from .cases import PHOTOGRAPH, unit
from .webui import Server

LOGIN = ("somebody", "secret")
LOGIN_FLAGS = ["--gradio-auth", ":".join(LOGIN)]


def routes_problem(server: Server, plain: Mapping[str, Any]) -> str:
    """What went wrong; empty if nothing did. The WebUI has a server name, so it refuses extension access."""
    server.call("/sdapi/v1/txt2img", dict(plain))  # a checkpoint is loaded
    status, told = server.call("/ip-adapter/check", {"unit": unit(stop=0.5), "steps": 10})
    expected = {"formulation": "joint", "uncond": "zero pixels", "fits_checkpoint": True}
    if status != 200 or any(told[key] != value for key, value in expected.items()) or not told["steps"]["acting"]:
        return f"check answered {status}: {str(told)[:300]}"
    adapters = {each["name"]: each for each in server.call("/ip-adapter/models")[1]["adapters"]}
    if not adapters["acceptance-plus.safetensors"]["encoder_present"]:
        return "models doesn't see the image encoder"
    if told["encoder"] not in [each["name"] for each in server.call("/ip-adapter/encoders")[1]["encoders"]]:
        return "encoders doesn't list the one that check tells"
    asked = {"images": [PHOTOGRAPH], "model": "acceptance-plus.safetensors"}
    status, seen = server.call("/ip-adapter/preview", asked)
    if status != 200 or Image.open(io.BytesIO(base64.b64decode(seen["images"][0]))).size != (seen["size"],) * 2:
        return f"preview answered {status}: {str(seen)[:300]}"
    for path, body, headers, wanted, sentence in (
        ("/ip-adapter/check", {"unit": unit() | {"weight": 9}}, {}, 422, '"weight" is 9'),
        ("/ip-adapter/check", {"unit": unit(stop=0.2), "steps": 4, "denoising_strength": 0.5}, {}, 422, "never act"),
        ("/ip-adapter/check", {"unit": unit()}, {"Content-Type": "text/plain"}, 415, "application/json"),
        ("/ip-adapter/check", {"unit": unit()}, {"Origin": "https://example"}, 403, "https://example"),
        ("/ip-adapter/encoders", None, {"Host": "tunnel.example"}, 403, "--api-auth"),
        ("/ip-adapter/references", None, {}, 403, "extension access"),
        ("/ip-adapter/download", {"name": "ip-adapter_sd15"}, {}, 403, "extension access"),
    ):
        status, answer = server.call(path, body, headers)
        if status != wanted or sentence not in str(answer.get("detail")):
            return f"{path} with {headers or body} answered {status}: {str(answer)[:300]}"
    status, answer = server.call("/ip-adapter/version", None, {"Host": "tunnel.example"})
    return "" if status == 200 else f"version answered {status}: {answer}"


def login_problem(server: Server) -> str:
    """The same for a WebUI whose page has a login, started with :data:`LOGIN_FLAGS`."""
    status = server.call("/ip-adapter/version")[0]
    if status != 401:
        return f"without the login version answered {status}"
    fields = urllib.parse.urlencode(dict(zip(("username", "password"), LOGIN, strict=True))).encode()
    with urllib.request.urlopen(f"{server.url}/login", fields, timeout=60) as answer:
        cookies = [value.partition(";")[0] for value in answer.headers.get_all("Set-Cookie")]
    for value, wanted in (("; ".join(cookies), 200), ("; ".join(f"{each}x" for each in cookies), 401)):
        status = server.call("/ip-adapter/encoders", None, {"Cookie": value})[0]
        if status != wanted:
            return f"with {'the' if wanted == 200 else 'a wrong'} login encoders answered {status}"
    return ""

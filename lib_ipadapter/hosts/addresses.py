"""Pictures at web addresses: fetched by the WebUI's own function, where its own settings allow it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from PIL.Image import Image

from ..errors import IPAdapterError
from ..pictures import read_picture

SETTING = "api_enable_requests"


def fetch(address: str) -> Image:
    """The picture at an address.

    Raises:
        IPAdapterError: if the settings forbid it, or there is no picture.
    """
    opts: Any = import_module("modules.shared").opts
    shown = address if len(address) <= 60 else address[:59] + "…"
    if not getattr(opts, SETTING, False):
        raise IPAdapterError(
            f"The picture is the address \"{shown}\", and this WebUI's settings don't allow addresses in the API: give "
            "it as base64 or a data URI."
        )
    api: Any = import_module("modules.api.api")
    try:
        picture: Image = api.decode_base64_to_image(address)  # refuses local addresses by a setting of its own
    except Exception as error:
        reason = " ".join(str(getattr(error, "detail", "") or error).split())[:200]
        raise IPAdapterError(
            f'The picture at "{shown}" can\'t be fetched ({reason}): give it as base64 or a data URI.'
        ) from error
    return read_picture(picture)

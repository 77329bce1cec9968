"""What a WebUI's command line says of who may do what."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any


def extension_access() -> bool:
    """Whether people at this WebUI may add files to it; by default not where strangers may reach it."""
    return not getattr(_options(), "disable_extension_access", True)


def allows_origin(origin: str) -> bool:
    """Whether the owner lets the scripts of another site's page call the API."""
    options = _options()
    listed = [each.strip() for each in (getattr(options, "cors_allow_origins", None) or "").split(",")]
    pattern = getattr(options, "cors_allow_origins_regex", None)
    return origin in listed or "*" in listed or bool(pattern and re.fullmatch(pattern, origin))


def _options() -> Any:
    return import_module("modules.shared").cmd_opts

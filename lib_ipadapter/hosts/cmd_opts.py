"""What a WebUI's command line says of who may do what."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def extension_access() -> bool:
    """Whether people at this WebUI may add files to it; by default not where strangers may reach it."""
    return not getattr(_options(), "disable_extension_access", True)


def allowed_origins() -> tuple[str, ...]:
    """Other pages whose scripts the owner lets call the API."""
    given = getattr(_options(), "cors_allow_origins", None) or ""
    return tuple(origin.strip() for origin in given.split(",") if origin.strip())


def _options() -> Any:
    return import_module("modules.shared").cmd_opts

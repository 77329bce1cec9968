"""Who may call which route of the HTTP API. Hosts protect their own routes only, so ours are asked about here.

All routes exist only beside the host's API and stand behind the logins that the host asks for; what is left to decide
is in :data:`ROUTES` and :func:`refusal`. Nothing here knows a web framework.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

JSON = "application/json"


@dataclass(frozen=True)
class Route:
    """One route and what it asks of who calls it."""

    method: str
    path: str
    answer: str
    """Name of the method that answers, see :class:`.api.Answers`."""
    open: bool = False
    """Whether it answers other machines where the host asks for no login."""
    trusted: bool = False
    """Whether it asks for extension access: it gives people's pictures away, or writes files."""


ROUTES = (
    Route("GET", "/ip-adapter/version", "version", open=True),
    Route("GET", "/ip-adapter/models", "models", open=True),
    Route("GET", "/ip-adapter/encoders", "encoders"),
    Route("POST", "/ip-adapter/check", "check"),
    Route("POST", "/ip-adapter/preview", "preview"),
    Route("GET", "/ip-adapter/references", "references", trusted=True),
    Route("GET", "/ip-adapter/references/{sha256}", "reference", trusted=True),
    Route("DELETE", "/ip-adapter/references/{sha256}", "forget_reference", trusted=True),
    Route("GET", "/ip-adapter/saved", "saved", trusted=True),
    Route("POST", "/ip-adapter/saved", "save", trusted=True),
    Route("GET", "/ip-adapter/saved/{name}", "thumbnail", trusted=True),
    Route("DELETE", "/ip-adapter/saved/{name}", "forget_saved", trusted=True),
    Route("GET", "/ip-adapter/catalogue", "catalogue"),
    Route("GET", "/ip-adapter/download", "download"),
    Route("POST", "/ip-adapter/download", "start_download", trusted=True),
    Route("POST", "/ip-adapter/download/cancel", "cancel_download"),
)

_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
"""Headers of a proxy or tunnel, whose own address says nothing of who calls."""


@dataclass(frozen=True)
class Caller:
    """What a request says of who sent it.

    Attributes:
        address: where it came from; empty if unknown.
        headers: by name in lower case.
        logged_in: whether the host asks for a login (and so had one, or the request wouldn't have come so far).
        has_body: whether anything was sent.
    """

    address: str
    headers: Mapping[str, str] = field(default_factory=dict)
    logged_in: bool = False
    has_body: bool = False

    @property
    def is_here(self) -> bool:
        """Whether it is a program on this machine, as far as can be told: tunnels and proxies come from here too."""
        named = urlsplit(f"//{self.headers.get('host', '')}").hostname or ""
        proxied = any(name in self.headers for name in _FORWARDED)
        return _is_loopback(self.address) and _is_loopback(named) and not proxied


def refusal(
    route: Route, caller: Caller, extension_access: bool, allows_origin: Callable[[str], bool] = lambda _: False
) -> tuple[int, str] | None:
    """Status and sentence if ``caller`` may not call ``route``, else None.

    Args:
        extension_access: whether people at this WebUI may add files to it.
        allows_origin: whether the host's owner lets the pages of another site call the API.
    """
    what = f"{route.method} {route.path}"
    origin = caller.headers.get("origin", "")
    here = caller.headers.get("host", "").lower()
    if origin and origin.lower().partition("://")[2] != here and not allows_origin(origin):
        return 403, (
            f"{what} is called by a page of {_clip(origin)}, and only pages of this WebUI may: call it from a program, "
            "or allow that origin with --cors-allow-origins."
        )
    kind = caller.headers.get("content-type", "")
    if route.method == "POST" and (kind or caller.has_body) and kind.partition(";")[0].strip().lower() != JSON:
        return 415, f'{what} is sent as "{_clip(kind)}"; allowed is {JSON}: send JSON and say so in Content-Type.'
    if route.trusted and not extension_access:
        return 403, (
            f"{what} is refused because extension access is disabled on this WebUI: start it without --listen, "
            "--server-name or --share, or with --enable-insecure-extension-access."
        )
    if not (route.open or caller.logged_in or caller.is_here):
        return 403, (
            f"{what} is refused to {_clip(caller.address) or 'unknown'}, because without a login it answers only "
            "programs on the WebUI's own machine: start the WebUI with --api-auth or --gradio-auth."
        )
    return None


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _clip(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"

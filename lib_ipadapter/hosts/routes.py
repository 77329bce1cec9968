"""Puts our routes beside a host's own; who may call them is decided in ``access``, what they answer in ``api``."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Depends, FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..access import ROUTES, Caller, Route, refusal
from ..errors import IPAdapterError
from .cmd_opts import allows_origin, extension_access

HOST_ROUTE = "/sdapi/v1/sd-models"
"""One of the host's API, beside which ours stand."""
LOGIN_CHECK = "/login_check"
"""gradio's own route, whose function knows in every version whether who asks has logged in."""

Answer = Callable[[Mapping[str, Any]], dict[str, Any] | bytes]


def add_routes(app: FastAPI, answers: object) -> None:
    """Adds every route, if the host's API is there. Each asks for the logins that the API and the page ask for.

    Args:
        answers: has a method for each route.
    """
    host = next((route for route in app.routes if getattr(route, "path", "") == HOST_ROUTE), None)
    if host is None:
        return
    dependencies = list(getattr(host, "dependencies", ()))
    login_set = any(getattr(app, name, None) is not None for name in ("auth", "auth_dependency"))
    if login_set:
        checks = [route for route in app.routes if getattr(route, "path", "") == LOGIN_CHECK]
        if not checks:  # a login that can't be asked about protects nothing
            print("IP-Adapter has no HTTP routes here, because this gradio's login can't be checked.")
            return
        dependencies.append(Depends(checks[0].endpoint))  # type: ignore[attr-defined]
    for route in ROUTES:
        app.add_api_route(
            route.path,
            _endpoint(route, getattr(answers, route.answer), bool(dependencies)),
            methods=[route.method],
            response_model=None,  # neither generation of pydantic shall have a say in a plain dict
            dependencies=dependencies,
            description=getattr(answers, route.answer).__doc__,
        )


def _endpoint(route: Route, answer: Answer, logged_in: bool) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def endpoint(request: Request) -> Response:
        body = await request.body()
        caller = Caller(request.client.host if request.client else "", dict(request.headers), logged_in, bool(body))
        refused = refusal(route, caller, extension_access(), allows_origin)
        if refused is not None:
            return JSONResponse({"detail": refused[1]}, refused[0])
        try:
            asked = {**(_fields(body) if route.method == "POST" else {}), **request.path_params}
            answered = await run_in_threadpool(answer, asked)
        except IPAdapterError as error:
            return JSONResponse({"detail": error.detail}, error.status_code)
        return Response(answered, media_type="image/png") if isinstance(answered, bytes) else JSONResponse(answered)

    endpoint.__name__ = f"ip_adapter_{route.answer}"
    return endpoint


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise IPAdapterError(
            f"The request's body can't be read as JSON ({str(error)[:100]}): send an object."
        ) from error
    if not isinstance(fields, dict):
        raise IPAdapterError(f"The request's body is a {type(fields).__name__}; allowed is a JSON object.")
    return fields

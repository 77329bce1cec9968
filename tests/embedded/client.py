"""Requests to an app without a socket."""

from __future__ import annotations

from typing import Any

import anyio
import httpx
from fastapi import FastAPI


class Client:
    """``get``, ``post`` and ``delete`` against an app in this process, as from this machine."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self._send("GET", path, **kwargs)

    def post(self, path: str, **kwargs: Any) -> httpx.Response:
        return self._send("POST", path, **kwargs)

    def delete(self, path: str, **kwargs: Any) -> httpx.Response:
        return self._send("DELETE", path, **kwargs)

    def _send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            # exceptions become the app's 500 answer, as behind a real server
            transport = httpx.ASGITransport(app=self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=600) as client:
                return await client.request(method, path, **kwargs)

        return anyio.run(send)

"""Who may call which route: every row of the table, and the ways around it."""

from __future__ import annotations

import pytest

from lib_ipadapter.access import JSON, ROUTES, Caller, Route, refusal

LOCAL = {"host": "127.0.0.1:7860"}
BY_ANSWER = {route.answer: route for route in ROUTES}
MODELS, CHECK, START, DELETE = (BY_ANSWER[name] for name in ("models", "check", "start_download", "forget_reference"))


def status(route: Route, caller: Caller, extension_access: bool = True, origins: tuple[str, ...] = ()) -> int:
    refused = refusal(route, caller, extension_access, origins.__contains__)
    if refused is None:
        return 200
    assert refused[1].startswith(f"{route.method} {route.path} is ") and refused[1].endswith(".")
    return refused[0]


def test_without_a_login_other_machines_are_told_the_version_and_the_models_alone() -> None:
    stranger = Caller("192.168.0.7", {"host": "192.168.0.2:7860", "content-type": JSON})
    assert {route.answer for route in ROUTES if status(route, stranger) == 200} == {"version", "models"}
    assert {status(route, stranger) for route in ROUTES} == {200, 403}


def test_this_machine_and_whoever_has_logged_in_may_call_everything() -> None:
    for caller in (
        Caller("127.0.0.1", LOCAL),
        Caller("::1", {"host": "[::1]:7860"}),
        Caller("::ffff:127.0.0.1", {"host": "localhost"}),
        Caller("192.168.0.7", {"host": "webui.example"}, logged_in=True),
    ):
        assert {status(route, caller) for route in ROUTES} == {200}


@pytest.mark.parametrize(
    "caller",
    [
        Caller("127.0.0.1", {"host": "abc.tunnel.example"}),  # a tunnel's own end, or a name bound to this address
        Caller("127.0.0.1", {**LOCAL, "x-forwarded-for": "10.0.0.1"}),
        Caller("127.0.0.1", {"host": "127.0.0.1.example"}),
        Caller("127.0.0.1", {}),
        Caller("", LOCAL),
        Caller("testclient", LOCAL),
    ],
)
def test_what_only_seems_to_be_this_machine(caller: Caller) -> None:
    assert status(CHECK, caller) == 403
    assert status(MODELS, caller) == 200


def test_pictures_and_downloads_ask_for_extension_access_whoever_calls() -> None:
    for caller in (Caller("127.0.0.1", LOCAL), Caller("10.0.0.1", {}, logged_in=True)):
        refused = {route.answer for route in ROUTES if status(route, caller, extension_access=False) == 403}
        used = {"references", "reference", "forget_reference"}
        assert refused == used | {"saved", "save", "thumbnail", "forget_saved"} | {"start_download"}


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx"],
)
def test_a_form_is_no_json(kind: str) -> None:
    sent = Caller("127.0.0.1", {**LOCAL, "content-type": kind}, has_body=True)
    assert {status(route, sent) for route in ROUTES if route.method == "POST"} == {415}
    json = Caller("127.0.0.1", {**LOCAL, "content-type": "Application/JSON; charset=utf-8"}, has_body=True)
    assert status(START, json) == 200
    assert status(BY_ANSWER["cancel_download"], Caller("127.0.0.1", LOCAL)) == 200  # nothing is sent at all


def test_pages_of_other_sites_are_refused_also_with_a_login() -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:8000", "http://127.0.0.1:7860.example"):
        caller = Caller("127.0.0.1", {**LOCAL, "origin": origin, "content-type": JSON}, logged_in=True)
        assert {status(route, caller) for route in ROUTES} == {403}
        assert status(DELETE, caller, origins=(origin,)) == 200
    assert status(DELETE, Caller("127.0.0.1", {**LOCAL, "origin": "http://127.0.0.1:7860"})) == 200

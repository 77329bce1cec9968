"""Downloads, against a server of our own that speaks what the hub's client asks for."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import reset_sessions

from lib_ipadapter import catalogue, downloads
from lib_ipadapter.catalogue import Entry
from lib_ipadapter.downloads import Downloader
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.library import Library
from tests.embedded import Host
from tests.embedded.client import Client

DATA = os.urandom(300_000)
ENTRY = Entry("small", "SD1.5", "base", "tests", "some/one", "models/file.bin", len(DATA), "")
CHECKED = Entry("checked", "SD1.5", "base", "tests", "some/one", "file.bin", None, hashlib.sha256(DATA).hexdigest())
WRONG = Entry("wrong", "any", "encoder", "tests", "some/one", "file.bin", None, "0" * 64)


class Hub(ThreadingHTTPServer):
    """Answers HEAD and GET of one file; what goes wrong is set by a test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.ranges: list[str | None] = []
        self.drops: list[int] = []
        self.status = 200
        self.gate: threading.Event | None = None
        self.elsewhere = ""
        """Where the file's bytes are, if not here."""
        self.renamed = ""
        """The repository's name now."""
        self.error_code = ""
        self.asked: list[tuple[str, str]] = []


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _head(self, start: int) -> None:
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()

    def _goes_elsewhere(self) -> bool:
        """Redirects as the hub does: to a repository's new name, or to the servers that have the bytes."""
        self.server.asked.append((self.command, self.path))
        if self.server.renamed and self.server.renamed not in self.path:
            self.send_response(307)
            self.send_header("Location", self.path.replace("some/one", self.server.renamed))
        elif self.server.elsewhere:
            self.send_response(302)
            self.send_header("Location", f"{self.server.elsewhere}/blob?signed=abc")
            self.send_header("X-Linked-Size", str(len(DATA)))
            self.send_header("X-Linked-Etag", '"def"')
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("ETag", '"abc"')
        else:
            return False
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True

    def do_HEAD(self) -> None:
        if self._goes_elsewhere():
            return
        if self.server.status != 200:
            self.send_response(self.server.status)
            if self.server.error_code:
                self.send_header("X-Error-Code", self.server.error_code)
            self.end_headers()
        else:
            self._head(0)

    def do_GET(self) -> None:
        if self._goes_elsewhere():
            return
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self._head(start)
        if self.server.gate is not None:
            self.server.gate.wait(30)
        end = start + self.server.drops.pop(0) if self.server.drops else len(DATA)
        self.wfile.write(DATA[start:end])
        self.close_connection = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # a block that breaks off is lost
        reset_sessions()  # they remember that other tests are offline
        monkeypatch.setattr(downloads, "ENTRIES", (ENTRY, CHECKED, WRONG))
        monkeypatch.setattr(catalogue, "ENTRIES", (ENTRY, CHECKED, WRONG))
        yield server
        reset_sessions()
        server.shutdown()
        thread.join()


@pytest.fixture
def storage() -> Iterator[Hub]:
    """The servers that have the bytes of the hub's large files."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def downloader(tmp_path: Path) -> Downloader:
    return Downloader(lambda: [tmp_path / "a"], lambda: [tmp_path / "e"], lambda: True)


def run(downloader: Downloader, name: str) -> dict[str, Any]:
    downloader.start(name)
    return downloader.wait(60)


def test_a_download(hub: Hub, downloader: Downloader, tmp_path: Path) -> None:
    state = run(downloader, "checked")
    assert (state["status"], state["done"], state["total"]) == ("done", len(DATA), len(DATA)), state
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["checked.bin"]
    assert (tmp_path / "a" / "checked.bin").read_bytes() == DATA
    assert not (tmp_path / "e").exists()


def test_the_bytes_are_on_another_server(hub: Hub, storage: Hub, downloader: Downloader, tmp_path: Path) -> None:
    hub.elsewhere = f"http://127.0.0.1:{storage.server_port}"
    storage.drops = [100_000]
    state = run(downloader, "checked")
    assert (state["status"], state["total"]) == ("done", len(DATA)), state
    assert (tmp_path / "a" / "checked.bin").read_bytes() == DATA
    assert [command for command, _ in hub.asked] == ["HEAD", "GET", "GET"]
    assert storage.ranges == [None, "bytes=100000-"]
    assert all("signed=abc" in path for _, path in storage.asked)


def test_a_renamed_repository(hub: Hub, storage: Hub, downloader: Downloader, tmp_path: Path) -> None:
    hub.renamed, hub.elsewhere = "some/other", f"http://127.0.0.1:{storage.server_port}"
    assert run(downloader, "checked")["status"] == "done"
    assert (tmp_path / "a" / "checked.bin").read_bytes() == DATA
    assert ("HEAD", "/some/other/resolve/main/file.bin") in hub.asked


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (401, ""), (404, "RepoNotFound")])
def test_a_repository_that_asks_for_an_account_or_is_gone(
    hub: Hub, downloader: Downloader, tmp_path: Path, status: int, code: str
) -> None:
    hub.status, hub.error_code = status, code
    state = run(downloader, "checked")
    assert state["status"] == "failed"
    assert f"HTTP {status}" in state["message"]
    assert "some/one/file.bin" in state["message"]
    assert [each.name for each in (tmp_path / "a").iterdir()] == []


def test_drops_are_resumed(hub: Hub, downloader: Downloader, tmp_path: Path) -> None:
    hub.drops = [100_000, 50_000]
    assert run(downloader, "checked")["status"] == "done"
    assert (tmp_path / "a" / "checked.bin").read_bytes() == DATA
    assert hub.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_start_goes_on(hub: Hub, downloader: Downloader, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "small.bin.part").write_bytes(DATA[:1234])
    assert run(downloader, "small")["status"] == "done"
    assert hub.ranges == ["bytes=1234-"] and (tmp_path / "a" / "small.bin").read_bytes() == DATA


def test_a_wrong_checksum_is_kept_and_said(hub: Hub, downloader: Downloader, tmp_path: Path) -> None:
    state = run(downloader, "wrong")
    kept = tmp_path / "e" / "wrong.bin.unexpected"
    assert state["status"] == "unexpected" and kept.as_posix() in state["message"] and "0" * 64 in state["message"]
    assert kept.read_bytes() == DATA and list((tmp_path / "e").iterdir()) == [kept]
    assert Library(lambda: [tmp_path / "e"], list)._files([tmp_path / "e"]) == []


def test_no_room(hub: Hub, downloader: Downloader, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: usage(10))
    state = run(downloader, "small")
    assert state["status"] == "failed" and "300000 more bytes" in state["message"] and hub.ranges == []


def test_the_disk_fills_up(hub: Hub, downloader: Downloader, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, block: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads._Sink, "write", full)
    state = run(downloader, "small")
    assert state["status"] == "failed" and "make room" in state["message"] and len(hub.ranges) == 1


def test_no_network(hub: Hub, downloader: Downloader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client tries again, more and more slowly
    state = run(downloader, "small")
    assert state["status"] == "failed" and "reaches the hub" in state["message"]


@pytest.mark.parametrize("status", [401, 404])
def test_refusals_of_the_hub(hub: Hub, downloader: Downloader, status: int) -> None:
    hub.status = status
    state = run(downloader, "small")
    assert state["status"] == "failed" and f"HTTP {status}" in state["message"]


def test_cancel_and_two_at_once(hub: Hub, downloader: Downloader, tmp_path: Path) -> None:
    hub.gate = threading.Event()
    downloader.start("small")
    thread = downloader._thread
    assert downloader.start("small")["status"] == "running" and downloader._thread is thread
    with pytest.raises(IPAdapterError, match="wait for it or cancel"):
        downloader.start("checked")
    downloader.cancel()
    hub.gate.set()
    assert downloader.wait(60)["status"] == "cancelled"
    assert not (tmp_path / "a" / "small.bin").exists()
    assert run(downloader, "small")["status"] == "done"


def test_what_is_there_stays(hub: Hub, downloader: Downloader, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "small.bin").write_bytes(b"mine")
    with pytest.raises(IPAdapterError, match="already"):
        downloader.start("small")
    assert (tmp_path / "a" / "small.bin").read_bytes() == b"mine"


def test_without_extension_access(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(IPAdapterError, match="extension access") as caught:
        Downloader(lambda: [tmp_path], lambda: [tmp_path], lambda: False).start("small")
    assert caught.value.status_code == 403


def test_without_the_hubs_client(hub: Hub, downloader: Downloader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "no package huggingface_hub" in run(downloader, "small")["message"]


def test_offline_by_setting(hub: Hub, downloader: Downloader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    assert "HF_HUB_OFFLINE" in run(downloader, "small")["message"]


def test_the_routes(own_host: Host) -> None:
    client = Client(own_host.app)
    entries = client.get("/ip-adapter/catalogue").json()["entries"]
    assert {"name", "licence", "size", "present"} <= set(entries[0]) and not any(each["present"] for each in entries)
    assert client.get("/ip-adapter/download").json()["status"] == "idle"
    assert client.post("/ip-adapter/download/cancel").json()["status"] == "idle"
    unknown = client.post("/ip-adapter/download", json={"name": "x"})
    assert unknown.status_code == 422 and "no entry 'x'" in unknown.json()["detail"]
    own_host.cmd_opts.disable_extension_access = True
    refused = client.post("/ip-adapter/download", json={"name": entries[0]["name"]})
    assert refused.status_code == 403 and "extension access" in refused.json()["detail"]


@pytest.fixture
def own_host(tmp_path: Path) -> Iterator[Host]:
    with Host("sd15", models_path=tmp_path) as made:
        made.cmd_opts.disable_extension_access = False
        yield made

"""The catalogue's data holds together."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from lib_ipadapter.catalogue import ENCODER, ENTRIES, find
from lib_ipadapter.downloads import Downloader
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.library import SUFFIXES
from lib_ipadapter.recognise import ENCODER_FILES
from lib_ipadapter.ui import handlers


def test_entries() -> None:
    assert len({entry.saved_as for entry in ENTRIES}) == len(ENTRIES) > 10
    for entry in ENTRIES:
        assert entry.saved_as.endswith(SUFFIXES) and re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repository)
        assert re.fullmatch(r"([0-9a-f]{64})?", entry.sha256) and (entry.size is None or entry.size > 0)
        assert entry.licence.startswith("Apache-2.0") and find(entry.name) is entry
    assert {entry.family for entry in ENTRIES if entry.kind == ENCODER} == {"any"}


def test_an_unknown_licence_is_said() -> None:
    entry = dataclasses.replace(ENTRIES[0], repository="some/one")
    assert entry.licence == "not known here, see the page of some/one"


def test_an_unknown_name() -> None:
    with pytest.raises(IPAdapterError, match="no entry 'x'"):
        find("x")


def test_the_encoder_that_is_missed_is_the_one_that_is_offered() -> None:
    named = {(public.repository, public.file) for public in ENCODER_FILES.values()}
    assert {(entry.repository, entry.file) for entry in ENTRIES if entry.kind == ENCODER} <= named


def test_what_the_page_says_of_a_download() -> None:
    entries = Downloader(list, list, lambda: True).catalogue()
    label = handlers.catalogue_labels(entries)[0]
    assert label.startswith("ip-adapter_sd15 · SD1.5 · base") and "44.6 MB" in label
    assert "h94/IP-Adapter/models/ip-adapter_sd15.safetensors" in handlers.licence_note(entries, label)
    asked: list[object] = []

    def start(name: object) -> dict[str, Any]:
        asked.append(name)
        return {"status": "running", "message": "Downloading.", "done": 1_000_000, "total": None}

    assert "data-running" in handlers.start_download(start, label)
    assert asked == ["ip-adapter_sd15"]
    assert "No model is chosen" in handlers.start_download(start, None)
    refused = Downloader(list, list, lambda: False).start
    assert "extension access is disabled" in handlers.start_download(refused, label)
    assert handlers.download_note({"status": "idle"}) == ""
    done = handlers.download_note({"status": "done", "message": "It is there."})
    assert "It is there." in done and "data-running" not in done

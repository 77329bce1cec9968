"""The catalogue's data holds together."""

from __future__ import annotations

import re

import pytest

from lib_ipadapter.catalogue import ENCODER, ENTRIES, find
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.library import SUFFIXES


def test_entries() -> None:
    assert len({entry.saved_as for entry in ENTRIES}) == len(ENTRIES) > 10
    for entry in ENTRIES:
        assert entry.saved_as.endswith(SUFFIXES) and re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repository)
        assert re.fullmatch(r"([0-9a-f]{64})?", entry.sha256) and (entry.size is None or entry.size > 0)
        assert entry.licence_text and find(entry.name) is entry
    assert {entry.family for entry in ENTRIES if entry.kind == ENCODER} == {"any"}


def test_an_unknown_name() -> None:
    with pytest.raises(IPAdapterError, match="no entry 'x'"):
        find("x")

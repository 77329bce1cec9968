"""Which values and files apply to a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_ipadapter import applies
from lib_ipadapter.encoding import NEGATIVE_KEY
from lib_ipadapter.library import Library
from lib_ipadapter.recognise import AdapterKind, recognise_adapter
from lib_ipadapter.tensorfile import open_tensors
from lib_ipadapter.units import UNCONDS, Unit
from tests.adapter_files import base_adapter, save
from tests.bare_model import SD15_LAYERS


@pytest.fixture
def kind(tmp_path: Path) -> AdapterKind:
    save(base_adapter([width for _, width in SD15_LAYERS], 64), tmp_path / "base.safetensors")
    return recognise_adapter(open_tensors(tmp_path / "base.safetensors").tensors)


def test_a_negative_file_applies_where_its_tokens_are_as_wide_as_the_adapter_s(kind: AdapterKind) -> None:
    facts = applies.facts(kind, {"b": 64, "A": 64, "c": 65})
    assert facts["files"] == {"negative": ["A", "b"]} and facts["values"] == {"uncond": list(UNCONDS)}
    facts = applies.facts(kind, {"c": 65})
    assert facts["files"] == {"negative": []}
    assert facts["values"] == {"uncond": [each for each in UNCONDS if each != "file"]}


def test_of_a_model_that_is_not_there_nothing_is_ruled_out() -> None:
    facts = applies.facts(None, {"b": 64, "A": 65})
    assert facts["files"] == {"negative": ["A", "b"]} and facts["values"] == {}


def test_what_controls_need_are_fields_and_values_of_a_unit() -> None:
    for field, values in applies.NEEDS.values():
        assert all(Unit(**{field: value}, negative="n" if value == "file" else "") for value in values)


def test_the_width_of_negative_files_is_read(tmp_path: Path) -> None:
    for name, shape in (("n", (1, 4, 64)), ("flat", (64,))):
        save_file({NEGATIVE_KEY: torch.zeros(shape)}, tmp_path / f"{name}.safetensors")
    library = Library(lambda: [tmp_path], list)
    assert library.negative_widths() == {"flat.safetensors": 0, "n.safetensors": 64}

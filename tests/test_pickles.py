"""PyTorch's containers: what torch.save wrote comes back, and nothing that a file asks for is ever run."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_ipadapter import pickle_reader, pickles
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.tensorfile import open_tensors

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)


@pytest.fixture(autouse=True)
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torch's loaders nor Python's unpickler may be entered, whatever a test does."""

    def entered(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an unpickler was entered")

    for module, names in (
        (torch, ("load",)),
        (torch.jit, ("load",)),
        (pickle, ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads")),
        (os, ("system", "popen")),
        (subprocess, ("Popen", "run", "call")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, entered)


def save(path: Path, value: Any, legacy: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().tobytes()


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.stride() == torch.empty(expected.shape).stride()
    assert bits(found) == bits(expected)


def refused(path: Path) -> str:
    """The one sentence with which a file is refused; the file must stay as it was."""
    before = path.read_bytes()
    with pytest.raises(IPAdapterError) as error:
        open_tensors(path).read()
    assert path.read_bytes() == before
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def zipped(path: Path, data_pkl: bytes, records: dict[str, bytes] | None = None, root: str = "archive") -> Path:
    """A zip container around a pickle of our own making."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {"data.pkl": data_pkl, **(records or {})}.items():
            archive.writestr(f"{root}/{name}", data)
    return path


def bare(path: Path, body: bytes) -> Path:
    """A file of nothing but these bytes."""
    path.write_bytes(body)
    return path


CONTAINERS: dict[str, Callable[[Path, bytes], Path]] = {
    "zip": lambda path, body: zipped(path, body),
    "legacy": lambda path, body: bare(path, MAGIC + body),
    "bare": lambda path, body: bare(path, body),
}


# --- what torch.save writes -------------------------------------------------------------------------------------------

BASE = torch.arange(48, dtype=torch.float32).reshape(6, 8) / 7

TENSORS = {
    "float32": BASE,
    "float16": BASE.half(),
    "bfloat16": BASE.bfloat16(),
    "float64": BASE.double(),
    "int64": torch.arange(-3, 4),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "complex64": torch.complex(BASE, -BASE),
    "float8_e4m3fn": BASE.to(torch.float8_e4m3fn),
    "float8_e5m2": BASE.to(torch.float8_e5m2),
    "uint16": torch.arange(5).to(torch.uint16),
    "transposed": BASE.t(),
    "strided": BASE[::2, 1::3],
    "inner": BASE[2:4, 1:5],
    "row": BASE[3],
    "expanded": torch.ones(1).expand(3, 4),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "parameter": torch.nn.Parameter(BASE),
    "conjugate of a real": torch.conj(BASE),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back(tmp_path: Path, name: str, legacy: bool) -> None:
    file = open_tensors(save(tmp_path / "m.bin", {"x": TENSORS[name]}, legacy))
    assert file.kind == "pickle"
    assert file.tensors["x"].shape == TENSORS[name].shape
    assert file.tensors["x"].dtype == TENSORS[name].dtype
    assert_equal(file.read()["x"], TENSORS[name])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_views_of_one_storage_become_independent(tmp_path: Path, legacy: bool) -> None:
    views = {"whole": BASE, "a": BASE[1:3], "b": BASE[:, 2], "t": BASE.t()}
    found = open_tensors(save(tmp_path / "m.bin", views, legacy)).read()
    for name, tensor in views.items():
        assert_equal(found[name], tensor)
    expected = BASE.clone()
    found["a"].zero_()
    assert_equal(found["whole"], expected)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_groups_are_flattened(tmp_path: Path, legacy: bool) -> None:
    value = {
        "image_proj": OrderedDict({"proj.weight": BASE}),
        "ip_adapter": {"1.to_k_ip.weight": BASE[0], "deep": {"er": BASE[1]}},
        "epoch": 3,
        "loss": 0.5,
        "note": "text",
        "history": [BASE],
        "optimizer": {"state": {0: {"exp_avg": BASE}}},
        None: BASE,
    }
    file = open_tensors(save(tmp_path / "m.bin", value, legacy))
    assert set(file.tensors) == {
        "image_proj.proj.weight",
        "ip_adapter.1.to_k_ip.weight",
        "ip_adapter.deep.er",
        "optimizer.state.0.exp_avg",
    }
    assert file.metadata == {}
    assert_equal(file.read(["ip_adapter.deep.er"])["ip_adapter.deep.er"], BASE[1])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [("state_dict",), ("module",), ("state_dict", "model"), ("model_state_dict",)])
def test_training_wrappers_are_left_out(tmp_path: Path, legacy: bool, wrap: tuple[str, ...]) -> None:
    value: dict[str, Any] = {"image_proj": {"norm.bias": BASE[0]}}
    for key in reversed(wrap):
        value = {key: value, "global_step": 7}
    assert set(open_tensors(save(tmp_path / "m.ckpt", value, legacy)).tensors) == {"image_proj.norm.bias"}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_modules_state_dict(tmp_path: Path, legacy: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    found = open_tensors(save(tmp_path / "m.pt", module.state_dict(), legacy)).read()
    expected = module.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert_equal(found[name], tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_pickle_protocol(tmp_path: Path, protocol: int, legacy: bool) -> None:
    value = {"g": OrderedDict(a=BASE, b=BASE.half())}
    path = tmp_path / "m.bin"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    found = open_tensors(path).read()
    assert_equal(found["g.a"], BASE)
    assert_equal(found["g.b"], BASE.half())


dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any layout over a storage of their own."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [draw(st.integers(0, 5)) for _ in shape]
    offset = draw(st.integers(0, 3))
    storage = torch.arange(offset + sum(3 * stride for stride in strides) + 1) % 251
    return storage.to(draw(dtypes)).as_strided(shape, strides, offset)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.text(min_size=1, max_size=8), tensors(), max_size=4), legacy=st.booleans())
def test_round_trip(tmp_path: Path, value: dict[str, torch.Tensor], legacy: bool) -> None:
    found = open_tensors(save(tmp_path / "m.bin", value, legacy)).read()
    assert set(found) == set(value)
    for name, tensor in value.items():
        assert_equal(found[name], tensor)


def test_big_endian_archives(tmp_path: Path) -> None:
    path = save(tmp_path / "m.bin", {"x": BASE, "c": torch.complex(BASE, -BASE)}, legacy=False)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    records["byteorder"] = b"big"
    for key, data in records.items():
        if key.startswith("data/"):
            values = struct.unpack(f"<{len(data) // 4}f", data)
            records[key] = struct.pack(f">{len(values)}f", *values)
    found = open_tensors(zipped(path, records.pop("data.pkl"), records)).read()
    assert_equal(found["x"], BASE)
    assert_equal(found["c"], torch.complex(BASE, -BASE))
    records["byteorder"] = b"middle"
    assert "byte order" in refused(zipped(path, pickle.dumps({}, 2), records))


def legacy_file(storages: list[tuple[str, int, bytes]], body: bytes) -> bytes:
    data = b"".join(struct.pack("<q", count) + raw for _, count, raw in storages)
    return MAGIC + body + pickle.dumps([key for key, _, _ in storages], 2) + data


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(20, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor_pickle(
    offset: int = 0,
    size: tuple[int, ...] = (2, 2),
    stride: tuple[int, ...] = (2, 1),
    numel: int = 4,
    storage: str = "FloatStorage",
    view: bytes = b"N",
    key: bytes = text("0"),
    legacy: bool = True,
) -> bytes:
    """The pickle of ``{"x": tensor}`` as torch writes it, with any numbers."""
    persistent = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + key + text("cpu") + number(numel)
    persistent += (view if legacy else b"") + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + number(offset) + numbers(size) + numbers(stride)
    return b"\x80\x02}" + text("x") + call + b"\x89ccollections\nOrderedDict\n)RtRs."


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def test_the_hand_made_file_is_a_good_one(tmp_path: Path) -> None:
    expected = torch.tensor([[1.0, 2], [3, 4]])
    path = tmp_path / "m.bin"
    path.write_bytes(legacy_file([("0", 4, FOUR)], tensor_pickle()))
    assert_equal(open_tensors(path).read()["x"], expected)
    zipped(path, tensor_pickle(legacy=False), {"data/0": FOUR})
    assert_equal(open_tensors(path).read()["x"], expected)


def test_a_view_of_a_storage(tmp_path: Path) -> None:
    view = b"(" + text("v") + number(1) + number(3) + b"t"
    path = tmp_path / "m.bin"
    path.write_bytes(legacy_file([("0", 4, FOUR)], tensor_pickle(offset=1, size=(2,), stride=(1,), view=view)))
    assert_equal(open_tensors(path).read()["x"], torch.tensor([3.0, 4]))


def test_storages_that_no_named_tensor_uses(tmp_path: Path) -> None:
    path = save(tmp_path / "m.bin", {"list": [torch.ones(3), torch.ones(2).half()], "x": BASE}, legacy=True)
    assert_equal(open_tensors(path).read()["x"], BASE)


# --- hostile numbers --------------------------------------------------------------------------------------------------

NUMBERS: list[dict[str, Any]] = [
    {"offset": -1},
    {"offset": 1},
    {"offset": 2**40},
    {"offset": 2**62},
    {"offset": 2**140},
    {"size": (-1, 2)},
    {"size": (2, 3)},
    {"size": (2**31, 2**31), "stride": (0, 0)},
    {"size": (2**47,), "stride": (0,)},
    {"size": (2**140,), "stride": (1,)},
    {"stride": (-1, 1)},
    {"stride": (-2, 1), "offset": 2},
    {"stride": (3, 1)},
    {"stride": (2**62, 1)},
    {"size": (2,), "stride": (2, 1)},
    {"size": (1,) * 17, "stride": (1,) * 17},
    {"numel": -1},
    {"numel": 5},
    {"numel": 2**60},
    {"numel": 2**140},
    {"storage": "DoubleStorage"},
    {"key": text("1")},
    {"key": text("../../etc/passwd")},
    {"key": number(0)},
    {"key": b"N"},
    {"key": b"]"},
    {"key": text("k" * 5000)},
]
VIEWS = [
    b"(" + text("v") + number(0) + number(5) + b"t",
    b"(" + text("v") + number(-1) + number(2) + b"t",
    b"(" + text("v") + number(3) + number(-2) + b"t",
    b"(" + text("v") + number(2**60) + number(1) + b"t",
    b"(" + text("v") + number(0) + number(3) + b"t",
    b"(" + text("v") + b"t",
    text("v"),
    number(3),
]


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize("change", NUMBERS, ids=lambda change: repr(change)[:50])
def test_impossible_numbers(tmp_path: Path, change: dict[str, Any], legacy: bool) -> None:
    path = tmp_path / "m.bin"
    body = tensor_pickle(**change, legacy=legacy)
    if legacy:
        path.write_bytes(legacy_file([("0", 4, FOUR)], body))
    else:
        zipped(path, body, {"data/0": FOUR})
    assert refused(path).startswith("m.bin is damaged or cut short") or "says that its storage" in refused(path)


@pytest.mark.parametrize("view", VIEWS, ids=range(len(VIEWS)))
def test_impossible_views(tmp_path: Path, view: bytes) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(legacy_file([("0", 4, FOUR)], tensor_pickle(view=view)))
    assert "damaged" in refused(path)


@pytest.mark.parametrize("count", [-1, 3, 5, 2**40, 2**62, -(2**62)])
def test_impossible_storage_sizes(tmp_path: Path, count: int) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(legacy_file([("0", count, FOUR)], tensor_pickle()))
    assert "storage 0" in refused(path)


def test_impossible_storage_lists(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    lists: list[Any] = [{}, [1], ["0", "0"], [["0"]], None, ["1"], []]
    for keys in lists:
        path.write_bytes(MAGIC + tensor_pickle() + pickle.dumps(keys, 2) + struct.pack("<q", 4) + FOUR)
        assert "damaged" in refused(path)


def test_a_small_file_does_not_become_gigabytes(tmp_path: Path) -> None:
    value = {"x": torch.ones(1).expand(2**26)}
    for legacy in (True, False):
        assert "would take more than" in refused(save(tmp_path / "m.bin", value, legacy))
    many = {str(i): torch.ones(1).expand(2**20) for i in range(40)}
    assert "would take more than" in refused(save(tmp_path / "m.bin", many, legacy=False))


# --- hostile pickles --------------------------------------------------------------------------------------------------


class Asks:
    """Pickles into a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


SYSTEM, EVAL = os.system, builtins.eval
CALLS: list[tuple[Any, str]] = [
    (Asks(SYSTEM, "echo"), f"{SYSTEM.__module__}.system"),
    (Asks(EVAL, "1"), "builtins.eval"),
    (Asks(getattr, "", "x"), "builtins.getattr"),
    (Asks(__import__, "os"), "builtins.__import__"),
    (Asks(shutil.rmtree, "/nowhere"), "shutil.rmtree"),
    (Asks(Path, "x"), "pathlib.Path"),
]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("value", "name"), CALLS, ids=[name for _, name in CALLS])
def test_calls_are_refused_by_name(tmp_path: Path, container: str, protocol: int, value: Any, name: str) -> None:
    path = CONTAINERS[container](tmp_path / "m.bin", pickle.dumps({"x": value} if protocol > 1 else value, protocol))
    said = refused(path)
    # Python 2's name for builtins stands in the older protocols.
    assert f"m.bin asks to run {name}: refused, the file was not changed" in said.replace("__builtin__", "builtins")


OPCODES: list[tuple[str, bytes, str]] = [
    ("REDUCE", b"\x80\x02cos\nsystem\n" + text("ls") + b"\x85R.", "os.system"),
    ("INST", b"\x80\x02(" + text("ls") + b"ios\nsystem\n.", "os.system"),
    ("OBJ", b"\x80\x02(cos\nsystem\n" + text("ls") + b"o.", "os.system"),
    ("NEWOBJ", b"\x80\x02cos\nsystem\n" + text("ls") + b"\x85\x81.", "os.system"),
    ("NEWOBJ_EX", b"\x80\x04cos\nsystem\n" + text("ls") + b"\x85}\x92.", "os.system"),
    (
        "STACK_GLOBAL",
        b"\x80\x04" + text("os") + text("system") + b"\x93" + text("ls") + b"\x85R.",
        "os.system",
    ),
    ("dotted", b"\x80\x04" + text("torch") + text("_utils.os.system") + b"\x93.", "torch._utils.os.system"),
    ("torch.load", b"\x80\x02ctorch\nload\n.", "torch.load"),
    ("near miss", b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
    ("odd name", b"\x80\x04" + text("a\x1b[31m\n") + text("b") + b"\x93.", "a?[31m?.b"),
    ("no name", b"\x80\x04K\x01K\x02\x93.", "something that isn't a name"),
    ("call of a number", b"\x80\x02K\x01)R.", "something that isn't a name"),
    ("call of a text", b"\x80\x02" + text("os.system") + b")R.", "something that isn't a name"),
    ("call of a storage", b"\x80\x02ctorch\nFloatStorage\n)R.", "torch.FloatStorage"),
    ("EXT1", b"\x80\x02\x82\x01.", "registered extension 1"),
    ("EXT4", b"\x80\x02\x84\x01\0\0\0.", "registered extension 1"),
    ("PERSID", b"\x80\x02Pos.system\n.", "by a text name"),
    ("persistent text", b"\x80\x02" + text("storage") + b"Q.", "isn't a tensor's storage"),
    ("persistent number", b"\x80\x02K\x01Q.", "isn't a tensor's storage"),
    ("persistent list", b"\x80\x02]Q.", "isn't a tensor's storage"),
    ("persistent module", b"\x80\x02(" + text("module") + b"NNNNtQ.", "isn't a tensor's storage"),
    ("persistent kind", b"\x80\x02(" + text("storage") + b"NNNNtQ.", "a storage of an unknown class"),
    ("buffer", b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("body", "name"), [row[1:] for row in OPCODES], ids=[row[0] for row in OPCODES])
def test_opcodes_that_ask_for_something(tmp_path: Path, container: str, body: bytes, name: str) -> None:
    said = refused(CONTAINERS[container](tmp_path / "m.bin", body))
    assert "m.bin asks to run " in said
    assert name in said


INERT = {
    "BUILD on a tensor": tensor_pickle(legacy=False)[:-2] + b"}" + text("shape") + b"K\x01sbs.",
    "BUILD on a dict": b"\x80\x02ccollections\nOrderedDict\n)R}" + text("items") + b"Nsb.",
    "SETITEM on a name": b"\x80\x02ctorch\nFloatStorage\nK\x01K\x02s0}.",
    "APPEND on a name": b"\x80\x02ctorch\nFloatStorage\nK\x01a0}.",
    "odd keys": b"\x80\x02})K\x01s]K\x01sNK\x01s.",
    "POP and DUP": b"\x80\x02}(K\x0112" + b"00}.",
    "sets": b"\x80\x04}" + text("s") + b"\x8f(K\x01\x90s" + text("f") + b"(K\x01\x91s.",
}


@pytest.mark.parametrize("name", INERT)
def test_opcodes_without_an_effect(tmp_path: Path, name: str) -> None:
    file = open_tensors(zipped(tmp_path / "m.bin", INERT[name], {"data/0": FOUR}))
    assert set(file.tensors) == ({"x"} if "tensor" in name else set())


def nested_dicts(depth: int) -> bytes:
    return b"\x80\x02" + (b"}" + text("k")) * depth + b"N" + b"s" * depth + b"."


BOMBS: dict[str, bytes] = {
    "memo number": b"\x80\x02Nr\xff\xff\xff\x7f}.",
    "nested dicts": nested_dicts(10_000),
    "nested tuples": b"\x80\x02)" + b"\x85" * 120_000 + b".",
    "nested tuple as a key": b"\x80\x02})" + b"\x85" * 120_000 + b"Ns.",
    "nested calls": b"\x80\x02" + b"ctorch._utils\n_rebuild_tensor\n(" * 20_000 + b"N" + b"NNNtR" * 20_000 + b".",
    "a dict in itself": b"\x80\x02}q\x00" + text("a") + b"h\x00s" + text("b") + b"h\x00s.",
    "doubling dicts": b"\x80\x02}q\x00"
    + b"".join(
        b"}q" + bytes([i + 1]) + text("a") + b"h" + bytes([i]) + b"s" + text("b") + b"h" + bytes([i]) + b"s"
        for i in range(14)
    )
    + b"}"
    + b"".join(text(str(i)) + b"h\x0es" for i in range(64))
    + b".",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "long bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
    "long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "negative length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b"x.",
    "long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"(.",
    "long decimal": b"\x80\x02L" + b"9" * 20_000 + b"L\n.",
    "many steps": b"\x80\x02" + b"}" * 1_100_000 + b".",
    "copies of a list": b"\x80\x02]("
    + b"N" * 60_000
    + b"eq\x000"
    + b"ccollections\nOrderedDict\nh\x00\x85R0" * 40
    + b"}.",
    "no stop": b"\x80\x02}",
    "empty stack": b"\x80\x02.",
    "only a mark": b"\x80\x02(.",
    "no mark": b"\x80\x02Nt.",
    "unknown memo": b"\x80\x02h\x05.",
    "unknown opcode": b"\x80\x02\xff.",
    "half a pair": b"\x80\x02}(Nu.",
    "few arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "no arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nNR.",
    "a tensor of nothing": b"\x80\x02}" + text("x") + b"ctorch._utils\n_rebuild_tensor\n(NNNNtRs.",
    "a list": b"\x80\x02].",
    "a number": b"\x80\x02K\x01.",
    "a long name": b"\x80\x02}" + text("n" * 2000) + b"}s.",
    "two of a name": b"\x80\x02}q\x00" + text("a") + b"}sK\x01s.",
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_or_harmless(tmp_path: Path, container: str, name: str) -> None:
    path = CONTAINERS[container](tmp_path / "m.bin", BOMBS[name])
    if container == "zip" and name in ("memo number", "nested tuple as a key"):
        assert open_tensors(path).tensors == {}
    else:
        refused(path)


def test_no_bytes_are_read_before_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"small": torch.ones(2), "large": torch.zeros(2**20)}
    opened: list[Any] = []
    plain = Path.open

    class Counting(io.BufferedReader):
        count = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            Counting.count += len(data)
            return data

        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            Counting.count += count
            return count

    def counting_open(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        assert mode == "rb", "a model file is only ever read"
        opened.append(self)
        return Counting(plain(self, mode, *args, **kwargs).detach())  # type: ignore[attr-defined]

    for legacy in (True, False):
        path = save(tmp_path / "m.bin", value, legacy)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", counting_open)
            Counting.count = 0
            file = open_tensors(path)
            assert Counting.count < 16_384
            Counting.count = 0
            assert torch.equal(file.read(["small"])["small"], torch.ones(2))
            assert Counting.count == 8
            Counting.count = 0
            file.read(["large"])
            assert Counting.count == 4 * 2**20
    assert len(opened) == 6


# --- damage -----------------------------------------------------------------------------------------------------------

VALUE = {
    "image_proj": {"proj.weight": BASE, "norm.weight": BASE[0].half()},
    "ip_adapter": {"1.to_k_ip.weight": BASE.bfloat16()},
}
FLAT = {f"{group}.{key}": tensor for group, tensors in VALUE.items() for key, tensor in tensors.items()}


def read_or_refused(path: Path) -> dict[str, torch.Tensor] | None:
    before = path.read_bytes()
    try:
        return open_tensors(path).read()
    except IPAdapterError:
        return None
    finally:
        assert path.read_bytes() == before


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_cut_short_anywhere(tmp_path: Path, legacy: bool) -> None:
    whole = save(tmp_path / "whole.bin", VALUE, legacy).read_bytes()
    path = tmp_path / "m.bin"
    step = max(1, len(whole) // 700)
    lengths = {*range(0, len(whole), step), *range(max(0, len(whole) - 200), len(whole))}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        found = read_or_refused(path)
        if found is not None:
            # Only what no tensor needs may be missing.
            assert set(found) == set(FLAT), length
            for key, tensor in FLAT.items():
                assert_equal(found[key], tensor)
    path.write_bytes(whole)
    assert read_or_refused(path) is not None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    legacy=st.booleans(),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), max_size=4),
)
def test_changed_anywhere(tmp_path: Path, legacy: bool, changes: list[tuple[float, bytes]]) -> None:
    whole = bytearray(save(tmp_path / "whole.bin", VALUE, legacy).read_bytes())
    for where, data in changes:
        at = int(where * len(whole))
        whole[at : at + len(data)] = data[: len(whole) - at]
    path = tmp_path / "m.bin"
    path.write_bytes(bytes(whole))
    read_or_refused(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.lists(
        st.sampled_from([bytes([i]) for i in range(256)])
        | st.sampled_from(
            [text("x"), number(1), numbers((2, 2)), b"ctorch._utils\n_rebuild_tensor_v2\n", b"tR", b"tQ"]
        ),
        max_size=60,
    ).map(b"".join)
)
def test_any_opcodes(tmp_path: Path, body: bytes) -> None:
    for container in CONTAINERS.values():
        read_or_refused(container(tmp_path / "m.bin", b"\x80\x04" + body + b"."))


def test_archives_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("picture.png", b"x")
    assert "is a zip archive, but not a PyTorch model file" in refused(path)
    zipped(path, b"N.", {"constants.pkl": b"N.", "code/__torch__.py": b""})
    assert "is a TorchScript program" in refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(legacy=False))
        archive.writestr("archive/data/0", FOUR)
    assert "compressed or encrypted" in refused(path)
    zipped(path, tensor_pickle(legacy=False))
    assert "record data/0 is missing" in refused(path)
    zipped(path, b"N" * (pickle_reader.MAX_HEAD + 1))
    assert "has a data.pkl of" in refused(path)


def test_a_hostile_zip_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.bin", {str(i): torch.ones(1) for i in range(40)}, legacy=False)
    monkeypatch.setattr(pickles, "MAX_DIRECTORY", 2000)
    assert "its zip directory claims" in refused(path)


def test_a_real_torchscript_program(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    module = torch.nn.Linear(2, 2)
    torch.jit.save(torch.jit.trace(module, torch.ones(1, 2)), str(path))  # type: ignore[no-untyped-call]
    assert "is a TorchScript program" in refused(path)


def test_whole_modules_are_refused_by_name(tmp_path: Path) -> None:
    for legacy in (False, True):
        assert "torch.nn.modules.linear.Linear" in refused(save(tmp_path / "m.pt", torch.nn.Linear(2, 2), legacy))

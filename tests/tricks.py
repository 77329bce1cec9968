"""Pickles that run something when they are loaded: each makes the file ``CANARY`` in the current folder."""

from __future__ import annotations

import builtins
import codecs
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import runpy
import shutil
import subprocess
import timeit
import zipfile
from typing import Any

import torch

CANARY = "canary"
MAKE = f"open({CANARY!r}, 'w').close()"
TOUCH = f"touch {CANARY}"


class Call:
    """Pickles into a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call

    def __call__(self) -> None:
        """The pickler wants what it writes as a function to be one."""


class State(Call):
    """The same with a state, for which ``BUILD`` calls the object's ``__setstate__``."""

    def __init__(self, state: Any, function: Any, *args: Any) -> None:
        self._call = (function, args, state)  # type: ignore[assignment]


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def dumped(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps({"image_proj": {"proj.weight": value}}, protocol)


def _module(name: str) -> Call:
    return Call(importlib.import_module, name)


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


_FUNCTION = Call(builtins.getattr, _module("types"), "FunctionType")
_COMPILED = Call(builtins.compile, MAKE, "x", "exec")
_EVIL = Call(builtins.exec, MAKE)

TRICKS: dict[str, bytes] = {
    "system": dumped(Call(os.system, TOUCH)),
    "popen": dumped(Call(subprocess.Popen, ["touch", CANARY])),
    "run": dumped(Call(subprocess.check_call, ["touch", CANARY])),
    "exec": dumped(_EVIL),
    "eval": dumped(Call(builtins.eval, MAKE)),
    "open": dumped(Call(builtins.open, CANARY, "w")),
    "copy": dumped(Call(shutil.copyfile, os.devnull, CANARY)),
    "getattr": dumped(Call(Call(builtins.getattr, Call(pathlib.Path, CANARY), "touch"))),
    "methodcaller": dumped(Call(Call(operator.methodcaller, "touch"), Call(pathlib.Path, CANARY))),
    "attrgetter": dumped(Call(Call(Call(operator.attrgetter, "system"), _module("os")), TOUCH)),
    "partial": dumped(Call(functools.partial(os.system, TOUCH))),
    "import": dumped(Call(Call(builtins.getattr, Call(builtins.__import__, "os"), "system"), TOUCH)),
    "map": dumped(Call(list, Call(map, os.system, [TOUCH]))),
    "timeit": dumped(Call(timeit.timeit, "pass", MAKE, timeit.default_timer, 1)),
    "runpy": dumped(Call(runpy._run_code, _COMPILED, {})),  # type: ignore[attr-defined]
    "function of code": dumped(Call(Call(_FUNCTION, _COMPILED, {"open": builtins.open}))),
    "nested pickle": dumped(Call(pickle.loads, pickle.dumps(_EVIL))),
    "nested torch": dumped(Call(torch.storage._load_from_bytes, _saved(_EVIL))),
    "setstate": dumped(Call(State((os.system, (TOUCH,), {}, None), functools.partial, print))),
    "codecs": dumped(Call(builtins.exec, Call(codecs.decode, codecs.encode(MAKE, "rot13"), "rot13"))),
    "protocol 0": dumped(Call(os.system, TOUCH), 0),
    "protocol 5": dumped(Call(os.system, TOUCH), 5),
    "instance": b"(" + b"S'" + TOUCH.encode() + b"'\nios\nsystem\n.",
    "object": b"\x80\x02(cos\nsystem\n" + text(TOUCH) + b"o.",
    "dotted name": b"\x80\x04" + text("shutil") + text("os.system") + b"\x93" + text(TOUCH) + b"\x85R.",
    "as a key": pickle.dumps({Call(os.system, TOUCH): 1}, 2),
    "thrown away": b"\x80\x02cos\nsystem\n" + text(TOUCH) + b"\x85R0}.",
    "behind a memo": b"\x80\x02cos\nsystem\nq\x000}q\x01h\x00" + text(TOUCH) + b"\x85R0h\x01.",
}


def evil_zips(whole: bytes) -> dict[str, bytes]:
    """A good archive, changed so that one reader sees a good pickle and another a hostile one."""
    evil = TRICKS["exec"]

    def with_records(extra: dict[str, bytes], first: bool = False) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as good, zipfile.ZipFile(file, "w") as archive:
            records = [(info.filename, good.read(info)) for info in good.infolist()]
            added = list(extra.items())
            for name, data in added + records if first else records + added:
                archive.writestr(name, data)
        return file.getvalue()

    root = zipfile.ZipFile(io.BytesIO(whole)).namelist()[0].partition("/")[0]
    return {
        "two data.pkl, the last hostile": with_records({f"{root}/data.pkl": evil}),
        "two data.pkl, the first hostile": with_records({f"{root}/data.pkl": evil}, first=True),
        "two roots": with_records({"other/data.pkl": evil}),
        "program": with_records({f"{root}/code/__torch__.py": b"x", f"{root}/constants.pkl": evil}),
        "data.pkl above": with_records({"../data.pkl": evil}),
        "data.pkl without a root": with_records({"data.pkl": evil}),
        "hostile version": with_records({f"{root}/version": evil, f"{root}/byteorder": evil}),
        "archive in front": evil + whole,
        "archive behind": whole + evil,
    }

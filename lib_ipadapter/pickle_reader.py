"""Reads a pickle as data: an interpreter of its opcodes that imports nothing and calls nothing.

Python's own unpickler, subclassed or not, isn't used. A pickle tells it to call things; its memo is an array as long as
the highest number that a file mentions, and hashing a deeply nested key runs out of C stack. Here every opcode is
interpreted on plain lists, names become inert :class:`Name` objects, and only the handful of names in
:data:`REBUILDERS`, :data:`STORAGES` and :data:`DTYPES` is accepted; whatever else a file asks for is refused by name.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import torch

from .errors import IPAdapterError

MAX_HEAD = 16 * 1024**2
"""Bytes of pickle that are read; the largest public checkpoints have one or two million."""
MAX_STEPS = 1_000_000
"""Opcodes that are interpreted; a tensor takes about 40."""


@dataclass(frozen=True, eq=False)
class Name:
    """A name that a pickle mentions, such as ``torch.HalfStorage``; it refers to nothing."""

    dotted: str


@dataclass(frozen=True, eq=False)
class StorageRef:
    """What a pickle says of a storage; nothing is checked yet.

    Attributes:
        dtype: of its elements; None if the pickle's name for it doesn't tell.
        key: its name among the storages of the file.
        numel: how many elements it claims to have.
        view: ``(key, offset, numel)`` of a part of it, in elements, that is meant instead of the whole.
    """

    dtype: torch.dtype | None
    key: Any
    numel: Any
    view: Any


@dataclass(frozen=True, eq=False)
class TensorRef:
    """What a pickle says of a tensor; nothing is checked yet. Offset and strides count elements."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any


class Opaque:
    """Something that no tensor depends on."""


OPAQUE = Opaque()


def _storages() -> dict[str, torch.dtype | None]:
    # Storage classes that torch.save names, and the dtype that each stands for.
    dtypes = {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
        "ComplexFloat": "complex64",
        "ComplexDouble": "complex128",
    }
    found: dict[str, torch.dtype | None] = {f"torch.{name}Storage": getattr(torch, of) for name, of in dtypes.items()}
    untyped = dict.fromkeys(("torch.UntypedStorage", "torch.storage.UntypedStorage"), torch.uint8)
    return {**found, **untyped, "torch.storage.TypedStorage": None}


STORAGES = _storages()
# Dtypes without a storage class of their own; not every torch that WebUIs ship has every one.
_NEWER = "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu uint16 uint32 uint64"
DTYPES: dict[str, torch.dtype] = {
    **{str(dtype): dtype for dtype in STORAGES.values() if dtype is not None},
    **{f"torch.{name}": getattr(torch, name) for name in _NEWER.split(" ") if hasattr(torch, name)},
}


def _tensor(args: tuple[Any, ...]) -> TensorRef:
    storage, offset, size, stride = args[:4]
    return TensorRef(storage, offset, size, stride, None)


def _tensor_of_dtype(args: tuple[Any, ...]) -> TensorRef:
    storage, offset, size, stride, _, _, dtype = args[:7]
    return TensorRef(storage, offset, size, stride, DTYPES.get(dtype.dotted) if isinstance(dtype, Name) else OPAQUE)


def _first(args: tuple[Any, ...]) -> Any:
    return args[0]


@dataclass(frozen=True)
class _Rebuilder:
    arguments: int
    """Fewest arguments that make sense."""
    build: Callable[[tuple[Any, ...]], Any]


REBUILDERS = {
    "torch._utils._rebuild_tensor": _Rebuilder(4, _tensor),
    "torch._utils._rebuild_tensor_v2": _Rebuilder(4, _tensor),
    "torch._utils._rebuild_tensor_v3": _Rebuilder(7, _tensor_of_dtype),
    "torch._utils._rebuild_parameter": _Rebuilder(1, _first),
    "torch._utils._rebuild_parameter_with_state": _Rebuilder(1, _first),
    "torch.Size": _Rebuilder(1, _first),
    "torch.device": _Rebuilder(0, lambda args: OPAQUE),
}
"""The names that a pickle may call, and what stands for the result."""

ORDERED_DICT = "collections.OrderedDict"

_ACCEPTED = {ORDERED_DICT, *REBUILDERS, *STORAGES, *DTYPES}


class _Mark:
    pass


_MARK = _Mark()


class PickleReader:
    """Reads pickles that follow one another in a file.

    Args:
        file: at the first byte of the first pickle; read forward and never past what the pickles need.
        name: what to call the file in a sentence.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._bytes_left = MAX_HEAD
        self._steps_left = MAX_STEPS
        self.storages: list[StorageRef] = []
        """Every storage mentioned so far, whether a named tensor uses it or not."""

    # What pickletools.genops needs of a file.

    def read(self, count: int) -> bytes:
        """Bytes of the pickle; refuses a length that no honest head has before anything is allocated for it."""
        if count > self._bytes_left:
            self._too_much()
        data = self._file.read(count)
        self._bytes_left -= len(data)
        return data

    def readline(self) -> bytes:
        """One line of the pickle, as its oldest opcodes have them."""
        data = self._file.readline(self._bytes_left + 1)
        if len(data) > self._bytes_left:
            self._too_much()
        self._bytes_left -= len(data)
        return data

    def tell(self) -> int:
        """Position in the file."""
        return self._file.tell()

    def load(self) -> Any:
        """The next pickle's value: dicts, lists, tuples, scalars, and the inert classes of this module.

        Raises:
            IPAdapterError: if the pickle asks for any name but the accepted ones (they are named in the sentence), is
                damaged, or is larger than a checkpoint's head can be.
        """
        try:
            return self._interpret(pickletools.genops(self))  # type: ignore[arg-type]
        except IPAdapterError:
            raise
        except Exception as error:
            # The decoder has no closed list of what it raises for bytes that are no pickle.
            raise IPAdapterError(
                f"{self._name} is damaged or cut short (its pickle breaks off: {str(error)[:80]}): download it again."
            ) from error

    def _interpret(self, opcodes: Iterator[tuple[Any, Any, Any]]) -> Any:
        stack: list[Any] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            for i in range(len(stack) - 1, -1, -1):
                if stack[i] is _MARK:
                    items = stack[i + 1 :]
                    del stack[i:]
                    return items
            raise ValueError("a mark is missing")

        def pop() -> Any:
            if stack[-1] is _MARK:
                raise ValueError("a value is missing")
            return stack.pop()

        for opcode, arg, _ in opcodes:
            self._spend(1)
            name = opcode.name
            if name in _LITERALS:
                stack.append(arg)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[arg] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[arg])
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name == "MARK":
                stack.append(_MARK)
            elif name in _SHORT_TUPLES:
                items = [pop() for _ in range(_SHORT_TUPLES[name])]
                stack.append(tuple(reversed(items)))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name == "EMPTY_TUPLE":
                stack.append(())
            elif name in ("EMPTY_LIST", "EMPTY_SET"):
                stack.append([])
            elif name in ("LIST", "FROZENSET"):
                stack.append(since_mark())
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "DICT":
                items = since_mark()
                stack.append({})
                _set_items(stack[-1], items)
            elif name == "SETITEM":
                value, key = pop(), pop()
                _set_items(stack[-1], [key, value])
            elif name == "SETITEMS":
                items = since_mark()
                _set_items(stack[-1], items)
            elif name == "APPEND":
                value = pop()
                _extend(stack[-1], [value])
            elif name in ("APPENDS", "ADDITEMS"):
                items = since_mark()
                _extend(stack[-1], items)
            elif name == "GLOBAL":
                stack.append(self._name_for(*arg.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                attribute, module = pop(), pop()
                stack.append(self._name_for(module, attribute))
            elif name == "REDUCE":
                args, callee = pop(), pop()
                stack.append(self._call(callee, args))
            elif name == "INST":
                args = tuple(since_mark())
                stack.append(self._call(self._name_for(*arg.split(" ", 1)), args))
            elif name == "OBJ":
                items = since_mark()
                stack.append(self._call(items[0], tuple(items[1:])))
            elif name == "NEWOBJ":
                args, callee = pop(), pop()
                stack.append(self._call(callee, args))
            elif name == "NEWOBJ_EX":
                _, args, callee = pop(), pop(), pop()
                stack.append(self._call(callee, args))
            elif name == "BUILD":
                pop()  # State of something inert, such as a state dict's _metadata.
            elif name == "BINPERSID":
                stack.append(self._storage(pop()))
            elif name == "PERSID":
                self._refuse("something outside the file by a text name")
            elif name in ("EXT1", "EXT2", "EXT4"):
                self._refuse(f"registered extension {arg}")
            elif name == "POP":
                stack.pop()
            elif name == "POP_MARK":
                since_mark()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name == "STOP":
                return pop()
            elif name not in ("PROTO", "FRAME"):
                self._refuse(f"the opcode {name}")
        raise ValueError("it has no end")

    def _name_for(self, module: Any, attribute: Any) -> Name:
        if not (isinstance(module, str) and isinstance(attribute, str)):
            self._refuse("something that isn't a name")
        dotted = f"{module}.{attribute}"
        if dotted not in _ACCEPTED:
            self._refuse(dotted)
        return Name(dotted)

    def _call(self, callee: Any, args: Any) -> Any:
        if not isinstance(callee, Name):
            self._refuse("something that isn't a name")
        if not isinstance(args, tuple):
            raise TypeError("a call has no arguments")
        if callee.dotted == ORDERED_DICT:
            found: dict[Any, Any] = {}
            pairs = args[0] if args and isinstance(args[0], (list, tuple)) else ()
            self._spend(len(pairs))
            for pair in pairs:
                if isinstance(pair, (list, tuple)) and len(pair) == 2:
                    _set_items(found, list(pair))
            return found
        rebuilder = REBUILDERS.get(callee.dotted)
        if rebuilder is None:
            self._refuse(callee.dotted)
        if len(args) < rebuilder.arguments:
            raise ValueError("a call lacks arguments")
        return rebuilder.build(args)

    def _storage(self, saved: Any) -> StorageRef:
        if not (isinstance(saved, tuple) and len(saved) in (5, 6) and saved[0] in ("storage", b"storage")):
            self._refuse("something outside the file that isn't a tensor's storage")
        _, kind, key, _, numel, *view = saved
        if not (isinstance(kind, Name) and kind.dotted in STORAGES):
            self._refuse("a storage of an unknown class")
        self.storages.append(StorageRef(STORAGES[kind.dotted], key, numel, view[0] if view else None))
        return self.storages[-1]

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            self._too_much()

    def _too_much(self) -> NoReturn:
        raise IPAdapterError(
            f"{self._name} describes more than a model file can hold ({MAX_HEAD // 1024**2} MiB and {MAX_STEPS} "
            "steps of "
            "pickle are the limit): it is damaged or hostile and was not changed, so get it as .safetensors."
        )

    def _refuse(self, asked: str) -> NoReturn:
        shown = "".join(c if c.isprintable() else "?" for c in asked[:120])
        raise IPAdapterError(
            f"{self._name} asks to run {shown}: refused, the file was not changed; "
            "get it as .safetensors or from a source that you trust."
        )


_LITERALS = frozenset(
    {
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
    }
    | {
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
    }
    | {"BINBYTES8", "BYTEARRAY8"}
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _set_items(target: Any, items: list[Any]) -> None:
    # Keys that are no scalars name no tensor, and hashing a nested tuple may not return.
    if len(items) % 2:
        raise ValueError("a key has no value")
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, (str, int)):
                target[key] = value


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)

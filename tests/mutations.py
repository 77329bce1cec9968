"""Hundreds of damaged and hostile model files, and a process with hard limits that meets them one after another.

``python -m tests.mutations FOLDER`` is that process: 20 s of CPU time for each look at a file, 1 GiB beyond what it had
before, every unpickler and everything that writes, renames, deletes or starts something ends it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from tests.adapter_files import base_adapter, full_face_adapter, plus_adapter
from tests.tricks import TRICKS, evil_zips

Flat = dict[str, Tensor]
Case = tuple[str, bytes]

CPU_SECONDS = 20
"""Far above what any takes, far below what a bomb that goes off would."""
MEMORY = 2**30
CONTAINERS = ("safetensors", "zip", "legacy")


# Valid files


def encoder() -> Flat:
    """The demo tower with one layer."""
    width, mlp = 128, 64
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, width),
        "visual_projection.weight": (width, width),
    }
    layer = "vision_model.encoder.layers.0."
    for norm in (
        "vision_model.pre_layrnorm",
        "vision_model.post_layernorm",
        f"{layer}layer_norm1",
        f"{layer}layer_norm2",
    ):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    linears = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    for name, shape in (linears | {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}).items():
        shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    return {key: torch.randn(shape, generator=generator) / 10 for key, shape in shapes.items()}


def flat(groups: dict[str, Flat]) -> Flat:
    return {f"{group}.{key}": tensor for group, keys in groups.items() for key, tensor in keys.items()}


def valid() -> dict[str, Flat]:
    """One of every kind that loads; small, since damage doesn't depend on size."""
    widths = [8] * 16
    return {
        "base": flat(base_adapter(widths, 16)),
        "plus": flat(plus_adapter(widths, 16, dim=64, heads=1, depth=2, tokens=4)),
        "full-face": flat(full_face_adapter(widths, 16)),
        "encoder": encoder(),
    }


def saved(tensors: Flat, container: str) -> bytes:
    if container == "safetensors":
        return safetensors_bytes({key: tensor.contiguous() for key, tensor in tensors.items()})
    grouped: dict[str, Any] = {}
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        if group in ("image_proj", "ip_adapter"):
            grouped.setdefault(group, {})[key] = tensor
        else:
            grouped[name] = tensor
    file = io.BytesIO()
    torch.save(grouped, file, _use_new_zipfile_serialization=container == "zip")
    return file.getvalue()


# Damage

DTYPES = (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float64, torch.float8_e4m3fn, torch.bfloat16)


def cases() -> Iterator[Case]:
    """Every file, and what was done to it."""
    draw = random.Random(5)
    for kind, tensors in valid().items():
        for container in CONTAINERS:
            yield from ((f"{what} {kind} {container}", data) for what, data in damaged(tensors, container, draw))
    for trick, body in TRICKS.items():
        for container, data in hidden(body).items():
            yield f"trick {trick} {container}", data
    yield from ((f"trick {name}", data) for name, data in evil_zips(saved(valid()["base"], "zip")).items())
    yield from ((f"bomb {name}", data()) for name, data in BOMBS.items())


def damaged(tensors: Flat, container: str, draw: random.Random) -> Iterator[Case]:
    whole = saved(tensors, container)
    yield "valid", whole
    names = sorted(tensors)
    for name in draw.sample(names, 8):
        yield "dropped", saved({key: t for key, t in tensors.items() if key != name}, container)
    for name in draw.sample(names, 8):
        shape = list(tensors[name].shape)
        at = draw.randrange(len(shape))
        shape[at] = draw.choice([0, 1, shape[at] + 1, 2 * shape[at], 3])
        other = draw.choice(
            [torch.zeros(shape), torch.zeros(1, *shape), tensors[name].t() if len(shape) == 2 else torch.zeros(())]
        )
        yield "reshaped", saved(tensors | {name: other}, container)
    for dtype in DTYPES:
        one = draw.choice(names)
        for changed in ({one}, set(names)):
            yield "retyped", saved({k: t.to(dtype) if k in changed else t for k, t in tensors.items()}, container)
    for _ in range(8):
        yield (
            "truncated",
            whole[
                : draw.choice([draw.randrange(len(whole)), draw.randrange(300), len(whole) - draw.randrange(1, 300)])
            ],
        )
    for _ in range(10):
        flipped = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            at = draw.choice(
                [draw.randrange(len(whole)), draw.randrange(min(4000, len(whole))), -draw.randrange(1, 4000)]
            )
            flipped[at] ^= 1 << draw.randrange(8)
        yield "flipped", bytes(flipped)


def hidden(body: bytes) -> dict[str, bytes]:
    """A hostile pickle in every place that some loader would read it from."""
    magic = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as records:
        records.writestr("archive/data.pkl", body)
    return {"bare": body, "legacy": magic + body, "zip": archive.getvalue()}


# Bombs

HEADER = 4 * 2**20
"""The longest header of a safetensors file that is read."""
EMPTY_TENSOR = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def deflated(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("archive/data.pkl", bytes(64 * 2**20))
    return file.getvalue()


def expanded(container: str) -> bytes:
    return saved(
        {"image_proj.proj.weight": torch.ones(1).expand(2**27)} if container != "zip" else flat_expanded(), container
    )


def flat_expanded() -> Flat:
    return {f"ip_adapter.{n}.to_k_ip.weight": torch.ones(1).expand(2**14, 2**14) for n in range(60)}


def many_records() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        for number in range(20_000):
            archive.writestr(f"archive/data/{number}", b"")
    return file.getvalue()


def claimed(field: bytes, value: bytes) -> bytes:
    """A zip archive whose directory's end claims something else."""
    whole = bytearray(saved(valid()["base"], "zip"))
    end = whole.rindex(b"PK\x05\x06")
    at = {b"entries": 8, b"size": 12, b"offset": 16, b"comment": 20}[field]
    whole[end + at : end + at + len(value)] = value
    return bytes(whole)


BOMBS: dict[str, Callable[[], bytes]] = {
    "deflated pickle": lambda: deflated(zipfile.ZIP_DEFLATED),
    "bzip2 pickle": lambda: deflated(zipfile.ZIP_BZIP2),
    "lzma pickle": lambda: deflated(zipfile.ZIP_LZMA),
    "expanded tensor, legacy": lambda: expanded("legacy"),
    "expanded tensors, zip": lambda: expanded("zip"),
    "many records": many_records,
    "entries": lambda: claimed(b"entries", b"\xff\xff\xff\xff"),
    "directory size": lambda: claimed(b"size", b"\xff\xff\xff\x7f"),
    "directory offset": lambda: claimed(b"offset", b"\xff\xff\xff\xff"),
    "comment": lambda: claimed(b"comment", b"\xff\xff"),
    "many steps": lambda: hidden(b"\x80\x02" + b"}" * 15_000_000 + b".")["zip"],
    "many steps, legacy": lambda: hidden(b"\x80\x02" + b"}" * 15_000_000 + b".")["legacy"],
    "many pops": lambda: hidden(b"\x80\x02" + b"N0" * 7_000_000 + b"}.")["zip"],
    "long texts": lambda: hidden(b"\x80\x02" + (b"X" + struct.pack("<I", 2**23) + b"x" * 2**23 + b"0") * 3 + b"}.")[
        "zip"
    ],
    "memo": lambda: hidden(b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", n) for n in range(400_000)) + b".")["zip"],
    "header of names": lambda: header(b"{" + b",".join(b'"%d":{}' % n for n in range(HEADER // 11)) + b"}"),
    "header of numbers": lambda: header(b'{"a":{"shape":[' + b"0," * (HEADER // 2 - 10) + b"0]}}"),
    "header of lists": lambda: header(b'{"a":[' + b"[]," * (HEADER // 3 - 10) + b"[]]}"),
    "header of spaces": lambda: header(b'{"a"' + b" " * (HEADER - 10) + b":1}"),
    "deep header": lambda: header(b'{"a":' * (HEADER // 5)),
    "long number": lambda: header(b'{"a":' + b"9" * (HEADER - 10) + b"}"),
    "header of escapes": lambda: header(b'{"' + b"\\u0041" * (HEADER // 6 - 10) + b'":1}'),
    "many tensors": lambda: header(
        b"{" + b",".join(EMPTY_TENSOR % n for n in range(HEADER // len(EMPTY_TENSOR) - 10_000)) + b"}"
    ),
    "header beyond all limits": lambda: header(b"{" + b",".join(b'"%d":{}' % n for n in range(5_000_000)) + b"}"),
    "header that is none": lambda: struct.pack("<Q", 2**47) + b"{}",
}


# The process that meets them


def forbid_all() -> Callable[[bool], None]:
    """From now on nothing may unpickle, and while it is switched on nothing may write or start anything."""
    on = False
    changes = (
        "remove",
        "rename",
        "rmdir",
        "mkdir",
        "link",
        "symlink",
        "truncate",
        "utime",
        "chmod",
        "chown",
        "setxattr",
    )
    starts = ("system", "exec", "posix_spawn", "spawn", "startfile", "fork", "forkpty", "kill", "putenv")
    forbidden = {f"os.{name}" for name in changes + starts}
    families = (
        "subprocess.",
        "shutil.",
        "pickle.",
        "socket.",
        "urllib.",
        "pty.",
        "tempfile.",
        "ctypes.dlopen",
        "fcntl.",
    )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not on:
            return
        writes = event == "open" and ((args[1] or "r").strip("rbt") or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes or event in forbidden or event.startswith(families):
            print(f"forbidden: {event} {args}", file=sys.stderr, flush=True)
            os._exit(3)  # an exception could be caught on its way

    def entered(*_: Any, **__: Any) -> Any:
        print("an unpickler was entered", file=sys.stderr, flush=True)
        os._exit(4)

    def switch(to: bool) -> None:
        nonlocal on
        on = to

    sys.addaudithook(hook)
    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        setattr(pickle, name, entered)
    torch.load = torch.jit.load = entered
    return switch


def judge(path: Path) -> str:
    """``worked`` or ``refused``, by every way that leads to a file."""
    from lib_ipadapter.clip_vision import load_clip_vision
    from lib_ipadapter.encoding import encode, image_kv, load_adapter, load_negative, run_here
    from lib_ipadapter.library import Library

    def adapter() -> None:
        loaded = load_adapter(path)
        kind = loaded.kind
        row = (kind.embedding_width,) if kind.output == "image_embeds" else (257, kind.embedding_width)
        (kv,) = image_kv(run_here, loaded.model, [torch.ones(1, *row)])
        assert [each.shape for each in kv[::2]] == [(1, kind.tokens, width) for width in kind.layer_widths]

    def vision() -> None:
        tower = load_clip_vision(path)
        size = tower.kind.image_size
        (seen,) = encode(run_here, tower, "image_embeds", [torch.zeros(1, 3, size, size)])
        assert seen.shape == (1, tower.kind.projection)

    worked = [within_limits(each) for each in (adapter, vision, lambda: load_negative(path))]
    library = Library(lambda: [path.parent], lambda: [path.parent])
    assert within_limits(library.listing)
    assert within_limits(library.listing)
    return "worked" if any(worked) else "refused"


def within_limits(function: Callable[[], object]) -> bool:
    import signal

    from lib_ipadapter.errors import IPAdapterError

    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # whose signal ends the process
    try:
        function()
    except IPAdapterError as error:
        sentence = str(error)
        assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 1000, sentence
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return True


def main(folder: Path) -> None:
    import resource

    path = folder / "case.bin"
    for data in (saved(tensors, "zip") for tensors in valid().values()):  # what is loaded late is loaded now
        path.write_bytes(data)
        judge(path)
    switch = forbid_all()
    found: Counter[str] = Counter()
    files = list(cases())
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for label, data in files:
        print(label, file=sys.stderr, flush=True)
        path.write_bytes(data)
        before = path.stat()
        switch(True)
        found[f"{label.split()[0]} {judge(path)}"] += 1
        switch(False)
        after = path.stat()
        assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
        assert path.read_bytes() == data
        assert [each.name for each in folder.iterdir()] == ["case.bin"]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

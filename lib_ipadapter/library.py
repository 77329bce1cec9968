"""Which adapters, image encoders and negatives there are on disk. Names mean nothing here; headers decide."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .encoding import NEGATIVE_KEY
from .errors import IPAdapterError
from .fingerprint import fingerprint
from .recognise import ENCODER_FILES, AdapterKind, EncoderKind, encoder_needed, recognise_adapter, recognise_encoder
from .tensorfile import TensorInfo, open_tensors

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

Kind = TypeVar("Kind")
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class _Known:
    """What a file's header said when it was read: its size and times then, and what it is, if anything."""

    stamp: tuple[int, ...]
    adapter: AdapterKind | None = None
    encoder: EncoderKind | None = None
    negative: int | None = None
    """Width of a negative file's image tokens; 0 if they have none."""


class Library:
    """The model files in a host's folders, each header read once for every change of the file.

    Args:
        adapter_folders, encoder_folders: called for every listing, so that settings may change; folders that don't
            exist are passed over.
    """

    def __init__(
        self, adapter_folders: Callable[[], Iterable[Path]], encoder_folders: Callable[[], Iterable[Path]]
    ) -> None:
        self._adapter_folders = adapter_folders
        self._encoder_folders = encoder_folders
        self._known: dict[str, _Known] = {}

    def adapters(self) -> dict[str, AdapterKind]:
        """Every adapter by the name that units use: its path inside its folder, with forward slashes.

        Where an earlier folder has a file of that name already, as much of the later folder's path as tells them apart
        stands before it: ``ControlNet/style.safetensors``. The name of the first file stays what it was.
        """
        return {name: kind for name, path in self._files(self._adapter_folders()) if (kind := self._look(path).adapter)}

    def negatives(self) -> list[str]:
        """Names of the negative files in the adapter folders."""
        return list(self.negative_widths())

    def negative_widths(self) -> dict[str, int]:
        """Width of the image tokens of every negative file by name."""
        files = self._files(self._adapter_folders())
        return {name: width for name, path in files if (width := self._look(path).negative) is not None}

    def encoders(self) -> dict[str, EncoderKind]:
        """Every image encoder by name."""
        return {name: kind for name, path in self._files(self._encoder_folders()) if (kind := self._look(path).encoder)}

    def listing(self) -> dict[str, Any]:
        """Everything by name as it is on disk now, ready for JSON: ``adapters``, ``encoders``, ``negatives``."""

        encoders = {kind.name for kind in self.encoders().values()}
        adapters = [
            {
                "name": name,
                "kind": known.adapter.description,
                "family": known.adapter.family,
                "variant": known.adapter.variant,
                "tokens": known.adapter.tokens,
                "encoder": encoder_needed(known.adapter),
                "encoder_present": encoder_needed(known.adapter) in encoders,
                "bytes": known.stamp[0],
            }
            for name, path in self._files(self._adapter_folders())
            if (known := self._look(path)).adapter
        ]
        return {
            "adapters": sorted(adapters, key=lambda each: str(each["name"]).lower()),
            "encoders": sorted(self.encoders(), key=str.lower),
            "negatives": sorted(self.negatives(), key=str.lower),
        }

    def encoder_listing(self) -> list[dict[str, Any]]:
        """Every image encoder by name, ready for JSON: ``name``, ``kind``, ``image_size``, ``bytes``."""
        found = [
            {
                "name": name,
                "kind": known.encoder.name,
                "image_size": known.encoder.image_size,
                "bytes": known.stamp[0],
            }
            for name, path in self._files(self._encoder_folders())
            if (known := self._look(path)).encoder
        ]
        return sorted(found, key=lambda each: str(each["name"]).lower())

    def encoder_name(self, path: Path) -> str:
        """Name of the image encoder at a path."""
        return next((name for name, each in self._files(self._encoder_folders()) if each == path), path.name)

    def encoder_size(self, path: Path) -> int:
        """Side in pixels of the pictures that the image encoder at a path takes."""
        known = self._look(path).encoder
        assert known is not None, path
        return known.image_size

    def adapter_path(self, name: str) -> Path:
        """Where the adapter of this name is.

        Raises:
            IPAdapterError: if there is no such file. What the file holds is for whoever loads it to say.
        """
        return self._find(name, "IP-Adapter model", self._adapter_folders(), self.adapters)

    def find_model(self, name: str, digits: str) -> tuple[str, str]:
        """What the adapter of this name and fingerprint is called here, and a note if that is another name or file.

        Args:
            digits: the fingerprint's first; '' if it isn't known.
        """
        paths = {each: path for each, path in self._files(self._adapter_folders()) if self._look(path).adapter}
        by_stem = {each.rpartition(".")[0]: path for each, path in reversed(paths.items())}
        paths = {**by_stem, **paths} if name in by_stem else paths
        if name in paths and _fits(paths[name], digits):
            return name, ""
        renamed = next((each for each, path in paths.items() if digits and _fits(path, digits)), None)
        if renamed is not None:
            return renamed, f"the model {name} is called {renamed} here."
        if name in paths:
            return name, f"the model {name} is another file here than the one that was used (fingerprint {digits})."
        return name, f"the model {name} isn't here: get it, or choose another one." if name else ""

    def negative_path(self, name: str) -> Path:
        """Where the negative file of this name is; raises as :meth:`adapter_path`."""
        return self._find(name, "negative file", self._adapter_folders(), self.negatives)

    def encoder_for(self, kind: AdapterKind) -> Path:
        """The first image encoder on disk that an adapter of this kind takes.

        Raises:
            IPAdapterError: if there is none; the sentence says which one to get and where to put it.
        """
        needed = encoder_needed(kind)
        folders = list(self._encoder_folders())
        for _, path in self._files(folders):
            found = self._look(path).encoder
            if found and found.name == needed:
                return path
        raise IPAdapterError(
            f"The adapter ({kind.description}) needs the image encoder {needed}, and none of it is in "
            f"{_names(folders)}: put {_file_to_get(needed)} into one of these folders, under any name."
        )

    def _find(self, name: str, what: str, folders: Iterable[Path], listed: Callable[[], Iterable[str]]) -> Path:
        folders = list(folders)
        files = dict(self._files(folders))
        by_stem = {candidate.rpartition(".")[0]: path for candidate, path in reversed(files.items())}
        path = files.get(name) or by_stem.get(name)
        if path is not None:
            return path
        choices = list(listed())
        near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5) or choices[:3]
        hint = f"choose one of those there, such as {', '.join(near)}" if near else "put one there"
        raise IPAdapterError(f"There is no {what} {name!r} in {_names(folders)}: {hint}.")

    def _files(self, folders: Iterable[Path]) -> list[tuple[str, Path]]:
        found: dict[str, Path] = {}
        for folder in folders:
            for path in _model_files(folder):
                for name in _names_of(path, folder):
                    if name not in found:
                        found[name] = path
                        break
                    if _same(found[name], path):
                        break
        return list(found.items())

    def _look(self, path: Path) -> _Known:
        """What a file is; read only if it has changed since the last look."""
        try:
            stat = path.stat()
        except OSError:
            return _Known(())
        stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)  # the last changes with permissions
        known = self._known.get(str(path))
        if known is None or known.stamp != stamp:
            known = self._known[str(path)] = _read(path, stamp)
        return known


def _read(path: Path, stamp: tuple[int, ...]) -> _Known:
    try:
        tensors = open_tensors(path).tensors
    except IPAdapterError:
        return _Known(stamp)
    adapter = _recognised(recognise_adapter, tensors)
    # Whatever has an adapter's tensors is refused as an encoder, so the second look can be spared.
    encoder = _recognised(recognise_encoder, tensors) if adapter is None else None
    shape = tensors[NEGATIVE_KEY].shape if list(tensors) == [NEGATIVE_KEY] else None
    width = None if shape is None else shape[2] if len(shape) == 3 else 0
    return _Known(stamp, adapter, encoder, width)


def _recognised(recognise: Callable[[Tensors], Kind], tensors: Tensors) -> Kind | None:
    try:
        return recognise(tensors)
    except IPAdapterError:
        return None


def _model_files(folder: Path) -> Iterator[Path]:
    """In a folder and all below it; what can't be read is passed over."""
    visited: set[str] = set()  # links may lead back to a folder above
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort(key=str.lower)
        for name in sorted(names, key=str.lower):
            path = Path(parent, name)
            if name.lower().endswith(SUFFIXES) and _is_text(str(path)):
                yield path


def _fits(path: Path, digits: str) -> bool:
    """Whether a file's fingerprint begins so."""
    try:
        return fingerprint(path).startswith(digits)
    except IPAdapterError:
        return False


def _is_text(name: str) -> bool:
    """Whether neither page nor API chokes on a name; a file system may have any bytes in it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names_of(path: Path, folder: Path) -> Iterator[str]:
    """What a file may be called, from the shortest to its whole path, which is no other file's."""
    name = path.relative_to(folder).as_posix()
    yield name
    for parent in (folder, *folder.parents):
        name = f"{parent.name}/{name}"
        yield name


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _file_to_get(encoder: str) -> str:
    public = ENCODER_FILES.get(encoder)
    if public is None:
        return "its file"
    return f"{public.file} of {public.repository} ({public.size})"


def _names(folders: Iterable[Path]) -> str:
    return ", ".join(folder.as_posix() for folder in folders) or "any known folder"

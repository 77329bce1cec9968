"""Saved references: pictures as the image encoder saw them, by a name, to be used again without the pictures.

One safetensors file each, in a folder beside the reference store and under its rules (see ``references``): readable by
its owner alone, and only where keeping pictures on disk is wanted. It may be copied to another machine. Nothing in the
folder is ever deleted unasked; instead nothing more is saved when the room for references is used up.

The file holds ``features`` (float32, ``[n, …]``: the encoder's output for n pictures) and ``thumbnail`` (uint8,
``[H, W, 3]``); its header says which encoder and which family of adapters they are for, and has the values of a unit's
fields to use them with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import Tensor

from . import references
from .checks import WEIGHT_RANGE
from .errors import IPAdapterError
from .fingerprint import FileIdentity, file_identity, fingerprint
from .recognise import AdapterKind
from .references import Rules, write_private
from .refs import saved_name
from .tensorfile import TensorFile, open_tensors
from .units import Unit

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = "ip-adapter-saved"
"""Name of the folder, beside the reference store."""
FORMAT = "ip-adapter saved reference"
VERSION = "1"
MAX_BYTES = 64 * 2**20
"""Of a file: the hidden states of some forty pictures."""
THUMBNAIL, SHOWN = 128, 4
"""Height of a thumbnail in pixels, and how many pictures it shows side by side."""
LISTED = 20
"""Names that an error tells at most."""
NOT_DEFAULTS = ("enabled", "images", "negative_images", "mixture", "pictures", "noise", "noise_strength")
"""Fields of a unit that say how its pictures become features, so that they mean nothing for these."""


@dataclass(frozen=True)
class SavedReference:
    """A saved reference whose header has been read."""

    name: str
    path: Path
    identity: FileIdentity
    encoder: str
    """Fingerprint of the image encoder's file."""
    family: str
    output: str
    weights: tuple[float, ...]
    """Of each picture, its part of the unit's weight."""
    defaults: Mapping[str, Any]
    """A unit's fields, as JSON has them."""
    fingerprint: str
    """The first digits of the fingerprint of the adapter that ``defaults`` name."""

    @property
    def key(self) -> Hashable:
        """Its features' place among what is kept."""
        return ("saved", self.name, self.identity)

    def check(self, kind: AdapterKind, encoder: Path) -> None:
        """Raises :class:`IPAdapterError` if an adapter is of another family, or sees through another encoder."""
        if (kind.family, kind.output) != (self.family, self.output):
            raise IPAdapterError(
                f'The saved reference "{self.name}" is for {self.family} adapters that take {self.output}, and the '
                f"adapter is for {kind.family} and takes {kind.output}: choose an adapter of that kind, or save the "
                "picture again with this one."
            )
        found = fingerprint(encoder)
        if found != self.encoder:
            raise IPAdapterError(
                f'The saved reference "{self.name}" was encoded by an image encoder with the fingerprint '
                f"{self.encoder[:10]}, and the adapter's here is {encoder.name} with {found[:10]}: use that encoder's "
                "file, or save the picture again."
            )

    def unit(self, **fields: Any) -> Unit:
        """A unit of this reference, with its defaults but for ``fields``."""
        try:
            return Unit.from_json({**self.defaults, "images": [{"saved": self.name}], **fields})
        except IPAdapterError as error:
            raise IPAdapterError(
                f'The saved reference "{self.name}" with {fields or "its defaults"}: {error}'
            ) from error


class SavedReferences:
    """The folder of saved references.

    Args:
        rules: asked every time; the folder is beside the store's.
    """

    def __init__(self, rules: Callable[[], Rules]) -> None:
        self._rules = rules

    def folder(self) -> Path | None:
        """Where they are; None: keeping pictures on disk isn't wanted here."""
        store = self._rules().folder
        return None if store is None else store.parent / FOLDER

    def names(self) -> list[str]:
        """Of all of them, also of those that are damaged."""
        folder = self.folder()
        try:
            found = [] if folder is None else [path.stem for path in folder.iterdir() if _is_name(path)]
        except OSError:
            return []
        return sorted(found, key=str.lower)

    def read(self, name: str) -> SavedReference:
        """The header of one.

        Raises:
            IPAdapterError: if there is none of this name, or its file is damaged or something else.
        """
        path = self._path(name)
        return _read(path.stem, path)[0]

    def features(self, key: Hashable) -> Tensor:
        """The features that :attr:`SavedReference.key` stands for, ``[n, …]``."""
        assert isinstance(key, tuple)
        _, file = _read(key[1], Path(key[2][0]))
        features = file.read(["features"])["features"].float()
        if not bool(features.isfinite().all()):
            raise _damaged(file.path, "its features aren't finite numbers")
        return features

    def thumbnail(self, name: str) -> Image.Image:
        """What its pictures look like, RGB."""
        path = self._path(name)
        _, file = _read(path.stem, path)
        return Image.fromarray(file.read(["thumbnail"])["thumbnail"].numpy())

    def listing(self) -> list[dict[str, Any]]:
        """All of them, ready for JSON; a damaged one with why."""
        found: list[dict[str, Any]] = []
        for name in self.names():
            try:
                each = self.read(name)
                found.append(
                    {
                        "name": name,
                        "family": each.family,
                        "encoder": each.encoder[:10],
                        "pictures": len(each.weights),
                        "defaults": dict(each.defaults),
                        "bytes": each.identity[1],
                        "saved": datetime.fromtimestamp(each.identity[2] / 1e9, timezone.utc).isoformat(
                            timespec="seconds"
                        ),
                    }
                )
            except IPAdapterError as error:
                found.append({"name": name, "problem": str(error)})
        return found

    def check_name(self, name: object, replace: bool = False) -> str:
        """The name for a new one.

        Raises:
            IPAdapterError: if it isn't allowed, or taken and not to be replaced, or nothing is kept on disk here.
        """
        if not isinstance(name, str):
            raise IPAdapterError(f'The field "name" must be a text: it is {name!r:.40}.')
        name = saved_name(name)
        folder = self.folder()
        if folder is None:
            raise _off()
        if not replace and _file(folder, name).exists():
            raise IPAdapterError(
                f'A saved reference "{name}" is there already: choose another name, or set "replace" to true.'
            )
        return name

    def save(
        self,
        name: str,
        unit: Unit,
        kind: AdapterKind,
        files: tuple[Path, Path],
        features: Tensor,
        weights: Sequence[float],
        pictures: Sequence[Image.Image],
    ) -> SavedReference:
        """Writes one.

        Args:
            name: as :meth:`check_name` gives it.
            unit: whose values become the defaults.
            kind: of the unit's adapter.
            files: of the adapter and of the image encoder.
            features, weights: of each picture.
            pictures: what the thumbnail shows.

        Raises:
            IPAdapterError: if there is no room for it, or it can't be written.
        """
        adapter, encoder = files
        values = json.loads(unit.to_json())
        defaults = {key: value for key, value in values.items() if key not in (*NOT_DEFAULTS, "version")}
        header = {
            "format": FORMAT,
            "version": VERSION,
            "encoder": fingerprint(encoder),
            "family": kind.family,
            "output": kind.output,
            "weights": json.dumps(list(weights)),
            "defaults": json.dumps(defaults),
            "fingerprint": fingerprint(adapter)[:10],
        }
        tensors = {"features": features.float().contiguous(), "thumbnail": _thumbnail(pictures)}
        content = to_safetensors(tensors, header)
        folder = self.folder()
        if folder is None:
            raise _off()
        path = _file(folder, name)
        self._check_room(folder, path, len(content))
        try:
            write_private(path, content)
        except OSError as error:
            raise IPAdapterError(
                f'The saved reference "{name}" can\'t be written to {folder.as_posix()} ({error.strerror or error}): '
                "make room, or check who may write there."
            ) from error
        return self.read(name)

    def forget(self, name: str) -> bool:
        """Deletes one; whether it was there."""
        folder = self.folder()
        path = None if folder is None else _file(folder, saved_name(name))
        if path is None or not path.is_file():
            return False
        try:
            path.unlink()
        except OSError as error:
            raise IPAdapterError(
                f"The file {path.name} in {path.parent.as_posix()} can't be removed ({error.strerror or error}): "
                "remove it by hand."
            ) from error
        return True

    def missing(self, name: str) -> IPAdapterError:
        """Why there is none of this name, with those that there are."""
        if self.folder() is None:
            return _off()
        names = self.names()
        if self._rules().guarded:
            there = "where strangers can reach the WebUI their names aren't told"
        elif names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            there = f"there are {', '.join(names[:LISTED])}{more}"
        else:
            there = "there is none yet"
        return IPAdapterError(
            f'No saved reference is named "{name}"; {there}: choose one, or save a unit under a name.'
        )

    # Inside

    def _path(self, name: str) -> Path:
        folder = self.folder()
        path = None if folder is None else _file(folder, saved_name(name))
        if path is None or not path.is_file():
            raise self.missing(name)
        return path

    def _check_room(self, folder: Path, path: Path, length: int) -> None:
        limit = self._rules().limit_bytes
        if length > MAX_BYTES:
            raise IPAdapterError(
                f"The saved reference takes {length / 1e6:.1f} MB, and at most {MAX_BYTES / 1e6:.0f} MB are allowed: "
                "save fewer pictures, or mix them."
            )
        others = 0
        if folder.is_dir():
            others = sum(each.stat().st_size for each in folder.iterdir() if _is_name(each) and each != path)
        if others + length > limit:
            raise IPAdapterError(
                f"The saved references would take {(others + length) / 1e6:.1f} MB, and {limit / 1e6:g} MB are allowed "
                "(Settings, IP-Adapter, room for reference pictures): delete some, or raise it."
            )


def is_key(key: Hashable) -> bool:
    """Whether it is the :attr:`SavedReference.key` of one."""
    return isinstance(key, tuple) and key[0] == "saved"


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _is_name(path: Path) -> bool:
    try:
        return path.suffix == ".safetensors" and saved_name(path.stem) == path.stem and path.is_file()
    except IPAdapterError:
        return False


def _off() -> IPAdapterError:
    return IPAdapterError(
        "Saved references are off with the reference store (Settings, IP-Adapter, keep used reference pictures on "
        "disk), as it is by default where strangers can reach the WebUI: switch it on."
    )


def _read(name: str, path: Path) -> tuple[SavedReference, TensorFile]:
    identity = file_identity(path)
    if identity[1] > MAX_BYTES:
        raise _damaged(path, f"it has {identity[1] / 1e6:.0f} MB, and at most {MAX_BYTES / 1e6:.0f} are read")
    file = open_tensors(path)
    header = file.metadata
    if header.get("format") != FORMAT:
        raise _damaged(path, "its header doesn't say that it is one")
    if header.get("version") != VERSION:
        raise _damaged(path, f"it is of version {header.get('version', '')[:10]}, which needs a newer extension")
    try:
        weights = json.loads(header["weights"])
        defaults = json.loads(header["defaults"])
        texts = [header[key] for key in ("encoder", "family", "output", "fingerprint")]
        shapes = file.tensors["features"].shape, file.tensors["thumbnail"].shape
    except (KeyError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its header lacks or garbles something ({str(error)[:60]})") from error
    numbers = isinstance(weights, list) and all(type(w) in (int, float) and math.isfinite(w) and w for w in weights)
    if not numbers or any(not WEIGHT_RANGE[0] <= w <= WEIGHT_RANGE[1] for w in weights):
        raise _damaged(path, "the weights in its header aren't numbers from -5 to 5 other than 0")
    if not isinstance(defaults, dict) or any(key in NOT_DEFAULTS for key in defaults):
        raise _damaged(path, "the defaults in its header aren't a unit's")
    features, thumbnail = shapes
    if len(features) not in (2, 3) or features[0] != len(weights) or not weights or 0 in features:
        raise _damaged(path, f"its features have the shape {list(features)} for {len(weights)} weights")
    if not file.tensors["features"].dtype.is_floating_point or file.tensors["thumbnail"].dtype != torch.uint8:
        raise _damaged(path, "its features aren't floating-point numbers, or its thumbnail no bytes")
    if len(thumbnail) != 3 or thumbnail[2] != 3 or 0 in thumbnail or max(thumbnail) > 16 * THUMBNAIL:
        raise _damaged(path, f"its thumbnail has the shape {list(thumbnail)}")
    encoder, family, output, adapter = texts
    return SavedReference(name, path, identity, encoder, family, output, tuple(weights), defaults, adapter), file


def _damaged(path: Path, what: str) -> IPAdapterError:
    return IPAdapterError(f"{path.name} is no saved reference that can be read, for {what}: save it again.")


def _thumbnail(pictures: Sequence[Image.Image]) -> Tensor:
    """The first pictures side by side, ``[H, W, 3]``."""
    panels = []
    for picture in pictures[:SHOWN]:
        width = max(1, min(2 * THUMBNAIL, round(picture.width * THUMBNAIL / picture.height)))
        panels.append(np.asarray(picture.convert("RGB").resize((width, THUMBNAIL), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.concatenate(panels, axis=1).copy())


default = SavedReferences(lambda: references.default.rules())
"""What the page, the API and generations of this load share."""

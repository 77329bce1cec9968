"""What the routes of the HTTP API answer, without a web framework and without a WebUI; who may ask is in ``access``."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .encoding import resolve_uncond
from .errors import IPAdapterError
from .formulations import resolve_formulation
from .hosts.base import UNetInfo
from .kept import Kept
from .mask_pictures import MaskPictures
from .pictures import picture_hash, prepare, read_picture
from .preparer import check_fit
from .progress import STEPS, Window
from .recognise import AdapterKind, recognise_adapter
from .steps import STEPS_RANGE, acts_in, counted, never_acted, of_img2img, of_scheduler, of_sigmas
from .tensorfile import open_tensors
from .units import SCHEMA_VERSION, ImageRef, Unit

if TYPE_CHECKING:
    from PIL.Image import Image

    from .downloads import Downloader
    from .session import Session

Asked = Mapping[str, Any]
"""A request: its body's fields and what its path names."""
PREVIEW_SIZE = 224
"""Side of a preview where no adapter says which encoder will see the picture."""
HALF = 2
"""Bytes of a number of K and V where no checkpoint says otherwise."""


class References(Protocol):
    """The pictures that are kept; see ``references``."""

    def get(self, sha256: str) -> Image:
        """The picture with this hash; raises :class:`IPAdapterError` if it isn't kept."""

    def png(self, sha256: str) -> bytes:
        """The same as a file; raises as :meth:`get`."""

    def listing(self) -> list[dict[str, Any]]:
        """All of them, ready for JSON."""

    def forget(self, sha256: str) -> bool:
        """Whether there was one, which is gone now."""


class Answers:
    """One method for each route, named in :data:`.access.ROUTES`.

    Args:
        session: the engine.
        loaded: the UNet that the WebUI has loaded; None if there is none, or none that can be asked.
        references: the pictures that are kept.
        downloader: gets models.
        fetch: the picture at an address, where the WebUI's settings allow it; else raises :class:`IPAdapterError`.
        may_see: whether kept pictures may be shown to who calls the API.
    """

    def __init__(
        self,
        session: Session,
        loaded: Callable[[], UNetInfo | None],
        references: References,
        downloader: Downloader,
        fetch: Callable[[str], Image],
        may_see: Callable[[], bool],
    ) -> None:
        self._library = session.library
        self._loaded = loaded
        self._references = references
        self._downloader = downloader
        self._fetch = fetch
        self._may_see = may_see

    def version(self, _: Asked) -> dict[str, Any]:
        """The version of this extension, and of the schema of units that it reads and writes."""
        return {"version": version(), "schema": SCHEMA_VERSION}

    def models(self, _: Asked) -> dict[str, Any]:
        """The model files that are there now: adapters with what they are and need, image encoders, negatives."""
        return self._library.listing()

    def encoders(self, _: Asked) -> dict[str, Any]:
        """The image encoders that are there now: name, kind, side of their pictures in pixels, bytes."""
        return {"encoders": self._library.encoder_listing()}

    def check(self, asked: Asked) -> dict[str, Any]:
        """What a unit would do: adapter, encoder, what ``auto`` means, steps, memory; or what is wrong.

        Fields: ``unit``; to be told the steps also ``steps`` and ``scheduler``, or the noise levels ``sigmas``, and for
        img2img ``denoising_strength``.
        """
        _only(asked, ("unit", "steps", "scheduler", "sigmas", "denoising_strength"))
        if "unit" not in asked:
            raise IPAdapterError('The field "unit" is missing; allowed is a unit, as in a generation\'s arguments.')
        unit = Unit.from_json(asked["unit"])
        path = self._library.adapter_path(unit.model)
        kind = recognise_adapter(open_tensors(path).tensors, path.name)
        info = self._loaded()
        if info is not None:
            check_fit(unit.model, kind, info)
        encoder = self._library.encoder_for(kind)
        uncond = resolve_uncond(unit.uncond, kind.variant)
        if uncond == "file":
            self._library.negative_path(unit.negative)
        if not unit.images:
            raise IPAdapterError("The unit has no picture; give it at least one.")
        pictures = [self._picture(image) for image in unit.images]
        MaskPictures(Kept(lambda: 0, lambda _: 0)).prepare(unit, store=False)
        return {
            "model": unit.model,
            "kind": kind.description,
            "family": kind.family,
            "variant": kind.variant,
            "tokens": kind.tokens,
            "encoder": self._library.encoder_name(encoder),
            "formulation": resolve_formulation(unit.formulation, kind.variant).name,
            "uncond": uncond,
            "pictures": [
                {"sha256": picture_hash(each), "width": each.width, "height": each.height} for each in pictures
            ],
            "acts": unit.enabled and bool(unit.acting_images),
            "steps": _steps(unit, asked),
            "memory": _memory(unit, kind, uncond, info),
            "fits_checkpoint": None if info is None else True,
        }

    def preview(self, asked: Asked) -> dict[str, Any]:
        """What the image encoder will see of pictures: ``images`` with their crops, and ``preparation``.

        With ``model``, in the size of the encoder that this adapter takes.
        """
        _only(asked, ("images", "preparation", "model"))
        unit = Unit.from_json({key: value for key, value in asked.items() if key != "model"})
        if not unit.images:
            raise IPAdapterError('The field "images" is empty; allowed is a picture or a list of pictures.')
        if any(image.sha256 for image in unit.images) and not self._may_see():
            error = IPAdapterError(
                "A kept picture isn't shown because extension access is disabled on this WebUI: give it as base64."
            )
            error.status_code = 403
            raise error
        size = PREVIEW_SIZE
        if asked.get("model", ""):
            path = self._library.adapter_path(Unit.from_json({"model": asked["model"]}).model)
            kind = recognise_adapter(open_tensors(path).tensors, path.name)
            size = self._library.encoder_size(self._library.encoder_for(kind))
        seen = [prepare(self._picture(image), unit.preparation, size, image.crop) for image in unit.images]
        return {"size": size, "images": [base64.b64encode(_png(each)).decode() for each in seen]}

    def references(self, _: Asked) -> dict[str, Any]:
        """The reference pictures that are kept on this machine: hash, size, bytes, when they were used last."""
        return {"references": self._references.listing()}

    def reference(self, asked: Asked) -> bytes:
        """A reference picture that is kept, as PNG."""
        return self._references.png(_hash(asked))

    def forget_reference(self, asked: Asked) -> dict[str, Any]:
        """Deletes a reference picture that is kept."""
        sha256 = _hash(asked)
        if not self._references.forget(sha256):
            error = IPAdapterError(f'No reference picture with sha256 "{sha256}" is kept here: list them to see which.')
            error.status_code = 404
            raise error
        return {"forgotten": sha256}

    def catalogue(self, _: Asked) -> dict[str, Any]:
        """The models that can be downloaded, with licence and size, and whether each is there already."""
        return {"entries": self._downloader.catalogue()}

    def start_download(self, asked: Asked) -> dict[str, Any]:
        """Starts the download of the catalogue's entry ``name``, or joins the one that runs."""
        return self._downloader.start(asked.get("name"))

    def download(self, _: Asked) -> dict[str, Any]:
        """The running download, or the last one."""
        return self._downloader.state()

    def cancel_download(self, _: Asked) -> dict[str, Any]:
        """Asks the running download to end; what has come stays for the next try."""
        return self._downloader.cancel()

    def _picture(self, image: ImageRef) -> Image:
        if image.sha256:
            return self._references.get(image.sha256)
        return self._fetch(image.data.strip()) if is_address(image.data) else read_picture(image.data)


def is_address(data: str) -> bool:
    """Whether a picture is given as a web address."""
    return data.lstrip()[:8].lower().startswith(("http://", "https://"))


def fetched(unit: Unit, fetch: Callable[[str], Image], keep: Callable[[Image], str]) -> Unit:
    """The unit with the hash of what was fetched in place of every picture that is an address."""
    if not any(is_address(image.data) for image in unit.images):
        return unit
    images = (
        replace(image, data="", sha256=keep(fetch(image.data.strip()))) if is_address(image.data) else image
        for image in unit.images
    )
    return replace(unit, images=tuple(images))


def version() -> str:
    """Of this extension, as its project file says."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    assert found is not None
    return found[1]


def _steps(unit: Unit, asked: Asked) -> dict[str, Any] | None:
    """Of how many steps there are the numbers of those that the unit acts in; None if steps weren't asked for."""
    if "sigmas" in asked:
        if "steps" in asked or "scheduler" in asked:
            raise IPAdapterError(
                'The field "sigmas" is given beside "steps" or "scheduler"; allowed is one of the two.'
            )
        progress = of_sigmas(_levels(asked["sigmas"]))
    elif "steps" in asked:
        count = asked["steps"]
        low, high = STEPS_RANGE
        if not isinstance(count, int) or isinstance(count, bool) or not low <= count <= high:
            raise IPAdapterError(f'The field "steps" must be a whole number from {low} to {high}: it is {count!r:.40}.')
        scheduler = asked.get("scheduler", "uniform")
        if not isinstance(scheduler, str):
            raise IPAdapterError(f'The field "scheduler" must be a text: it is {scheduler!r:.40}.')
        progress = of_scheduler(scheduler, count)
    else:
        for name in ("scheduler", "denoising_strength"):
            if name in asked:
                raise IPAdapterError(f'The field "{name}" says nothing without "steps": give the number of steps too.')
        return None
    if "denoising_strength" in asked:
        strength = asked["denoising_strength"]
        if not _is_number(strength) or not 0 <= strength <= 1:
            raise IPAdapterError(
                f'The field "denoising_strength" must be a number from 0 to 1: it is {strength!r:.40}.'
            )
        progress = of_img2img(progress, float(strength))
    if unit.timing == STEPS:
        progress = counted(len(progress))
    acting = acts_in(Window(unit.start, unit.stop, unit.timing), progress)
    if not acting:
        raise IPAdapterError(never_acted(unit, (progress[0], progress[-1])))
    return {"of": len(progress), "acting": acting}


def _levels(value: object) -> list[float]:
    if isinstance(value, list) and all(_is_number(each) and each >= 0 for each in value) and any(value):
        falling = all(a > b for a, b in pairwise(value))
        if falling and len(value) <= STEPS_RANGE[1] + 1:
            return [float(each) for each in value]
    raise IPAdapterError(
        f'The field "sigmas" must be a list of falling noise levels, such as [14.6, 3.2, 0.7, 0]: it is {value!r:.60}.'
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _memory(unit: Unit, kind: AdapterKind, uncond: str, info: UNetInfo | None) -> dict[str, int]:
    """Bytes of K and V on the device while sampling; the same at every size and batch."""
    distinct = len({(image.data, image.sha256, image.crop, image.weight) for image in unit.acting_images})
    shares = len({image.weight for image in unit.acting_images})
    sets = distinct + (0 if uncond == "none" else shares)
    number = HALF if info is None else info.dtype.itemsize
    return {"kv_bytes": sets * kind.tokens * 2 * sum(kind.layer_widths) * number}


def _only(asked: Asked, known: Sequence[str]) -> None:
    for name in asked:
        if name not in known:
            raise IPAdapterError(f'The field "{name:.40}" is unknown; allowed are {", ".join(known)}.')


def _hash(asked: Asked) -> str:
    return ImageRef(sha256=str(asked["sha256"]) or "-").sha256


def _png(picture: Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()

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

from . import saved
from .errors import IPAdapterError
from .formulations import resolve_formulation
from .gathering import uncond_of
from .hosts.base import UNetInfo
from .kept import Kept
from .layer_weights import effective, groups, on_unet
from .layers import LAYOUTS
from .mask_pictures import MaskPictures
from .mixtures import MIXTURES
from .pictures import picture_hash, prepare, read_picture
from .preparer import check_fit
from .progress import STEPS
from .recognise import AdapterKind, recognise_adapter
from .refs import ImageRef
from .steps import STEPS_RANGE, counted, curve_of, factors, never_acted, of_img2img, of_scheduler, of_sigmas, takes_part
from .tensorfile import open_tensors
from .units import PER_GENERATION, PICTURE_FIELDS, SCHEMA_VERSION, TOGETHER, Unit

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

    def add(self, picture: Image) -> str:
        """Keeps a picture; its name for units."""


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
        self._session = session
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
        img2img ``denoising_strength``. ``hires``: whether these are the steps of the hires pass.
        """
        _only(asked, ("unit", "steps", "scheduler", "sigmas", "denoising_strength", "hires"))
        if "unit" not in asked:
            raise IPAdapterError('The field "unit" is missing; allowed is a unit, as in a generation\'s arguments.')
        unit = Unit.from_json(asked["unit"])
        path = self._library.adapter_path(unit.model)
        kind = recognise_adapter(open_tensors(path).tensors, path.name)
        info = self._loaded()
        if info is not None:
            check_fit(unit.model, kind, info)
        encoder = self._library.encoder_for(kind)
        uncond = uncond_of(unit, kind)
        if uncond == "file":
            self._library.negative_path(unit.negative)
        if not unit.images:
            raise IPAdapterError("The unit has no picture; give it at least one.")
        for image in unit.negative_images:
            self._known(image, kind, encoder)
        pictures = [self._known(image, kind, encoder) for image in unit.images]
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
            "pictures": pictures,
            "acts": unit.enabled and bool(unit.acting_images),
            "steps": _steps(unit, asked),
            "layers": _layers(unit, kind),
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

    def saved(self, _: Asked) -> dict[str, Any]:
        """The saved references: name, family of adapters, encoder's fingerprint, pictures, a unit's default values."""
        return {"saved": saved.default.listing()}

    def save(self, asked: Asked) -> dict[str, Any]:
        """Saves the pictures of ``unit``, encoded, and its values under ``name``; over another one with ``replace``."""
        _only(asked, ("name", "unit", "replace"))
        for field in ("name", "unit"):
            if field not in asked:
                raise IPAdapterError(f'The field "{field}" is missing; allowed are "name", "unit" and "replace".')
        replaces = asked.get("replace", False)
        if not isinstance(replaces, bool):
            raise IPAdapterError(f'The field "replace" is {replaces!r:.40}; allowed are true and false.')
        unit = fetched(Unit.from_json(asked["unit"]), self._fetch, self._references.add)
        made = self._session.save_reference(unit, asked["name"], replaces)
        return {"name": made.name, "pictures": len(made.weights), "bytes": made.identity[1]}

    def thumbnail(self, asked: Asked) -> bytes:
        """The thumbnail of a saved reference, as PNG."""
        return _png(saved.default.thumbnail(str(asked["name"])))

    def forget_saved(self, asked: Asked) -> dict[str, Any]:
        """Deletes a saved reference."""
        name = str(asked["name"])
        if not saved.default.forget(name):
            error = saved.default.missing(name)
            error.status_code = 404
            raise error
        return {"forgotten": name}

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

    def _known(self, image: ImageRef, kind: AdapterKind, encoder: Path) -> dict[str, Any]:
        """What a check says of a picture."""
        if image.saved:
            known = saved.default.read(image.saved)
            known.check(kind, encoder)
            return {"saved": known.name, "pictures": len(known.weights)}
        picture = self._picture(image)
        return {"sha256": picture_hash(picture), "width": picture.width, "height": picture.height}

    def _picture(self, image: ImageRef) -> Image:
        if image.saved:
            raise IPAdapterError(
                f'The picture is the saved reference "{image.saved}", which is encoded already, so that there is '
                "nothing to be shown; allowed is a picture."
            )
        if image.sha256:
            return self._references.get(image.sha256)
        return self._fetch(image.data.strip()) if is_address(image.data) else read_picture(image.data)


def is_address(data: str) -> bool:
    """Whether a picture is given as a web address."""
    return data.lstrip()[:8].lower().startswith(("http://", "https://"))


def fetched(unit: Unit, fetch: Callable[[str], Image], keep: Callable[[Image], str]) -> Unit:
    """The unit with the hash of what was fetched in place of every picture that is an address."""
    changed: dict[str, Any] = {}
    for name in PICTURE_FIELDS:
        images: tuple[ImageRef, ...] = getattr(unit, name)
        if any(is_address(image.data) for image in images):
            changed[name] = tuple(
                replace(image, data="", sha256=keep(fetch(image.data.strip()))) if is_address(image.data) else image
                for image in images
            )
    return replace(unit, **changed) if changed else unit


def version() -> str:
    """Of this extension, as its project file says."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    assert found is not None
    return found[1]


def _steps(unit: Unit, asked: Asked) -> dict[str, Any] | None:
    """How many steps there are, in which of them the unit acts, and its weight in each; None if that wasn't asked."""
    hires = asked.get("hires", False)
    if not isinstance(hires, bool):
        raise IPAdapterError(f'The field "hires" must be true or false: it is {hires!r:.40}.')
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
        for name in ("scheduler", "denoising_strength", "hires"):
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
    found = factors(unit, progress, hires)
    acting = [number for number, factor in enumerate(found, 1) if factor]
    if not acting and takes_part(unit, hires):
        raise IPAdapterError(never_acted(unit, (progress[0], progress[-1]), hires))
    return {"of": len(progress), "acting": acting, "weights": [round(unit.weight * factor, 4) for factor in found]}


def _layers(unit: Unit, kind: AdapterKind) -> list[dict[str, Any]]:
    """The unit's own weight in each layer group."""
    keys = LAYOUTS[len(kind.layer_widths)]
    on_unet(unit.layers, keys, unit.weight or 1.0, unit.composition_weight, len(unit.acting_images))
    return effective(unit.layers, unit.weight, unit.composition_weight, len(groups(keys)))


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
    conds = _sets(unit, unit.acting_images)
    if uncond == "none" or unit.uncond_weight == 0:
        unconds = 0
    elif unit.negatives:
        unconds = _sets(unit, [image for image in unit.negative_images or unit.acting_images if image.weight])
    elif unit.pictures != TOGETHER:
        unconds = conds
    else:
        weights = [weight for _, weight in _weights(unit.acting_images)]
        unconds = 1 if MIXTURES[unit.mixture].mix or len(set(weights)) == 1 else len(weights)
    if any(curve_of(unit, hires).only is None for hires in (False, True) if takes_part(unit, hires)):
        # those that a changing weight is brought into, and those beside them that it is brought in from
        conds, unconds = 2 * conds, 2 * unconds
    number = HALF if info is None else info.dtype.itemsize
    return {"kv_bytes": (conds + unconds) * kind.tokens * 2 * sum(kind.layer_widths) * number}


def _sets(unit: Unit, images: Sequence[ImageRef]) -> int:
    """How many pictures' tokens pictures become."""
    if MIXTURES[unit.mixture].mix:
        return min(1, len(images))
    distinct = len(set(_weights(images))) if unit.pictures == TOGETHER else len(images)
    return min(1, distinct) if unit.pictures == PER_GENERATION else distinct


def _weights(images: Sequence[ImageRef]) -> list[tuple[Any, float]]:
    """Of each picture what tells it from others, and its weight."""
    found: list[tuple[Any, float]] = []
    for image in images:
        inside = saved.default.read(image.saved).weights if image.saved else (1.0,)
        source = (image.data, image.sha256, image.saved, image.crop)
        found += [((source, n), image.weight * weight) for n, weight in enumerate(inside)]
    return found


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

"""One generation after another: what was asked for becomes an injection in the live UNet, and is taken out again.

A :class:`Session` lives as long as the loaded script; a :class:`_Run` as long as one job. The run is kept on the
host's processing object, so that a job inside a job (a face detailer's, say) has its own.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image

from . import uploads
from .clip_vision import CLIPVision, load_clip_vision
from .encoding import (
    LoadedAdapter,
    encode,
    image_kv,
    load_adapter,
    load_negative,
    resolve_uncond,
    single,
    token_kv,
    uncond_features,
)
from .errors import IPAdapterError
from .formulations import Formulation, resolve_formulation
from .hosts.base import Host, UNetInfo
from .injection import Injection, Term
from .library import Library
from .pictures import clip_preprocess, picture_hash, prepare, read_picture, to_pixels
from .plan import ImageKV
from .progress import Window
from .rows import COND, UNCOND
from .units import ImageRef, Unit

V = TypeVar("V")


class _Cache(Generic[V]):
    """The most recently used values."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of ``key``, made when it isn't there."""
        if key not in self._values:
            value = make()
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        self._values.clear()


@dataclass(frozen=True)
class _Prepared:
    """A unit whose pictures are K/V."""

    unit: Unit
    adapter: LoadedAdapter
    formulation: Formulation
    uncond: str
    conds: tuple[ImageKV, ...]
    unconds: tuple[ImageKV, ...]

    def term(self, info: UNetInfo) -> Term | None:
        window = Window(self.unit.start, self.unit.stop)
        prompts = {COND: self.conds, UNCOND: self.unconds}
        return Term.weighed(self.formulation, window, prompts, self.unit.weight, max(info.widths))

    def infotext(self) -> str:
        unit = self.unit
        return (
            f"model: {unit.model}, weight: {unit.weight:g}, start: {unit.start:g}, stop: {unit.stop:g}, "
            f"formulation: {self.formulation.name}, uncond: {self.uncond}, preparation: {unit.preparation}"
        )


@dataclass
class _Run:
    """One job."""

    units: list[_Prepared] = field(default_factory=list)
    passes: int = 0
    injection: Injection | None = None
    acting: list[_Prepared] = field(default_factory=list)
    """The unit of each of the injection's terms."""
    identity: object = None
    failed: bool = False


# Attribute of the host's processing object that holds its run.
_RUN = "image_prompt_run"

KEPT_ENCODERS, KEPT_ADAPTERS = 1, 2
KEPT_FEATURES, KEPT_KV = 64, 16


class Session:
    """The engine in one WebUI.

    Args:
        host: the WebUI.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.library = Library(host.adapter_folders, host.encoder_folders)
        self._encoders: _Cache[CLIPVision] = _Cache(KEPT_ENCODERS)
        self._adapters: _Cache[LoadedAdapter] = _Cache(KEPT_ADAPTERS)
        self._features: _Cache[Any] = _Cache(KEPT_FEATURES)
        self._kv: _Cache[ImageKV] = _Cache(KEPT_KV)

    # What the page lists

    def adapters(self) -> list[str]:
        """Names of the adapters on disk."""
        return sorted(self.library.adapters(), key=str.lower)

    def encoders(self) -> list[str]:
        """Names of the image encoders on disk."""
        return sorted(self.library.encoders(), key=str.lower)

    def negatives(self) -> list[str]:
        """Names of the negative files on disk."""
        return sorted(self.library.negatives(), key=str.lower)

    # A job's way through the host's callbacks

    def begin(self, p: Any) -> None:
        """A job starts: nothing of an earlier one may act in it, however that ended."""
        setattr(p, _RUN, None)
        self._host.detach(p)

    def prepare(self, p: Any, units: Sequence[Unit]) -> dict[str, str]:
        """Reads files, encodes pictures, makes K/V: everything heavy, before sampling.

        Args:
            units: those that take part; a unit of weight 0 doesn't.

        Returns:
            What to write into the picture's parameters.

        Raises:
            IPAdapterError: if a unit can't do what it was asked.
        """
        active = [unit for unit in units if unit.weight != 0]
        if not active:
            return {}
        info = self._host.unet_info(p)
        run = _Run([self._prepare(unit, info) for unit in active])
        setattr(p, _RUN, run)
        return {f"IP-Adapter {number}": each.infotext() for number, each in enumerate(run.units, 1)}

    def attach(self, p: Any, **_: Any) -> None:
        """Before every pass: the units go into the UNet that is loaded now."""
        run: _Run | None = getattr(p, _RUN, None)
        if run is None or run.failed:
            return
        info = self._host.unet_info(p)
        for each in run.units:
            _check_fit(each.adapter, info)
        with_terms = [(each, term) for each in run.units if (term := each.term(info)) is not None]
        run.acting = [each for each, _ in with_terms]
        run.injection = Injection(
            [term for _, term in with_terms],
            len(info.keys),
            self._host.first_role,
            lambda progress: _check_stops(run, progress),
        )
        run.identity = info.identity
        self._host.attach(p, run.injection)
        self._host.around_sampling(p, lambda: self._after_pass(p, run))

    def on_step(self, params: Any) -> None:
        """Before every step's UNet calls."""
        p = getattr(params.denoiser, "p", None)
        run: _Run | None = getattr(p, _RUN, None)
        if run is None or run.injection is None:
            return
        try:
            if not self._host.check(p, run.injection, run.identity):
                self.attach(p)
            self._host.on_step(params)
        except Exception as error:  # the host swallows what a callback raises, and would go on without the unit
            if not isinstance(error, IPAdapterError):
                traceback.print_exc()
            self._host.fail_in_sampling(p, str(error))

    def end(self, p: Any) -> None:
        """A job is over."""
        self._host.detach(p)
        setattr(p, _RUN, None)

    def fail(self, p: Any, message: str) -> None:
        """This job can't do what was asked: it ends with the sentence, and nothing of ours acts in it."""
        setattr(p, _RUN, _Run(failed=True))
        self._host.detach(p)
        self._host.fail(p, message)

    def close(self) -> None:
        """The script is unloaded."""
        for cache in (self._encoders, self._adapters, self._features, self._kv):
            cache.clear()

    # Inside

    def _after_pass(self, p: Any, run: _Run) -> None:
        injection = run.injection
        if injection is None:
            return
        run.passes += 1
        for each, acted in zip(run.acting, injection.acted, strict=True):
            if not acted:
                sentence = _never_acted(each.unit, injection.progress_seen)
                if run.passes == 1:
                    raise IPAdapterError(sentence)
                self._host.comment(p, sentence)

    def _prepare(self, unit: Unit, info: UNetInfo) -> _Prepared:
        path = self.library.adapter_path(unit.model)
        adapter = self._adapters.get(_identity(path), lambda: load_adapter(path))
        _check_fit(adapter, info)
        formulation = resolve_formulation(unit.formulation, adapter.kind.variant)
        uncond = resolve_uncond(unit.uncond, adapter.kind.variant)
        encoder_path = self.library.encoder_for(adapter.kind)
        conds = tuple(self._picture_kv(ref, unit, adapter, encoder_path) for ref in unit.images)
        unconds: tuple[ImageKV, ...] = ()
        if uncond != "none":
            # Each picture has its uncond tokens; in one softmax the uncond side must weigh as much as the cond side.
            unconds = (self._uncond_kv(uncond, unit, adapter, encoder_path),) * len(conds)
        return _Prepared(unit, adapter, formulation, uncond, conds, unconds)

    def _encoder(self, path: Path) -> CLIPVision:
        return self._encoders.get(_identity(path), lambda: load_clip_vision(path))

    def _picture_kv(self, ref: ImageRef, unit: Unit, adapter: LoadedAdapter, encoder_path: Path) -> ImageKV:
        picture = _picture(ref)
        kind = adapter.kind
        key = (picture_hash(picture), unit.preparation, _identity(encoder_path), kind.output)

        def features() -> Any:
            encoder = self._encoder(encoder_path)
            size = encoder.kind.image_size
            pixels = clip_preprocess(to_pixels([prepare(picture, unit.preparation, size)]), size)
            return encode(self._host.run, encoder, kind.output, pixels)

        def kv() -> ImageKV:
            return single(image_kv(self._host.run, adapter.model, self._features.get(key, features)))

        return self._kv.get((*key, _identity(adapter.path)), kv)

    def _uncond_kv(self, source: str, unit: Unit, adapter: LoadedAdapter, encoder_path: Path) -> ImageKV:
        kind, model = adapter.kind, adapter.model
        if source == "file":
            path = self.library.negative_path(unit.negative)

            def from_file() -> ImageKV:
                return ImageKV.from_pairs(token_kv(self._host.run, model, load_negative(path, kind.context_width)))

            return self._kv.get((_identity(path), _identity(adapter.path)), from_file)

        def kv() -> ImageKV:
            features = uncond_features(self._host.run, source, kind, self._encoder(encoder_path))
            return single(image_kv(self._host.run, model, features))

        return self._kv.get((source, _identity(encoder_path), _identity(adapter.path)), kv)


def _identity(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise IPAdapterError(
            f"The file {path.name} can't be read ({error.strerror}): refresh the model list."
        ) from error
    return str(path), stat.st_size, stat.st_mtime_ns


def _picture(ref: ImageRef) -> Image.Image:
    return uploads.get(ref.sha256) if ref.sha256 else read_picture(ref.data)


def _check_fit(adapter: LoadedAdapter, info: UNetInfo) -> None:
    kind = adapter.kind
    if kind.layer_widths != info.widths or kind.context_width != info.context_width:
        families = {16: "SD1.5", 70: "SDXL"}
        raise IPAdapterError(
            f"The adapter {adapter.path.name} ({kind.description}) is made for another model family: it has "
            f"{len(kind.layer_widths)} layers for a text context {kind.context_width} wide, the loaded checkpoint "
            f"({families.get(len(info.keys), 'unknown')}) {len(info.keys)} and {info.context_width}; choose an adapter "
            "for this checkpoint, or another checkpoint."
        )


def _check_stops(run: _Run, first: float) -> None:
    """Ends a job's first pass at its first UNet call when a unit's stop is already behind it."""
    for each in run.acting:
        if run.passes == 0 and each.unit.stop < 1 and not Window(0.0, each.unit.stop).contains(first):
            raise IPAdapterError(_never_acted(each.unit, (first, 1.0)))


def _never_acted(unit: Unit, progress: tuple[float, float] | None) -> str:
    """What to say of a unit that acted in no UNet call of a pass; ``progress`` of its first and its furthest call."""
    subject = f"The IP-Adapter unit with {unit.model} acts from start {unit.start:g} to stop {unit.stop:g}"
    if progress is None:
        return f"{subject}, and the sampler called the UNet not once, so it would never act: choose more steps."
    first, last = progress
    cure = f"choose a stop above {first:.2f}"
    if Window(0.0, unit.stop).contains(first):
        cure = f"choose a start of {last:.2f} or less" if unit.start > last else "choose more steps or a wider window"
    return (
        f"{subject}, and this pass's steps lie between {first:.2f} and {last:.2f} of the noise schedule, so it would "
        f"never act: {cure}."
    )

"""One generation after another: what was asked for becomes an injection in the live UNet, and is taken out again.

A :class:`Session` lives as long as the loaded script; a :class:`_Run` as long as one job. The run is kept on the
host's processing object, so that a job inside a job (a face detailer's, say) has its own.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import influence, infotext, references, saved, tags
from .applies import facts
from .errors import ERROR_KEY, IPAdapterError
from .hosts.base import Host
from .hosts.loaded import loaded_unet
from .influence import Influence
from .injection import Injection
from .kept import DEFAULT_GB, limit_bytes
from .library import Library
from .masks import WHOLE, Canvas
from .places import Batch, check_batch
from .preparer import PreparedUnit, Preparer, check_fit
from .progress import NOISE, Window
from .results import save_beside, strip
from .steps import never_acted, takes_part
from .tags import Tag, Tagged
from .units import Unit

# Attribute of the host's processing object that holds its run.
_RUN = "image_prompt_run"


@dataclass
class _Run:
    """One job."""

    own: list[PreparedUnit] = field(default_factory=list)
    """The units that its arguments ask for."""
    passes: int = 0
    """Passes that have ended."""
    batch: Batch = field(default_factory=Batch)
    """Which pass of which batch is running."""
    injection: Injection | None = None
    acting: list[PreparedUnit] = field(default_factory=list)
    """Of each of the injection's terms, its unit."""
    tagged: Tagged = field(default_factory=dict)
    """The tags of its prompts."""
    of_tags: list[PreparedUnit] = field(default_factory=list)
    """The units that they ask for."""
    identity: object = None
    canvas: Canvas | None = None
    """What the running pass draws."""
    latent: tuple[int, int] | None = None
    """Rows and columns of its latent."""
    failed: bool = False
    influence: Influence | None = None
    """Of the last pass that drew the first picture of the job, if a unit asks for it."""

    @property
    def units(self) -> list[PreparedUnit]:
        """All of them."""
        return self.own + self.of_tags


class Session:
    """The engine in one WebUI.

    Args:
        host: the WebUI.
        kept_bytes: the limit of host memory for models and K/V that are kept between generations.
        hashes: whether pictures' parameters name the references by their hashes.
    """

    def __init__(
        self,
        host: Host,
        kept_bytes: Callable[[], int] = lambda: limit_bytes(DEFAULT_GB),
        hashes: Callable[[], bool] = lambda: True,
    ) -> None:
        self._host = host
        self._hashes = hashes
        self._library = Library(host.adapter_folders, host.encoder_folders)
        self._preparer = Preparer(self._library, host.run, kept_bytes, host.first_role)

    # What the page lists

    @property
    def library(self) -> Library:
        """The model files."""
        return self._library

    def adapters(self) -> list[str]:
        """Names of the adapters on disk."""
        return sorted(self._library.adapters(), key=str.lower)

    def choices(self, everything: bool) -> list[tuple[str, str]]:
        """Label and name of the adapters that fit the loaded checkpoint; of the others too, with the reason.

        While no checkpoint is loaded all are listed.
        """
        info = loaded_unet(self._host)
        chosen, others = [], []
        for name, kind in sorted(self._library.adapters().items(), key=lambda each: each[0].lower()):
            try:
                if info is not None:
                    check_fit(name, kind, info)
                chosen.append((name, name))
            except IPAdapterError:
                others.append((f"{name} (doesn't fit: {kind.description.partition(' · ')[0]})", name))
        return chosen + others if everything else chosen

    def describe(self, name: str) -> str:
        """What the adapter of this name is, see :attr:`.recognise.AdapterKind.description`; '' if there is none."""
        kind = self._library.adapters().get(name)
        return kind.description if kind is not None else ""

    def misfit(self, name: str) -> str:
        """Why the adapter of this name can't act in the loaded checkpoint, as a sentence; '' if it can."""
        kind, info = self._library.adapters().get(name), loaded_unet(self._host)
        try:
            if kind is not None and info is not None:
                check_fit(name, kind, info)
        except IPAdapterError as error:
            return str(error)
        return ""

    def applies(self, name: str) -> dict[str, Any]:
        """What applies to a unit with the adapter of this name, see :mod:`.applies`."""
        return facts(self._library.adapters().get(name), self._library.negative_widths())

    def encoders(self) -> list[str]:
        """Names of the image encoders on disk."""
        return sorted(self._library.encoders(), key=str.lower)

    def negatives(self) -> list[str]:
        """Names of the negative files on disk."""
        return sorted(self._library.negatives(), key=str.lower)

    def read_infotext(self, params: Mapping[str, Any]) -> infotext.Parsed:
        """The units of a picture's parameters, as they can be had here; see :func:`.infotext.parse`."""
        return infotext.parse(params, self._library.find_model, references.has)

    def save_reference(self, unit: Unit, name: object, replace: bool = False) -> saved.SavedReference:
        """Saves a unit's pictures, as the image encoder sees them, and its values under a name; see :mod:`.saved`.

        Raises:
            IPAdapterError: for a name that isn't allowed or taken, and whatever a generation with the unit refuses.
        """
        checked = saved.default.check_name(name, replace)
        if not unit.acting_images:
            raise IPAdapterError("The unit has no picture that takes part; give it one to save.")
        with self._host.alone():
            return self._preparer.save(unit, checked)

    # A job's way through the host's callbacks

    def begin(self, p: Any) -> None:
        """A job starts: nothing of an earlier one may act in it, however that ended."""
        self._let_go(p)
        self._host.detach(p)
        # A copied job (a cell of an X/Y/Z grid) shares its parameters with the others; ours are of this job alone.
        parameters = {
            key: value for key, value in p.extra_generation_params.items() if not infotext.OUR_KEY.fullmatch(key)
        }
        if len(parameters) < len(p.extra_generation_params):
            p.extra_generation_params = parameters

    def prepare(self, p: Any, units: Sequence[Unit], tagged: Tagged | None = None) -> Mapping[str, str]:
        """Reads files, encodes pictures, makes K/V: everything heavy, before sampling.

        Args:
            units: those that are on; one of weight 0, or all of whose pictures have weight 0, takes no part, and
                neither does one that isn't meant for jobs inside a job in such a one.
            tagged: the tags of its prompts.

        Returns:
            What to write into the picture's parameters.

        Raises:
            IPAdapterError: if a unit can't do what it was asked.
        """
        nested = not all(unit.nested for unit in units) and self._host.is_nested(p)
        active = {
            number: unit for number, unit in enumerate(units, 1) if unit.acting_images and (unit.nested or not nested)
        }
        if not active and not tagged:
            return {}
        check_batch(list(active.values()), int(getattr(p, "batch_size", 1)))
        prepared = self._preparer.prepare(list(active.values()), self._host.unet_info(p)) if active else []
        run = _Run(prepared)
        self._take_tags(p, run, tagged or {})
        setattr(p, _RUN, run)
        for sentence in dict.fromkeys(problem for each in prepared for problem in each.problems):
            self._host.comment(p, sentence)
        by_number = dict(zip(active, prepared, strict=True))
        return infotext.write(
            {number: each.by_hash for number, each in by_number.items()},
            {number: each.facts for number, each in by_number.items()},
            self._hashes(),
        )

    def attach(self, p: Any, x: Any = None, **_: Any) -> None:
        """Before every pass: the units go into the UNet that is loaded now. ``x`` is the pass' first latent."""
        run: _Run | None = getattr(p, _RUN, None)
        tagged = tags.found(p)
        if run is None and tagged:
            run = _Run()
            setattr(p, _RUN, run)
        if run is not None and not run.failed:
            run.injection = None
            if tagged != run.tagged:  # another extension has changed the prompts since they were read
                self._take_tags(p, run, tagged)
            run.batch = Batch(
                int(getattr(p, "iteration", 0)),
                int(getattr(p, "batch_size", 1) if x is None else x.shape[0]),
                bool(getattr(p, "is_hr_pass", False)),
            )
            if not any(takes_part(each.unit, run.batch.hires) for each in run.units):
                self._host.detach(p)
                return
            run.canvas = self._canvas(p, run, x)
            run.latent = None if x is None else (int(x.shape[-2]), int(x.shape[-1]))
            self._attach(p, run)
            self._host.around_sampling(p, lambda: self._after_pass(p, run))

    def on_step(self, params: Any) -> None:
        """Before every step's UNet calls."""
        p = getattr(params.denoiser, "p", None)
        run: _Run | None = getattr(p, _RUN, None)
        if run is None or run.injection is None:
            return
        try:
            if not self._host.check(p, run.injection, run.identity):
                self._attach(p, run)
            self._host.on_step(params)
        except Exception as error:  # the host swallows what a callback raises, and would go on without the unit
            if not isinstance(error, IPAdapterError):
                traceback.print_exc()
            self._host.fail_in_sampling(p, str(error))

    def drop_blank(self, p: Any, pictures: list[Any]) -> None:
        """Takes out the pictures of a job that a comment has ended in mid-pass: they are decoded blank latents."""
        if self._host.was_ended_by_comment(p):
            pictures.clear()

    def finish(self, p: Any, processed: Any, show: bool, save: bool) -> None:
        """A job has its results: the first of them is shown and saved with the references, if that is wanted.

        So is, where a unit asks for it, where each picture acted in the first.

        What goes wrong with that is said beside the results, which are there.

        Args:
            processed: the host's results.
            show: whether a strip of references and result is added to the gallery.
            save: whether the references are saved beside the result's file, if it has one.
        """
        run: _Run | None = getattr(p, _RUN, None)
        if run is None or not run.units or not processed.images:
            return
        number = min(processed.index_of_first_image, len(processed.images) - 1)
        result = processed.images[number]
        file = getattr(result, "already_saved_as", None)
        if run.influence is not None:
            for picture, words in influence.shown(run.influence, result):
                processed.images.append(picture)
                processed.infotexts.append(words)
        if not (show or (save and file)):
            return
        try:
            references = [picture for each in run.units for picture in self._preparer.pictures(each.unit)]
            if save and file:
                save_beside(references, Path(file))
            if show:
                processed.images.append(strip(references, result))
                processed.infotexts.append(processed.infotexts[number])
        except (IPAdapterError, OSError) as error:
            # The job's own comments have been read by now.
            processed.comments = f"{processed.comments}The references aren't beside the result: {error}\n"

    def end(self, p: Any) -> None:
        """A job is over."""
        self._let_go(p)
        self._host.detach(p)

    def fail(self, p: Any, message: str) -> None:
        """This job can't do what was asked: it ends with the sentence, and nothing of ours acts in it."""
        self._let_go(p)
        setattr(p, _RUN, _Run(failed=True))
        self._host.detach(p)
        self._host.fail(p, message)

    def close(self) -> None:
        """The script is unloaded: nothing of ours stays behind."""
        self._host.detach(None)
        self._preparer.clear()

    # Inside

    def _let_go(self, p: Any) -> None:
        """Frees a job's K/V now: run and injection refer to each other, so the collector would come for them later."""
        run: _Run | None = getattr(p, _RUN, None)
        if run is not None:
            run.injection = None
        setattr(p, _RUN, None)

    def _canvas(self, p: Any, run: _Run, latent: Any) -> Canvas | None:
        """What the coming pass draws, with all masks on it; None where there are none, or the host gives no latent."""
        masked = [each for each in run.units if each.is_masked]
        if not masked or latent is None:
            return None
        canvas = Canvas((int(latent.shape[-2]), int(latent.shape[-1])), self._host.region(p))
        sentences = [sentence for each in masked for sentence in each.on_canvas(canvas)]
        for sentence in dict.fromkeys(sentences if run.passes == 0 else ()):
            self._host.comment(p, sentence)
        return canvas

    def _take_tags(self, p: Any, run: _Run, tagged: Tagged) -> None:
        """Prepares what the prompts' tags ask for, in place of what was asked for before."""
        pairs = [(self._unit_of(tag), place) for (tag, _), place in tagged.items()]
        pairs = [(unit, place) for unit, place in pairs if unit.acting_images]
        units, places = [unit for unit, _ in pairs], [place for _, place in pairs]
        run.of_tags = self._preparer.prepare(units, self._host.unet_info(p), places) if pairs else []
        run.tagged = tagged

    def _unit_of(self, tag: Tag) -> Unit:
        """The unit that a tag of a prompt asks for."""
        try:
            known = saved.default.read(tag.name)
            unit = known.unit(**tag.fields)
        except IPAdapterError as error:
            raise IPAdapterError(f"The prompt has the tag {tag}: {error}") from error
        return replace(unit, model=self._library.find_model(unit.model, known.fingerprint)[0])

    def _attach(self, p: Any, run: _Run) -> None:
        """Puts the units into the live UNet; in the middle of a pass, into the one that a refiner has brought."""
        before = run.injection
        seen = before.progress_seen() if before is not None else None
        if (
            before is not None
            and seen is not None
            and all(_is_over(each.until(run.batch.hires), before) for each in run.acting)
        ):
            run.injection = None  # every unit has done its part, whatever the new UNet is
            return
        try:
            info = self._host.unet_info(p)
            terms = [
                (each, term)
                for each in run.units
                if takes_part(each.unit, run.batch.hires)
                for term in each.terms(info, run.batch)
            ]
        except IPAdapterError as error:
            if seen is None:
                raise
            stop = math.floor(seen[1] * 100) / 100
            cure = f"set the unit's stop to {stop:.2f} or less" if stop > 0 else "let it change later"
            raise IPAdapterError(
                f"The checkpoint changes in mid-sampling (refiner) at {seen[1]:.2f} of the noise schedule to one that "
                f"the unit doesn't fit, so {cure}: {error}"
            ) from error
        if not terms:  # none of the pictures is for this batch
            return
        run.identity = info.identity
        run.acting = [each for each, _ in terms]
        run.injection = Injection(
            [term for _, term in terms],
            len(info.keys),
            lambda progress: _check_stops(run, progress),
        )
        run.injection.canvas = run.canvas
        if before is not None:
            run.injection.continue_from(before)
        asked = any(each.unit.influence for each in run.units) and not self._host.is_nested(p)
        if asked and run.latent is not None and run.batch.generation == 0:
            numbers = {id(each): number for number, each in enumerate(run.units, 1)}
            names = [f"unit {numbers[id(each)]}" if each.unit.influence else "" for each in run.acting]
            # A hires pass draws all of its result, whatever it has cut off the first pass's.
            region = WHOLE if run.batch.hires else self._host.region(p)
            run.influence = run.injection.influence = Influence(run.latent, names, info.keys, region)
        self._host.attach(p, run.injection)

    def _after_pass(self, p: Any, run: _Run) -> None:
        injection = run.injection
        if injection is None:
            return
        run.passes += 1
        acted = {id(each): False for each in run.acting}
        for each, did in zip(run.acting, injection.acted, strict=True):
            acted[id(each)] |= did
        for each in run.units:
            if not acted.get(id(each), True):
                sentence = never_acted(each.unit, injection.progress_seen(each.unit.timing), run.batch.hires)
                if run.passes == 1:
                    raise IPAdapterError(sentence)
                self._host.comment(p, sentence)
                p.extra_generation_params[ERROR_KEY] = sentence


def _is_over(window: Window, injection: Injection) -> bool:
    """Whether a window lies behind the furthest UNet call."""
    seen = injection.progress_seen(window.timing)
    return window.stop < 1 and seen is not None and window.stop <= seen[1]


def _check_stops(run: _Run, first: float) -> None:
    """Ends a job's first pass at its first UNet call when a unit's stop is already behind it in the noise schedule."""
    for each in run.acting:
        until = each.until(run.batch.hires)
        if run.passes == 0 and until.timing == NOISE and not until.contains(first):
            raise IPAdapterError(never_acted(each.unit, (first, 1.0), run.batch.hires))

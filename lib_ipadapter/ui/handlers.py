"""What the page's events do on the server, as plain functions that know no gradio."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any

from PIL.Image import Image

from .. import pictures, references, saved
from ..errors import IPAdapterError
from ..refs import ImageRef
from ..steps import SCHEDULERS, STEPS_RANGE, of_img2img, of_scheduler
from ..units import Unit

# Every annotation below must resolve at run time: gradio 3 evaluates those of its event handlers.


def keep(sent: str | None) -> tuple[str, str]:
    """Keep pictures that the page sent.

    Args:
        sent: a JSON list of objects, ``name`` of the file and ``data``, a data URI; '' for none.

    Returns:
        What joins the unit's pictures, as JSON (see :func:`_added`), and a note. If one file is no picture,
        none is kept and the note names it: a unit never acts with fewer pictures than it was given.
    """
    read: list[Image] = []
    for file in json.loads(sent) if sent else ():
        try:
            read.append(pictures.read_picture(file["data"]))
        except IPAdapterError as error:
            return _added([]), note(f"{os.path.basename(file['name'])}: {error}")
    return _added([references.add(picture) for picture in read]), ""


def _added(hashes: list[str]) -> str:
    """Hashes for the page, in a text that no earlier answer had: the same picture may come twice."""
    return json.dumps({"hashes": hashes, "answer": uuid.uuid4().hex})


def preview(listed: str | None, preparation: str) -> str:
    """The encoder's exact inputs for a unit's pictures.

    Args:
        listed: the unit's ``images`` as JSON, '' for none.
        preparation: one of ``units.PREPARATIONS``.

    Returns:
        A JSON list: each picture as asked, with ``uri`` (a PNG, for nothing may be lost; of a saved reference, which
        is encoded already, its thumbnail) or ``problem``.
    """
    answers = []
    for entry in json.loads(listed) if listed else ():
        asked: dict[str, Any] = dict(entry) if isinstance(entry, dict) else {"data": entry}
        asked["preparation"] = preparation
        try:
            ref = ImageRef.from_json(entry)
            if ref.saved:
                asked["uri"] = _png_uri(_thumbnail(ref.saved))
            else:
                picture = references.get(ref.sha256) if ref.sha256 else pictures.read_picture(ref.data)
                asked["uri"] = _png_uri(pictures.prepare(picture, preparation, crop=ref.crop))
        except IPAdapterError as error:
            asked["problem"] = str(error)
        answers.append(asked)
    return json.dumps(answers)


_UNLISTED = "Where strangers may reach the WebUI, saved references are used by name and neither listed nor shown."


def _thumbnail(name: str) -> Image:
    if references.default.rules().guarded:
        raise IPAdapterError(_UNLISTED)
    return saved.default.thumbnail(name)


def saved_references(wish: str | None, save: Callable[[Unit, object, bool], object]) -> str:
    """What the page wants of the saved references, and which there are then.

    Args:
        wish: JSON with ``do`` ("list", "save", "replace" or "delete"), and for others than the first ``name``; for
            saving ``slot``, the unit's text.
        save: saves a unit under a name; the last argument says whether over another one.

    Returns:
        JSON with ``saved`` (see :meth:`.saved.SavedReferences.listing`, each with a ``uri`` of its thumbnail where it
        can be read) and ``note``, HTML. Where strangers may reach the WebUI nothing is listed, replaced or deleted.
    """
    asked = json.loads(wish) if wish else {"do": "list"}
    guarded = references.default.rules().guarded
    said = remark(_UNLISTED) if guarded else ""
    try:
        if guarded and asked["do"] in ("replace", "delete"):
            raise IPAdapterError(f"{_UNLISTED} Nor are they replaced or deleted: the owner does that.")
        if asked["do"] in ("save", "replace"):
            if not asked["slot"]:
                raise IPAdapterError("The unit has no picture: give it one to save.")
            save(Unit.from_json(asked["slot"]), asked["name"], asked["do"] == "replace")
            said = remark(f'Saved as "{asked["name"]}"; in prompts it is <ipa:{asked["name"]}:1>.')
        elif asked["do"] == "delete":
            if not saved.default.forget(asked["name"]):
                raise saved.default.missing(asked["name"])
            said = remark(f'"{asked["name"]}" is deleted.')
    except IPAdapterError as error:
        said = note(str(error))
    listed = [] if guarded else saved.default.listing()
    for entry in listed:
        with suppress(IPAdapterError):
            entry["uri"] = _png_uri(_thumbnail(entry["name"]))
    return json.dumps({"saved": listed, "note": said, "answer": uuid.uuid4().hex})


def _png_uri(picture: Image) -> str:
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def kept_line() -> str:
    """Where the pictures that a person gives are kept."""
    folder = references.default.rules().folder
    if folder is None:
        return remark("Pictures are kept in the WebUI's memory alone, until it ends.")
    return remark(
        f"A copy of every picture that a generation used is kept in {folder.as_posix()}, so that parameters bring it "
        "back; Settings, IP-Adapter, has the switch and the limit."
    )


def forget(sha256: str | None) -> str:
    """Deletes the copy of one picture; what came of it, as a note. '' or ``None`` is nobody's wish."""
    if not sha256:
        return ""
    try:
        return note("The copy is deleted." if references.default.forget(sha256) else "There was no copy of it.")
    except IPAdapterError as error:
        return note(str(error))


def forget_all(sure: str | None) -> str:
    """Deletes all copies, if the person said yes; what came of it, as a note."""
    if not sure:
        return ""
    try:
        count = references.default.forget_all()
    except IPAdapterError as error:
        return note(str(error))
    return note(f"{count} {'copy is' if count == 1 else 'copies are'} deleted.")


def check(slot: str) -> str:
    """The sentence that a job with this slot would stop with, as a note; '' if it is fine or unused."""
    if not slot:
        return ""
    try:
        Unit.from_json(slot)
    except IPAdapterError as error:
        return note(str(error))
    return ""


_REASON = re.compile(r" \(doesn't fit: [^()]*\)$")


def model_name(label: str | None) -> str:
    """The name of a model in the list's label, which has the reason behind it where the model doesn't fit."""
    return _REASON.sub("", label or "")


def schedule(asked: str, progress_of_pass: Callable[[str, str, int], list[float] | None]) -> str:
    """Progress of every step of the pass that the page's controls describe.

    Args:
        asked: JSON with ``sampler``, ``scheduler``, ``steps``, and ``strength`` for img2img.
        progress_of_pass: what the WebUI's own tables say, None where they say nothing.

    Returns:
        JSON: ``asked``, ``progress``, and whether that is ``exact``; '' for what nobody can be asked.
    """
    try:
        values = json.loads(asked)
        sampler, scheduler, count = str(values["sampler"]), str(values["scheduler"]), int(values["steps"])
        strength = values.get("strength")
        if not STEPS_RANGE[0] <= count <= STEPS_RANGE[1]:
            return ""
        progress = progress_of_pass(sampler, scheduler, count)
        exact = progress is not None
        if progress is None:
            name = scheduler.lower().replace(" ", "_")
            progress = of_scheduler(name if name in SCHEDULERS else "uniform", count)
        if strength is not None:
            progress = of_img2img(progress, float(strength))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    return json.dumps({"asked": asked, "progress": progress, "exact": exact})


def has_file(slot: str) -> bool:
    """Whether a unit's slot names a negative file."""
    try:
        return bool(Unit.from_json(slot).negative) if slot else False
    except IPAdapterError:
        return True  # what can't be read isn't changed


def digest(listed: object) -> str:
    """A short text that is another one when what the page lists has changed."""
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def remark(text: str) -> str:
    """Words beside a control, as the page shows them; '' stays ''."""
    return f'<p class="ip-adapter-remark">{html.escape(text)}</p>' if text else ""


def catalogue_labels(entries: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each entry of the catalogue; its name comes first, up to the first blank."""
    return [
        f"{each['name']} · {each['family']} · {each['kind']}: {each['good_for']} · {_size(each['size'])} · "
        f"licence {each['licence']}" + (" · there already" if each["present"] else "")
        for each in entries
    ]


def licence_note(entries: Sequence[dict[str, Any]], label: object) -> str:
    """What to know before a download: where the file comes from, its licence, whether it is there."""
    for each in entries:
        if each["name"] == _entry_name(label):
            there = " It is there already." if each["present"] else ""
            return note(
                f"{each['repository']}/{each['file']}, {_size(each['size'])}. Licence: {each['licence']}.{there}"
            )
    return ""


def start_download(start: Callable[[object], dict[str, Any]], label: object) -> str:
    """Starts the download of the entry with this label; the state of it, or the sentence why not."""
    if not label:
        return note("No model is chosen: choose one of the list to download it.")
    try:
        return download_note(start(_entry_name(label)))
    except IPAdapterError as error:
        return note(str(error))


def download_note(state: dict[str, Any]) -> str:
    """The state of a download; marked for the page while it runs."""
    if state["status"] == "idle":
        return ""
    if state["status"] != "running":
        return note(state["message"])
    of_total = "" if state["total"] is None else f" of {_size(state['total'])}"
    shown = f"{state['message']} {_size(state['done'])}{of_total}."
    return f"<div data-running>{note(shown)}</div>"


def _entry_name(label: object) -> str:
    return str(label or "").partition(" ")[0]


def _size(size: int | None) -> str:
    return "size not known" if size is None else f"{size / 1e6:.1f} MB"


def notes(messages: Sequence[str]) -> str:
    """Several messages as the page shows them."""
    return "".join(note(message) for message in messages)


def note(message: str) -> str:
    """A message as the page shows it."""
    return f'<p class="ip-adapter-note" role="alert">{html.escape(message)}</p>'

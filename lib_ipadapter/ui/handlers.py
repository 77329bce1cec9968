"""What the page's events do on the server, as plain functions that know no gradio."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from .. import pictures, references
from ..errors import IPAdapterError
from ..units import Unit

# Every annotation below must resolve at run time: gradio 3 evaluates those of its event handlers.


def keep_files(files: Sequence[object] | None, preparation: str) -> tuple[str, list[Image], str]:
    """Keep uploaded picture files and show what the image encoder will see of them.

    Args:
        files: what gradio's file component hands over: paths (gradio 4), or objects with the path in ``name``
        (3). preparation: one of ``units.PREPARATIONS``.

    Returns:
        The hashes as a JSON list ('' for none), the prepared pictures, and a note. If one file is no picture,
        none is kept and the note names it: a unit never acts with fewer pictures than it was given.
    """
    hashes = []
    for file in files or ():
        path = Path(str(getattr(file, "name", file)))
        try:
            hashes.append(references.add(pictures.read_picture(path)))
        except IPAdapterError as error:
            return "", [], note(f"{os.path.basename(path)}: {error}")
    if not hashes:
        return "", [], ""
    text = json.dumps(hashes)
    return text, *preview(text, preparation)


def preview(hashes: str, preparation: str) -> tuple[list[Image], str]:
    """The encoder's exact inputs for uploaded pictures (a JSON list of hashes, '' for none), and a note."""
    try:
        kept = [references.get(sha256) for sha256 in (json.loads(hashes) if hashes else ())]
        return [pictures.prepare(picture, preparation) for picture in kept], ""
    except IPAdapterError as error:
        return [], note(str(error))


def check(slot: str) -> str:
    """The sentence that a job with this slot would stop with, as a note; '' if it is fine or unused."""
    if not slot:
        return ""
    try:
        Unit.from_json(slot)
    except IPAdapterError as error:
        return note(str(error))
    return ""


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

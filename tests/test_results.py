"""References shown beside the result, and saved beside its file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_ipadapter.pictures import read_picture
from lib_ipadapter.results import GAP, save_beside, strip
from tests.embedded import Host
from tests.embedded_hosts import request, unit
from tests.photos import base64_photo

SHOW, SAVE = "ip_adapter_show_strip", "ip_adapter_save_references"


def test_a_strip() -> None:
    tall, wide = Image.new("RGB", (10, 40), (200, 0, 0)), Image.new("L", (80, 20), 90)
    made = strip([tall, wide], Image.new("RGB", (30, 20), (0, 0, 200)))
    assert made.size == (5 + GAP + 80 + GAP + 30, 20)
    pixels = np.asarray(made)
    assert (pixels[:, :5] == (200, 0, 0)).all()
    assert (pixels[:, 5 : 5 + GAP] == 255).all()
    assert (pixels[:, 5 + GAP : 85 + GAP] == 90).all()
    assert (pixels[:, -30:] == (0, 0, 200)).all()


def test_saved_references_are_bare_and_nothing_is_overwritten(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("parameters", "secret")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "in.png", pnginfo=text)
    with Image.open(tmp_path / "in.png") as picture:
        saved = save_beside([picture, picture], tmp_path / "00001-7.jpg")
    assert [path.name for path in saved] == ["00001-7-reference-1.png", "00001-7-reference-2.png"]
    with Image.open(saved[0]) as again:
        assert (again.info, again.getpixel((0, 0))) == ({}, (1, 2, 3))
    saved[1].write_bytes(b"mine")
    saved[0].unlink()
    with pytest.raises(FileExistsError):
        save_beside([Image.new("RGB", (4, 4))] * 2, tmp_path / "00001-7.jpg")
    assert saved[1].read_bytes() == b"mine"


@pytest.fixture
def saving(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The host marks its results as saved, as WebUIs do; where."""
    from tests.embedded import processing

    path = tmp_path / "00000-1.png"
    made = processing.Processed.__init__

    def init(self: Any, p: Any, images: list[Any], *args: Any, **kwargs: Any) -> None:
        made(self, p, images, *args, **kwargs)
        for image in images:
            image.already_saved_as = str(path)

    monkeypatch.setattr(processing.Processed, "__init__", init)
    return path


def test_both_are_off_by_default(host: Host, saving: Path) -> None:
    assert (host.opts.data_labels[SHOW].default, host.opts.data_labels[SAVE].default) == (False, False)
    assert len(host.txt2img(**request(unit())).images) == 1
    assert list(saving.parent.iterdir()) == []


@pytest.fixture
def in_the_page(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests are taken as the page's; what came out of them."""
    session: Any = sys.modules["sd_image_prompt"].live_session  # type: ignore[attr-defined]
    finish, done = session.finish, []

    def as_page(p: Any, processed: Any, show: bool, save: bool) -> None:
        assert show is False  # a client of the API gets the pictures that it asked for
        done.append(processed)
        finish(p, processed, host.opts.data.get(SHOW, False), save)

    monkeypatch.setattr(session, "finish", as_page)
    return done


def test_shown_and_saved(host: Host, saving: Path, in_the_page: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.opts.data, SHOW, True)
    monkeypatch.setitem(host.opts.data, SAVE, True)
    host.txt2img(**request(unit(photos=("astronaut", "coffee"))))
    result, shown = in_the_page[0].images
    assert in_the_page[0].infotexts[1] == in_the_page[0].infotexts[0]
    references = [read_picture(base64_photo(name)) for name in ("astronaut", "coffee")]
    assert np.array_equal(np.asarray(shown), np.asarray(strip(references, result)))
    saved = sorted(saving.parent.iterdir())
    assert [path.name for path in saved] == ["00000-1-reference-1.png", "00000-1-reference-2.png"]
    assert np.array_equal(np.asarray(read_picture(saved[1])), np.asarray(references[1]))
    host.txt2img(**request())
    assert len(in_the_page[1].images) == 1  # without a unit there is nothing to show


def test_a_failure_is_said_beside_the_result(
    host: Host, saving: Path, in_the_page: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(host.opts.data, SAVE, True)
    for _ in range(2):
        host.txt2img(**request(unit()))
    first, second = in_the_page
    assert first.comments == ""
    assert len(second.images) == 1
    assert second.comments.startswith("The references aren't beside the result: ")

"""A second generation with the same pictures opens no file, decodes nothing and runs no module."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.embedded import Host
from tests.embedded.demo_models import DemoModels
from tests.embedded_hosts import request, unit

SETTING = "ip_adapter_kept_gb"


class Watch:
    """Files of models opened, pictures decoded, modules run and units prepared, since it was last asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.on = str(folder), True
        self.opened: list[str] = []
        self.decoded = self.runs = 0
        sys.addaudithook(self._audit)
        for name in ("sd_image_prompt.gathering", "sd_image_prompt.references"):
            module = sys.modules[name]
            read = module.read_picture  # type: ignore[attr-defined]
            monkeypatch.setattr(module, "read_picture", lambda source, read=read: self._decode(read, source))
        on_device = sys.modules["sd_image_prompt.hosts.comfy"].on_device  # type: ignore[attr-defined]
        monkeypatch.setattr("sd_image_prompt.hosts.comfy.on_device", lambda *args: self._run(on_device, *args))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and str(arguments[0]).startswith(self.folder):
            self.opened.append(str(arguments[0]))

    def _decode(self, read: Any, source: Any) -> Image.Image:
        self.decoded += 1
        picture: Image.Image = read(source)
        return picture

    def _run(self, on_device: Any, *args: Any) -> Any:
        self.runs += 1
        return on_device(*args)

    def take(self) -> tuple[int, int, int]:
        """Files opened, pictures decoded, modules run."""
        found = (len(self.opened), self.decoded, self.runs)
        self.opened, self.decoded, self.runs = [], 0, 0
        return found


@pytest.fixture
def watch(host: Host, models: DemoModels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    sys.modules["sd_image_prompt"].live_session._preparer.clear()  # type: ignore[attr-defined]
    made = Watch(monkeypatch, models.models_path)
    yield made
    made.on = False  # a hook of the interpreter can't be taken out


def generate(host: Host, *units: Any) -> None:
    host.txt2img(**request(*units))


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_the_second_generation_opens_and_decodes_nothing(host: Host, watch: Watch, kind: str) -> None:
    generate(host, unit(kind, photos=("astronaut", "chelsea")))
    opened, decoded, runs = watch.take()
    assert opened
    assert (decoded, runs) == (2, 2)  # the encoder once, the adapter once, also for the uncond side
    generate(host, unit(kind, photos=("astronaut", "chelsea")))
    assert watch.take() == (0, 0, 0)
    generate(host, unit(kind, photos=("astronaut", "chelsea"), weight=0.4, start=0.5))
    assert watch.take() == (0, 0, 0)


def test_a_pictures_prompt_does_not_depend_on_what_was_known_before(host: Host, watch: Watch) -> None:
    """Pictures of a unit are encoded together, whose last digits depend on each other; so they are kept together."""
    both = unit("plus", photos=("astronaut", "chelsea"))

    def drawn() -> bytes:
        return host.txt2img(**request(both)).images[0].tobytes()

    first = drawn()
    sys.modules["sd_image_prompt"].live_session._preparer.clear()  # type: ignore[attr-defined]
    generate(host, unit("plus", photos=("chelsea",)))
    watch.take()
    assert drawn() == first
    assert watch.take()[1:] == (2, 2)


def test_the_same_pixels_in_other_bytes_are_decoded_and_nothing_more(host: Host, watch: Watch) -> None:
    one = unit()
    generate(host, one)
    watch.take()
    other = {**one, "images": [f" {one['images'][0]}\n"]}
    generate(host, other)
    assert watch.take() == (0, 1, 0)
    generate(host, other)
    assert watch.take() == (0, 0, 0)


def test_another_preparation_encodes_again_and_opens_nothing(host: Host, watch: Watch) -> None:
    generate(host, unit("base"))
    watch.take()
    generate(host, unit("base", preparation="pad"))
    opened, decoded, runs = watch.take()
    assert (opened, decoded, runs) == (0, 1, 2)


def test_the_setting_says_what_is_kept(host: Host, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.opts.data_labels[SETTING].section == ("ip_adapter", "IP-Adapter")
    assert host.opts.data_labels[SETTING].default == 4
    monkeypatch.setitem(host.opts.data, SETTING, 0)
    for _ in range(2):
        generate(host, unit())
        opened, decoded, runs = watch.take()
        assert opened
        assert (decoded, runs) == (1, 2)
    assert not sys.modules["sd_image_prompt"].live_session._preparer.kept._values  # type: ignore[attr-defined]


@pytest.mark.parametrize("stop", [1.0, 0.6])
def test_nothing_of_a_generation_waits_for_the_garbage_collector(
    host: Host, monkeypatch: pytest.MonkeyPatch, stop: float
) -> None:
    """Its K/V lie where the UNet computes, and would add up there until the collector happens to run."""
    session = sys.modules["sd_image_prompt.session"]
    made: list[weakref.ref[Any]] = []

    def recorded(*args: Any) -> Any:
        injection = session_injection(*args)
        made.append(weakref.ref(injection))
        return injection

    session_injection = session.Injection  # type: ignore[attr-defined]
    monkeypatch.setattr(session, "Injection", recorded)
    gc.collect()
    gc.disable()
    try:
        generate(host, unit(stop=stop))
        assert made
        assert [each() for each in made] == [None] * len(made)
    finally:
        gc.enable()


def test_a_wrong_setting_ends_the_job_with_a_sentence(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.opts.data, SETTING, "much")
    with pytest.raises(Exception, match="'much'; it can be a number of gigabytes"):
        generate(host, unit())

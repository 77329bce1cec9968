"""Tags in prompts: read, refused, and what each picture of a job gets."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.places import InPictures
from lib_ipadapter.saved import FOLDER
from lib_ipadapter.tags import Tag, found, tags_of
from lib_ipadapter.units import Unit
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.host import PROJECT_ROOT
from tests.embedded_hosts import request, unit
from tests.test_axes import XYZ, grid
from tests.test_generation import difference, pixels, same

PLAIN = "a red house"


# --- Reading

names = st.from_regex(r"[\w.-]([\w .-]{0,20}[\w.-])?", fullmatch=True)


@given(names, st.floats(-5, 5), st.text(st.characters(exclude_characters="<"), max_size=20))
def test_tags_are_read_anywhere_in_a_prompt(name: str, weight: float, around: str) -> None:
    prompt = f"{around}<ipa:{name}:{weight}:style>{around} <lora:{name}:1> <ipa: {name} >"
    assert tags_of(prompt) == (Tag(name, str(weight), "style"), Tag(name))
    assert Tag(name, str(weight)).fields == {"weight": str(weight)}


@given(st.text())
def test_any_prompt_has_tags_or_a_sentence(prompt: str) -> None:
    try:
        tags_of(prompt)
    except IPAdapterError as error:
        assert "<ipa:name:0.7>" in str(error)


@pytest.mark.parametrize("tag", ["<ipa:>", "<ipa: :1>", "<ipa:a:1:style:2>"])
def test_another_form_is_refused(tag: str) -> None:
    with pytest.raises(IPAdapterError, match="allowed are <ipa:name>"):
        tags_of(f"a {tag} house")


def job(prompts: list[str], hires: list[str] | None = None, **fields: Any) -> SimpleNamespace:
    extra = {"all_hr_prompts": hires, "enable_hr": True} if hires is not None else {}
    return SimpleNamespace(all_prompts=prompts, batch_size=2, **extra, **fields)


def test_each_picture_has_its_prompts_tags() -> None:
    one, two = Tag("one", "0.5"), Tag("two")
    p = job(["<ipa:one:0.5> <ipa:two>", "none", "<ipa:two><ipa:two>"], ["", "", "<ipa:one:0.5>"])
    assert found(p) == {
        (one, 0): InPictures(frozenset({0}), frozenset({2}), 2),
        (two, 0): InPictures(frozenset({0, 2}), frozenset(), 2),
        (two, 1): InPictures(frozenset({2}), frozenset(), 2),
    }
    assert found(job(["a <lora:x:1>"])) == {}
    assert found(job(["<ipa:one>"], disable_extra_networks=True)) == {}


def test_a_tag_in_a_negative_prompt_is_refused() -> None:
    with pytest.raises(IPAdapterError, match="The negative prompt has the tag <ipa:one>"):
        found(job(["a"], all_negative_prompts=["<ipa:one>"]))


# --- Generations


@pytest.fixture
def references(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three saved ones."""
    with_references(host, monkeypatch)
    yield
    forget(host)


def with_references(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.cmd_opts, "disable_extension_access", False, raising=False)
    client = Client(host.app)
    for name in ("astronaut", "chelsea", "my coffee"):
        wanted = unit("plus", photos=(name.split()[-1],), weight=0.8, formulation="decoupled")
        answer = client.post("/ip-adapter/saved", json={"name": name, "unit": wanted, "replace": True})
        assert answer.status_code == 200, answer.json()


def by_unit(name: str = "astronaut", **fields: Any) -> dict[str, Any]:
    wanted = {"weight": 0.8, "formulation": "decoupled", **fields}
    return {**unit("plus", **wanted), "images": [{"saved": name}]}


@pytest.mark.usefixtures("references")
def test_a_tag_is_a_unit_of_the_reference(host: Host) -> None:
    for tag, wanted in (
        ("<ipa:astronaut>", by_unit()),
        ("<ipa:my coffee:0.4>", by_unit("my coffee", weight=0.4)),
        ("<ipa:astronaut:-0.5>", by_unit(weight=-0.5)),
    ):
        tagged = host.txt2img(**request(prompt=f"{PLAIN}{tag}"))
        assert same(tagged.image, host.txt2img(**request(wanted, prompt=PLAIN)).image), tag
        assert tag in tagged.infotexts[0]  # so that what is pasted does it again
        assert "IP-Adapter 1" not in tagged.infotexts[0]
    assert same(host.txt2img(**request(prompt=f"{PLAIN}<ipa:astronaut:0>")).image, host.txt2img(**request()).image)
    assert same(host.txt2img(**request()).image, host.txt2img(**request(prompt=PLAIN)).image)
    assert host.extra_networks.unknown == []
    assert not host.errors


@pytest.mark.usefixtures("references")
def test_tags_act_beside_units_and_twice_beside_each_other(host: Host) -> None:
    tagged = host.txt2img(**request(unit(), prompt=f"{PLAIN}<ipa:astronaut><ipa:astronaut>")).image
    units = host.txt2img(**request(unit(), by_unit(), by_unit())).image
    assert same(tagged, units)


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("formulation", ["joint", "decoupled"])
def test_pictures_of_one_batch_have_their_own(host: Host, formulation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = importlib.import_module("sd_image_prompt.saved").default
    read = folder.read

    def with_formulation(name: str) -> Any:
        known = read(name)
        known.defaults["formulation"] = formulation
        return known

    monkeypatch.setattr(folder, "read", with_formulation)
    prompts = [f"{PLAIN}<ipa:astronaut>", PLAIN, f"{PLAIN}<ipa:chelsea:0.5><ipa:astronaut>", f"{PLAIN}<ipa:my coffee>"]
    drawn = prompted(host, prompts, batch_size=2, n_iter=2)
    wanted: list[list[dict[str, Any]]] = [
        [by_unit(formulation=formulation)],
        [],
        [by_unit("chelsea", weight=0.5, formulation=formulation), by_unit(formulation=formulation)],
        [by_unit("my coffee", formulation=formulation)],
    ]
    for n, units in enumerate(wanted):
        alone = host.txt2img(**request(*units, prompt=PLAIN, batch_size=2, n_iter=2)).images[n]
        assert np.abs(pixels(drawn[n]) - pixels(alone)).max() <= 2, n
    assert not host.errors


def prompted(host: Host, prompts: list[str], **fields: Any) -> list[Any]:
    """Pictures of a job with a prompt for each, as a wildcard extension or a script makes it."""
    wanted = request(**fields)
    p = host.Txt2Img(**{key: value for key, value in wanted.items() if key != "prompt"}, prompt=prompts)
    p.scripts = host.runners["txt2img"]
    p.script_args = p.scripts.default_script_args()
    p.do_not_save_grid = True
    return list(host.process(p).images)


@pytest.mark.usefixtures("references")
def test_the_hires_pass_has_the_tags_of_its_prompt(host: Host) -> None:
    fields: dict[str, Any] = {"enable_hr": True, "hr_scale": 1.25, "denoising_strength": 0.7}
    both = host.txt2img(**request(prompt=f"{PLAIN}<ipa:astronaut>", **fields)).image
    assert same(both, host.txt2img(**request(by_unit(), prompt=PLAIN, **fields)).image)
    second = host.txt2img(**request(prompt=PLAIN, hr_prompt=f"{PLAIN}<ipa:astronaut>", **fields)).image
    first = host.txt2img(**request(prompt=f"{PLAIN}<ipa:astronaut>", hr_prompt=PLAIN, **fields)).image
    plain = host.txt2img(**request(prompt=PLAIN, **fields)).image
    for a, b in ((second, first), (second, plain), (first, plain), (second, both), (first, both)):
        assert difference(a, b) > 0.5
    assert not host.errors


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("<ipa:nobody:0.7>", 'the tag <ipa:nobody:0.7>: No saved reference is named "nobody"; there are astronaut, c'),
        ("<ipa:../x>", "allowed are 1 to 64 letters"),
        ("<ipa:astronaut:much>", 'The field "weight" is "much"'),
        ("<ipa:astronaut:9>", 'The field "weight" is "9"; allowed is a finite number from -5 to 5'),
        ("<ipa:astronaut:1:nowhere>", '"nowhere"'),
        ("<ipa:>", "The prompt has the tag <ipa:>"),
    ],
)
@pytest.mark.usefixtures("references")
def test_what_a_tag_cannot_do_is_said(host: Host, prompt: str, part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)):
        host.txt2img(**request(prompt=f"{PLAIN}{prompt}"))
    assert len(host.txt2img(**request()).images) == 1


def test_the_third_part_is_the_layers() -> None:
    assert Tag("a", "1", "style").fields == {"weight": "1", "layers": "style"}
    assert "layers" not in Unit.__dataclass_fields__ or Unit.from_json({"layers": "all"})


def test_search_and_replace_of_x_y_z(host_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_of("sd15", extensions=(PROJECT_ROOT, XYZ))
    with_references(host, monkeypatch)
    wanted = grid("Prompt S/R", "astronaut, chelsea, my coffee:0.3")
    cells = host.txt2img(**{**wanted, "prompt": f"{PLAIN}<ipa:astronaut>"}).images
    alone = [by_unit(), by_unit("chelsea"), by_unit("my coffee", weight=0.3)]
    assert len(cells) == 3
    for cell, each in zip(cells, alone, strict=True):
        assert same(cell, host.txt2img(**request(each, prompt=PLAIN)).image)
    forget(host)


def forget(host: Host) -> None:
    for path in (Path(host.cmd_opts.data_dir) / "ip-adapter" / FOLDER).iterdir():
        path.unlink()


LATE = """
from modules import scripts
class Late(scripts.Script):
    def title(self): return 'Late'
    def show(self, is_img2img): return scripts.AlwaysVisible
    def process(self, p, *args):
        p.all_prompts = [each.replace('__who__', '<ipa:astronaut>').replace('__nobody__', '<ipa:nobody>')
                         for each in p.all_prompts]
"""
"""An extension that expands wildcards after us."""


def test_wildcards_that_are_expanded_after_us_act_too(
    host_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = tmp_path / "late" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "late.py").write_text(LATE)
    host = host_of("sd15", extensions=(PROJECT_ROOT, tmp_path / "late"))
    with_references(host, monkeypatch)
    drawn = host.txt2img(**request(prompt=f"{PLAIN}__who__")).image
    assert same(drawn, host.txt2img(**request(by_unit(), prompt=PLAIN)).image)
    with pytest.raises(ValueError, match='named "nobody"'):
        host.txt2img(**request(prompt=f"{PLAIN}__nobody__"))
    assert same(host.txt2img(**request(prompt=PLAIN)).image, host.txt2img(**request()).image)
    forget(host)

"""Which files are offered and by which name, in folders as people have them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lib_ipadapter.encoding import NEGATIVE_KEY, load_adapter
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.fingerprint import fingerprint
from lib_ipadapter.library import Library
from lib_ipadapter.pictures import read_picture
from lib_ipadapter.recognise import ENCODER_FILES, ENCODERS, AdapterKind, encoder_needed, recognise_adapter
from tests.adapter_files import base_adapter, plus_adapter, save
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.demo_models import DemoModels
from tests.embedded_hosts import request
from tests.huge_files import huge_safetensors
from tests.photos import base64_photo
from tests.test_recognise import SUPPORTED, public, tensors_of

WIDTHS = [8] * 16


def an_adapter(path: Path, plus: bool = False, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return save((plus_adapter if plus else base_adapter)(WIDTHS, 8, seed=seed), path)


def library(*folders: Path) -> Library:
    return Library(lambda: folders, lambda: folders)


# Files of one name


def test_two_files_of_one_name_are_both_offered_and_the_first_keeps_its_name(tmp_path: Path) -> None:
    first, second, third = tmp_path / "ipadapter", tmp_path / "ControlNet", tmp_path / "old" / "ControlNet"
    paths = [an_adapter(folder / "faces" / "a.safetensors", seed=n) for n, folder in enumerate((first, second, third))]
    an_adapter(second / "b.bin", plus=True)
    files = library(first, second, third)
    names = ["faces/a.safetensors", "ControlNet/faces/a.safetensors", "old/ControlNet/faces/a.safetensors"]
    assert set(files.adapters()) == {*names, "b.bin"}
    for name, path in zip(names, paths, strict=True):
        assert files.adapter_path(name) == path
        assert files.adapter_path(name.removesuffix(".safetensors")) == path
    paths[0].unlink()  # then the next one is the first
    assert files.adapter_path("faces/a.safetensors") == paths[1]


def test_a_name_that_looks_like_a_folders_is_no_other_files(tmp_path: Path) -> None:
    """The first folder has a folder of the second's name with a file of that name."""
    own = an_adapter(tmp_path / "one" / "two" / "a.bin")
    plain = an_adapter(tmp_path / "one" / "a.bin")
    other = an_adapter(tmp_path / "two" / "a.bin")
    files = library(tmp_path / "one", tmp_path / "two")
    found = {name: files.adapter_path(name) for name in files.adapters()}
    assert found == {"a.bin": plain, "two/a.bin": own, f"{tmp_path.name}/two/a.bin": other}


def test_one_file_in_two_folders_is_offered_once(tmp_path: Path) -> None:
    path = an_adapter(tmp_path / "one" / "a.safetensors")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.safetensors").symlink_to(path)
    (tmp_path / "three").symlink_to(tmp_path / "one", target_is_directory=True)
    assert list(library(tmp_path / "one", tmp_path / "two", tmp_path / "three").adapters()) == ["a.safetensors"]


def test_a_whole_name_goes_before_a_name_without_its_suffix(tmp_path: Path) -> None:
    an_adapter(tmp_path / "a.bin.pt")
    path = an_adapter(tmp_path / "a.bin.safetensors").rename(tmp_path / "b.safetensors")
    exact = path.rename(tmp_path / "a.bin")
    files = library(tmp_path)
    assert files.adapter_path("a.bin") == exact
    assert files.adapter_path("a.bin.pt") == tmp_path / "a.bin.pt"
    assert files.adapter_path("a") == exact


def test_encoders_and_negatives_of_one_name(tmp_path: Path, models: DemoModels) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    for n, folder in enumerate(folders):
        folder.mkdir()
        shutil.copy(models.encoder, folder / "e.safetensors")
        save_file({NEGATIVE_KEY: torch.full((1, 4, 8), float(n))}, folder / "n.safetensors")
    files = library(*folders)
    assert list(files.encoders()) == ["e.safetensors", "two/e.safetensors"]
    assert files.negatives() == ["n.safetensors", "two/n.safetensors"]
    assert files.negative_path("two/n.safetensors") == folders[1] / "n.safetensors"


def test_the_api_takes_either_of_two_files_of_one_name(models: DemoModels, tmp_path: Path) -> None:
    folders = tmp_path / "models" / "ipadapter", tmp_path / "models" / "ControlNet"
    shutil.copytree(models.encoder.parent, tmp_path / "models" / "clip_vision")
    for folder, source in zip(folders, (models.base["sd15"], models.plus["sd15"]), strict=True):
        folder.mkdir()
        shutil.copy(source, folder / "my style.safetensors")
    with Host("sd15", models_path=tmp_path / "models") as host:
        listed = Client(host.app).get("/ip-adapter/models").json()["adapters"]
        names = ["ControlNet/my style.safetensors", "my style.safetensors"]
        assert [each["name"] for each in listed] == names
        assert ["plus" in each["kind"] for each in listed] == [True, False]
        made = [host.txt2img(**request({"model": name, "images": [base64_photo()]})) for name in names]
        assert not np.array_equal(np.asarray(made[0].image), np.asarray(made[1].image))
        for name, each in zip(names, made, strict=True):
            assert f"model: {name}" in each.infotexts[0]


# Odd names and folders


ODD_NAMES = [
    "with spaces.safetensors",
    " leading and trailing .safetensors",
    "brackets [v1] (final) {2}.safetensors",
    "плюс-лицо.safetensors",
    "顔 アダプター.safetensors",
    "🙂.safetensors",
    "quotes ' and \" and `.safetensors",
    "a,b;c:d=e&f#g%20.safetensors",
    "UPPER.SAFETENSORS",
    "no.suffix.before.PT",
    "-dash.bin",
    ".hidden.safetensors",
    "e\u0301 decomposed.safetensors",
]


@pytest.mark.skipif(os.name == "nt", reason="Windows forbids some of these names")
def test_odd_names_are_offered_and_work(models: DemoModels, tmp_path: Path) -> None:
    folder = tmp_path / "моделі [1] (x)"
    shutil.copytree(models.encoder.parent, folder / "clip_vision")
    (folder / "ipadapter").mkdir()
    for name in ODD_NAMES:
        shutil.copy(models.base["sd15"], folder / "ipadapter" / name)
    with Host("sd15", models_path=folder) as host:
        client = Client(host.app)
        assert {each["name"] for each in client.get("/ip-adapter/models").json()["adapters"]} == set(ODD_NAMES)
        plain = np.asarray(host.txt2img(**request(steps=1)).image)
        for name in ODD_NAMES:
            wanted = request({"model": name, "images": [base64_photo()]}, steps=1)
            answer = client.post("/sdapi/v1/txt2img", json=wanted)
            assert answer.status_code == 200, (name, answer.text[:300])
            assert not np.array_equal(plain, np.asarray(read_picture(answer.json()["images"][0])))
        assert not host.errors


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text_is_not_offered_and_hides_no_other(tmp_path: Path) -> None:
    path = tmp_path / "good.bin"
    torch.save(base_adapter(WIDTHS, 8), path)
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/bad\xff.bin")).write_bytes(path.read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    assert [each["name"] for each in library(tmp_path).listing()["adapters"]] == ["good.bin"]


def test_links_that_lead_in_circles(tmp_path: Path) -> None:
    an_adapter(tmp_path / "a" / "b" / "one.safetensors")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self", target_is_directory=True)
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").symlink_to(tmp_path / "x.safetensors")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    files = library(tmp_path)
    assert [*files.adapters()] == ["a/b/one.safetensors"]
    for name in ("x.safetensors", "gone.safetensors"):
        assert files.adapter_path(name) == tmp_path / name  # whoever loads it says what is wrong


def test_folders_that_cannot_be_read_or_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    an_adapter(tmp_path / "open" / "a.safetensors")
    an_adapter(tmp_path / "open" / "closed" / "b.safetensors")
    (tmp_path / "file").write_text("no folder")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if "closed" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    files = library(tmp_path / "open" / "closed", tmp_path / "file", tmp_path / "nowhere", tmp_path / "open")
    assert list(files.adapters()) == ["a.safetensors"]
    with pytest.raises(IPAdapterError, match=r"no IP-Adapter model 'b' in .*closed.*such as a\.safetensors"):
        files.adapter_path("b")


def test_a_file_that_cannot_be_read_is_passed_over_and_named_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, empty = an_adapter(tmp_path / "a.safetensors"), tmp_path / "empty.safetensors"
    empty.touch()
    an_adapter(tmp_path / "good.safetensors")
    opened = Path.open

    def refusing(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refusing)
    files = library(tmp_path)
    assert list(files.adapters()) == ["good.safetensors"]
    with pytest.raises(IPAdapterError, match=r"a\.safetensors can't be read \(Permission denied\)"):
        load_adapter(files.adapter_path("a.safetensors"))
    with pytest.raises(IPAdapterError, match=r"empty\.safetensors is empty: download it again\."):
        load_adapter(files.adapter_path("empty"))


def test_a_file_that_is_replaced_between_two_pictures_is_read_anew(models: DemoModels, tmp_path: Path) -> None:
    shutil.copytree(models.models_path, tmp_path / "models")
    path = tmp_path / "models" / "ipadapter" / "mine.safetensors"
    wanted = request({"model": path.name, "images": [base64_photo()]})
    with Host("sd15", models_path=tmp_path / "models") as host:

        def draw(source: Path) -> np.ndarray:
            shutil.copy(source, tmp_path / "new")
            os.replace(tmp_path / "new", path)
            return np.asarray(host.txt2img(**wanted).image)

        base, plus, again = draw(models.base["sd15"]), draw(models.plus["sd15"]), draw(models.base["sd15"])
        assert not np.array_equal(base, plus)
        assert np.array_equal(base, again)

        # Another adapter of the same size, so that only the time tells; then another image encoder.
        data = bytearray(models.base["sd15"].read_bytes())
        data[-2000:] = bytes(2000)
        (tmp_path / "zeros").write_bytes(data)
        assert (tmp_path / "zeros").stat().st_size == path.stat().st_size
        assert not np.array_equal(base, draw(tmp_path / "zeros"))
        draw(models.base["sd15"])
        encoder = tmp_path / "models" / "clip_vision" / models.encoder.name
        other = bytearray(encoder.read_bytes())
        other[-4000:] = bytes(4000)
        encoder.write_bytes(other)
        assert not np.array_equal(base, np.asarray(host.txt2img(**wanted).image))
        path.unlink()
        with pytest.raises(ValueError, match=r"no IP-Adapter model 'mine\.safetensors'"):
            host.txt2img(**wanted)


# The image encoder to get


NEEDING = {SUPPORTED[name][4]: name for name in SUPPORTED}


@pytest.mark.parametrize("encoder", ENCODER_FILES)
def test_the_encoder_that_is_missing_is_named_with_file_size_and_folder(tmp_path: Path, encoder: str) -> None:
    name = NEEDING.get(encoder)
    kind = recognise_adapter(public(name)) if name else an_adapter_for_vit_l()
    assert encoder_needed(kind) == encoder
    public_file = ENCODER_FILES[encoder]
    folder = tmp_path / "clip_vision"
    with pytest.raises(IPAdapterError) as error:
        Library(list, lambda: [folder]).encoder_for(kind)
    said = str(error.value)
    for part in (f"needs the image encoder {encoder},", folder.as_posix(), kind.description):
        assert part in said
    assert f"put {public_file.file} of {public_file.repository} ({public_file.size}) into" in said
    assert said.endswith(".") and "GB" in public_file.size


def an_adapter_for_vit_l() -> AdapterKind:
    """No public adapter of a supported family takes the pooled embedding of ViT-L/14."""
    groups = base_adapter([320] * 16, 768, 768)
    flat = {f"{group}.{key}": tuple(tensor.shape) for group, keys in groups.items() for key, tensor in keys.items()}
    return recognise_adapter(tensors_of(flat))


def test_every_public_encoder_has_its_file() -> None:
    assert set(ENCODER_FILES) == {kind.name for kind in ENCODERS if not kind.name.startswith("demo")}


def test_an_encoder_is_found_in_whatever_folder_and_name(tmp_path: Path) -> None:
    shapes = {key: info.shape for key, info in public("clip_vision_vit-bigg").items()}
    (tmp_path / "two" / "deep").mkdir(parents=True)
    path = huge_safetensors(tmp_path / "two" / "deep" / "модель.pt", shapes, item=2)
    kind = recognise_adapter(public("ip-adapter_sdxl"))
    try:
        assert Library(list, lambda: [tmp_path / "one", tmp_path / "two"]).encoder_for(kind) == path
    finally:
        path.unlink()


# Files that an infotext names


def test_a_model_of_an_infotext_is_found_by_name_and_fingerprint(tmp_path: Path) -> None:
    digits = fingerprint(an_adapter(tmp_path / "sub" / "a.safetensors"))[:10]
    files = library(tmp_path)
    for known in (digits, ""):
        assert files.find_model("sub/a.safetensors", known) == ("sub/a.safetensors", "")
        assert files.find_model("sub/a", known) == ("sub/a", "")  # as requests may spell it
    (tmp_path / "sub" / "a.safetensors").rename(tmp_path / "new.bin")
    assert files.find_model("sub/a.safetensors", digits) == (
        "new.bin",
        "the model sub/a.safetensors is called new.bin here.",
    )
    name, note = files.find_model("sub/a.safetensors", "")
    assert name == "sub/a.safetensors" and "isn't here" in note


def test_another_file_of_the_name_gives_way_to_the_one_that_was_meant(tmp_path: Path) -> None:
    digits = fingerprint(an_adapter(tmp_path / "a.safetensors"))[:10]
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    an_adapter(tmp_path / "a.safetensors", seed=1)
    files = library(tmp_path)
    assert files.find_model("a.safetensors", digits)[0] == "b.safetensors"
    (tmp_path / "b.safetensors").unlink()
    name, note = files.find_model("a.safetensors", digits)
    assert name == "a.safetensors" and f"is another file here than the one that was used (fingerprint {digits})" in note
    assert files.find_model("", "") == ("", "")

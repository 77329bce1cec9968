"""The store of references: lossless, bounded, private, and safe to use from several threads."""

from __future__ import annotations

import io
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_ipadapter import references
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.pictures import picture_hash
from lib_ipadapter.references import LOCAL, OFF, ON, References, Rules, rules_of


def noise(seed: int, width: int = 20, height: int = 10) -> Image.Image:
    """A picture that hardly compresses: about 600 bytes as PNG."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def kept(store: References, hashes: list[str]) -> list[bool]:
    """Which of ``hashes`` the store has; asking makes no difference to their order of age among themselves."""
    found = []
    for sha256 in hashes:
        try:
            store.get(sha256)
            found.append(True)
        except IPAdapterError:
            found.append(False)
    return found


def test_what_comes_back_is_what_was_added() -> None:
    store = References()
    picture = noise(0)
    picture.info["transparency"] = picture.getpixel((0, 0))  # would be written into the file and read as a hole
    sha256 = store.add(picture)
    assert sha256 == picture_hash(picture)
    for name in (sha256, sha256.upper()):
        back = store.get(name)
        assert back.mode == "RGB"
        assert back.tobytes() == picture.tobytes()
        back.putpixel((0, 0), (0, 0, 0))  # the caller's own
    assert picture_hash(store.get(sha256)) == sha256
    assert "transparency" in picture.info


def test_a_picture_of_another_mode_is_kept_as_it_is_read() -> None:
    store = References()
    clear = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    assert store.get(store.add(clear)).getpixel((1, 1)) == (255, 255, 255)


def test_the_least_recently_used_go_first() -> None:
    store = References(memory_bytes=2500)  # room for three
    hashes = [store.add(noise(seed)) for seed in range(3)]
    assert kept(store, hashes) == [True] * 3
    store.get(hashes[0])
    hashes.append(store.add(noise(3)))
    assert kept(store, hashes) == [True, False, True, True]
    store.add(noise(2))  # adding again counts as use
    store.get(hashes[0])
    hashes.append(store.add(noise(4)))
    assert kept(store, hashes) == [True, False, True, False, True]


def test_the_bound_is_on_the_packed_bytes() -> None:
    store = References(memory_bytes=30_000)
    flat = [store.add(Image.new("RGB", (100, 100), (shade, 0, 0))) for shade in range(15)]
    assert kept(store, flat) == [True] * 15  # unpacked, one of them would fill the store


def test_the_same_picture_takes_its_place_once() -> None:
    store = References(memory_bytes=2500)
    first = store.add(noise(0))
    assert {store.add(noise(1)) for _ in range(20)} == {picture_hash(noise(1))}
    assert kept(store, [first]) == [True]


def test_the_newest_stays_however_large() -> None:
    store = References(memory_bytes=1)
    hashes = [store.add(noise(seed)) for seed in range(3)]
    assert kept(store, hashes) == [False, False, True]


@pytest.mark.parametrize("sha256", ["0" * 64, "", "no hash"])
def test_a_missing_picture_is_named_with_what_to_do(sha256: str) -> None:
    with pytest.raises(IPAdapterError, match=f'"{sha256}".*upload it again') as caught:
        References().get(sha256)
    assert caught.value.status_code == 422


def test_the_modules_functions_share_one_store() -> None:
    sha256 = references.add(noise(99))
    assert references.get(sha256).tobytes() == noise(99).tobytes()


def test_threads_do_not_disturb_each_other() -> None:
    store = References(memory_bytes=5000)
    wrong: list[object] = []

    def work(first: int) -> None:
        try:
            for seed in range(first, first + 30):
                picture = noise(seed % 12)
                sha256 = store.add(picture)
                try:
                    if store.get(sha256).tobytes() != picture.tobytes():
                        wrong.append(seed)
                except IPAdapterError:
                    pass  # another thread's pictures may have taken its place
        except Exception as error:  # a thread's exception would vanish
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(5 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    with store._lock:
        assert store._bytes == sum(len(kept.file) for kept in store._files.values()) <= 5000


# --- On disk


def on_disk(folder: Path, limit_bytes: int = 10**6, guarded: bool = False) -> References:
    """A store that has just been started."""
    return References(lambda: Rules(folder, limit_bytes, guarded))


def never() -> Any:
    raise AssertionError("read")


def used(store: References, picture: Image.Image) -> str:
    """A generation uses a picture that came as a file."""
    sha256 = picture_hash(picture)
    assert store.keep(sha256, lambda: picture) == ""
    return sha256


def test_a_used_picture_outlives_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "references"
    before = on_disk(folder)
    picture = noise(0)
    picture.info["comment"] = "secret"
    sha256 = before.add(picture)
    assert not folder.exists() and not on_disk(folder).has(sha256)  # added isn't used
    assert before.keep(sha256, never) == ""
    path = folder / f"{sha256}.png"
    assert os.listdir(folder) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert b"secret" not in path.read_bytes() and Image.open(path).info == {}
    after = on_disk(folder)
    assert after.has(sha256.upper())
    assert after.get(sha256.upper()).tobytes() == picture.tobytes()
    assert after.keep(sha256, never) == ""  # it is there


def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    used(on_disk(tmp_path), noise(0))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    store = on_disk(tmp_path, 2500)  # room for three
    hashes = []
    for seed in range(3):
        hashes.append(used(store, noise(seed)))
        os.utime(tmp_path / f"{hashes[-1]}.png", (seed + 1, seed + 1))
    on_disk(tmp_path).get(hashes[0])  # used now
    hashes.append(used(store, noise(3)))
    assert [on_disk(tmp_path).has(each) for each in hashes] == [True, False, True, True]


def test_a_picture_over_the_limit_is_not_stored(tmp_path: Path) -> None:
    store = on_disk(tmp_path, 700)
    small = used(store, noise(0))
    sentence = store.keep(picture_hash(noise(1, 100, 100)), lambda: noise(1, 100, 100))
    assert "allowed in all" in sentence
    assert os.listdir(tmp_path) == [f"{small}.png"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = on_disk(tmp_path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        sentence = store.keep("a" * 64, lambda: noise(0))
    assert "No space left on device" in sentence and "make room" in sentence
    assert os.listdir(tmp_path) == []
    used(store, noise(0))


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.png.1.part", tmp_path / ".b.png.2.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    used(on_disk(tmp_path), noise(0))
    assert not old.exists() and new.exists()


def test_a_file_that_is_not_what_its_name_says_is_no_reference(tmp_path: Path) -> None:
    sha256 = used(on_disk(tmp_path), noise(0))
    other = io.BytesIO()
    noise(1).save(other, "PNG")
    for content in (b"", other.getvalue()):
        (tmp_path / f"{sha256}.png").write_bytes(content)
        with pytest.raises(IPAdapterError, match=sha256):
            on_disk(tmp_path).get(sha256)


@pytest.mark.parametrize("name", ["../secret", "..", "", "/etc/passwd", "secret", "A" * 63, "\u0660" * 64])
def test_only_hashes_are_names(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "store"
    used(on_disk(folder), noise(0))
    for place in (tmp_path, folder):
        noise(1).save(place / "secret.png")
    store = on_disk(folder)
    assert not store.has(name) and not store.forget(name)
    with pytest.raises(IPAdapterError):
        store.get(name)


def test_memory_alone_where_the_store_is_off(tmp_path: Path) -> None:
    sha256 = used(on_disk(tmp_path / "store"), noise(0))
    off = References(lambda: rules_of(tmp_path / "store", OFF, 100, True))
    assert not off.has(sha256)
    assert off.keep(picture_hash(noise(1)), never) == ""
    assert off.get(off.add(noise(2))).tobytes() == noise(2).tobytes()


def test_listing_and_forgetting(tmp_path: Path) -> None:
    store = on_disk(tmp_path)
    stored, fresh = used(store, noise(0, 30, 20)), store.add(noise(1))
    os.utime(tmp_path / f"{stored}.png", (0, 0))
    assert [(each["sha256"], each["width"], each["height"]) for each in store.listing()] == [
        (fresh, 20, 10),
        (stored, 30, 20),
    ]
    assert store.listing()[1]["used"] == "1970-01-01T00:00:00+00:00"
    assert store.listing()[1]["bytes"] == (tmp_path / f"{stored}.png").stat().st_size == len(store.png(stored))
    assert store.forget(stored) and not store.forget(stored)
    assert not store.has(stored) and os.listdir(tmp_path) == []
    store.keep(fresh, never)
    assert store.forget_all() == 1
    assert store.listing() == [] and os.listdir(tmp_path) == []
    with store._lock:
        assert store._bytes == 0


# --- Where strangers may come


def test_the_rules_fail_closed(tmp_path: Path) -> None:
    table = {
        (LOCAL, True): (True, False),
        (LOCAL, False): (False, True),
        (ON, True): (True, False),
        (ON, False): (True, True),
        (OFF, True): (False, False),
        ("nonsense", False): (False, True),
    }
    for (choice, local), (stored, guarded) in table.items():
        rules = rules_of(tmp_path, choice, 5, local)
        assert (rules.folder is not None, rules.guarded) == (stored, guarded), choice
        assert rules.limit_bytes == 5 * 10**6
    assert rules_of(tmp_path, ON, "much", True).limit_bytes == Rules().limit_bytes


def test_a_hash_is_not_enough_where_strangers_may_come(tmp_path: Path) -> None:
    used(on_disk(tmp_path), noise(9))
    store = on_disk(tmp_path, guarded=True)
    handle = store.add(noise(0), "mine")
    content = picture_hash(noise(0))
    store.keep(content, never)
    assert handle != content and store.resolve(handle) == content
    assert store.get(handle).tobytes() == noise(0).tobytes()
    for stranger in ("", "another"):
        for sha256 in (content, picture_hash(noise(9))):
            assert not store.has(sha256, stranger) and not store.forget(sha256, stranger)
            with pytest.raises(IPAdapterError, match="only for who added it"):
                store.get(sha256, stranger)
        assert store.listing(stranger) == [] and store.forget_all(stranger) == 0
    assert store.get(content, "mine").tobytes() == noise(0).tobytes()
    assert [each["sha256"] for each in store.listing("mine")] == [content]


def test_handles_last_as_long_as_the_folder_and_are_this_webuis_own(tmp_path: Path) -> None:
    store = on_disk(tmp_path / "a", guarded=True)
    handle = store.add(noise(0))
    store.keep(picture_hash(noise(0)), never)
    assert stat.S_IMODE((tmp_path / "a" / "handles.key").stat().st_mode) == 0o600
    assert on_disk(tmp_path / "a", guarded=True).get(handle).tobytes() == noise(0).tobytes()
    assert on_disk(tmp_path / "b", guarded=True).add(noise(0)) != handle
    assert on_disk(tmp_path / "a").has(picture_hash(noise(0)))  # local again


def test_an_owner_forgets_only_its_own(tmp_path: Path) -> None:
    store = on_disk(tmp_path, guarded=True)
    mine, others = store.add(noise(0), "mine"), store.add(noise(1), "others")
    assert store.forget_all("mine") == 1
    assert not store.has(mine) and store.has(others)


def test_times_are_of_the_last_use(tmp_path: Path) -> None:
    store = on_disk(tmp_path)
    sha256 = used(store, noise(0))
    os.utime(tmp_path / f"{sha256}.png", (1, 1))
    begun = time.time()
    store.keep(sha256, never)
    assert (tmp_path / f"{sha256}.png").stat().st_mtime > begun - 10


def test_a_file_that_can_not_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = on_disk(tmp_path)
    sha256 = used(store, noise(0))

    def held(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(Path, "unlink", held)
    with pytest.raises(IPAdapterError, match=f"{sha256}.*in use"):
        store.forget(sha256)

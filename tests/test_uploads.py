"""The store of uploaded pictures: lossless, bounded, and safe to use from several threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image

from lib_ipadapter import uploads
from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.pictures import picture_hash, read_picture
from lib_ipadapter.uploads import UploadStore


def noise(seed: int, width: int = 20, height: int = 10) -> Image.Image:
    """A picture that hardly compresses: about 600 bytes as PNG."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def kept(store: UploadStore, hashes: list[str]) -> list[bool]:
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
    store = UploadStore()
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
    store = UploadStore()
    clear = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    assert store.get(store.add(clear)).getpixel((1, 1)) == (255, 255, 255)


def test_the_least_recently_used_go_first() -> None:
    store = UploadStore(limit_bytes=2500)  # room for three
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
    store = UploadStore(limit_bytes=30_000)
    flat = [store.add(Image.new("RGB", (100, 100), (shade, 0, 0))) for shade in range(15)]
    assert kept(store, flat) == [True] * 15  # unpacked, one of them would fill the store


def test_the_same_picture_takes_its_place_once() -> None:
    store = UploadStore(limit_bytes=2500)
    first = store.add(noise(0))
    assert {store.add(noise(1)) for _ in range(20)} == {picture_hash(noise(1))}
    assert kept(store, [first]) == [True]


def test_the_newest_stays_however_large() -> None:
    store = UploadStore(limit_bytes=1)
    hashes = [store.add(noise(seed)) for seed in range(3)]
    assert kept(store, hashes) == [False, False, True]


@pytest.mark.parametrize("sha256", ["0" * 64, "", "no hash"])
def test_a_missing_picture_is_named_with_what_to_do(sha256: str) -> None:
    with pytest.raises(IPAdapterError, match=f'"{sha256}".*upload it again') as caught:
        UploadStore().get(sha256)
    assert caught.value.status_code == 422


def test_the_modules_functions_share_one_store() -> None:
    sha256 = uploads.add(noise(99))
    assert uploads.get(sha256).tobytes() == noise(99).tobytes()


def test_threads_do_not_disturb_each_other() -> None:
    store = UploadStore(limit_bytes=5000)
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
        assert store._bytes == sum(map(len, store._files.values())) <= 5000


def test_what_is_kept_is_listed_given_out_and_forgotten() -> None:
    store = UploadStore()
    sha256 = store.add(Image.new("RGB", (3, 2), (1, 2, 3)))
    (listed,) = store.listing()
    assert listed["sha256"] == sha256 and listed["bytes"] > 0
    assert picture_hash(read_picture(store.png(sha256))) == sha256
    assert store.forget(sha256.upper()) and not store.forget(sha256)
    assert store.listing() == []
    with pytest.raises(IPAdapterError, match=sha256):
        store.png(sha256)
    assert store._bytes == 0

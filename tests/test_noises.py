"""Noise over a picture: its formula, and the same again for the same picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lib_ipadapter.noises import NOISES, noised
from lib_ipadapter.pictures import picture_hash
from lib_ipadapter.units import NOISES as NAMES
from tests.photos import photo

SIZE = 224


@pytest.fixture(scope="module")
def square() -> Image.Image:
    return photo("coffee").resize((SIZE, SIZE)).convert("RGB")


def values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=float)


def test_the_table_has_every_name() -> None:
    assert ("none", *NOISES) == NAMES
    assert all(each.help for each in NOISES.values())


@pytest.mark.parametrize("name", NOISES)
def test_it_depends_on_the_pictures_content_alone(square: Image.Image, name: str) -> None:
    sha256 = picture_hash(square)
    first = noised(square, name, 0.7, sha256)
    assert np.array_equal(values(first), values(noised(square.copy(), name, 0.7, sha256)))
    assert not np.array_equal(values(first), values(noised(square, name, 0.7, "0" * 64)))
    assert np.array_equal(values(noised(square, name, 0.0, sha256)), values(square))


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_gaussian_noise_has_the_strength_as_deviation(strength: float) -> None:
    grey = Image.new("RGB", (SIZE, SIZE), (128, 128, 128))
    found = values(noised(grey, "gaussian", strength, "a")) / 255
    drawn = np.random.default_rng(0).normal(128 / 255, strength, 10**6).clip(0, 1)
    assert found.mean() == pytest.approx(drawn.mean(), abs=0.01)
    assert found.std() == pytest.approx(drawn.std(), abs=0.01)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_fading_leaves_that_much_less_of_the_picture(square: Image.Image, strength: float) -> None:
    x, found = values(square), values(noised(square, "fade", strength, "a"))
    slope = np.cov(x.ravel(), found.ravel())[0, 1] / x.var()
    assert slope == pytest.approx(1 - strength, abs=0.02)
    assert (found - (1 - strength) * x).mean() / 255 == pytest.approx(strength / 2, abs=0.01)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_shuffled_pixels_are_the_pictures_own(square: Image.Image, strength: float) -> None:
    x, found = (values(each).reshape(-1, 3) for each in (square, noised(square, "shuffle", strength, "a")))
    assert np.array_equal(np.sort(x, axis=0), np.sort(found, axis=0))
    moved = (x != found).any(axis=1).mean()
    assert strength - 0.05 < moved <= strength

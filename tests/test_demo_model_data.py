"""The data set of the small model: scenes, captions, vocabulary, files."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tests.demo_model import captions, scenes
from tests.demo_model.bpe import Tokenizer, train
from tests.demo_model.files import load_tensors, save_png, save_tensors, sheet
from tests.demo_model.scenes import COLOURS, RGB, SHAPES, TEXTURES, Scenes, rearranged, render, sample


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(captions.vocabulary_text())


def one(shape: str, colour: str, texture: str = "plain", background: str = "white") -> Scenes:
    """One still scene of a large shape in the middle."""
    scene = sample(1, generator(), allow_held_out=True, simple=True)

    def index(n: int) -> torch.Tensor:
        return torch.tensor([n])

    return replace(
        scene,
        shape=index(SHAPES.index(shape)),
        colour=index(COLOURS.index(colour)),
        texture=index(TEXTURES.index(texture)),
        background=index(COLOURS.index(background)),
        background_kind=index(0),
        size=index(2),
        place=index(0),
        radius=torch.tensor([0.3]),
        shift=torch.zeros(1, 2),
        turn=torch.zeros(1),
        tint=torch.zeros(1, 3, 3),
    )


def test_the_same_seed_gives_the_same_scenes_and_another_others() -> None:
    first, again, other = (sample(40, generator(seed)) for seed in (1, 1, 2))
    for f in fields(Scenes):
        assert torch.equal(getattr(first, f.name), getattr(again, f.name)), f.name
    assert not torch.equal(render(first, 32), render(other, 32))


def test_held_out_combinations_never_come_in_training_and_do_otherwise() -> None:
    held = set(scenes.held_out_combinations())
    assert 20 < len(held) < len(SHAPES) * len(COLOURS) * len(TEXTURES) / 5
    assert {c for _, c, _ in held} == set(range(len(COLOURS))), "every colour is among them"
    training, any_ = sample(4000, generator()), sample(4000, generator(), allow_held_out=True)

    def combinations(s: Scenes) -> set[tuple[int, int, int]]:
        there = s.background_kind != 2
        first = torch.stack([s.shape, s.colour, s.texture], 1)[there]
        second = torch.stack([s.shape_2, s.colour_2, s.texture_2], 1)[there & (s.relation > 0)]
        return {tuple(row) for row in torch.cat([first, second]).tolist()}

    assert not combinations(training) & held
    assert len(combinations(any_) & held) > 0.9 * len(held)
    assert len(combinations(training)) > 0.95 * (len(SHAPES) * len(COLOURS) * len(TEXTURES) - len(held))


def test_shapes_stand_out_from_what_is_behind_them() -> None:
    many = sample(500, generator(), allow_held_out=True)
    assert bool((many.colour != many.background).all())
    second = many[many.relation > 0]
    assert bool((second.colour_2 != second.background).all() & (second.colour_2 != second.colour).all())
    assert set(many.count[many.relation > 0].tolist()) == {1}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour_on_its_background(shape: str) -> None:
    picture = render(one(shape, "blue"), 96)[0]
    assert picture.shape == (3, 96, 96) and float(picture.min()) >= 0 and float(picture.max()) <= 1
    blue, white = (torch.tensor(RGB[COLOURS.index(c)])[:, None, None] for c in ("blue", "white"))
    is_blue, is_white = (((picture - c).abs().amax(0) < 0.02) for c in (blue, white))
    # what is neither is an edge
    assert 0.06 < float(is_blue.float().mean()) < 0.4
    assert float((is_blue | is_white).float().mean()) > 0.93
    middle = bool(is_blue[47:49, 47:49].all())
    assert middle is (shape not in ("ring", "moon"))


def test_no_two_shapes_and_no_two_textures_look_the_same() -> None:
    drawn = [render(one(shape, "red"), 64)[0] for shape in SHAPES]
    drawn += [render(one("square", "red", texture), 64)[0] for texture in TEXTURES[1:]]
    for n, a in enumerate(drawn):
        for b in drawn[:n]:
            assert float((a - b).abs().mean()) > 0.01


def test_a_picture_has_the_same_things_at_every_size() -> None:
    many = sample(16, generator(3))
    large = torch.nn.functional.avg_pool2d(render(many, 128), 4)
    assert float((large - render(many, 32)).abs().mean()) < 0.01


def test_a_reference_keeps_what_it_stands_for_and_moves() -> None:
    many = sample(300, generator(4))
    other = rearranged(many, generator(5), move=1.0, other_background=1.0)
    for name in ("shape", "colour", "texture", "count", "relation", "shape_2", "colour_2"):
        assert torch.equal(getattr(many, name), getattr(other, name)), name
    shown = many.background_kind != 2
    assert float((many.place != other.place)[shown].float().mean()) > 0.2
    assert float((many.background != other.background)[shown].float().mean()) > 0.4
    assert bool((other.background != other.colour)[shown].all())
    still = rearranged(many, generator(5), move=0.0, other_background=0.0)
    assert torch.equal(still.place, many.place) and torch.equal(still.background, many.background)
    blurry = (~shown).nonzero()[:, 0]
    assert torch.equal(render(many[blurry], 32), render(other[blurry], 32))


def test_full_captions_name_what_is_there() -> None:
    many = sample(200, generator(6))
    texts = captions.texts(captions.choose_phrases(many, generator(7), full=True))
    for n, text in enumerate(texts):
        said = set(text.replace(",", " ").split())
        assert COLOURS[many.colour[n]] in said, text
        if many.background_kind[n] == 2:
            continue
        noun = SHAPES[many.shape[n]]
        assert {noun, noun + "s", noun + "es"} & said, text
        assert COLOURS[many.background[n]] in said, text
        if many.relation[n] > 0:
            assert SHAPES[many.shape_2[n]] in said and COLOURS[many.colour_2[n]] in said, text
        textured = {"striped", "stripes", "dotted", "spotted", "checkered", "checked"} & said
        assert bool(textured) or (many.texture[n] == 0), text
        assert " a orange" not in text and "an a" not in text


def test_short_captions_say_nothing_that_is_not_there_and_differ_in_length() -> None:
    many = sample(400, generator(8))
    texts = captions.texts(captions.choose_phrases(many, generator(9)))
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) <= 3 and max(lengths) >= 12
    for n, text in enumerate(texts):
        there = {COLOURS[c[n]] for c in (many.colour, many.background)} | {COLOURS[many.colour_2[n]]}
        assert {word for word in text.replace(",", " ").split() if word in COLOURS} <= there, text


def test_tokens_of_captions_are_those_of_their_words(tokenizer: Tokenizer) -> None:
    chosen = captions.choose_phrases(sample(64, generator(10)), generator(11))
    rows = captions.CaptionTokens(tokenizer, "cpu")
    assert rows(chosen).tolist() == [tokenizer.rows(text) for text in captions.texts(chosen)]
    assert rows.empty(2).tolist() == [tokenizer.rows("")] * 2


def test_the_tokeniser_is_clips(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    reference = CLIPTokenizer.from_pretrained(tmp_path)
    for text in (
        "a small red circle on blue",
        "Two GREEN striped triangles,  on a white background!",
        "It's 12 (odd:1.2) words_like this; äöü 猫 🙂",
        "",
        "word " * 100,
    ):
        expected = reference(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert tokenizer.rows(text) == expected, text
    assert Tokenizer.load(tmp_path).vocabulary == tokenizer.vocabulary
    assert len(tokenizer.vocabulary) == 1000
    assert ",</w>" in tokenizer.vocabulary


def test_words_of_the_grammar_are_one_token_each(tokenizer: Tokenizer) -> None:
    for phrase in captions.phrases():
        for word in phrase.replace(",", " ").replace("-", " ").split():
            assert len(tokenizer.encode(word)) == 1, word


def test_files_are_read_by_others(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).half(), "b.c": torch.arange(5), "d": torch.tensor(2.5)}
    save_tensors(tensors, tmp_path / "deep" / "x.safetensors")
    for read in (load_file(tmp_path / "deep" / "x.safetensors"), load_tensors(tmp_path / "deep" / "x.safetensors")):
        assert set(read) == set(tensors)
        assert all(
            torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors
        )
    pictures = torch.rand(3, 3, 8, 8)
    save_png(sheet(pictures, 2), tmp_path / "x.png")
    found = np.asarray(Image.open(tmp_path / "x.png"))
    assert found.shape == (16, 16, 3)
    np.testing.assert_array_equal(found[8:, :8], (pictures[2].permute(1, 2, 0) * 255).round().byte().numpy())
    assert (found[8:, 8:] == 255).all()

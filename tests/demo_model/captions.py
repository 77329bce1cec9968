"""Captions: a grammar of phrases in slots, chosen for a whole batch of scenes at once.

A caption is one phrase out of the table for every slot, many of them empty: attributes are dropped at random, so that
short prompts work as well as full ones. As tokens a phrase is what the tokeniser makes of it, and since that works
word by word, the tokens of a caption are those of its phrases in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .bpe import CONTEXT, Tokenizer
from .scenes import COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Scenes

LEADS = ("a picture of", "an image of", "a drawing of", "picture of")
NUMBERS = ("one", "two", "three")
SIZE_WORDS = (("small", "little", "tiny"), ("medium", "medium-sized"), ("large", "big", "huge"))
PLACE_WORDS = (
    ("in the middle", "in the center", "in the centre", "at the center"),
    ("on the left", "at the left", "left"),
    ("on the right", "at the right", "right"),
    ("at the top", "on top", "top"),
    ("at the bottom", "bottom"),
)
TEXTURE_WORDS = (
    ("plain", "solid"),
    ("striped", "with stripes"),
    ("dotted", "spotted"),
    ("checkered", "checked"),
)
BESIDE = ("next to", "beside", "and")
ON = ("with", "and")
BLURRY = ("a blurry picture of", "a blurry pattern of", "soft fields of", "blurry")


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


@lru_cache(maxsize=1)
def phrases() -> tuple[str, ...]:
    """The table; 0 is the empty phrase."""
    found = ["", "a", "an", *LEADS, *NUMBERS, *BLURRY, *BESIDE, *ON, "on it", "shape", "shapes"]
    for words in (*SIZE_WORDS, *PLACE_WORDS, *TEXTURE_WORDS):
        found += words
    for colour in COLOURS:
        found += [colour, f"on {colour}", f"on a {colour} background", f"against {colour}", f", {colour} background"]
        found += [f"on an {colour} background", f"on a {colour} gradient", f"on an {colour} gradient"]
        found += [f"on a background of {colour}"]
        found += [f"and {colour}"]
    for shape in SHAPES:
        found += [shape, _plural(shape)]
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=1)
def _numbers() -> dict[str, int]:
    return {phrase: n for n, phrase in enumerate(phrases())}


def _table(rows: Sequence[Sequence[str]], device: torch.device) -> Tensor:
    """Numbers of phrases, ``[rows, choices]``; shorter rows begin again."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[_numbers()[row[i % len(row)]] for i in range(longest)] for row in rows], device=device)


def choose_phrases(
    scenes: Scenes, generator: torch.Generator, full: bool = False, like: Scenes | None = None
) -> Tensor:
    """A caption of every scene: numbers of phrases, ``[B, slots]``.

    Args:
        scenes: what to describe; a caption never says what isn't there.
        generator: all depends on its state alone.
        full: name every attribute that has a word, in words chosen at random.
        like: say size, place and background only where these scenes have the same.
    """
    n, device = len(scenes), scenes.shape.device
    number = _numbers()

    def chance(share: float) -> Tensor:
        return torch.rand(n, generator=generator, device=device) < share

    def say(share: float) -> Tensor:
        return chance(1.0 if full else share)

    def pick(table: Tensor, rows: Tensor | None = None) -> Tensor:
        choice = torch.randint(table.shape[1], (n,), generator=generator, device=device)
        return table[rows if rows is not None else torch.zeros_like(choice), choice]

    def only(mask: Tensor, phrase: Tensor | int) -> Tensor:
        return torch.where(mask, phrase, 0)

    def one(text: str) -> Tensor:
        return torch.full((n,), number[text], device=device)

    def article(first: Tensor, bare: Tensor) -> Tensor:
        """ "a" or "an" by the word that follows; nothing where ``bare``."""
        return only(~bare, torch.where(first == number["orange"], number["an"], number["a"]))

    colours = _table([[c] for c in COLOURS], device)[:, 0]
    singular = _table([[s] for s in SHAPES], device)[:, 0]
    plural = _table([[_plural(s)] for s in SHAPES], device)[:, 0]
    textures = _table(TEXTURE_WORDS, device)
    many = scenes.count > 1

    def shared(*names: str) -> Tensor:
        same = torch.ones(n, dtype=torch.bool, device=device)
        for name in names if like is not None else ():
            same &= getattr(like, name) == getattr(scenes, name)
        return same

    size = only(say(0.5) & shared("size"), pick(_table(SIZE_WORDS, device), scenes.size))
    texture = only(torch.where(scenes.texture == 0, say(0.15), say(0.8)), pick(textures, scenes.texture))
    after = texture == number["with stripes"]
    colour = only(say(0.88), colours[scenes.colour])
    swap = chance(0.3)
    before = only(~after, texture)
    first, then = torch.where(swap, before, colour), torch.where(swap, colour, before)
    noun = torch.where(many, plural[scenes.shape], singular[scenes.shape])
    noun = torch.where(say(0.94), noun, torch.where(many, number["shapes"], number["shape"]))
    lead = only(chance(0.3), pick(_table([LEADS], device)))
    numbers = _table([[w] for w in NUMBERS], device)[:, 0]
    opening = torch.where(size > 0, size, torch.where(first > 0, first, then))
    one_word = (~many) & chance(0.08)
    count = torch.where(many | one_word, numbers[scenes.count - 1], article(opening, chance(0.3)))
    place = only(
        say(0.55) & shared("place") & ~many & (scenes.relation == 0), pick(_table(PLACE_WORDS, device), scenes.place)
    )

    has_second = (scenes.relation > 0) & say(0.85)
    on = scenes.relation == 1
    joint = only(has_second, torch.where(on, pick(_table([ON], device)), pick(_table([BESIDE], device))))
    colour_2 = only(has_second & say(0.92), colours[scenes.colour_2])
    texture_2 = only(
        has_second & torch.where(scenes.texture_2 == 0, chance(0.1), say(0.8)),
        pick(_table([[w[0]] for w in TEXTURE_WORDS], device), scenes.texture_2),
    )
    article_2 = article(torch.where(colour_2 > 0, colour_2, texture_2), ~has_second)
    noun_2 = only(has_second, singular[scenes.shape_2])
    on_it = only(has_second & on, one("on it"))

    behind = [
        [f"on {c}", f"on a{'n' * (c == 'orange')} {c} background", f"against {c}", f", {c} background", f"on {c}"]
        for c in COLOURS
    ]
    graded = [[f"on a{'n' * (c == 'orange')} {c} gradient", f"on {c}", f"on a background of {c}"] for c in COLOURS]
    background = torch.where(
        scenes.background_kind == 1,
        pick(_table(graded, device), scenes.background),
        pick(_table(behind, device), scenes.background),
    )
    background = only(say(0.65) & shared("background", "background_kind"), background)
    ending = only(after, texture)
    slots = [lead, count, size, first, then, noun, ending, place, joint, article_2, colour_2, texture_2, noun_2, on_it]
    slots.append(background)

    blurry = scenes.background_kind == 2
    of = _table([[f"and {c}"] for c in COLOURS], device)[:, 0]
    fields = [pick(_table([BLURRY], device)), colours[scenes.colour], only(say(0.8), of[scenes.background])]
    return torch.stack(
        [torch.where(blurry, fields[i] if i < len(fields) else 0, slot) for i, slot in enumerate(slots)], 1
    )


def texts(chosen: Tensor) -> list[str]:
    """Captions as words."""
    table = phrases()
    return [" ".join(table[i] for i in row if i).replace(" ,", ",") for row in chosen.tolist()]


class CaptionTokens:
    """Turns chosen phrases into rows of token numbers as the text encoder takes them."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device | str) -> None:
        rows = [tokenizer.encode(phrase) for phrase in phrases()]
        longest = max(map(len, rows))
        self.end = tokenizer.end
        self.start = tokenizer.start
        self.table = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], device=device)

    def __call__(self, chosen: Tensor) -> Tensor:
        """``[B, slots]`` to ``[B, CONTEXT]``: start, the words, end, filled up with end."""
        tokens = self.table[chosen].flatten(1)
        order = (tokens < 0).to(torch.int8).argsort(dim=1, stable=True)
        tokens = tokens.gather(1, order)[:, : CONTEXT - 2]
        tokens = torch.nn.functional.pad(tokens, (0, max(0, CONTEXT - 2 - tokens.shape[1])), value=-1)
        tokens = torch.where(tokens < 0, self.end, tokens)
        edge = torch.ones_like(tokens[:, :1])
        return torch.cat([self.start * edge, tokens, self.end * edge], 1)

    def empty(self, rows: int) -> Tensor:
        """The rows of an empty prompt."""
        return self(torch.zeros(rows, 1, dtype=torch.int64, device=self.table.device))


def vocabulary_text() -> list[str]:
    """The words that the vocabulary is made for: those of the grammar, and common ones of prompts."""
    extra = (
        "the of and with in on at to for from by is it this that no not without very more less image photo photograph "
        "photography painting picture drawing sketch render illustration art style quality best masterpiece detailed "
        "high low worst blurry sharp simple abstract pattern background foreground color colour colors colours bright "
        "dark light pale deep vivid soft hard smooth rough round flat shape shapes line lines dot dots spot spots "
        "stripe stripes check checks grid circle ellipse rectangle hexagon pentagon oval arrow triangle square star "
        "ring cross diamond heart moon red green blue yellow orange purple pink cyan white black gray grey brown "
        "violet magenta turquoise gold silver beige navy small medium large tiny little big huge giant left right top "
        "bottom middle center centre upper lower corner edge inside outside above below under over beside between "
        "next near far two three four five six seven eight nine ten many several single pair group row column person "
        "man woman girl boy child face portrait cat dog bird horse fish tree flower grass leaf forest mountain sky sea "
        "water river lake beach sun cloud snow rain night day morning evening city street house building room window "
        "door car road bridge field garden table chair food fruit apple banana lemon bread cup bottle book paper wood "
        "stone metal glass fabric wall floor landscape nature animal summer winter spring autumn beautiful pretty old "
        "new young modern vintage digital realistic cartoon minimal cute colorful striped dotted checkered solid plain "
        "gradient noise texture textured pixel vector logo icon symbol sign text ugly bad deformed"
    )
    # often enough that every word of the grammar becomes one token
    own = sorted({word for phrase in phrases() for word in phrase.split()} | {*SIZES, *PLACES, *TEXTURES})
    return [*own * 50, *extra.split()]

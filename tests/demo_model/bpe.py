"""A byte-level vocabulary as CLIP's tokeniser has it: lower case, words ending in ``</w>``, merges in order of rank."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

CONTEXT = 77
"""Tokens of a prompt with start and end."""
SIZE = 1000
"""Entries that the vocabulary has at most."""
START, END = "<|startoftext|>", "<|endoftext|>"

_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


def byte_letters() -> list[str]:
    """The letter that stands for each byte, as GPT-2 chose them: printable ones for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(plain))
    return [letters[byte] for byte in range(256)]


def words(text: str) -> list[str]:
    """What merges stay within."""
    return _WORD.findall(text.lower())


def _letters(word: str) -> tuple[str, ...]:
    table = byte_letters()
    units = [table[byte] for byte in word.encode("utf-8")]
    return (*units[:-1], units[-1] + "</w>")


def _merged(units: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(units):
        if units[i : i + 2] == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(units[i])
            i += 1
    return tuple(out)


class Tokenizer:
    """Words to token numbers.

    Args:
        merges: pairs in order of rank. The vocabulary follows: every byte, every byte at a word's end, what merges
            give, start and end.
    """

    def __init__(self, merges: Iterable[tuple[str, str]]) -> None:
        self.merges = tuple(merges)
        letters = byte_letters()
        # printable bytes first, as in CLIP's own table
        order = sorted(letters, key=lambda letter: (ord(letter) >= 256, ord(letter)))
        entries = [*order, *(letter + "</w>" for letter in order), *(a + b for a, b in self.merges), START, END]
        self.vocabulary = {entry: n for n, entry in enumerate(dict.fromkeys(entries))}
        self.start, self.end = self.vocabulary[START], self.vocabulary[END]
        self._rank = {pair: n for n, pair in enumerate(self.merges)}
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without start and end."""
        return [token for word in words(text) for token in self._word(word)]

    def rows(self, text: str) -> list[int]:
        """One row of ``CONTEXT`` numbers: start, as much as fits, end, filled up with end."""
        tokens = self.encode(text)[: CONTEXT - 2]
        return [self.start, *tokens, *[self.end] * (CONTEXT - 1 - len(tokens))]

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            units = _letters(word)
            while True:
                pairs = [pair for pair in pairwise(units) if pair in self._rank]
                if not pairs:
                    break
                units = _merged(units, min(pairs, key=self._rank.__getitem__))
            self._known[word] = [self.vocabulary[unit] for unit in units]
        return self._known[word]

    def save(self, folder: Path) -> None:
        """Write ``vocab.json``, ``merges.txt`` and what tells a reader that they are CLIP's kind."""
        folder.mkdir(parents=True, exist_ok=True)

        def write(name: str, content: object) -> None:
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (folder / name).write_text(text + "\n", encoding="utf-8")

        (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        write("special_tokens_map.json", special)
        write(
            "tokenizer_config.json",
            {
                "tokenizer_class": "CLIPTokenizer",
                "do_lower_case": True,
                "model_max_length": CONTEXT,
                "add_prefix_space": False,
                "errors": "replace",
                **special,
            },
        )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokeniser of a folder that :meth:`save` wrote."""
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
        pairs = [line.split(" ") for line in lines if line]
        return cls((a, b) for a, b in pairs)


def train(texts: Iterable[str], size: int = SIZE) -> Tokenizer:
    """The vocabulary of at most ``size`` entries that shortens ``texts`` most; ties go by the alphabet."""
    counts = Counter(word for text in texts for word in words(text))
    pieces = {word: _letters(word) for word in counts}
    merges: list[tuple[str, str]] = []
    while len(merges) < size - 2 * 256 - 2:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, units in pieces.items():
            for pair in pairwise(units):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(units, best) for word, units in pieces.items()}
    return Tokenizer(merges)

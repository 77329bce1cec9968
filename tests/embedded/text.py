"""Text to context: a byte-level tokeniser in 75-token chunks, and transformers' ``CLIPTextModel``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from tests.demo_model.bpe import Tokenizer

from .shapes import ENTRY_WIDTH, Shape

CHUNK = 75
"""Tokens of text in one chunk; with the start and end tokens around them a chunk is 77 long."""
START, END = 256, 257

_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def tokenise(
    text: str, encode: Callable[[str], list[int]] = _bytes, start: int = START, end: int = END
) -> list[list[int]]:
    """Tokens of the text in chunks of 77: start, 75 tokens, end, filled up with end. ``BREAK`` begins a chunk.

    By default the tokens are its UTF-8 bytes.
    """
    chunks: list[list[int]] = []
    for part in _BREAK.split(text):
        tokens = encode(part.strip())
        pieces = [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)] or [[]]
        chunks += [[start, *piece, *[end] * (CHUNK + 1 - len(piece))] for piece in pieces]
    return chunks


def make_text_model(shape: Shape, seed: int) -> CLIPTextModel:
    """A small text encoder whose output has the shape's context width; weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPTextConfig(
            vocab_size=258,
            hidden_size=shape.context,
            intermediate_size=2 * shape.context,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CHUNK + 2,
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=END,
        )
        return CLIPTextModel(config).eval().requires_grad_(False)


@dataclass
class TextEncoder:
    """The text side of a checkpoint."""

    model: CLIPTextModel
    shape: Shape
    tokenizer: Tokenizer | None = None
    """That of a trained model; the random ones read bytes."""

    def encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Context ``[77 * chunks, width]`` and pooled output ``[width]`` (of the first chunk) of one prompt."""
        known = self.tokenizer
        chunks = tokenise(text) if known is None else tokenise(text, known.encode, known.start, known.end)
        ids = torch.tensor(chunks, device=self.model.device)
        out = self.model(input_ids=ids)
        return out.last_hidden_state.reshape(-1, self.shape.context).float(), out.pooler_output[0].float()

    def vector(self, pooled: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """SDXL's vector: pooled text and the sinusoidal embeddings of the size, crop and target size numbers."""
        numbers = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=pooled.device)
        half = ENTRY_WIDTH // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=pooled.device) / half)
        angles = numbers[:, None] * frequencies
        return torch.cat([pooled, torch.cat([angles.cos(), angles.sin()], dim=1).flatten()])

"""What a grammar must know of the model's tokens, and the tables that llguidance makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer


@dataclass(frozen=True)
class Vocabulary:
    """The model's tokens as text.

    ``tokens[i]`` are the bytes that token i adds to an answer (b"" for none). ``special_ids`` are never text, whatever
    they are called; ``eos_token_ids`` end an answer. ``encode`` gives the ids of a text, without adding special tokens.
    """

    tokens: Sequence[bytes]
    special_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]
    encode: Callable[[str], list[int]]


class _Source:
    """A vocabulary with the attributes that ``TokenizerWrapper`` reads."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        tokens = list(vocabulary.tokens[:vocab_size])
        # Rows of the output layer without a token (padding) must never be drawn.
        tokens += [b""] * (vocab_size - len(tokens))
        # Tokens that end an answer are no text, whatever the tokenizer says: else one could stand inside a string.
        ends = {i for i in vocabulary.eos_token_ids if i < vocab_size}
        special = {i for i in vocabulary.special_ids if i < vocab_size} | ends
        special |= {i for i, token in enumerate(tokens) if not token}
        for i in special - vocabulary.special_ids:
            tokens[i] = b"<unused %d>" % i
        self.tokens = tokens
        self.special_token_ids = sorted(special)
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id: int | None = None
        self._encode = vocabulary.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def build_tables(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """The token tables of a model whose logits have ``vocab_size`` columns; about 3 us a token."""
    from llguidance import LLTokenizer, TokenizerWrapper  # 60 ms that an engine without grammars never pays

    ends = [i for i in vocabulary.eos_token_ids if i < vocab_size]
    return LLTokenizer(TokenizerWrapper(_Source(vocabulary, vocab_size)), n_vocab=vocab_size, eos_token=ends)

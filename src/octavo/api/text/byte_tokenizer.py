"""A tokenizer for models without one (random weights): one token a byte, and readable names for the other ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from octavo.api.text.gguf_tokenizer import BuiltTokenizer
from octavo.api.text.pieces import byte_level_alphabet
from octavo.errors import ModelFileError


def build_byte_tokenizer(config: Mapping[str, Any]) -> BuiltTokenizer:
    """Ids 0..255 are the bytes; every other id decodes to `` t<id>``. ``config`` gives vocab_size and eos/bos ids.

    A vocabulary below 256 encodes the bytes that it lacks as its last id. The bos token is never added.
    """
    text_config = config.get("text_config")
    inner: Mapping[str, Any] = text_config if isinstance(text_config, Mapping) else {}
    size = config.get("vocab_size", inner.get("vocab_size"))
    if size is None:  # GGUF metadata
        size = next((value for key, value in config.items() if key.endswith(".vocab_size")), None)
    if not isinstance(size, int) or not 1 <= size < 2**24:
        raise ModelFileError(
            f"A dummy model needs vocab_size in its config to make a tokenizer, got {size!r}."
        )
    char_of = {byte: char for char, byte in byte_level_alphabet().items()}
    space = char_of[ord(" ")]
    vocabulary = {char_of[i] if i < 256 else f"{space}t{i}": i for i in range(size)}
    last = next(reversed(vocabulary))
    backend = Tokenizer(BPE(vocabulary, [], unk_token=last if size < 256 else None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    eos = config.get("eos_token_id", inner.get("eos_token_id"))
    eos_ids = eos if isinstance(eos, list) else [eos]
    bos = config.get("bos_token_id", inner.get("bos_token_id"))
    return BuiltTokenizer(
        backend,
        bos if isinstance(bos, int) and 0 <= bos < size else None,
        tuple(sorted({i for i in eos_ids if isinstance(i, int) and 0 <= i < size})),
        {},
    )

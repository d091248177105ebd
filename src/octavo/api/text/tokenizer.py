"""Text to token ids and back, over the ``tokenizers`` library (never ``transformers``: it costs a second to import)."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from octavo.api.text.byte_tokenizer import build_byte_tokenizer
from octavo.api.text.gguf_tokenizer import BuiltTokenizer, build_from_gguf
from octavo.api.text.pieces import PieceRules
from octavo.errors import ModelFileError
from octavo.files.base import ModelFiles

MAX_KEPT_SETS = 32
MAX_TOKENIZER_BYTES = 512 << 20
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """One vocabulary: encodes, decodes, and knows its special tokens.

    ``decode`` and ``Detokenizer`` share one table id -> bytes, so a text decoded in pieces equals the text decoded whole.
    Bytes that are not UTF-8 come out as U+FFFD. Ids beyond the vocabulary decode to nothing.
    """

    def __init__(self, built: BuiltTokenizer) -> None:
        self.backend = built.backend
        self.bos_token_id = built.bos_token_id
        self.eos_token_ids = built.eos_token_ids
        self.special_tokens: Mapping[str, str] = dict(built.named_tokens)
        self.vocab_size: int = self.backend.get_vocab_size(with_added_tokens=True)
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        if added:  # ids may have holes: count up to the last one
            self.vocab_size = max(self.vocab_size, max(added) + 1)
        self._added = {i: token.content for i, token in added.items()}
        decoder = self.backend.decoder
        rules = PieceRules.from_decoder(None if decoder is None else json.loads(decoder.__getstate__()))
        self._to_bytes = rules.compiled()
        self.strip_start = rules.strip_start
        self._table: list[bytes | None] = [None] * self.vocab_size
        self._with: dict[str, frozenset[int]] = {}

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest vocabulary entry: no text of more than n times this fits n tokens."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in the text become their ids."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pair(
        self, first: str, second: str, most: tuple[int | None, int | None] = (None, None)
    ) -> tuple[list[int], int]:
        """Token ids of two texts, of each at most so many, as one input, and where the second begins (0 where this
        model is not told)."""
        a, b = (self.backend.encode(text, add_special_tokens=False) for text in (first, second))
        for part, count in zip((a, b), most):
            if count is not None:
                part.truncate(count)
        made = self.backend.post_process(a, b)
        return made.ids, made.type_ids.index(1) if 1 in made.type_ids else 0

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` of every text, in parallel where there are many."""
        if len(texts) < 2:
            return [self.encode(text, add_special_tokens) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``."""
        skip = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join([self.token_bytes(i) for i in ids if i not in skip]).decode("utf-8", "replace")
        return text.removeprefix(self.strip_start) if self.strip_start else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text (b"" outside the vocabulary)."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        piece = self._table[token_id]
        if piece is None:
            piece = self._table[token_id] = self._bytes_of(token_id)
        return piece

    def tokens_with(self, text: str) -> frozenset[int]:
        """All tokens that have ``text`` in theirs; the latest answers are kept."""
        found = self._with.pop(text, None)
        if found is None:
            found = frozenset(self._search(text.encode()))
        self._with[text] = found
        if len(self._with) > MAX_KEPT_SETS:
            self._with.pop(next(iter(self._with)), None)  # another thread may have been here too
        return found

    def _search(self, part: bytes) -> Iterator[int]:
        """Tokens with ``part`` in them: one search through all of them, because clients choose what is looked for."""
        joined, starts = self._joined
        at = joined.find(part)
        while at >= 0:
            token = bisect_right(starts, at) - 1
            if at + len(part) < starts[token + 1]:  # not over the gap between two tokens
                yield token
                at = joined.find(part, starts[token + 1])
            else:
                at = joined.find(part, at + 1)

    @cached_property
    def _joined(self) -> tuple[bytes, list[int]]:
        """The bytes of all tokens with a gap of one byte behind each, and where each begins; the last entry is the end."""
        pieces = [self.token_bytes(i) for i in range(self.vocab_size)]
        starts = [0, *accumulate(len(piece) + 1 for piece in pieces)]
        return b"".join([piece + b"\0" for piece in pieces]), starts

    def token_text(self, token_id: int) -> str:
        """One token as text (logprobs show it so); incomplete UTF-8 shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry as it is written in the vocabulary."""
        return self.backend.token_to_id(token)

    def _bytes_of(self, token_id: int) -> bytes:
        literal = self._added.get(token_id)
        if literal is not None:
            return literal.encode("utf-8", "replace")
        piece = self.backend.id_to_token(token_id)
        return b"" if piece is None else self._to_bytes(piece)


def load_tokenizer(files: ModelFiles, override: str | None = None) -> Tokenizer:
    """The tokenizer of a model, or the one that ``override`` (a folder or a tokenizer.json) names.

    Raises ``ModelFileError`` where none is found or it cannot be read.
    """
    ends = _id_list(files.generation_config.get("eos_token_id"))
    if override is not None:
        built = build_from_folder(Path(override))
    elif files.format == "gguf":
        built = build_from_gguf(files.config)
    elif files.format == "dummy" and not (files.path / "tokenizer.json").is_file():
        built = build_byte_tokenizer(files.config)
    else:
        built = build_from_folder(files.path if files.path.is_dir() else files.path.parent)
        ends += _id_list(files.config.get("eos_token_id"))
    size = built.backend.get_vocab_size()
    known = {*built.eos_token_ids, *(i for i in ends if i < size)}
    return Tokenizer(replace(built, eos_token_ids=tuple(sorted(known))))


def build_from_folder(path: Path) -> BuiltTokenizer:
    """Build from tokenizer.json (and tokenizer_config.json beside it, which names the special tokens)."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        old = (file.parent / "tokenizer.model").is_file()
        raise ModelFileError(
            f"There is no tokenizer.json in {file.parent}" + (" (only a tokenizer.model)." if old else "."),
            "Save the fast tokenizer there (AutoTokenizer.from_pretrained(...).save_pretrained(...)) or use --tokenizer.",
        )
    if file.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ModelFileError(f"{file} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB, which no tokenizer is.")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # noqa: BLE001  (the library raises no narrower one)
        raise ModelFileError(f"{file} is not a readable tokenizer: {error}.") from None
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(file.parent / "tokenizer_config.json")
    _add_declared_tokens(backend, config)
    named = {name: text for name in _NAMES if (text := _content(config.get(name)))}
    ids = {name: backend.token_to_id(text) for name, text in named.items()}
    eos = ids.get("eos_token")
    return BuiltTokenizer(backend, ids.get("bos_token"), () if eos is None else (eos,), named)


def _add_declared_tokens(backend: Backend, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json declares (older exports keep them there)."""
    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, dict):
        return
    known = backend.get_added_tokens_decoder()
    for key, token in sorted(declared.items(), key=lambda item: int(item[0]) if item[0].isdigit() else 0):
        text = _content(token)
        if not text or not key.isdigit() or int(key) in known:
            continue
        made = AddedToken(
            text,
            special=bool(token.get("special")),
            normalized=bool(token.get("normalized")),
            lstrip=bool(token.get("lstrip")),
            rstrip=bool(token.get("rstrip")),
            single_word=bool(token.get("single_word")),
        )
        (backend.add_special_tokens if made.special else backend.add_tokens)([made])


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) and value else None


def _id_list(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelFileError(f"{path} is not readable: {error}.") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} must hold a JSON object.")
    return value

"""What each token id stands for in bytes, derived once from the tokenizer's decoder description.

A decoder that maps every token on its own (byte-level BPE, SentencePiece with byte fallback) can be turned into a table
id -> bytes. Decoding is then a join, and incremental decoding a UTF-8 decoder: linear, and equal to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import ModelFileError

SPACE_MARK = "▁"  # SentencePiece writes a space as this character


def byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE vocabularies (GPT-2's table).

    Printable Latin-1 bytes stand for themselves, the others are moved to 256 and up in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


@dataclass
class PieceRules:
    """How one vocabulary entry becomes bytes: the parts of a decoder that matter token by token."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: list[tuple[str, str]] = field(default_factory=list)
    inner_mark: str = ""  # WordPiece: what goes on with a word; any other piece begins one
    strip_start: str = ""  # removed once from the start of a whole text (the space added in encoding)

    @classmethod
    def from_decoder(cls, decoder: Any) -> PieceRules:
        """Read a ``tokenizers`` decoder description (tokenizer.json's "decoder").

        Raises ``ModelFileError`` for a decoder that cannot be applied token by token.
        """
        rules = cls()
        for part in _parts(decoder):
            rules._add(part)
        return rules

    def _add(self, part: dict[str, Any]) -> None:
        kind = part.get("type")
        if kind == "ByteLevel":
            self.byte_level = True
        elif kind == "ByteFallback":
            self.byte_fallback = True
        elif kind == "Replace" and "String" in part.get("pattern", {}):
            self.replacements.append((part["pattern"]["String"], part["content"]))
        elif kind == "Metaspace":
            self.replacements.append((part.get("replacement", SPACE_MARK), " "))
            if part.get("prepend_scheme", "always") != "never":
                self.strip_start = " "
        elif kind == "Strip" and not part.get("stop"):
            self.strip_start = part.get("content", " ") * int(part.get("start", 0))
        elif (
            kind == "WordPiece"
        ):  # its clean-up of spaces before punctuation looks beyond one token: left out
            self.inner_mark, self.strip_start = part.get("prefix", "##"), " "
        elif kind != "Fuse":
            raise ModelFileError(
                f"The tokenizer's decoder {kind!r} is not supported.",
                "Octavo generates text with byte-level and SentencePiece tokenizers; use --tokenizer to name another.",
            )

    def compiled(self) -> Callable[[str], bytes]:
        """A function vocabulary entry -> bytes."""
        alphabet = byte_level_alphabet() if self.byte_level else {}
        inner_mark = self.inner_mark
        replacements, byte_fallback = self.replacements, self.byte_fallback

        def to_bytes(piece: str) -> bytes:
            if alphabet:
                try:
                    return bytes([alphabet[char] for char in piece])
                except KeyError:  # not written in the alphabet: literal text
                    return piece.encode("utf-8", "replace")
            if byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                try:
                    return bytes([int(piece[3:5], 16)])
                except ValueError:
                    pass
            if inner_mark:
                piece = piece[len(inner_mark) :] if piece.startswith(inner_mark) else f" {piece}"
            for old, new in replacements:
                piece = piece.replace(old, new)
            return piece.encode("utf-8", "replace")

        return to_bytes


def _parts(decoder: Any) -> Iterable[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [part for inner in decoder["decoders"] for part in _parts(inner)]
    return [decoder]

"""Token ids to text while they arrive: never half a character, linear in the number of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from octavo.api.text.tokenizer import Tokenizer

_LONGEST_CHARACTER_BYTES = 4


class Detokenizer:
    """Turns the tokens of one answer into text.

    ``prompt_ids`` says that the answer continues a prompt: a space at its start is then text, and a character that the
    prompt left unfinished is completed. Without it the pushes join to ``Tokenizer.decode`` of all ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] | None = None
    ) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strip = tokenizer.strip_start if prompt_ids is None else ""
        if prompt_ids:
            # Only the end of the prompt can hold an unfinished character; what it decodes to was not generated.
            tail = b"".join([self._bytes_of(i) for i in prompt_ids[-_LONGEST_CHARACTER_BYTES:]])
            self._decode(tail)

    def push(self, ids: Iterable[int]) -> str:
        """The text that became complete with ``ids``."""
        bytes_of, skip = self._bytes_of, self._skip
        text = self._decode(b"".join([bytes_of(i) for i in ids if i not in skip]))
        return self._stripped(text) if self._strip else text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got its last byte, else nothing."""
        text = self._decode(b"", True)
        return self._stripped(text) if self._strip else text

    def _stripped(self, text: str) -> str:
        if not text:
            return text
        # At the very start only; strip_start is a single space in every tokenizer that has one.
        strip, self._strip = self._strip, ""
        return text.removeprefix(strip)

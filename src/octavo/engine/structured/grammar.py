"""A grammar on its way through one answer: which tokens may come next, and back again where drafts are refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from octavo.errors import OctavoError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class GrammarError(OctavoError):
    """A grammar that cannot be compiled, or cannot go on; the sequence ends alone."""


class TokenGrammar:
    """Implements ``Constraint`` with llguidance.

    Tokens in ``stop_ids`` are allowed where the answer may end and nowhere else, whether they are text or not (text that
    ends an answer is not part of it). ``eos_ids`` are the ends that ``matcher`` itself knows; one that is not in
    ``stop_ids`` (ignore_eos) is never allowed. Ids outside ``vocab_size`` (a draft may be anything) are not accepted:
    the matcher would not survive them.
    """

    def __init__(
        self, matcher: LLMatcher, *, vocab_size: int, eos_ids: Iterable[int], stop_ids: Iterable[int]
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_bytes = 4 * ((vocab_size + 31) // 32)
        self._stop_ids = frozenset(stop_ids)
        self._own = self._stop_ids.symmetric_difference(eos_ids)  # whose bits the matcher cannot know
        self._stopped = 0  # stop tokens accepted since; the matcher has not seen them

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def accept(self, token: int) -> bool:
        """See ``Constraint.accept``."""
        if self._stopped or not 0 <= token < self._vocab_size:
            return False
        if token in self._stop_ids:
            if not self._matcher.is_accepting():
                return False
            self._stopped = 1
            return True
        return self._matcher.try_consume_tokens([token]) == 1

    def rewind(self, count: int) -> None:
        """See ``Constraint.rewind``."""
        if count and self._stopped:
            self._stopped = 0
            count -= 1
        if count:
            self._matcher.rollback(count)

    def mask(self) -> bytes:
        """See ``Constraint.mask``; raises ``GrammarError`` where nothing at all may follow or a limit is reached."""
        matcher = self._matcher
        if matcher.is_error():
            raise GrammarError(f"The grammar cannot go on: {matcher.get_error()}")
        words = matcher.compute_bitmask()[: self._num_bytes]
        if matcher.is_error():
            raise GrammarError(f"The grammar cannot go on: {matcher.get_error()}")
        if self._own and not matcher.is_stopped():
            words = self._with_stops(words, matcher.is_accepting())
        if words.count(0) == len(words):  # any() would walk thousands of zeros in Python
            raise GrammarError(
                "The grammar allows no token here.", "Its text may need characters that the vocabulary lacks."
            )
        return words

    def _with_stops(self, words: bytes, may_end: bool) -> bytes:
        changed = bytearray(words)
        for token in self._own:
            if may_end and token in self._stop_ids:
                changed[token >> 3] |= 1 << (token & 7)
            else:
                changed[token >> 3] &= ~(1 << (token & 7))
        return bytes(changed)

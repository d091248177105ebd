"""``allowed_token_ids`` and ``bad_words`` as a constraint, alone or on top of a grammar: runners need to know of neither."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from octavo.engine.scheduler.sequence import Constraint
from octavo.engine.structured.grammar import GrammarError


class TokenRules:
    """Implements ``Constraint`` around ``inner`` (None: only the rules count).

    A bad word of k tokens forbids its last token where the k - 1 tokens generated before are its others. Raises
    ``GrammarError`` from ``mask`` where nothing is left.
    """

    def __init__(
        self,
        allowed: Iterable[int] | None,
        bad_words: Iterable[Sequence[int]],
        inner: Constraint | None,
        *,
        vocab_size: int,
    ) -> None:
        self._inner = inner
        self._num_bytes = 4 * ((vocab_size + 31) // 32)
        self._allowed = (1 << vocab_size) - 1
        if allowed is not None:
            bits = bytearray(self._num_bytes)
            for token in allowed:
                bits[token >> 3] |= 1 << (token & 7)
            self._allowed = int.from_bytes(bits, "little")
        # By last token, so that a step looks only at the words which end with a token that could be drawn.
        self._bad: list[tuple[int, tuple[int, ...]]] = []
        for *before, last in bad_words:
            if before:
                self._bad.append((last, tuple(before)))
            else:
                self._allowed &= ~(1 << last)
        self._tokens: list[int] = []

    @property
    def ended(self) -> bool:
        """See ``Constraint.ended``."""
        return self._inner is not None and self._inner.ended

    def accept(self, token: int) -> bool:
        """See ``Constraint.accept``."""
        if token < 0 or not self._permitted() >> token & 1:
            return False
        if self._inner is not None and not self._inner.accept(token):
            return False
        self._tokens.append(token)
        return True

    def rewind(self, count: int) -> None:
        """See ``Constraint.rewind``."""
        if count:
            del self._tokens[-count:]
            if self._inner is not None:
                self._inner.rewind(count)

    def mask(self) -> bytes:
        """See ``Constraint.mask``."""
        bits = self._permitted()
        if self._inner is not None:
            bits &= int.from_bytes(self._inner.mask(), "little")
        if not bits:
            raise GrammarError(
                "No token is left: allowed_token_ids, bad_words and the rest of the request exclude each other."
            )
        return bits.to_bytes(self._num_bytes, "little")

    def _permitted(self) -> int:
        bits = self._allowed
        for last, before in self._bad:
            if tuple(self._tokens[-len(before) :]) == before:
                bits &= ~(1 << last)
        return bits

"""Grammars are compiled in a thread beside the loop, and the last ones are kept.

Work is bounded by llguidance's own limits (fuel, not seconds, so that the same grammar always gets the same answer):
about 0.2 s for the worst grammar the bounds let in. Memory is bounded by the number of grammars kept and the states
that each may have.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.engine.structured.grammar import GrammarError, TokenGrammar
from octavo.engine.structured.vocabulary import Vocabulary, build_tables
from octavo.errors import is_panic

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT = 64  # grammars
MAX_LEXER_STATES = 20_000  # of one grammar, 1-2 kB each


@dataclass(frozen=True)
class Compiled:
    """A grammar before its first token; every answer goes through a copy."""

    matcher: LLMatcher
    vocab_size: int
    eos_ids: tuple[int, ...]

    def start(self, stop_ids: Iterable[int]) -> TokenGrammar:
        """A new answer, which tokens in ``stop_ids`` end."""
        return TokenGrammar(
            self.matcher.deep_copy(), vocab_size=self.vocab_size, eos_ids=self.eos_ids, stop_ids=stop_ids
        )


class GrammarCompiler:
    """``load`` reads the model's vocabulary; it is called once, in the thread, for the first grammar.

    ``vocab_size`` is the number of logits. One thread calls ``compile``. ``at_once``: there is no thread, and whoever
    asks waits; several engines that must schedule alike cannot depend on when another thread is done.
    """

    def __init__(self, load: Callable[[], Vocabulary], vocab_size: int, *, at_once: bool = False) -> None:
        self._load = load
        self._at_once = at_once
        self._vocab_size = vocab_size
        self._tables: tuple[LLTokenizer, tuple[int, ...]] | None = None
        self._kept: OrderedDict[str, Future[Compiled]] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    def compile(self, grammar: str) -> Future[Compiled]:
        """The compiled grammar, now or soon; a ``GrammarError`` inside says what is wrong with it."""
        future = self._kept.get(grammar)
        if future is not None:
            self._kept.move_to_end(grammar)
            return future
        if self._at_once:
            future = Future()
            try:
                future.set_result(self._try(grammar))
            except Exception as error:  # noqa: BLE001  (as a thread would keep it)
                future.set_exception(error)
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="octavo-grammar")
            future = self._thread.submit(self._try, grammar)
        self._kept[grammar] = future
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return future

    def close(self) -> None:
        """Stop the thread; what is being compiled is finished, what waits is not begun."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._kept.clear()

    def _try(self, grammar: str) -> Compiled:
        try:
            return self._compile(grammar)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise GrammarError(f"The grammar cannot be used: {error}") from None

    def _compile(self, grammar: str) -> Compiled:
        from llguidance import LLMatcher, LLParserLimits  # see ``build_tables``

        if self._tables is None:
            vocabulary = self._load()
            if not vocabulary.eos_token_ids:
                raise GrammarError("The model's tokenizer names no end-of-sequence token; grammars need one.")
            self._tables = build_tables(vocabulary, self._vocab_size), vocabulary.eos_token_ids
        tables, eos_ids = self._tables
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(tables, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.deep_copy().compute_bitmask()  # the first mask fills tables that all copies share
        if matcher.is_error():
            raise GrammarError(f"The grammar cannot be used: {matcher.get_error()}")
        return Compiled(matcher, self._vocab_size, eos_ids)

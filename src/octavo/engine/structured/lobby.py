"""Where sequences wait for their grammar.

Not in the queue: that is served strictly in order, so one that cannot run would hold up all who came later. When its
grammar is there, a sequence joins the queue with the place of its arrival.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from octavo.engine.scheduler.sequence import Constraint, Sequence
from octavo.engine.structured.compiler import Compiled, GrammarCompiler

MAX_WAIT_S = 30.0


@dataclass
class _Waiting:
    seq: Sequence
    grammar: Future[Compiled]
    constrain: Callable[[Sequence, Constraint], None]
    until_s: float


class Lobby:
    """One thread calls everything; ``max_wait_s`` bounds how long a sequence waits here."""

    def __init__(self, compiler: GrammarCompiler, max_wait_s: float = MAX_WAIT_S) -> None:
        self._compiler = compiler
        self._max_wait_s = max_wait_s
        self._waiting: dict[int, _Waiting] = {}
        self._news = threading.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, seq: Sequence, grammar: str, constrain: Callable[[Sequence, Constraint], None]) -> None:
        """Begin to compile ``grammar`` for a sequence; ``constrain`` binds them in the end."""
        future = self._compiler.compile(grammar)
        self._waiting[seq.id] = _Waiting(seq, future, constrain, time.monotonic() + self._max_wait_s)
        future.add_done_callback(self._tell)

    def remove(self, seq: Sequence) -> bool:
        """Forget a sequence that has ended; False where it is not here."""
        return self._waiting.pop(seq.id, None) is not None

    def leave(self) -> tuple[list[Sequence], list[tuple[Sequence, str]]]:
        """Sequences that have their grammar now, and those that get none, with the reason."""
        if not self._waiting:
            return [], []
        self._news.clear()
        now = time.monotonic()
        ready: list[Sequence] = []
        failed: list[tuple[Sequence, str]] = []
        for waiting in list(self._waiting.values()):
            seq, future = waiting.seq, waiting.grammar
            if not future.done():
                if now < waiting.until_s:
                    continue
                failed.append((seq, f"The grammar was not compiled within {self._max_wait_s:g} s."))
            elif (error := future.exception()) is not None:
                failed.append((seq, str(error)))
            else:
                waiting.constrain(seq, future.result().start(seq.stop_ids))
                ready.append(seq)
            del self._waiting[seq.id]
        return ready, failed

    def wait(self, timeout_s: float) -> None:
        """Sleep until a grammar is done, at most ``timeout_s``; for a loop that has nothing else to do."""
        if self._waiting:
            self._news.wait(timeout_s)

    def close(self) -> None:
        """Stop compiling."""
        self._compiler.close()

    def _tell(self, _: Future[Compiled]) -> None:
        self._news.set()

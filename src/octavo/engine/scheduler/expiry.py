"""Deadlines: who has to end now, because its time is over or because it has waited too long."""

from __future__ import annotations

import heapq

from octavo.engine.scheduler.sequence import Sequence
from octavo.protocol.generate import Terms


class Expiry:
    """A heap of moments (seconds of the engine's clock); sequences that ended before theirs are skipped."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence, bool]] = []
        self._number = 0

    def add(self, seq: Sequence, terms: Terms) -> None:
        """Watch a sequence that has arrived now."""
        for limit_ms, is_deadline in ((terms.deadline_ms, True), (terms.max_queue_ms, False)):
            if limit_ms is not None:
                self._number += 1
                heapq.heappush(self._heap, (seq.arrived_s + limit_ms / 1e3, self._number, seq, is_deadline))

    def due(self, now_s: float) -> list[Sequence]:
        """Sequences that must end now."""
        ended: list[Sequence] = []
        heap = self._heap
        while heap and heap[0][0] <= now_s:
            _, _, seq, is_deadline = heapq.heappop(heap)
            if not seq.finished and (is_deadline or seq.admitted_s < 0) and seq not in ended:
                ended.append(seq)
        return ended

"""The waiting line: one heap, whose key is the policy.

    fcfs       (number of arrival,)
    priority   (priority, arrival time, number of arrival)      lower runs first

A preempted sequence goes back with the key it had, hence before everybody who came later.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from octavo.engine.scheduler.sequence import Sequence
from octavo.errors import UsageError
from octavo.protocol.generate import GenerateRequest

POLICIES = ("fcfs", "priority")


def order_key(policy: str, request: GenerateRequest, number: int) -> tuple[float, ...]:
    """The sort key of a request that was the ``number``-th to arrive; keys of one policy are all different."""
    if policy == "fcfs":
        return (number,)
    if policy == "priority":
        return (request.priority, request.arrival_s, number)
    raise UsageError(f"Unknown scheduling policy {policy!r}.", f"Use one of {', '.join(POLICIES)}.")


class Queue:
    """Sequences by key; removal from the middle is lazy (the entry is skipped when it comes up)."""

    __slots__ = ("_heap", "_present")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Sequence]] = []
        self._present: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._present)

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        return iter(list(self._present.values()))

    def push(self, seq: Sequence) -> None:
        """Put a sequence in line."""
        heapq.heappush(self._heap, (seq.key, seq))
        self._present[seq.id] = seq

    def peek(self) -> Sequence | None:
        """Who is next (None: nobody waits)."""
        heap, present = self._heap, self._present
        while heap:
            seq = heap[0][1]
            if present.get(seq.id) is seq:
                return seq
            heapq.heappop(heap)
        return None

    def pop(self) -> Sequence:
        """Take the next one out; somebody must wait."""
        seq = self.peek()
        if seq is None:
            raise IndexError("pop from an empty queue")
        heapq.heappop(self._heap)
        del self._present[seq.id]
        return seq

    def remove(self, seq: Sequence) -> None:
        """Take a waiting sequence out of the line."""
        del self._present[seq.id]
        if len(self._heap) > 64 and len(self._heap) > 4 * len(self._present):
            # Many were aborted: do not let their entries pile up behind a long-waiting head.
            self._heap = [(other.key, other) for other in self._present.values()]
            heapq.heapify(self._heap)

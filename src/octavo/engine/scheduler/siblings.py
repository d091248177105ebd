"""Choices of one request share their prompt: the first computes it, the others wait and find its pages.

Let in together, all of them would compute the prompt, because a page can be shared only when the step that filled it was
collected.
"""

from __future__ import annotations

from octavo.engine.scheduler.sequence import Sequence


class Siblings:
    """Who waits for which request's prompt."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Sequence]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def hold(self, leader: int, seq: Sequence) -> None:
        """``seq`` waits for the request with the id ``leader``."""
        self._waiting.setdefault(leader, []).append(seq)

    def remove(self, seq: Sequence) -> bool:
        """Forget a sequence that has ended; False where it is not here."""
        waiting = self._waiting.get(-1 if seq.leader is None else seq.leader, [])
        if seq not in waiting:
            return False
        waiting.remove(seq)
        return True

    def leave(self, leader: int) -> list[Sequence]:
        """Those who waited for ``leader``, which has computed its prompt or has ended."""
        return self._waiting.pop(leader, [])

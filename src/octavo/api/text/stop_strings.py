"""Find stop strings in text that arrives in pieces, holding back only what could still become one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Watches one answer for stop strings.

    The match is the one that is complete first as the text grows character by character; of several that end on the
    same character, the first in the list. So the result does not depend on how the text is cut into pieces.
    An Aho-Corasick automaton (Aho and Corasick 1975): linear in the text, whatever the number of strings.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = list(stops)
        self._include = include_stop
        self._next: list[dict[str, int]] = [{}]  # per state: character -> state
        self._depth = [0]  # length of the text that the state stands for
        self._match = [-1]  # the stop string that ends here, or -1
        self._fail = [0]
        for index, stop in enumerate(self._stops):
            self._add(stop, index)
        self._link()
        self._state = 0
        self._held = ""

    def _add(self, stop: str, index: int) -> None:
        state = 0
        for char in stop:
            following = self._next[state].get(char)
            if following is None:
                following = len(self._next)
                self._next[state][char] = following
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(-1)
                self._fail.append(0)
            state = following
        if state and self._match[state] < 0:
            self._match[state] = index

    def _link(self) -> None:
        """Point every state at the longest shorter suffix that is also a state, breadth first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                queue.append(child)
                self._fail[child] = self._step(self._fail[state], char)
            inherited = self._match[self._fail[state]]
            if inherited >= 0 and not 0 <= self._match[state] < inherited:
                self._match[state] = inherited

    def _step(self, state: int, char: str) -> int:
        while True:
            following = self._next[state].get(char)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._fail[state]

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to show, and the stop string once one is complete (what follows it is dropped)."""
        state = self._state
        root, match, step = self._next[0], self._match, self._step
        for position, char in enumerate(text):
            if state:
                state = step(state, char)
            elif char in root:
                state = root[char]
            else:
                continue
            if match[state] >= 0:
                stop = self._stops[match[state]]
                seen = self._held + text[: position + 1]
                self._held, self._state = "", 0
                return (seen if self._include else seen[: -len(stop)]), stop
        self._state = state
        whole = self._held + text
        keep = self._depth[state]
        safe = whole[: len(whole) - keep]
        self._held = whole[len(whole) - keep :]
        return safe, None

    def flush(self) -> str:
        """What was held back, once it is certain that nothing follows."""
        held, self._held, self._state = self._held, "", 0
        return held

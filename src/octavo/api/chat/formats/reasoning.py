"""Splits what a model thinks from what it answers, while both arrive."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from octavo.api.chat.events import ChatEvent, Reasoning
from octavo.api.chat.formats.markers import partial_marker


@dataclass(frozen=True)
class ThinkingMarkers:
    """The texts around a model's thoughts."""

    start: str
    end: str


# Looked for in the template's source, in this order.
MARKERS = (
    ThinkingMarkers("<think>", "</think>"),
    ThinkingMarkers("[THINK]", "[/THINK]"),
    ThinkingMarkers("<seed:think>", "</seed:think>"),
    ThinkingMarkers("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ThinkingMarkers("<|START_THINKING|>", "<|END_THINKING|>"),
)


def detect_thinking(source: str | None) -> ThinkingMarkers | None:
    """The markers that stand in a chat template; None for a model that does not think aloud."""
    for markers in MARKERS:
        if source is not None and markers.end in source:
            return markers
    return None


class _State(Enum):
    BEFORE = auto()  # nothing but white space yet
    INSIDE = auto()
    AFTER = auto()


class ReasoningParser:
    """Text of choice ``index`` in; events for thoughts and the text of the answer out.

    ``opened``: the prompt has written the start marker already. White space at both ends of the thoughts and in front of
    the answer belongs to the markers. Only thoughts at the beginning count: a marker later is text.
    """

    def __init__(self, markers: ThinkingMarkers, index: int, *, opened: bool) -> None:
        self._markers = markers
        self._index = index
        self._state = _State.INSIDE if opened else _State.BEFORE
        self._opened = opened
        self._pending = ""  # perhaps the beginning of a marker
        self._space: list[str] = []  # white space that may stand at an end
        self._begun = False  # this part has some text

    @property
    def thinking(self) -> bool:
        """Whether the text is inside of the thoughts now."""
        return self._state is _State.INSIDE

    def push(self, text: str) -> tuple[list[ChatEvent], str]:
        """The thoughts and the answer's text that ``text`` brings."""
        if self._state is _State.AFTER and self._begun:
            return [], text
        events: list[ChatEvent] = []
        text, self._pending = self._pending + text, ""
        if self._state is _State.BEFORE:
            text = self._before(text)
        if self._state is _State.INSIDE:
            text = self._inside(text, events)
        return events, self._after(text) if self._state is _State.AFTER else ""

    def finish(self) -> tuple[list[ChatEvent], str]:
        """What is left at the end of the answer."""
        events: list[ChatEvent] = []
        rest, self._pending = self._pending, ""
        if self._state is _State.INSIDE:
            self._think(rest, events)
            return events, ""
        if self._state is _State.BEFORE:
            return [], "".join(self._space) + rest
        return [], ""

    def _before(self, text: str) -> str:
        start = self._markers.start
        body = text.lstrip()
        self._space.append(text[: len(text) - len(body)])
        if body.startswith(start):
            self._state, self._space = _State.INSIDE, []
            return body[len(start) :]
        if start.startswith(body):  # not decided yet (also where body is empty)
            self._pending = body
            return ""
        # No thoughts: the white space was the answer's own.
        self._state, self._begun = _State.AFTER, True
        return "".join(self._space) + body

    def _inside(self, text: str, events: list[ChatEvent]) -> str:
        if not self._begun and self._opened:  # some models write the marker although the prompt has it
            start, body = self._markers.start, text.lstrip()
            if body.startswith(start):
                text = body[len(start) :]
                self._opened = False
            elif body and start.startswith(body):
                self._pending = text
                return ""
        end = self._markers.end
        found = text.find(end)
        if found >= 0:
            self._think(text[:found], events)
            self._state, self._begun, self._space = _State.AFTER, False, []
            return text[found + len(end) :]
        keep = partial_marker(text, 0, end)
        self._pending = text[len(text) - keep :]
        self._think(text[: len(text) - keep], events)
        return ""

    def _think(self, text: str, events: list[ChatEvent]) -> None:
        if not self._begun:
            text = text.lstrip()
        solid = text.rstrip()
        if solid:
            space, self._space, self._begun = "".join(self._space), [], True
            events.append(Reasoning(self._index, space + solid, []))
        if len(solid) < len(text):
            self._space.append(text[len(solid) :])

    def _after(self, text: str) -> str:
        if self._begun:
            return text
        text = text.lstrip()
        self._begun = bool(text)
        return text

"""What is known of a model's thoughts before it answers: its markers as tokens, and where the prompt leaves off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo.api.chat.formats.reasoning import ReasoningParser, ThinkingMarkers, detect_thinking
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer
from octavo.errors import RequestError
from octavo.protocol.generate import Thinking


@dataclass(frozen=True)
class ThinkingFormat:
    """A model that thinks aloud. ``ids`` are the markers as single tokens; None where they are written in several, and
    the engine cannot watch them. ``shows_specials``: they are special tokens, so the text must keep those."""

    markers: ThinkingMarkers
    ids: tuple[int, int] | None
    shows_specials: bool

    @classmethod
    def of(cls, template: ChatTemplate, tokenizer: Tokenizer) -> ThinkingFormat | None:
        """From the model's template; None for a model that does not think aloud."""
        markers = detect_thinking(template.source)
        if markers is None:
            return None
        start, end = tokenizer.id_of(markers.start), tokenizer.id_of(markers.end)
        if start is None or end is None:
            return cls(markers, None, False)
        return cls(markers, (start, end), not tokenizer.special_ids.isdisjoint((start, end)))


@dataclass(frozen=True)
class PromptThoughts:
    """Where a prompt leaves the model. ``closed``: the thoughts are over (or switched off). ``num_tokens``: the prompt has
    opened them and holds so many; None where it has not."""

    closed: bool = False
    num_tokens: int | None = None


def prompt_thoughts(ids: Sequence[int], format: ThinkingFormat, tokenizer: Tokenizer) -> PromptThoughts:
    """Read the last turn of a prompt, back to the special token (or marker) that begins it."""
    markers = format.markers
    if format.ids is None:
        tail = tokenizer.decode(ids[-64:], skip_special_tokens=False).rstrip()
        return PromptThoughts(tail.endswith(markers.end), 0 if tail.endswith(markers.start) else None)
    start, end = format.ids
    for place in range(len(ids) - 1, -1, -1):
        token = ids[place]
        if token == end:
            return PromptThoughts(closed=True)
        if token == start:
            return PromptThoughts(num_tokens=len(ids) - 1 - place)
        if token in tokenizer.special_ids:
            break
    return PromptThoughts()


@dataclass(frozen=True)
class ThinkingPlan:
    """Thoughts of one request, decided. ``engine`` is what the engine must watch (None: nothing)."""

    format: ThinkingFormat
    prompt: PromptThoughts
    engine: Thinking | None

    def parser(self, index: int) -> ReasoningParser | None:
        """A reader of choice ``index``'s thoughts; None where there will be none."""
        if self.prompt.closed:
            return None
        opened = self.prompt.num_tokens is not None
        return ReasoningParser(self.format.markers, index, opened=opened)


def plan_thinking(
    format: ThinkingFormat | None,
    ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    budget: int | None,
    has_grammar: bool,
) -> ThinkingPlan | None:
    """Decide; None for a model that does not think aloud. Raises ``RequestError`` where a budget cannot be kept."""
    if format is None:
        if budget is not None and budget >= 0:
            raise RequestError(
                "thinking_token_budget is set, but this model's chat template has no thinking markers.",
                param="thinking_token_budget",
                cure="Remove the field.",
            )
        return None
    prompt = prompt_thoughts(ids, format, tokenizer)
    bound = -1 if budget is None else budget
    if format.ids is None:
        if bound >= 0:
            raise RequestError(
                f"thinking_token_budget needs thinking markers that are one token each; {format.markers.end!r} is not.",
                param="thinking_token_budget",
                cure="Remove the field.",
            )
        return ThinkingPlan(format, prompt, None)
    engine = None
    if not prompt.closed and (bound >= 0 or has_grammar):
        start, end = format.ids
        engine = Thinking(start_id=start, end_id=end, budget=bound, num_prompt_tokens=prompt.num_tokens)
    return ThinkingPlan(format, prompt, engine)

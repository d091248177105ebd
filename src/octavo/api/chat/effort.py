"""How much a model may think: efforts (words) as budgets (tokens) and as the switches that templates know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.api.chat.thinking import ThinkingFormat

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# Tokens of thoughts for each word; -1 leaves them free.
BUDGETS: dict[str, int] = {
    "none": 0,
    "minimal": 256,
    "low": 1024,
    "medium": 4096,
    "high": 16384,
    "xhigh": -1,
    "max": -1,
}
SWITCHES = ("enable_thinking", "thinking")  # variables with which templates turn thoughts off


@dataclass(frozen=True)
class AskedThinking:
    """A budget in tokens (None: not asked) and variables for the chat template."""

    budget: int | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def asked_thinking(
    effort: str | None, budget: int | None, format: ThinkingFormat | None, source: str | None
) -> AskedThinking:
    """What an effort and an explicit budget (which goes first) ask of this model.

    An effort is advice: a template that knows the word gets it, a model that thinks gets the budget, any other ignores it.
    """
    source = source or ""
    variables: dict[str, Any] = {}
    if effort is not None and "reasoning_effort" in source:
        # gpt-oss knows three words.
        variables["reasoning_effort"] = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}.get(
            effort, effort
        )
    if budget is None and effort == "none":
        variables |= {name: False for name in SWITCHES if name in source}
    if budget is not None or effort is None:
        return AskedThinking(budget, variables)
    can_watch = format is not None and format.ids is not None
    return AskedThinking(BUDGETS[effort] if can_watch else None, variables)

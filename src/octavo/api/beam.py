"""Beam search over any engine: every step asks for the likeliest next tokens of each beam.

A beam is a prompt of its own to the engine, whose prefix cache holds what the beams share; only the tokens behind the
last whole page are computed again. The search is that of transformers (``early_stopping=False``), against which it is
tested: of the ``(1 + ends) x width`` likeliest continuations over all beams, those that end and are among the first
``width`` are answers, the others that are likeliest go on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import msgspec

from octavo.api.frontend import Frontend
from octavo.errors import RequestError
from octavo.protocol.generate import BeamSearchParams, Logprob, SamplingParams, Terms

T = TypeVar("T")


@dataclass(frozen=True)
class Beam:
    """Tokens behind the prompt and their log probability in all; ``reason`` is None while it may go on."""

    tokens: tuple[int, ...] = ()
    logprob: float = 0.0
    reason: Literal["stop", "length", "deadline"] | None = None

    def score(self, length_penalty: float) -> float:
        """What beams are compared by: log probability / length ** penalty."""
        return self.logprob / float(max(1, len(self.tokens)) ** length_penalty)


class BeamSearch:
    """One search without an engine: ``beams`` want to be continued, ``advance`` continues them.

    ``eos_token_ids`` end a beam. ``sampling`` is what to ask the engine for, for each beam.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: Iterable[int], max_tokens: int) -> None:
        self.params = params
        self.max_tokens = max_tokens
        self.beams = [Beam()]
        self._ends = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._finished: list[Beam] = []
        self._num_candidates = (1 + max(1, len(self._ends))) * params.beam_width

    @property
    def sampling(self) -> SamplingParams:
        """One token, and the likeliest ones beside it."""
        return SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=self._num_candidates, detokenize=False, ignore_eos=True
        )

    def advance(self, found: Sequence[Sequence[Logprob]]) -> None:
        """Go on by one token; ``found`` has the likeliest tokens behind each of ``beams``."""
        width = self.params.beam_width
        candidates = [
            (beam.logprob + token.logprob, beam, token.token_id)
            for beam, tokens in zip(self.beams, found)
            for token in tokens
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        going: list[Beam] = []
        for place, (logprob, beam, token) in enumerate(candidates[: self._num_candidates]):
            tokens = (*beam.tokens, token)
            is_end = token in self._ends
            if not is_end and len(tokens) < self.max_tokens:
                going.append(Beam(tokens, logprob))
            elif place < width:
                self._finished.append(Beam(tokens, logprob, "stop" if is_end else "length"))
        self._finished.sort(key=self._score, reverse=True)
        del self._finished[width:]
        self.beams = going[:width]
        full = len(self._finished) == width
        if full and self.beams and self._score(self.beams[0]) <= self._score(self._finished[-1]):
            self.beams = []  # none can get better

    def stop(self) -> None:
        """The time is over: what goes on is an answer as it is."""
        self._finished += [replace(beam, reason="deadline") for beam in self.beams if beam.tokens]
        self._finished.sort(key=self._score, reverse=True)
        self.beams = []

    def answers(self) -> list[Beam]:
        """The best beams, best first, ``beam_width`` of them where there are so many."""
        return self._finished[: self.params.beam_width]

    def _score(self, beam: Beam) -> float:
        return beam.score(self.params.length_penalty)


def candidates(rows: list[list[Logprob]] | None) -> list[Logprob]:
    """The likeliest tokens of a delta with one token (the first entry is the drawn one)."""
    return rows[0][1:] if rows else []


async def run_search(
    frontend: Frontend,
    prompt_ids: list[int],
    search: BeamSearch,
    *,
    request_id: str,
    priority: int = 0,
    cache_salt: str | None = None,
    terms: Terms,
    clock: Callable[[], float] = time.monotonic,
) -> BeamSearch:
    """Search to the end; ``search`` is returned. Cancelling it aborts what runs in the engine.

    A deadline ends it with the beams there are.
    """
    ends_s = None if terms.deadline_ms is None else clock() + terms.deadline_ms / 1e3

    async def ask(beam: Beam, number: int, mine: Terms) -> list[Logprob] | None:
        generation = frontend.generate(
            [*prompt_ids, *beam.tokens],
            search.sampling,
            request_id=f"{request_id}-{number}",
            priority=priority,
            cache_salt=cache_salt,
            terms=mine,
        )
        rows: list[Logprob] | None = None
        async for delta in generation:
            if delta.finish_reason != "deadline":
                rows = candidates(delta.logprobs) or rows
        return rows

    while search.beams:
        mine = terms
        if ends_s is not None:
            left_ms = int((ends_s - clock()) * 1e3)
            if left_ms < 1:
                search.stop()
                break
            mine = msgspec.structs.replace(terms, deadline_ms=left_ms)
        found = await together([ask(beam, i, mine) for i, beam in enumerate(search.beams)])
        if any(rows is None for rows in found):
            search.stop()
            break
        search.advance([rows or [] for rows in found])
        terms = msgspec.structs.replace(terms, max_queue_ms=None)  # it has begun
    return search


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first error cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


MEANINGLESS = (
    *("stop", "stop_token_ids", "min_tokens", "seed", "top_p", "top_k", "min_p", "presence_penalty"),
    *(
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "allowed_token_ids",
        "bad_words",
        "dry_multiplier",
        "repetition_detection",
    ),
    *("prompt_logprobs", "structured_outputs", "response_format", "tools", "thinking_token_budget"),
)


def check_beam_fields(request: object) -> None:
    """Refuse what has no meaning in a beam search, by name."""
    for name in MEANINGLESS:
        if getattr(request, name, None):
            raise RequestError(f"{name} has no meaning with use_beam_search.", name, "Remove one of the two.")
    for name in ("temperature", "logprobs", "echo"):
        if getattr(request, name, None):
            raise RequestError(f"{name} cannot be used with use_beam_search.", name, "Remove it.")

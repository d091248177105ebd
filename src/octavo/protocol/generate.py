"""What the front half asks of the engine (tokens in) and what it gets back (tokens out)."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from octavo.errors import RequestError
from octavo.protocol import bounds

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to draw tokens; names, meanings and defaults are vLLM's.

    Construction checks every range (``RequestError`` names the field), so an instance is always valid.
    ``stop`` strings are matched by the front half, which has the text; the engine knows only tokens.
    """

    n: bounds.Count = 1
    temperature: bounds.Temperature = 1.0
    top_p: bounds.TopP = 1.0
    top_k: bounds.TopK = 0
    min_p: bounds.MinP = 0.0
    presence_penalty: bounds.Penalty = 0.0
    frequency_penalty: bounds.Penalty = 0.0
    repetition_penalty: bounds.RepetitionPenalty = 1.0
    seed: bounds.Seed | None = None
    max_tokens: bounds.MaxTokens | None = 16
    min_tokens: bounds.MinTokens = 0
    stop: bounds.StopString | bounds.StopStrings | None = None
    stop_token_ids: bounds.StopTokenIds = []
    ignore_eos: bool = False
    logprobs: bounds.NumLogprobs | None = None
    prompt_logprobs: bounds.NumLogprobs | None = None
    logit_bias: bounds.LogitBias | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        # msgspec checks annotated ranges while it decodes; a Python caller gets the same checks here.
        for name, kind, default in _CHECKS:
            value = getattr(self, name)
            if value is default:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"{name} must be a finite number, got {value}.", param=name)
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                raise RequestError(f"{name}: {error}.", param=name) from None

    @property
    def greedy(self) -> bool:
        """True where the most likely token is always taken."""
        return self.temperature < 1e-5

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


_CHECKS = tuple((field.name, field.type, field.default) for field in msgspec.structs.fields(SamplingParams))


class GenerateRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One sequence to generate (a request with ``n > 1`` is sent as n of these).

    ``id`` is chosen by the client and unique among its live requests. ``eos_token_ids`` end the sequence
    unless ``sampling.ignore_eos``. ``arrival_s`` is a wall clock time (queue order, metrics).
    """

    id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: list[int] = []
    priority: int = 0
    arrival_s: float = 0.0
    cache_salt: str | None = None


class Logprob(msgspec.Struct, array_like=True, gc=False):
    """One candidate token: its id, log probability and rank (1 = most likely)."""

    token_id: int
    logprob: float
    rank: int


class TokenDelta(msgspec.Struct, array_like=True, gc=False):
    """What one step added to one request; the last one carries ``finish_reason``.

    ``stop_token`` is the token that ended a "stop" by the engine. It is the last of ``tokens``.
    ``logprobs`` holds one list a token (the drawn token first, then the top ones); ``prompt_logprobs`` likewise
    for every prompt token but the first, sent once, with the first delta.
    """

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    logprobs: list[list[Logprob]] | None = None
    prompt_logprobs: list[list[Logprob]] | None = None

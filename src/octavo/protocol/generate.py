"""What the front half asks of the engine (tokens in) and what it gets back (tokens out)."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from octavo.errors import RequestError
from octavo.protocol import bounds

# "deadline": its time was over, what was generated is valid. "rejected": given up before it began; try again later.
# "repetition": see ``RepetitionDetectionParams``.
# "unsatisfiable": what the request allows leaves no token.
FinishReason = Literal[
    "stop", "length", "repetition", "abort", "error", "deadline", "rejected", "unsatisfiable"
]


class StructuredOutputsParams(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """What an answer must look like; names are vLLM's, and exactly one of the first six says it.

    ``json`` is a JSON schema (an object, or its text), ``json_object`` any JSON object, ``regex`` a regular expression
    for the whole answer (no look-around, no back references), ``choice`` a list of answers, ``grammar`` a context-free
    grammar in Lark's form with the rule ``start``, ``structural_tag`` free text with segments that follow schemas (see
    ``api/structural_tags.py``). The rest changes how JSON is written: ``disable_any_whitespace``
    allows none, ``whitespace_pattern`` is a regular expression for it, ``disable_additional_properties`` closes
    every object of the schema that does not say otherwise. Raises ``RequestError`` where not exactly one is given.
    """

    json: bounds.GrammarText | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: bounds.GrammarText | None = None
    choice: bounds.Choices | None = None
    grammar: bounds.GrammarText | None = None
    structural_tag: bounds.GrammarText | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: bounds.WhitespacePattern | None = None

    def __post_init__(self) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs needs exactly one of {', '.join(CONSTRAINTS)}; "
                f"{', '.join(given) if given else 'none'} is given.",
                param="structured_outputs",
            )


CONSTRAINTS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class RepetitionDetectionParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Ends an answer that has got stuck: its last tokens are one pattern, at least ``min_count`` times in a row.

    Patterns have ``min_pattern_size`` (0: 1) to ``max_pattern_size`` (0: none is looked for) tokens.
    """

    max_pattern_size: bounds.PatternSize = 0
    min_pattern_size: bounds.PatternSize = 0
    min_count: bounds.PatternCount = 2

    def __post_init__(self) -> None:
        if self.max_pattern_size < self.min_pattern_size:
            raise RequestError(
                f"repetition_detection: max_pattern_size ({self.max_pattern_size}) is less than min_pattern_size "
                f"({self.min_pattern_size}).",
                param="repetition_detection",
            )


DRY_BREAKERS = ("\n", ":", '"', "*")  # where ``dry_sequence_breakers`` says nothing


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to draw tokens; names, meanings and defaults are vLLM's.

    Construction checks every range (``RequestError`` names the field), so an instance is always valid.
    ``stop`` strings are matched by the front half, which has the text; the engine knows only tokens. ``bad_words`` are
    texts whose last token is not drawn where the ones before it stand; the front half tokenizes them. ``dry_multiplier``
    above 0 turns DRY on (see ``engine/structured/dry.py``), whose other fields are named and preset as in llama.cpp.
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
    allowed_token_ids: bounds.AllowedTokenIds | None = None
    bad_words: bounds.BadWords = []
    dry_multiplier: bounds.DryMultiplier = 0.0
    dry_base: bounds.DryBase = 1.75
    dry_allowed_length: bounds.DryLength = 2
    dry_sequence_breakers: bounds.DryBreakers | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        # msgspec checks annotated ranges while it decodes; a Python caller gets the same checks here.
        for name, kind, default in _CHECKS:
            value = getattr(self, name)
            if value is default:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"{name} must be a finite number, got {value}.", param=name)
            try:
                converted = msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                raise RequestError(f"{name}: {error}.", param=name) from None
            if isinstance(converted, msgspec.Struct) and converted is not value:  # given as a dictionary
                msgspec.structs.force_setattr(self, name, converted)

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


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to search for the likeliest answers; names are vLLM's.

    ``beam_width`` answers are kept at a time and returned. They are compared by log probability /
    length ** ``length_penalty``, the length in generated tokens, the end token included.
    """

    beam_width: bounds.BeamWidth
    max_tokens: bounds.MaxTokens
    ignore_eos: bool = False
    length_penalty: bounds.LengthPenalty = 1.0

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(type(self)):
            try:
                msgspec.convert(getattr(self, field.name), field.type)
            except msgspec.ValidationError as error:
                raise RequestError(f"{field.name}: {error}.", param=field.name) from None


_CHECKS = tuple((field.name, field.type, field.default) for field in msgspec.structs.fields(SamplingParams))


class Thinking(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Where a model's thoughts begin and end, and how many tokens they may have (``budget`` -1: any number).

    ``num_prompt_tokens`` are the thoughts that the prompt holds already, whose end the model is to write; None where the
    prompt does not open them.
    """

    start_id: bounds.TokenId
    end_id: bounds.TokenId
    budget: bounds.ThinkingBudget = -1
    num_prompt_tokens: int | None = None


class Terms(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """On whose behalf a request runs, and how long it may take.

    ``tenant`` and ``weight`` say whose share it is charged to under fair scheduling. ``deadline_ms`` (from arrival to
    the last token) ends it with finish reason "deadline", ``max_queue_ms`` (from arrival to its first step) with
    "rejected".
    """

    tenant: bounds.TenantName = ""
    weight: bounds.Weight = 1.0
    deadline_ms: bounds.Milliseconds | None = None
    max_queue_ms: bounds.Milliseconds | None = None


# The last token's hidden state, the mean of all, the first token's; what the model's classification head makes of it; all
# hidden states, one after the other (encoders).
Pooling = Literal["last", "mean", "cls", "classify", "tokens"]


class Dry(msgspec.Struct, array_like=True, frozen=True):
    """``SamplingParams``' DRY as the engine needs it: breakers are tokens."""

    multiplier: float
    base: float
    allowed_length: int
    breakers: list[int]


class GenerateRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One sequence to generate (a request with ``n > 1`` is sent as n of these), or with ``pooling`` to turn into a vector.

    ``id`` is chosen by the client and unique among its live requests. ``eos_token_ids`` end the sequence
    unless ``sampling.ignore_eos``. ``arrival_s`` is a wall clock time (queue order, metrics).

    ``grammar`` constrains the answer: a grammar in llguidance's form (Lark text, or its JSON), which the front half
    makes of ``sampling.structured_outputs`` and checks; the engine only compiles it. With ``thinking`` it begins behind
    the thoughts. ``bad_words`` are token sequences (see ``SamplingParams.bad_words``). ``leader`` is the id of a request
    with the same prompt: this one waits until that has computed it, then shares its pages. ``second_at`` is the place at
    which the second text of a pair begins, for models that are told so (0: there is none).
    """

    id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: list[int] = []
    priority: int = 0
    arrival_s: float = 0.0
    cache_salt: str | None = None
    grammar: str | None = None
    thinking: Thinking | None = None
    bad_words: list[list[int]] = []
    dry: Dry | None = None
    leader: int | None = None
    terms: Terms = Terms()
    pooling: Pooling | None = None
    second_at: int = 0


class PoolingParams(msgspec.Struct, kw_only=True):
    """What ``LLM.embed``, ``classify``, ``score`` and ``encode`` may be asked for; None: as the model has it.

    ``dimensions``: only so many numbers of a vector. ``use_activation``: vectors of length 1, scores as probabilities.
    ``truncate_prompt_tokens``: longer texts are cut (-1: to what the model holds).
    """

    dimensions: bounds.Dimensions | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: bounds.Truncate | None = None


class Times(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Where a request's time went before its first token, in seconds: waiting, then computing the prompt."""

    queue_s: float
    prefill_s: float


class Logprob(msgspec.Struct, array_like=True, gc=False):
    """One candidate token: its id, log probability and rank (1 = most likely)."""

    token_id: int
    logprob: float
    rank: int


class TokenDelta(msgspec.Struct, array_like=True, gc=False):
    """What one step added to one request; the last one carries ``finish_reason``.

    ``stop_token`` is the token that ended a "stop" by the engine. It is the last of ``tokens``.
    ``logprobs`` holds one list a token (the drawn token first, then the top ones); ``prompt_logprobs`` likewise
    for every prompt token but the first, sent once, with the first delta; so are ``times``. ``embedding`` is what a
    pooling request asked for, as little-endian float32 numbers.
    """

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    logprobs: list[list[Logprob]] | None = None
    prompt_logprobs: list[list[Logprob]] | None = None
    times: Times | None = None
    embedding: bytes | None = None

"""Requests and replies of the OpenAI dialect; ranges come from the one table of bounds.

Requests: ``None`` and an absent field mean the same (the model's default). A field that Octavo knows but does not
serve yet stands in a ``...NotYet`` struct with the type ``Any``: its neutral values are accepted, any other is refused
by name, because a field that silently does nothing is worse than an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from octavo.api.chat.effort import Effort
from octavo.protocol import bounds
from octavo.protocol.generate import RepetitionDetectionParams, StructuredOutputsParams

NumTopLogprobs = Annotated[int, Meta(ge=0, le=20)]
MaxTokensOrZero = Annotated[int, Meta(ge=0, le=2**31 - 1)]
ModelName = Annotated[str, Meta(min_length=1, max_length=1024)]
Prompt = Annotated[
    str | list[Any],
    Meta(
        description="Text, a list of texts, token ids, or a list of lists of token ids.",
        extra_json_schema={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer", "minimum": 0}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
            ]
        },
    ),
]
# The template room reads messages: which roles and parts there are is the model's business.
Messages = Annotated[
    list[dict[str, Any]],
    Meta(
        min_length=1,
        max_length=16384,
        extra_json_schema={
            "items": {
                "type": "object",
                "properties": {"role": {"type": "string"}, "content": {}},
                "required": ["role"],
            }
        },
    ),
]
ToolName = Annotated[str, Meta(min_length=1, max_length=256)]
User = Annotated[str, Meta(max_length=1024)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; never sent, true is refused


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The schema of ``response_format``; ``strict`` changes nothing, because every schema is enforced."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's way to ask for JSON, and vLLM's to ask for structural tags."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[dict[str, Any]] | None = None  # these three: structural_tag in both of its forms
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


class FunctionDefinition(msgspec.Struct, kw_only=True):
    """A function the model may call; ``parameters`` is a JSON schema."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """One tool of a request."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(msgspec.Struct, kw_only=True):
    """A function by name."""

    name: ToolName


class NamedToolChoice(msgspec.Struct, kw_only=True):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


Tools = Annotated[list[Tool], Meta(max_length=256)]
Functions = Annotated[list[FunctionDefinition], Meta(max_length=256)]


class NotYet(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Known fields that are not served yet, on both routes."""

    best_of: Any = None
    kv_transfer_params: Any = None
    logits_processors: Any = None
    spaces_between_special_tokens: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    vllm_xargs: Any = None


class SamplingFields(NotYet, kw_only=True):
    """Fields of every generation request; names as OpenAI and vLLM have them."""

    model: ModelName | None = None
    truncate_prompt_tokens: bounds.Truncate | None = None
    n: bounds.Count | None = None
    temperature: bounds.Temperature | None = None
    top_p: bounds.TopP | None = None
    top_k: bounds.TopK | None = None
    min_p: bounds.MinP | None = None
    presence_penalty: bounds.Penalty | None = None
    frequency_penalty: bounds.Penalty | None = None
    repetition_penalty: bounds.RepetitionPenalty | None = None
    logit_bias: bounds.LogitBias | None = None
    seed: bounds.Seed | None = None
    stop: bounds.StopString | bounds.StopStrings | None = None
    stop_token_ids: bounds.StopTokenIds | None = None
    allowed_token_ids: bounds.AllowedTokenIds | None = None
    bad_words: bounds.BadWords | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    dry_multiplier: bounds.DryMultiplier | None = None
    dry_base: bounds.DryBase | None = None
    dry_allowed_length: bounds.DryLength | None = None
    dry_sequence_breakers: bounds.DryBreakers | None = None
    min_tokens: bounds.MinTokens | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: NumTopLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = None
    priority: bounds.Priority | None = None
    cache_salt: bounds.CacheSalt | None = None
    deadline_ms: bounds.Milliseconds | None = None
    max_queue_ms: bounds.Milliseconds | None = None
    return_timings: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: bounds.LengthPenalty | None = None
    request_id: bounds.RequestId | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: StructuredOutputsParams | None = None
    response_format: ResponseFormat | None = None


class ChatNotYet(SamplingFields, kw_only=True):
    """Known fields of chat that are not served yet."""

    audio: Any = None
    mm_processor_kwargs: Any = None
    media_io_kwargs: Any = None
    modalities: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionNotYet(SamplingFields, kw_only=True):
    """Known fields of completions that are not served yet."""

    prompt_embeds: Any = None
    suffix: Any = None


# Values that change nothing; None is always one.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "suffix": ("",),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "vllm_xargs": ({},),
}


def not_yet(kind: type[SamplingFields]) -> tuple[str, ...]:
    """Names of the fields of ``kind`` that are known but not served: those of type ``Any``."""
    return tuple(field.name for field in msgspec.structs.fields(kind) if field.type is Any)


class ChatCompletionRequest(ChatNotYet, kw_only=True):
    """Body of ``POST /v1/chat/completions``.

    ``safety_identifier`` and ``prompt_cache_key`` say who asks, like ``user``; they change nothing here, where every
    prefix is cached.
    """

    messages: Messages
    chat_template: bounds.TemplateSource | None = None
    echo: bool | None = None
    functions: Functions | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    return_prompt_text: bool | None = None
    documents: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    safety_identifier: User | None = None
    prompt_cache_key: User | None = None
    max_tokens: bounds.MaxTokens | None = None
    max_completion_tokens: bounds.MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumTopLogprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    thinking_token_budget: bounds.ThinkingBudget | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None


class CompletionRequest(CompletionNotYet, kw_only=True):
    """Body of ``POST /v1/completions``; ``max_tokens`` 0 is allowed with ``echo`` (score a text)."""

    prompt: Prompt
    max_tokens: MaxTokensOrZero | None = 16
    logprobs: NumTopLogprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    thinking_token_budget: bounds.ThinkingBudget | None = None


# Looked up for every request, so read from the types only once.
NOT_YET = {kind: not_yet(kind) for kind in (ChatCompletionRequest, CompletionRequest)}


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /tokenize``: a text, or a conversation put through the chat template."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: bounds.TemplateSource | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(msgspec.Struct, kw_only=True):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /detokenize``."""

    tokens: bounds.TokenIds
    model: ModelName | None = None


class DetokenizeResponse(msgspec.Struct, kw_only=True):
    """Text of token ids."""

    prompt: str


class PromptTokensDetails(msgspec.Struct):
    """How many prompt tokens came out of the prefix cache."""

    cached_tokens: int = 0


class Timings(msgspec.Struct, kw_only=True):
    """Where the time of a request went, in milliseconds; None where there is nothing to tell yet.

    ``queue_ms`` and ``prefill_ms`` are those of the choice that came first, as the engine measured them.
    """

    queue_ms: float | None
    prefill_ms: float | None
    first_token_ms: float | None
    decode_ms: float | None
    total_ms: float | None
    tokens_per_second: float | None


class CompletionTokensDetails(msgspec.Struct):
    """How many generated tokens were thoughts, counted by engine steps."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of a request over all its choices; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class PromptLogprob(msgspec.Struct):
    """One candidate for a prompt token, keyed by its id."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class TopLogprob(msgspec.Struct):
    """A likely token at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    """The drawn token at a position and the likeliest ones there."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log probabilities of a chat choice."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Log probabilities of a completion choice, as parallel lists; offsets count characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class FunctionCall(msgspec.Struct, omit_defaults=True):
    """A function's name and the JSON text of its arguments; a stream brings them in parts."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct, kw_only=True):
    """A call that the model wants made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ToolCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds to call number ``index``."""

    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionCall | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET  # where the request has ``functions``
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET  # the same, for older clients


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """Reply of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET


class ChatDelta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to the message."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionCall | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # the same, for older clients


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """What a chunk adds to one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One completion, or in a stream what an event adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """Reply of ``POST /v1/completions``, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """One served model name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "octavo"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """Reply of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]

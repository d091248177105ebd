"""Requests and replies of ``/v1/responses``; ranges come from the one table of bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from octavo.api.chat.effort import Effort
from octavo.api.openai.schema import ModelName, NumTopLogprobs, TokenLogprob, ToolName, User
from octavo.protocol import bounds
from octavo.protocol.generate import StructuredOutputsParams

ResponseId = Annotated[str, Meta(min_length=1, max_length=256)]
Items = Annotated[
    list[dict[str, Any]],
    Meta(
        min_length=1,
        max_length=16384,
        description="Messages, function calls, their outputs, and reasoning.",
    ),
]
MetadataText = Annotated[str, Meta(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], MetadataText], Meta(max_length=16)]
Included = Annotated[list[str], Meta(max_length=16)]


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """A function; tools that run at OpenAI are refused."""

    type: Literal["function"]
    name: ToolName
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class NamedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function by name."""

    type: Literal["function"]
    name: ToolName


class ToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one function that must be called, or ("allowed_tools") the few that may be."""

    type: Literal["function", "allowed_tools"]
    name: ToolName | UnsetType = UNSET
    mode: Literal["auto", "required"] | UnsetType = UNSET
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=256)] | UnsetType = UNSET


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text must be; ``strict`` changes nothing, because every schema is enforced."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | UnsetType = UNSET
    schema: dict[str, Any] | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET


class TextConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer's text."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | UnsetType | None = UNSET


class Reasoning(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How much to think. Thoughts are given as they are; no summaries are made of them."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | UnsetType | None = UNSET


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Padding against eavesdroppers is never sent."""

    include_obfuscation: Literal[False] | None = None


class InputTokensRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/responses/input_tokens``."""

    model: ModelName | None = None
    input: bounds.Text | Items | None = None
    instructions: bounds.Text | None = None
    previous_response_id: ResponseId | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    tools: Annotated[list[Tool], Meta(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    truncation: Literal["auto", "disabled"] | None = None


class ResponsesRequest(InputTokensRequest, kw_only=True):
    """Body of ``POST /v1/responses``: OpenAI's fields, then those of sampling beyond it."""

    input: bounds.Text | Items
    background: bool | None = None
    include: Included | None = None
    max_output_tokens: bounds.MaxTokens | None = None
    max_tool_calls: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = (
        None  # of tools that run at OpenAI: there are none
    )
    metadata: Metadata | None = None
    prompt_cache_key: User | None = None  # every prefix is cached
    safety_identifier: User | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: bounds.Temperature | None = None
    top_logprobs: NumTopLogprobs | None = None
    top_p: bounds.TopP | None = None
    user: User | None = None
    top_k: bounds.TopK | None = None
    min_p: bounds.MinP | None = None
    presence_penalty: bounds.Penalty | None = None
    frequency_penalty: bounds.Penalty | None = None
    repetition_penalty: bounds.RepetitionPenalty | None = None
    logit_bias: bounds.LogitBias | None = None
    seed: bounds.Seed | None = None
    stop: bounds.StopString | bounds.StopStrings | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: bounds.Priority | None = None
    cache_salt: bounds.CacheSalt | None = None
    request_id: bounds.RequestId | None = None
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: bounds.ThinkingBudget | None = None
    chat_template_kwargs: dict[str, Any] | None = None


Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    """Text of an answer."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    """Thoughts of an answer."""

    text: str


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """What the model said."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought."""

    id: str
    summary: list[Any] = []
    content: list[ReasoningText]
    status: Status


class FunctionCallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call that the model wants made."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct):
    """Prompt tokens out of the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    """Tokens of thoughts."""

    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Failure(msgspec.Struct):
    """Why a response failed."""

    code: str
    message: str


class Incomplete(msgspec.Struct):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"]


class Response(msgspec.Struct, kw_only=True):
    """Reply of ``POST /v1/responses``, and what is kept of it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: bool = False
    error: Failure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: Reasoning
    service_tier: str = "default"
    store: bool = True
    temperature: float
    text: TextConfig
    tool_choice: str | ToolChoice = "auto"
    tools: list[Tool] = []
    top_logprobs: int = 0
    top_p: float
    truncation: str = "disabled"
    usage: Usage | None = None
    user: str | None = None


class Deleted(msgspec.Struct, kw_only=True):
    """Reply of ``DELETE /v1/responses/{id}``."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class ItemList(msgspec.Struct, kw_only=True):
    """Reply of ``GET /v1/responses/{id}/input_items``."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(msgspec.Struct, kw_only=True):
    """Reply of ``POST /v1/responses/input_tokens``."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class Event(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One event of a stream; which fields there are depends on ``type``."""

    type: str
    sequence_number: int = -1
    response: Response | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: OutputItem | None = None
    part: OutputText | ReasoningText | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    name: str | None = None
    logprobs: list[TokenLogprob] | None = None

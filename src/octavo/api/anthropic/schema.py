"""Requests and replies of ``/v1/messages``; ranges come from the one table of bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octavo.api.openai.schema import ModelName, ToolName
from octavo.protocol import bounds

MAX_BLOCKS = 16384
Temperature = Annotated[float, Meta(ge=0.0, le=1.0)]
Metadata = dict[str, Any]
# Where a cached prefix may end. Every prefix is cached here, so the mark is accepted and changes nothing.
CacheControl = dict[str, Any]


class Block(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """A part of a message."""

    cache_control: CacheControl | None = None


class TextBlock(Block, tag="text", kw_only=True):
    """Text."""

    text: str
    citations: list[Any] | None = None


class ImageBlock(Block, tag="image", kw_only=True):
    """An image; refused by models that read text alone."""

    source: dict[str, Any]


class DocumentBlock(Block, tag="document", kw_only=True):
    """A document; refused, because nothing here turns files into text."""

    source: dict[str, Any]
    title: str | None = None
    context: str | None = None
    citations: dict[str, Any] | None = None


class ThinkingBlock(Block, tag="thinking", kw_only=True):
    """Thoughts of an earlier answer; the template decides whether the model sees them again."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Block, tag="redacted_thinking", kw_only=True):
    """Thoughts that only Anthropic can read; left out of the prompt."""

    data: str


class ToolUseBlock(Block, tag="tool_use", kw_only=True):
    """A call the model made."""

    id: str
    name: ToolName
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


ResultContent = str | Annotated[list[TextBlock | ImageBlock | DocumentBlock], Meta(max_length=MAX_BLOCKS)]


class ToolResultBlock(Block, tag="tool_result", kw_only=True):
    """What a call returned."""

    tool_use_id: str
    content: ResultContent | None = None
    is_error: bool | None = None


AnyBlock = (
    TextBlock
    | ImageBlock
    | DocumentBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
)


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: bounds.Text | Annotated[list[AnyBlock], Meta(max_length=MAX_BLOCKS)]


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function; ``input_schema`` is the JSON schema of its arguments. Tools that run at Anthropic are refused."""

    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    input_examples: list[dict[str, Any]] | None = None
    eager_input_streaming: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: Annotated[list[str], Meta(max_length=16)] | None = None


class ToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether tools may, must or must not be called; ``name`` goes with the type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether the model thinks; ``budget_tokens`` bounds the thoughts of type "enabled"."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: bounds.ThinkingBudget | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema that the answer must follow."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How much effort to spend, and the form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/messages/count_tokens``."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=16384)]
    model: ModelName | None = None
    system: bounds.Text | Annotated[list[TextBlock], Meta(max_length=MAX_BLOCKS)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=256)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of ``POST /v1/messages``."""

    max_tokens: bounds.MaxTokens
    metadata: Metadata | None = None
    stop_sequences: bounds.StopStrings | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_k: bounds.TopK | None = None
    top_p: bounds.TopP | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


class TokenCount(msgspec.Struct):
    """Reply of ``POST /v1/messages/count_tokens``."""

    input_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of a request; ``input_tokens`` are those that were not in the prefix cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class TextOut(msgspec.Struct, tag_field="type", tag="text"):
    """Text of an answer."""

    text: str
    citations: None = None


class ThinkingOut(msgspec.Struct, tag_field="type", tag="thinking"):
    """Thoughts of an answer; they are not signed."""

    thinking: str
    signature: str = ""


class ToolUseOut(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A call in an answer."""

    id: str
    name: str
    input: Any


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
OutBlock = TextOut | ThinkingOut | ToolUseOut


class MessageReply(msgspec.Struct, kw_only=True):
    """Reply of ``POST /v1/messages``; in a stream its beginning."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    """The first event of a stream."""

    message: MessageReply


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    """A block begins."""

    index: int
    content_block: OutBlock


class TextPiece(msgspec.Struct, tag_field="type", tag="text_delta"):
    """More text."""

    text: str


class ThinkingPiece(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    """More thoughts."""

    thinking: str


class InputPiece(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    """More of a call's arguments (JSON text)."""

    partial_json: str


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    """A block grows."""

    index: int
    delta: TextPiece | ThinkingPiece | InputPiece


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    """A block is complete."""

    index: int


class Ending(msgspec.Struct):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    """The message is complete: why, and its usage."""

    delta: Ending
    usage: Usage


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    """The last event of a stream."""


StreamEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop

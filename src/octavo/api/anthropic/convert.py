"""Anthropic's request as a chat request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from octavo.api.anthropic.schema import (
    AnyBlock,
    CountTokensRequest,
    DocumentBlock,
    ImageBlock,
    Message,
    MessagesRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
)
from octavo.api.openai.schema import (
    ChatCompletionRequest,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
)
from octavo.api.openai.schema import Tool as ChatTool
from octavo.errors import RequestError

# Names of fields in errors: ours to theirs.
NAMES = {"thinking_token_budget": "thinking.budget_tokens", "stop": "stop_sequences"}
CHOICES: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
    """The same request in the form all dialects share; ``RequestError`` names what cannot be mapped."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _texts(body.system, "system")})
    for i, message in enumerate(body.messages):
        messages += _turns(message, f"messages[{i}].content")
    last = messages[-1]
    # A last turn of the assistant is the beginning of the answer.
    begun = last["role"] == "assistant" and bool(last["content"]) and not last.get("tool_calls")
    chat = ChatCompletionRequest(
        model=body.model,
        messages=messages,
        tools=[_tool(tool) for tool in body.tools or []] or None,
        continue_final_message=begun or None,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    _choose_tools(body, chat)
    _think(body, chat)
    if body.output_config is not None and body.output_config.format is not None:
        schema = JsonSchemaFormat(schema=body.output_config.format.schema)
        chat.response_format = ResponseFormat(type="json_schema", json_schema=schema)
    if isinstance(body, MessagesRequest):
        chat.max_tokens = body.max_tokens
        chat.stop = body.stop_sequences
        chat.temperature, chat.top_k, chat.top_p = body.temperature, body.top_k, body.top_p
        chat.stream = body.stream
    return chat


def _choose_tools(body: CountTokensRequest, chat: ChatCompletionRequest) -> None:
    choice = body.tool_choice
    if choice is None:
        return
    if (choice.type == "tool") != (choice.name is not None):
        raise RequestError('tool_choice.name goes with the type "tool".', param="tool_choice.name")
    chat.tool_choice = CHOICES.get(choice.type)
    if choice.name is not None:
        chat.tool_choice = NamedToolChoice(type="function", function=FunctionName(name=choice.name))
    if choice.disable_parallel_tool_use:
        chat.parallel_tool_calls = False


def _think(body: CountTokensRequest, chat: ChatCompletionRequest) -> None:
    thinking = body.thinking
    if body.output_config is not None:
        chat.reasoning_effort = body.output_config.effort
    if thinking is None:
        return
    if (thinking.type == "enabled") != (thinking.budget_tokens is not None):
        raise RequestError(
            'thinking.budget_tokens goes with the type "enabled".', param="thinking.budget_tokens"
        )
    if thinking.type == "disabled":
        chat.reasoning_effort = "none"
    chat.thinking_token_budget = thinking.budget_tokens
    if thinking.display == "omitted":
        chat.include_reasoning = False


def _tool(tool: Tool) -> ChatTool:
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return ChatTool(type="function", function=function)


def _turns(message: Message, where: str) -> list[dict[str, Any]]:
    """One turn as messages: results of tools have messages of their own, in front of what the user says."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results = [
        {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": _texts(block.content or "", f"{where}[{i}].content"),
        }
        for i, block in enumerate(message.content)
        if isinstance(block, ToolResultBlock)
    ]
    said = _said(message, message.content, where)
    return [*results, said] if said["content"] or len(said) > 2 or not results else list(results)


def _said(message: Message, blocks: Sequence[AnyBlock], where: str) -> dict[str, Any]:
    """What a turn says itself: text, thoughts and calls."""
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            arguments = json.dumps(block.input, ensure_ascii=False)
            function = {"name": block.name, "arguments": arguments}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ImageBlock | DocumentBlock):
            raise _only_text(block, f"{where}[{i}]")
        elif isinstance(block, RedactedThinkingBlock):
            continue
    made: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return made


def _texts(content: str | Sequence[TextBlock | ImageBlock | DocumentBlock], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, block in enumerate(content):
        if not isinstance(block, TextBlock):
            raise _only_text(block, f"{where}[{i}]")
        texts.append(block.text)
    return "\n".join(texts)


def _only_text(block: ImageBlock | DocumentBlock, where: str) -> RequestError:
    kind = "an image" if isinstance(block, ImageBlock) else "a document"
    return RequestError(
        f"{where} is {kind}, but this model reads text alone.", param=where, cure="Send text blocks."
    )

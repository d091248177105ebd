"""Ollama's requests as chat requests."""

from __future__ import annotations

import json
from typing import Any

from octavo.api.ollama.schema import (
    NEUTRAL,
    Asked,
    ChatRequest,
    GenerateRequest,
    Images,
    Message,
    Options,
)
from octavo.api.openai.context import Context
from octavo.api.openai.schema import ChatCompletionRequest, JsonSchemaFormat, ResponseFormat
from octavo.errors import RequestError

# Names of fields in errors: ours to theirs.
NAMES = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "response_format": "format",
    "prompt": "prompt",
    **{name: f"options.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "seed", "stop")},
}


def served_name(context: Context, name: str | None) -> str | None:
    """The name as it is served: Ollama's clients may add ``:latest``."""
    if name is not None and name not in context.served_model_names:
        return name.removesuffix(":latest")
    return name


def chat_request(context: Context, body: ChatRequest | GenerateRequest) -> ChatCompletionRequest:
    """The same request in the form all dialects share; ``RequestError`` names what cannot be mapped."""
    chat = ChatCompletionRequest(
        model=served_name(context, body.model),
        messages=_conversation(body.messages) if isinstance(body, ChatRequest) else _prompt(body),
        tools=body.tools if isinstance(body, ChatRequest) else None,
        stream=body.stream is not False,
    )
    if body.format:
        chat.response_format = (
            ResponseFormat(type="json_object")
            if isinstance(body.format, str)
            else ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=body.format))
        )
        if chat.tools and isinstance(body.format, dict | str):
            raise RequestError("format and tools exclude each other.", param="format")
    _think(context, body, chat)
    if body.options is not None:
        _options(context, body.options, chat)
    return chat


def _think(context: Context, body: Asked, chat: ChatCompletionRequest) -> None:
    if body.think is None:
        return
    if body.think is False:
        chat.reasoning_effort = "none"
        return
    if context.frontend.thinking is None:
        raise RequestError("This model does not support thinking.", param="think", cure="Send think: false.")
    if body.think is not True:
        chat.reasoning_effort = body.think


def _options(context: Context, options: Options, chat: ChatCompletionRequest) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(options, name)
        if value is not None and value not in neutral:
            raise RequestError(f"options.{name} is not supported.", param=f"options.{name}")
    most = context.info.max_model_len
    if options.num_ctx is not None and options.num_ctx > most:
        raise RequestError(
            f"options.num_ctx is {options.num_ctx}, but this server's context is {most} tokens.",
            param="options.num_ctx",
            cure=f"Use at most {most}, or start the server with a larger --max-model-len.",
        )
    if options.num_predict == 0:
        raise RequestError("options.num_predict must not be 0.", param="options.num_predict")
    if options.num_predict is not None and options.num_predict > 0:
        chat.max_tokens = options.num_predict
    chat.temperature, chat.seed, chat.stop = options.temperature, options.seed, options.stop
    chat.top_k, chat.top_p, chat.min_p = options.top_k, options.top_p, options.min_p
    chat.presence_penalty, chat.frequency_penalty = options.presence_penalty, options.frequency_penalty
    if options.repeat_last_n != 0:
        chat.repetition_penalty = options.repeat_penalty


def _prompt(body: GenerateRequest) -> list[dict[str, Any]]:
    _no_images(body.images, "images")
    if body.template:
        raise RequestError(
            "template is not accepted in requests: it is a program.",
            param="template",
            cure="Start the server with --chat-template FILE, or send raw: true.",
        )
    if body.suffix:
        raise RequestError("suffix is not supported: this model does not fill in.", param="suffix")
    if body.raw and body.system:
        raise RequestError("raw sends the prompt as it is: system does not go with it.", param="system")
    system = [{"role": "system", "content": body.system}] if body.system else []
    return [*system, {"role": "user", "content": body.prompt}]


def _conversation(messages: list[Message]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    count = 0
    waiting: list[tuple[str, str]] = []  # calls without a result: name, id
    for i, message in enumerate(messages):
        _no_images(message.images, f"messages[{i}].images")
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            turn["tool_calls"] = []
            for call in message.tool_calls:
                call_id = call.id if isinstance(call.id, str) else f"call{count:05d}"
                count += 1
                function = {
                    "name": call.function.name,
                    "arguments": json.dumps(call.function.arguments, ensure_ascii=False),
                }
                turn["tool_calls"].append({"id": call_id, "type": "function", "function": function})
                waiting.append((call.function.name, call_id))
        if message.role == "tool":
            name = message.tool_name or message.name
            place = next((k for k, (known, _) in enumerate(waiting) if name in (None, known)), None)
            known_name, call_id = waiting.pop(place) if place is not None else (name, "call00000")
            turn["tool_call_id"] = message.tool_call_id or call_id
            if name or known_name:
                turn["name"] = name or known_name
        made.append(turn)
    return made


def _no_images(images: Images | None, where: str) -> None:
    if images:
        raise RequestError(f"{where} holds images, but this model reads text alone.", param=where)

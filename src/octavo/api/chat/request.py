"""A conversation, as every dialect hands it over, and how it becomes prompt tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from octavo.api.chat.formats.generic import explained
from octavo.api.text.messages import content_text, conversation_chars
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer
from octavo.errors import RequestError

LARGE_CHAT = 16_384  # characters; rendering and tokenizing more than this is done beside the event loop


class ChatRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a chat prompt is made of; the dialects (OpenAI, ...) map their fields to these.

    ``messages`` are in OpenAI's form; content is a text, a list of text parts, or None. ``continue_final_message`` leaves
    the last message open, so that the model goes on with it. ``chat_template_kwargs`` are extra variables of the template;
    they cannot replace the ones above. With ``explain_tools`` tools and calls are written into the messages, for a template
    that knows none.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    explain_tools: bool = False


class ChatPrompt:
    """Turns conversations into prompts for one model. ``template`` and ``tokenizer`` are the model's."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def render(self, request: ChatRequest) -> str:
        """The prompt text. Raises ``RequestError`` that names the message and part at fault."""
        if request.continue_final_message and request.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other.",
                param="continue_final_message",
            )
        messages, tools = request.messages, request.tools
        if request.explain_tools:
            messages, tools = explained(messages, tools), None
        text = self._template.render(
            messages,
            add_generation_prompt=request.add_generation_prompt,
            tools=tools,
            documents=request.documents,
            kwargs=request.chat_template_kwargs,
        )
        return _cut_after_last(text, request.messages) if request.continue_final_message else text

    def token_ids(self, request: ChatRequest) -> list[int]:
        """The prompt tokens. The template writes the special tokens itself, so none are added by default."""
        return self._tokenizer.encode(self.render(request), request.add_special_tokens)

    async def token_ids_async(self, request: ChatRequest) -> list[int]:
        """``token_ids``, in a thread where the conversation is so long that other streams would wait for it."""
        if conversation_chars(request.messages) > LARGE_CHAT:
            return await asyncio.to_thread(self.token_ids, request)
        return self.token_ids(request)


def _cut_after_last(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt up to the end of the last message's content: what the template writes after it is dropped."""
    last = content_text(messages[-1].get("content"), "messages[-1].content") or ""
    for kept in (last, last.strip()):  # many templates trim the content
        start = text.rfind(kept) if kept else -1
        if start >= 0:
            return text[: start + len(kept)]
    raise RequestError(
        "continue_final_message needs a last message whose text the chat template keeps as it is.",
        param="continue_final_message",
    )

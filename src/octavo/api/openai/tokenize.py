"""``/tokenize`` and ``/detokenize``: what the model would read, and what ids say."""

from __future__ import annotations

from octavo.api.frontend import check_token_ids
from octavo.api.openai.context import Context
from octavo.api.openai.prompts import chat_ids, encode_text
from octavo.api.openai.schema import (
    ChatCompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from octavo.api.openai.tools import tool_plan
from octavo.errors import RequestError


async def tokenize(context: Context, request: TokenizeRequest) -> TokenizeResponse:
    """Token ids of a text or of a conversation."""
    context.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("Give either prompt or messages.", param="prompt")
    if request.messages is not None:
        chat = ChatCompletionRequest(
            messages=request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=request.add_special_tokens,
            chat_template=request.chat_template,
            chat_template_kwargs=request.chat_template_kwargs,
            tools=request.tools,
        )
        ids = await chat_ids(context, chat, await tool_plan(context, chat))
    else:
        ids = await encode_text(context, request.prompt or "", request.add_special_tokens is not False)
    tokenizer = context.frontend.tokenizer
    return TokenizeResponse(
        count=len(ids),
        max_model_len=context.info.max_model_len,
        tokens=ids,
        token_strs=[tokenizer.token_text(i) for i in ids] if request.return_token_strs else None,
    )


async def detokenize(context: Context, request: DetokenizeRequest) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    context.check_model(request.model)
    check_token_ids(request.tokens, context.info.vocab_size, "tokens")
    text = context.frontend.tokenizer.decode(request.tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)

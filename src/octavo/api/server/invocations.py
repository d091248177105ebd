"""``/invocations`` (SageMaker's only route): the body's fields say which request it is."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request

from octavo.api.openai import schema
from octavo.api.openai.chat import chat_completions
from octavo.api.openai.completions import completions
from octavo.api.openai.context import Context
from octavo.api.openai.embeddings import classify, embeddings, rerank, score
from octavo.api.openai.pooling_schema import ClassifyRequest, EmbeddingRequest, RerankRequest, ScoreRequest
from octavo.api.server.body import BodyDecoder, check_media_type, read_body
from octavo.api.server.route import Reply, Service
from octavo.api.server.sse import until_disconnect
from octavo.errors import RequestError

FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True)
class Target:
    """A kind of request: the fields that tell it, its body and its answer."""

    marks: tuple[str, ...]
    body: type[msgspec.Struct]
    answer: Callable[[Context, Any], Coroutine[Any, Any, Reply]]


# Looked through in this order; all marks must be there.
GENERATING = (
    Target(("messages",), schema.ChatCompletionRequest, chat_completions),
    Target(("prompt",), schema.CompletionRequest, completions),
)
POOLING = (
    Target(("query", "documents"), RerankRequest, rerank),
    Target(("text_1",), ScoreRequest, score),
    Target(("queries",), ScoreRequest, score),
    Target(("data_1",), ScoreRequest, score),
    Target(("input",), EmbeddingRequest, embeddings),
    Target(("messages",), EmbeddingRequest, embeddings),
)
# The same for a model with a classification head.
CLASSIFYING = (
    *POOLING[:4],
    Target(("input",), ClassifyRequest, classify),
    Target(("messages",), ClassifyRequest, classify),
)


async def invocations(service: Service, request: Request, _: None) -> Reply:
    """Answer whatever the body asks for."""
    raw = await read_body(request, service.settings.max_body_bytes)
    check_media_type(request)
    facts = service.context.info.facts
    pooling = CLASSIFYING if facts.labels else POOLING
    target = _target(_names(raw), (*GENERATING, *pooling) if facts.can_generate else pooling)
    decoder = BodyDecoder(target.body, ignore_unknown=service.settings.ignore_unknown_fields)
    return await until_disconnect(request.receive, target.answer(service.context, decoder.decode(raw)))


def _names(raw: bytes) -> frozenset[str]:
    try:
        return frozenset(FIELDS.decode(raw))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestError("The body is not a JSON object.") from None


def _target(names: frozenset[str], targets: Iterable[Target]) -> Target:
    for target in targets:
        if names.issuperset(target.marks):
            return target
    raise RequestError(
        "The body is no request that is known here.",
        cure="Send messages, prompt, input, text_1 and text_2, or query and documents.",
    )

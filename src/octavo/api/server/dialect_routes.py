"""Routes of the dialects beside OpenAI's first two: each maps fields over the same conversations."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request

from octavo.api import cohere
from octavo.api.anthropic import schema as anthropic
from octavo.api.anthropic.messages import count_tokens, messages
from octavo.api.ollama import generate as ollama_generate
from octavo.api.ollama import models as ollama_models
from octavo.api.ollama import schema as ollama
from octavo.api.ollama.embed import embed, old_embed
from octavo.api.openai import pooling_schema as pooling
from octavo.api.openai import schema, tokens
from octavo.api.openai.context import Context
from octavo.api.openai.embeddings import classify, embeddings, rerank, score
from octavo.api.openai.embeddings import pooling as pooled
from octavo.api.server.invocations import invocations
from octavo.api.server.response_routes import response_routes
from octavo.api.server.route import Reply, Route, Service

Answer = Callable[[Context, Any], Coroutine[Any, Any, Reply]]


def _pooling() -> tuple[Route, ...]:
    def row(path: str, answer: Answer, summary: str, body: type, reply: type) -> Route:
        return Route("POST", path, handler(answer), summary, body, reply)

    alike, order = "How alike texts are.", "Documents in the order of a query."
    return (
        row(
            "/v1/embeddings",
            embeddings,
            "A vector for every input.",
            pooling.EmbeddingRequest,
            pooling.EmbeddingReply,
        ),
        row(
            "/pooling",
            pooled,
            "Vectors or classes of every input.",
            pooling.PoolingRequest,
            pooling.PoolingReply,
        ),
        row("/classify", classify, "Classes of every input.", pooling.ClassifyRequest, pooling.ClassifyReply),
        row(
            "/v2/embed", cohere.embed, "Vectors of texts (Cohere).", cohere.CohereRequest, cohere.CohereReply
        ),
        *(
            row(path, score, alike, pooling.ScoreRequest, pooling.ScoreReply)
            for path in ("/score", "/v1/score")
        ),
        *(
            row(path, rerank, order, pooling.RerankRequest, pooling.RerankReply)
            for path in ("/rerank", "/v1/rerank", "/v2/rerank")
        ),
        row("/api/embed", embed, "Vectors of texts (Ollama).", ollama.EmbedRequest, ollama.Embedded),
        row(
            "/api/embeddings",
            old_embed,
            "The vector of a text (Ollama).",
            ollama.OldEmbedRequest,
            ollama.OldEmbedded,
        ),
    )


def dialect_routes() -> tuple[Route, ...]:
    """All of them."""
    return (*_tokens(), *_pooling(), *response_routes(), *_anthropic(), *_ollama(), *_ollama_store())


def _tokens() -> tuple[Route, ...]:
    return (
        Route(
            "POST",
            "/v1/chat/completions/render",
            handler(tokens.render_chat_request),
            "A chat request as tokens; nothing is generated.",
            schema.ChatCompletionRequest,
            tokens.TokensRequest,
        ),
        Route(
            "POST",
            "/v1/completions/render",
            handler(tokens.render_completion),
            "A completion request as tokens; nothing is generated.",
            schema.CompletionRequest,
            tokens.Rendered,
        ),
        Route(
            "POST",
            "/inference/v1/generate",
            handler(tokens.generate),
            "Tokens that go on from tokens.",
            tokens.TokensRequest,
            tokens.TokensReply,
            tokens.TokensReply,
        ),
        Route(
            "POST",
            "/invocations",
            invocations,
            "Any of the requests above; its fields say which (SageMaker).",
        ),
    )


def _anthropic() -> tuple[Route, ...]:
    return (
        Route(
            "POST",
            "/v1/messages",
            handler(messages),
            "Answer a conversation (Anthropic).",
            anthropic.MessagesRequest,
            anthropic.MessageReply,
            anthropic.MessageStart,
        ),
        Route(
            "POST",
            "/v1/messages/count_tokens",
            handler(count_tokens),
            "Tokens of a conversation (Anthropic).",
            anthropic.CountTokensRequest,
            anthropic.TokenCount,
        ),
    )


def _ollama() -> tuple[Route, ...]:
    lines = "application/x-ndjson"
    return (
        Route(
            "POST",
            "/api/chat",
            handler(ollama_generate.chat),
            "Answer a conversation (Ollama).",
            ollama.ChatRequest,
            ollama.ChatReply,
            ollama.ChatReply,
            stream_media_type=lines,
        ),
        Route(
            "POST",
            "/api/generate",
            handler(ollama_generate.generate),
            "Answer a prompt (Ollama).",
            ollama.GenerateRequest,
            ollama.GenerateReply,
            ollama.GenerateReply,
            stream_media_type=lines,
        ),
        Route(
            "POST",
            "/api/show",
            handler(ollama_models.show),
            "Describe a served name (Ollama).",
            ollama.ShowRequest,
            ollama.Shown,
        ),
        Route(
            "POST",
            "/api/pull",
            handler(ollama_models.pull),
            "Succeeds for a served name (Ollama).",
            ollama.PullRequest,
            ollama.Status,
            ollama.Status,
            stream_media_type=lines,
        ),
    )


def _ollama_store() -> tuple[Route, ...]:
    """Lists, and what changes a store of models: refused."""
    refused = handler(ollama_models.not_here)
    changes = (
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("POST", "/api/push"),
        ("DELETE", "/api/delete"),
        ("POST", "/api/blobs/{digest}"),
        ("HEAD", "/api/blobs/{digest}"),
    )
    return (
        Route(
            "GET",
            "/api/tags",
            handler(ollama_models.tags),
            "List the served names (Ollama).",
            reply=ollama.Tags,
        ),
        Route(
            "GET",
            "/api/ps",
            handler(ollama_models.processes),
            "List what is loaded (Ollama).",
            reply=ollama.Processes,
        ),
        Route(
            "GET",
            "/api/version",
            handler(ollama_models.version),
            "The version of the server (Ollama).",
            reply=ollama.Version,
        ),
        *(Route(method, path, refused, "Refused: 501 (Ollama).") for method, path in changes),
    )


def handler(answer: Answer) -> Callable[[Service, Request, Any], Coroutine[Any, Any, Reply]]:
    """A route's handler around a function of a dialect."""

    async def handle(service: Service, _: Request, body: Any) -> Reply:
        return await answer(service.context, body)

    return handle

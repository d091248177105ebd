"""Requests and replies of ``/v1/embeddings``, ``/pooling``, ``/classify``, ``/score`` and ``/rerank``; ranges come from the one table of bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octavo.api.openai.schema import Messages, ModelName, Prompt, SamplingFields, User
from octavo.protocol import bounds

Texts = Annotated[list[str], Meta(min_length=1, max_length=2048)]
NumTokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TopN = Annotated[int, Meta(ge=0, le=2048)]


class PoolingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of every request that pools. ``use_activation`` is vLLM's word for ``normalize``."""

    model: ModelName | None = None
    user: User | None = None
    truncate_prompt_tokens: bounds.Truncate | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: bounds.Priority | None = None
    cache_salt: bounds.CacheSalt | None = None
    request_id: bounds.RequestId | None = None
    deadline_ms: bounds.Milliseconds | None = None
    max_queue_ms: bounds.Milliseconds | None = None

    @property
    def standing(self) -> SamplingFields:
        """What the queue must know."""
        return SamplingFields(
            priority=self.priority,
            cache_salt=self.cache_salt,
            deadline_ms=self.deadline_ms,
            max_queue_ms=self.max_queue_ms,
        )


class InputFields(PoolingFields, kw_only=True):
    """``input`` in its four forms, or a conversation."""

    input: Prompt | None = None
    messages: Messages | None = None
    use_activation: bool | None = None
    chat_template: bounds.TemplateSource | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class EmbeddingRequest(InputFields, kw_only=True):
    """Body of ``POST /v1/embeddings``."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: bounds.Dimensions | None = None
    normalize: bool | None = None


class PoolingRequest(EmbeddingRequest, kw_only=True):
    """Body of ``POST /pooling``; without ``task`` it is what the model is made for."""

    task: Literal["embed", "classify", "token_embed"] | None = None


class ClassifyRequest(InputFields, kw_only=True):
    """Body of ``POST /classify``."""


class PoolingUsage(msgspec.Struct, kw_only=True):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class EmbeddingItem(msgspec.Struct, kw_only=True):
    """The vector of one input: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingReply(msgspec.Struct, kw_only=True):
    """Reply of ``POST /v1/embeddings``."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[EmbeddingItem]
    usage: PoolingUsage


class PooledItem(msgspec.Struct, kw_only=True):
    """What became of one input: numbers (of token_embed a list for each token), or base64 of little-endian float32."""

    object: Literal["pooling"] = "pooling"
    index: int
    data: list[float | list[float]] | str


class PoolingReply(msgspec.Struct, kw_only=True):
    """Reply of ``POST /pooling``."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PooledItem]
    usage: PoolingUsage


class ClassItem(msgspec.Struct, kw_only=True):
    """The classes of one input: the likeliest label, and how likely each is, in the model's order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(msgspec.Struct, kw_only=True):
    """Reply of ``POST /classify``."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassItem]
    usage: PoolingUsage


Side = Annotated[str, Meta(max_length=1_048_576)] | Texts


class PairFields(PoolingFields, kw_only=True):
    """Fields of requests about pairs of texts; ``use_activation`` False leaves a cross-encoder's numbers as they are."""

    use_activation: bool | None = None
    max_tokens_per_query: NumTokens | None = None
    max_tokens_per_doc: NumTokens | None = None


class ScoreRequest(PairFields, kw_only=True):
    """Body of ``POST /score``: one text against many, or pairs. The spellings mean the same."""

    text_1: Side | None = None
    text_2: Side | None = None
    queries: Side | None = None
    documents: Side | None = None
    items: Side | None = None
    data_1: Side | None = None
    data_2: Side | None = None


class ScoreItem(msgspec.Struct, kw_only=True):
    """How alike a pair is: the cosine of its vectors, or what a cross-encoder says of it."""

    object: Literal["score"] = "score"
    index: int
    score: float


class ScoreReply(msgspec.Struct, kw_only=True):
    """Reply of ``POST /score``."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreItem]
    usage: PoolingUsage


class DocumentText(msgspec.Struct):
    """A document."""

    text: str


class RerankRequest(PairFields, kw_only=True):
    """Body of ``POST /rerank``."""

    query: Annotated[str, Meta(min_length=1, max_length=1_048_576)]
    documents: Annotated[list[str | DocumentText], Meta(min_length=1, max_length=2048)]
    top_n: TopN | None = None
    return_documents: bool | None = None


class RerankItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One document and how well it answers the query."""

    index: int
    relevance_score: float
    document: DocumentText | None = None


class RerankReply(msgspec.Struct, kw_only=True):
    """Reply of ``POST /rerank``: best first."""

    id: str
    model: str
    results: list[RerankItem]
    usage: PoolingUsage

"""``/v1/embeddings``, ``/score`` and ``/rerank``: vectors of texts, and how alike they are."""

from __future__ import annotations

import base64
import time

import numpy as np

from octavo.api.openai.context import Context, reply_id
from octavo.api.openai.pooling_schema import (
    DocumentText,
    EmbeddingItem,
    EmbeddingReply,
    EmbeddingRequest,
    PoolingFields,
    PoolingUsage,
    RerankItem,
    RerankReply,
    RerankRequest,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
)
from octavo.api.openai.prompts import chat_ids, split_prompt
from octavo.api.openai.schema import TokenizeRequest
from octavo.api.pooling import Cutting, Vectors, shortened, token_ids, vectors
from octavo.errors import RequestError

SPELLINGS = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))


async def embeddings(context: Context, request: EmbeddingRequest) -> EmbeddingReply:
    """A vector for every input."""
    model = context.check_model(request.model)
    if (request.input is None) == (request.messages is None):
        raise RequestError("Give either input or messages.", param="input")
    if (
        None not in (request.normalize, request.use_activation)
        and request.normalize != request.use_activation
    ):
        raise RequestError("normalize and use_activation mean the same and differ.", param="use_activation")
    normalize = request.use_activation if request.normalize is None else request.normalize
    inputs: list[str | list[int]]
    if request.messages is not None:
        conversation = TokenizeRequest(
            messages=request.messages,
            chat_template_kwargs=request.chat_template_kwargs,
            add_generation_prompt=bool(request.add_generation_prompt),
            continue_final_message=request.continue_final_message,
        )
        inputs = [await chat_ids(context, conversation)]
    else:
        inputs = _inputs(request)
    ids = await _ids(context, request, inputs, "input")
    request_id = reply_id("embd-", request.request_id)
    made = await vectors(context, request.standing, ids, request_id=request_id, normalize=normalize)
    scaled = context.info.facts.normalize if normalize is None else normalize
    made = shortened(made, request.dimensions, normalize=scaled)
    encode = _base64 if request.encoding_format == "base64" else _numbers
    return EmbeddingReply(
        id=request_id,
        created=int(time.time()),
        model=model,
        data=[EmbeddingItem(index=i, embedding=encode(vector)) for i, vector in enumerate(made)],
        usage=_usage(ids),
    )


async def score(context: Context, request: ScoreRequest) -> ScoreReply:
    """The cosine of each pair; a single text on the first side is paired with all of the second."""
    model = context.check_model(request.model)
    left, right, name = _sides(request)
    if len(left) not in (1, len(right)):
        raise RequestError(
            f"{len(left)} and {len(right)} texts make no pairs: give one first text, or as many as second ones.",
            param=name,
        )
    ids = await _ids(context, request, [*left, *right], name)
    request_id = reply_id("score-", request.request_id)
    made = await vectors(context, request.standing, ids, request_id=request_id, normalize=True)
    scores = (made[: len(left)] * made[len(left) :]).sum(axis=1)
    return ScoreReply(
        id=request_id,
        created=int(time.time()),
        model=model,
        data=[ScoreItem(index=i, score=float(value)) for i, value in enumerate(scores)],
        usage=_usage(ids),
    )


async def rerank(context: Context, request: RerankRequest) -> RerankReply:
    """Documents in the order of how well they fit the query."""
    model = context.check_model(request.model)
    texts = [document if isinstance(document, str) else document.text for document in request.documents]
    query = await _ids(context, request, [request.query], "query")
    cutting = Cutting(request.max_tokens_per_doc) if request.max_tokens_per_doc is not None else None
    documents = await _ids(context, request, texts, "documents", cutting)
    request_id = reply_id("rerank-", request.request_id)
    ids = [*query, *documents]
    made = await vectors(context, request.standing, ids, request_id=request_id, normalize=True)
    scores = made[1:] @ made[0]
    order = np.argsort(-scores, kind="stable")
    if request.top_n:
        order = order[: request.top_n]
    results = [RerankItem(index=int(i), relevance_score=float(scores[i])) for i in order]
    if request.return_documents is not False:
        for result in results:
            result.document = DocumentText(texts[result.index])
    return RerankReply(id=request_id, model=model, results=results, usage=_usage(ids))


async def _ids(
    context: Context,
    request: PoolingFields,
    inputs: list[str | list[int]] | list[str],
    param: str,
    cutting: Cutting | None = None,
) -> list[list[int]]:
    asked = Cutting(request.truncate_prompt_tokens, request.truncation_side or "right")
    return await token_ids(
        context,
        inputs,
        param=param,
        cutting=cutting or asked,
        add_special_tokens=request.add_special_tokens is not False,
    )


def _inputs(request: EmbeddingRequest) -> list[str | list[int]]:
    try:
        return split_prompt(request.input if request.input is not None else "")
    except RequestError as error:
        param = (error.param or "prompt").replace("prompt", "input", 1)
        raise RequestError(error.cause.replace("prompt", "input"), param, error.cure) from None


def _sides(request: ScoreRequest) -> tuple[list[str], list[str], str]:
    given = [pair for pair in SPELLINGS if any(getattr(request, name) is not None for name in pair)]
    if len(given) != 1 or any(getattr(request, name) is None for name in given[0]):
        raise RequestError("Give both text_1 and text_2 (or queries and documents).", param="text_1")
    first, second = (getattr(request, name) for name in given[0])
    left, right = ([side] if isinstance(side, str) else side for side in (first, second))
    return left, right, given[0][0]


def _usage(ids: list[list[int]]) -> PoolingUsage:
    count = sum(map(len, ids))
    return PoolingUsage(prompt_tokens=count, total_tokens=count)


def _numbers(vector: Vectors) -> list[float]:
    return vector.tolist()  # type: ignore[no-any-return]


def _base64(vector: Vectors) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()

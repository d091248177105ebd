"""``/v1/embeddings``, ``/pooling``, ``/classify``, ``/score`` and ``/rerank``: vectors, classes, and what fits what."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np

from octavo.api.openai.context import Context, reply_id
from octavo.api.openai.pooling_schema import (
    ClassifyReply,
    ClassifyRequest,
    ClassItem,
    DocumentText,
    EmbeddingItem,
    EmbeddingReply,
    EmbeddingRequest,
    InputFields,
    PairFields,
    PooledItem,
    PoolingFields,
    PoolingReply,
    PoolingRequest,
    PoolingUsage,
    RerankItem,
    RerankReply,
    RerankRequest,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
)
from octavo.api.openai.prompts import chat_ids, split_prompt
from octavo.api.openai.schema import ChatCompletionRequest
from octavo.api.pooling import classes, pair_ids, token_ids, token_vectors, vectors
from octavo.api.vectors import Cutting, Vectors, shortened
from octavo.errors import RequestError

SPELLINGS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
SIDES = ("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2")


async def embeddings(context: Context, request: EmbeddingRequest) -> EmbeddingReply:
    """A vector for every input."""
    model = context.check_model(request.model)
    request_id = reply_id("embd-", request.request_id)
    made, ids = await _embedded(context, request, request_id)
    encode = _base64 if request.encoding_format == "base64" else _numbers
    return EmbeddingReply(
        id=request_id,
        created=int(time.time()),
        model=model,
        data=[EmbeddingItem(index=i, embedding=encode(vector)) for i, vector in enumerate(made)],
        usage=_usage(ids),
    )


async def pooling(context: Context, request: PoolingRequest) -> PoolingReply:
    """Vectors or classes of every input, as the task or else the model says."""
    model = context.check_model(request.model)
    request_id = reply_id("pool-", request.request_id)
    if request.task == "classify" or (request.task is None and context.info.facts.labels):
        for name in ("dimensions", "normalize"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name} is a field of vectors, and the task is classify.", param=name)
        classified, ids = await _classified(context, request, request_id)
        made = list(classified)
    elif request.task == "token_embed":
        ids = await _input_ids(context, request)
        normalize = _normalize(request)
        found = await token_vectors(
            context, request.standing, ids, request_id=request_id, normalize=normalize
        )
        scaled = context.info.facts.normalize if normalize is None else normalize
        made = [shortened(rows, request.dimensions, normalize=scaled) for rows in found]
    else:
        embedded, ids = await _embedded(context, request, request_id)
        made = list(embedded)
    data: list[PooledItem] = []
    for i, rows in enumerate(made):
        told: Any = _base64(rows) if request.encoding_format == "base64" else rows.tolist()
        data.append(PooledItem(index=i, data=told))
    return PoolingReply(
        id=request_id,
        created=int(time.time()),
        model=model,
        data=data,
        usage=_usage(ids),
    )


async def classify(context: Context, request: ClassifyRequest) -> ClassifyReply:
    """The classes of every input."""
    model = context.check_model(request.model)
    request_id = reply_id("classify-", request.request_id)
    made, ids = await _classified(context, request, request_id)
    labels = context.info.facts.labels
    data = [
        ClassItem(index=i, label=labels[int(row.argmax())], probs=row.tolist(), num_classes=len(labels))
        for i, row in enumerate(made)
    ]
    return ClassifyReply(id=request_id, created=int(time.time()), model=model, data=data, usage=_usage(ids))


async def score(context: Context, request: ScoreRequest) -> ScoreReply:
    """How well each pair fits; a single text on the first side is paired with all of the second."""
    model = context.check_model(request.model)
    left, right, name = _sides(request)
    if len(left) not in (1, len(right)):
        raise RequestError(
            f"{len(left)} and {len(right)} texts make no pairs: give one first text, or as many as second ones.",
            param=name,
        )
    request_id = reply_id("score-", request.request_id)
    if context.info.facts.labels:
        pairs = list(zip(left * len(right) if len(left) == 1 else left, right))
        scores, ids = await _cross_scores(context, request, pairs, name, request_id)
    else:
        scores, ids = await _cosines(context, request, (left, name), (right, name), request_id)
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
    request_id = reply_id("rerank-", request.request_id)
    if context.info.facts.labels:
        pairs = [(request.query, text) for text in texts]
        scores, ids = await _cross_scores(context, request, pairs, "documents", request_id)
    else:
        sides = ([request.query], "query"), (texts, "documents")
        scores, ids = await _cosines(context, request, *sides, request_id)
    order = np.argsort(-scores, kind="stable")
    if request.top_n:
        order = order[: request.top_n]
    results = [RerankItem(index=int(i), relevance_score=float(scores[i])) for i in order]
    if request.return_documents is not False:
        for result in results:
            result.document = DocumentText(texts[result.index])
    return RerankReply(id=request_id, model=model, results=results, usage=_usage(ids))


async def _embedded(
    context: Context, request: EmbeddingRequest, request_id: str
) -> tuple[Vectors, list[list[int]]]:
    """Vectors of the inputs as asked, and the inputs' tokens."""
    normalize = _normalize(request)
    ids = await _input_ids(context, request)
    made = await vectors(context, request.standing, ids, request_id=request_id, normalize=normalize)
    scaled = context.info.facts.normalize if normalize is None else normalize
    return shortened(made, request.dimensions, normalize=scaled), ids


def _normalize(request: EmbeddingRequest) -> bool | None:
    if (
        None not in (request.normalize, request.use_activation)
        and request.normalize != request.use_activation
    ):
        raise RequestError("normalize and use_activation mean the same and differ.", param="use_activation")
    return request.use_activation if request.normalize is None else request.normalize


async def _classified(
    context: Context, request: InputFields, request_id: str
) -> tuple[Vectors, list[list[int]]]:
    """Probabilities of the inputs' classes, and the inputs' tokens."""
    ids = await _input_ids(context, request)
    activation = request.use_activation
    made = await classes(context, request.standing, ids, request_id=request_id, use_activation=activation)
    return made, ids


async def _cosines(
    context: Context,
    request: PairFields,
    first: tuple[list[str], str],
    second: tuple[list[str], str],
    request_id: str,
) -> tuple[Vectors, list[list[int]]]:
    """Scores of texts that are read apart: the cosines of their vectors. Each side comes with its field's name."""
    if request.use_activation is False:
        raise RequestError(
            "Scores of this model are cosines; use_activation changes nothing.", param="use_activation"
        )
    ids = []
    for (texts, name), most in zip(
        (first, second), (request.max_tokens_per_query, request.max_tokens_per_doc)
    ):
        ids += await _ids(context, request, texts, name, None if most is None else Cutting(most))
    made = await vectors(context, request.standing, ids, request_id=request_id, normalize=True)
    count = len(first[0])
    return (made[:count] * made[count:]).sum(axis=1), ids


async def _cross_scores(
    context: Context,
    request: PairFields,
    pairs: list[tuple[str, str]],
    name: str,
    request_id: str,
) -> tuple[Vectors, list[list[int]]]:
    """Scores of pairs that are read together (a cross-encoder)."""
    count = len(context.info.facts.labels)
    if count != 1:
        raise RequestError(
            f"{context.served_model_names[0]} tells {count} classes apart, which makes no score.",
            param="model",
            cure="Use /classify.",
        )
    ids, second_at = await pair_ids(
        context,
        pairs,
        param=name,
        cutting=Cutting(request.truncate_prompt_tokens),
        most=(request.max_tokens_per_query, request.max_tokens_per_doc),
    )
    activation = request.use_activation
    made = await classes(
        context, request.standing, ids, second_at, request_id=request_id, use_activation=activation
    )
    return made[:, 0], ids


async def _input_ids(context: Context, request: InputFields) -> list[list[int]]:
    if (request.input is None) == (request.messages is None):
        raise RequestError("Give either input or messages.", param="input")
    inputs: list[str | list[int]]
    if request.messages is not None:
        conversation = ChatCompletionRequest(
            messages=request.messages,
            chat_template=request.chat_template,
            chat_template_kwargs=request.chat_template_kwargs,
            add_generation_prompt=bool(request.add_generation_prompt),
            continue_final_message=request.continue_final_message,
        )
        inputs = [await chat_ids(context, conversation)]
    else:
        inputs = _inputs(request)
    return await _ids(context, request, inputs, "input")


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


def _inputs(request: InputFields) -> list[str | list[int]]:
    try:
        return split_prompt(request.input if request.input is not None else "")
    except RequestError as error:
        param = (error.param or "prompt").replace("prompt", "input", 1)
        raise RequestError(error.cause.replace("prompt", "input"), param, error.cure) from None


def _sides(request: ScoreRequest) -> tuple[list[str], list[str], str]:
    given = [name for name in SIDES if getattr(request, name) is not None]
    if tuple(given) not in SPELLINGS:
        raise RequestError("Give both text_1 and text_2 (or queries and documents).", param="text_1")
    first, second = (getattr(request, name) for name in given)
    left, right = ([side] if isinstance(side, str) else side for side in (first, second))
    return left, right, given[0]


def _usage(ids: list[list[int]]) -> PoolingUsage:
    count = sum(map(len, ids))
    return PoolingUsage(prompt_tokens=count, total_tokens=count)


def _numbers(vector: Vectors) -> list[float]:
    return vector.tolist()  # type: ignore[no-any-return]


def _base64(vector: Vectors) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()

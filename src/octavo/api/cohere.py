"""Cohere's ``/v2/embed``: their fields over the same vectors."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from octavo.api.openai.context import Context, reply_id
from octavo.api.openai.pooling_schema import Texts
from octavo.api.openai.schema import ModelName, SamplingFields
from octavo.api.pooling import token_ids, vectors
from octavo.api.vectors import Cutting, Vectors, shortened
from octavo.errors import RequestError
from octavo.protocol import bounds

EmbeddingType = Literal["float", "base64", "binary", "ubinary", "int8", "uint8"]
SIDES = {"START": "left", "END": "right"}
SERVED = ("float", "base64", "binary", "ubinary")


class Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of an input; texts are served."""

    type: Literal["text"]
    text: str


class Input(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An input in parts, which are one text."""

    content: Annotated[list[Part], Meta(min_length=1, max_length=64)]


class CohereRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v2/embed``. ``input_type`` is accepted: these models read queries and documents alike."""

    model: ModelName | None = None
    texts: Texts | None = None
    inputs: Annotated[list[Input], Meta(min_length=1, max_length=2048)] | None = None
    images: Any = None  # refused
    input_type: Annotated[str, Meta(max_length=64)] | None = None
    embedding_types: Annotated[list[EmbeddingType], Meta(min_length=1, max_length=8)] | None = None
    output_dimension: bounds.Dimensions | None = None
    max_tokens: bounds.MaxTokens | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    priority: bounds.Priority | None = None


class Embeddings(msgspec.Struct, omit_defaults=True):
    """The vectors of all inputs, in each form that was asked for."""

    numbers: list[list[float]] | None = msgspec.field(name="float", default=None)
    coded: list[str] | None = msgspec.field(name="base64", default=None)
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None


class BilledUnits(msgspec.Struct):
    """Tokens that were read."""

    input_tokens: int


class ApiVersion(msgspec.Struct):
    """The version of the dialect."""

    version: str = "2"


class Meta2(msgspec.Struct):
    """What Cohere tells beside the vectors."""

    api_version: ApiVersion
    billed_units: BilledUnits


class CohereReply(msgspec.Struct, kw_only=True):
    """Reply of ``POST /v2/embed``."""

    id: str
    embeddings: Embeddings
    texts: list[str]
    meta: Meta2
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"


async def embed(context: Context, request: CohereRequest) -> CohereReply:
    """A vector for every text."""
    context.check_model(request.model)
    texts, param = _texts(request)
    kinds = request.embedding_types or ["float"]
    for kind in kinds:
        if kind not in SERVED:
            raise RequestError(
                f"embedding_types: {kind} is not served here.",
                param="embedding_types",
                cure=f"Use {', '.join(SERVED)}.",
            )
    longest = context.info.max_model_len
    most = longest if request.max_tokens is None else min(request.max_tokens, longest)
    how = request.truncate or "END"
    cutting = Cutting() if how == "NONE" else Cutting(most, SIDES[how])
    ids = await token_ids(context, texts, param=param, cutting=cutting)
    if how == "NONE":
        for i, one in enumerate(ids):
            if len(one) > most:
                name = f"{param}[{i}]"
                raise RequestError(f"{name} has {len(one)} tokens, more than {most}.", param=name)
    request_id = reply_id("embd-", None)
    made = await vectors(
        context, SamplingFields(priority=request.priority), ids, request_id=request_id, normalize=None
    )
    made = shortened(made, request.output_dimension, normalize=context.info.facts.normalize)
    return CohereReply(
        id=request_id,
        embeddings=_forms(made, kinds),
        texts=texts,
        meta=Meta2(ApiVersion(), BilledUnits(sum(map(len, ids)))),
    )


def _texts(request: CohereRequest) -> tuple[list[str], str]:
    if request.images is not None:
        raise RequestError("images are not served: the models here read text.", param="images")
    if (request.texts is None) == (request.inputs is None):
        raise RequestError("Give either texts or inputs.", param="texts")
    if request.texts is not None:
        return request.texts, "texts"
    return ["\n".join(part.text for part in one.content) for one in request.inputs or []], "inputs"


def _forms(made: Vectors, kinds: list[EmbeddingType]) -> Embeddings:
    """Binary forms keep a bit for each number, set where it is above 0, eight to a byte."""
    bits = np.packbits(made > 0, axis=1)
    found = Embeddings()
    if "float" in kinds:
        found.numbers = made.tolist()
    if "base64" in kinds:
        found.coded = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in made]
    if "ubinary" in kinds:
        found.ubinary = bits.tolist()
    if "binary" in kinds:
        found.binary = (bits.astype(np.int16) - 128).tolist()
    return found

"""``/api/embed`` and its older form ``/api/embeddings``."""

from __future__ import annotations

import time
import uuid

from octavo.api.ollama.convert import served_name
from octavo.api.ollama.schema import Embedded, EmbedRequest, OldEmbedded, OldEmbedRequest
from octavo.api.openai.context import Context
from octavo.api.openai.schema import SamplingFields
from octavo.api.pooling import token_ids, vectors
from octavo.api.vectors import Cutting, shortened


async def embed(context: Context, body: EmbedRequest) -> Embedded:
    """A vector of length 1 for every text."""
    begin = time.perf_counter_ns()
    name = context.check_model(served_name(context, body.model))
    texts = [body.input] if isinstance(body.input, str) else body.input
    cutting = Cutting(None if body.truncate is False else -1)
    ids = await token_ids(context, texts, param="input", cutting=cutting)
    made = []
    if ids:
        found = await vectors(
            context, SamplingFields(), ids, request_id=f"embd-{uuid.uuid4().hex}", normalize=True
        )
        made = shortened(found, body.dimensions, normalize=True).tolist()
    return Embedded(
        model=name,
        embeddings=made,
        total_duration=time.perf_counter_ns() - begin,
        load_duration=0,
        prompt_eval_count=sum(map(len, ids)),
    )


async def old_embed(context: Context, body: OldEmbedRequest) -> OldEmbedded:
    """The vector of one text."""
    made = await embed(context, EmbedRequest(input=body.prompt, model=body.model))
    return OldEmbedded(made.embeddings[0])

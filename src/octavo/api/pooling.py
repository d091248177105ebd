"""Texts to vectors and classes: checked ids to the engine, float32 bytes back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np

from octavo.api.frontend import LARGE_TEXT, check_token_ids
from octavo.api.openai.context import Context
from octavo.api.openai.run import Run
from octavo.api.openai.schema import SamplingFields
from octavo.api.vectors import ONE_TOKEN, Cutting, Vectors, fitting, probabilities, unit
from octavo.errors import RequestError
from octavo.protocol.generate import Pooling

MAX_NUMBERS = 1 << 23  # of one reply with vectors of all tokens


async def token_ids(
    context: Context,
    inputs: Sequence[str | list[int]],
    *,
    param: str,
    cutting: Cutting,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """Ids of every input; ``RequestError`` names the one that is empty or too long."""
    made = []
    for i, text in enumerate(inputs):
        name = param if len(inputs) == 1 else f"{param}[{i}]"
        if isinstance(text, str):
            tokenizer = context.frontend.tokenizer
            if len(text) > LARGE_TEXT:
                ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
            else:
                ids = tokenizer.encode(text, add_special_tokens)
        else:
            check_token_ids(text, context.info.vocab_size, name)
            ids = text
        made.append(fitting(context.frontend, ids, name, cutting))
    return made


async def pair_ids(
    context: Context,
    pairs: Sequence[tuple[str, str]],
    *,
    param: str,
    cutting: Cutting,
    most: tuple[int | None, int | None] = (None, None),
) -> tuple[list[list[int]], list[int]]:
    """Ids of pairs of texts, each pair one input, and where their second texts begin; ``most`` tokens of each text."""
    tokenizer = context.frontend.tokenizer

    def encode() -> list[tuple[list[int], int]]:
        return [tokenizer.encode_pair(first, second, most) for first, second in pairs]

    large = sum(len(first) + len(second) for first, second in pairs) > LARGE_TEXT
    made = await asyncio.to_thread(encode) if large else encode()
    ids = [
        fitting(context.frontend, ids, param if len(pairs) == 1 else f"{param}[{i}]", cutting)
        for i, (ids, _) in enumerate(made)
    ]
    return ids, [at if at < len(cut) else 0 for cut, (_, at) in zip(ids, made)]


async def vectors(
    context: Context,
    request: SamplingFields,
    inputs: Sequence[list[int]],
    *,
    request_id: str,
    normalize: bool | None,
) -> Vectors:
    """The vectors [N, E] of token ids; scaled to length 1 where the request or else the model says so.

    Raises ``RequestError`` where the model gives none, and what ``Run`` raises.
    """
    facts = context.info.facts
    made = _stacked(await _pooled(context, request, inputs, facts.pooling, (), request_id))
    return unit(made) if (facts.normalize if normalize is None else normalize) else made


async def classes(
    context: Context,
    request: SamplingFields,
    inputs: Sequence[list[int]],
    second_at: Sequence[int] = (),
    *,
    request_id: str,
    use_activation: bool | None,
) -> Vectors:
    """What the model's head makes of token ids [N, labels]: probabilities, or with ``use_activation`` False its numbers.

    Raises ``RequestError`` where the model has no head, and what ``Run`` raises.
    """
    facts = context.info.facts
    if facts.can_pool and not facts.labels:
        raise RequestError(f"{context.served_model_names[0]} has no classification head.", param="model")
    made = _stacked(await _pooled(context, request, inputs, "classify", second_at, request_id))
    return made if use_activation is False else probabilities(made, facts.activation)


async def token_vectors(
    context: Context,
    request: SamplingFields,
    inputs: Sequence[list[int]],
    *,
    request_id: str,
    normalize: bool | None,
) -> list[Vectors]:
    """The vectors [n, E] of every token of each input; see ``vectors``."""
    facts = context.info.facts
    count = sum(map(len, inputs)) * facts.hidden_size
    if count > MAX_NUMBERS:
        raise RequestError(
            f"The vectors of all tokens are {count} numbers; at most {MAX_NUMBERS} are given in one reply.",
            param="input",
            cure="Send fewer or shorter texts.",
        )
    found = await _pooled(context, request, inputs, "tokens", (), request_id)
    made = [np.frombuffer(raw, "<f4").reshape(len(ids), -1) for raw, ids in zip(found, inputs)]
    return [unit(rows) for rows in made] if (facts.normalize if normalize is None else normalize) else made


def _stacked(found: list[bytes]) -> Vectors:
    return np.frombuffer(b"".join(found), "<f4").reshape(len(found), -1)


async def _pooled(
    context: Context,
    request: SamplingFields,
    inputs: Sequence[list[int]],
    pooling: Pooling,
    second_at: Sequence[int],
    request_id: str,
) -> list[bytes]:
    facts = context.info.facts
    if not facts.can_pool:
        raise RequestError(
            f"{context.served_model_names[0]} is served for generation alone.",
            param="model",
            cure="Start the server with --runner pooling.",
        )
    prompts = [(ids, ONE_TOKEN) for ids in inputs]
    run = Run(
        context,
        request,
        prompts,
        request_id=request_id,
        counts_output=False,
        pooling=pooling,
        second_at=second_at,
    )
    found: list[bytes] = [b""] * len(inputs)
    async with aclosing(run.deltas()) as deltas:
        async for batch in deltas:
            for choice, delta in batch:
                if delta.embedding is not None:
                    found[choice] = delta.embedding
    return found

"""Texts to vectors: checked ids to the engine, float32 bytes back, then cut and scaled as asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.api.frontend import LARGE_TEXT, check_token_ids
from octavo.api.openai.context import Context
from octavo.api.openai.run import Run
from octavo.api.openai.schema import SamplingFields
from octavo.errors import RequestError
from octavo.protocol.generate import SamplingParams

Vectors = NDArray[np.float32]
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)


@dataclass(frozen=True)
class Cutting:
    """Which texts are cut: to ``most`` tokens (None: none is, -1: to what the model holds), from which side."""

    most: int | None = None
    side: str = "right"


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
        made.append(_fitting(context, ids, name, cutting))
    return made


def _fitting(context: Context, ids: list[int], name: str, cutting: Cutting) -> list[int]:
    longest = context.info.max_model_len
    most = longest if cutting.most == -1 else cutting.most
    if most is not None and most > longest:
        raise RequestError(
            f"truncate_prompt_tokens is {most}, but the model holds {longest}.",
            param="truncate_prompt_tokens",
        )
    if most is not None and len(ids) > most:
        if cutting.side == "left":
            ids = ids[len(ids) - most :]
        else:  # the token that ends a text stays its last
            ends = context.frontend.tokenizer.special_ids
            ids = [*ids[: most - 1], ids[-1]] if ids[-1] in ends and most else ids[:most]
    if not ids:
        raise RequestError(f"{name} is empty: it has no tokens.", param=name)
    if len(ids) > longest:
        raise RequestError(
            f"{name} has {len(ids)} tokens, but the model holds {longest}.",
            param=name,
            cure="Shorten it, or send truncate_prompt_tokens: -1.",
        )
    return ids


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
    if not facts.can_pool:
        raise RequestError(
            f"{context.served_model_names[0]} is served for generation alone.",
            param="model",
            cure="Start the server with --runner pooling.",
        )
    prompts = [(ids, ONE_TOKEN) for ids in inputs]
    run = Run(context, request, prompts, request_id=request_id, counts_output=False, pooling=facts.pooling)
    found: list[bytes] = [b""] * len(inputs)
    async with aclosing(run.deltas()) as deltas:
        async for batch in deltas:
            for choice, delta in batch:
                if delta.embedding is not None:
                    found[choice] = delta.embedding
    made = np.frombuffer(b"".join(found), "<f4").reshape(len(inputs), -1)
    return unit(made) if (facts.normalize if normalize is None else normalize) else made


def shortened(made: Vectors, dimensions: int | None, *, normalize: bool) -> Vectors:
    """The first ``dimensions`` numbers of each vector, scaled again (Kusupati et al. 2022)."""
    if dimensions is None:
        return made
    if dimensions > made.shape[1]:
        raise RequestError(
            f"dimensions is {dimensions}, but the model's vectors have {made.shape[1]}.", param="dimensions"
        )
    return unit(made[:, :dimensions]) if normalize else made[:, :dimensions]


def unit(made: Vectors) -> Vectors:
    """Each vector scaled to length 1 (zeros stay)."""
    lengths = np.linalg.norm(made, axis=1, keepdims=True)
    scaled: Vectors = made / np.maximum(lengths, 1e-12)
    return scaled

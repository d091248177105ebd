"""Checks of a request that need the engine's facts; the same for every client and for the core itself."""

from __future__ import annotations

from octavo.errors import RequestError
from octavo.protocol.control import EngineInfo
from octavo.protocol.generate import GenerateRequest


def check_request(request: GenerateRequest, info: EngineInfo) -> None:
    """Raise ``RequestError`` (naming the field) for a request that this engine cannot run to its end."""
    prompt, sampling, vocab = request.prompt_token_ids, request.sampling, info.vocab_size
    if not prompt:
        raise RequestError("The prompt is empty.", "prompt", "Send at least one token.")
    _check_ids("prompt", prompt, vocab)
    _check_kind(request, info)
    if len(prompt) >= info.max_model_len + (request.pooling is not None):
        raise RequestError(
            f"The prompt has {len(prompt)} tokens; this model is served with a context of {info.max_model_len} "
            f"tokens for prompt and answer (KV cache: {info.num_pages} pages).",
            "prompt",
            "Send a shorter prompt or start the server with a larger --max-model-len.",
        )
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab)
    if sampling.logit_bias:
        _check_ids("logit_bias", list(sampling.logit_bias), vocab)
    if sampling.allowed_token_ids is not None:
        _check_ids("allowed_token_ids", sampling.allowed_token_ids, vocab)
        ends = {*request.eos_token_ids, *sampling.stop_token_ids}
        if sampling.min_tokens and ends.issuperset(sampling.allowed_token_ids):
            raise RequestError(
                "allowed_token_ids allows only tokens that end the answer, which min_tokens forbids.",
                "allowed_token_ids",
            )
    for word in request.bad_words:
        _check_ids("bad_words", word, vocab)
    if request.dry is not None:
        _check_ids("dry_sequence_breakers", request.dry.breakers, vocab)
    if bool(sampling.dry_multiplier) != (request.dry is not None):
        raise RequestError("DRY must reach the engine with its breakers as tokens.", "dry_multiplier")
    if sampling.bad_words and not request.bad_words:
        raise RequestError("bad_words must reach the engine as tokens.", "bad_words")
    if request.thinking is not None:
        _check_ids("thinking", [request.thinking.start_id, request.thinking.end_id], vocab)
    if sampling.structured_outputs is not None and request.grammar is None:
        raise RequestError(
            "structured_outputs must reach the engine as a grammar.",
            "structured_outputs",
            "Send the request through the front half.",
        )
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise RequestError(
            f"min_tokens ({sampling.min_tokens}) is more than max_tokens ({sampling.max_tokens}).",
            "min_tokens",
        )
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(sampling, name)
        if asked is not None and asked > vocab:
            raise RequestError(f"{name} asks for {asked} tokens; the vocabulary has {vocab}.", name)


def _check_kind(request: GenerateRequest, info: EngineInfo) -> None:
    """A model may generate, give vectors, or both."""
    if request.pooling is None and not info.facts.can_generate:
        raise RequestError(
            f"{info.model} gives embeddings and generates no text.", "model", "Use /v1/embeddings."
        )
    if request.pooling is not None and not info.facts.can_pool:
        raise RequestError(
            f"{info.model} is served for generation alone.",
            "model",
            "Start the server with --runner pooling to get embeddings.",
        )
    if request.pooling == "classify" and not info.facts.labels:
        raise RequestError(f"{info.model} has no classification head.", "model")
    if request.pooling == "tokens" and not info.facts.is_encoder:
        raise RequestError(
            f"{info.model} is no encoder: it gives one vector a text, not one a token.", "task"
        )
    if not 0 <= request.second_at < len(request.prompt_token_ids):
        raise RequestError("second_at must be a place in the prompt.", "second_at")


def _check_ids(name: str, ids: list[int], vocab_size: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        place = next(i for i, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise RequestError(
            f"{name}[{place}] is token {ids[place]}; the vocabulary has tokens 0 to {vocab_size - 1}.", name
        )

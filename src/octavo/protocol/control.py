"""Questions and orders that are not requests: engine facts, statistics, cache reset, shutdown."""

from __future__ import annotations

from typing import Literal

import msgspec

from octavo.protocol.generate import Pooling

FRONT_SHIFT = 40  # request ids and order numbers of front process K lie in [K << 40, (K + 1) << 40)

Activation = Literal["sigmoid", "softmax", "identity"]


class ModelFacts(msgspec.Struct, kw_only=True, frozen=True):
    """What a model is and can do. ``pooling`` is how a sequence becomes one vector ("last", "mean" or "cls") and
    ``normalize`` whether that vector gets length 1, where a request does not say. A model with a classification head has
    ``labels``, and ``activation`` makes its numbers probabilities."""

    weights_bytes: int = 0
    num_parameters: int = 0
    weights_format: str = "safetensors"
    device_kind: str = "cpu"
    can_generate: bool = True
    can_pool: bool = False
    pooling: Pooling = "last"
    normalize: bool = True
    hidden_size: int = 0
    is_encoder: bool = False
    labels: tuple[str, ...] = ()
    activation: Activation = "softmax"


class EngineInfo(msgspec.Struct, kw_only=True, frozen=True):
    """What the front half must know of a running engine; constant while it runs.

    ``memory_bytes``: part of the device's memory -> (planned before the start, measured).
    """

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    dtype: str
    device: str
    kernels: dict[str, str] = {}
    timeline_s: dict[str, float] = {}
    memory_bytes: dict[str, tuple[int, int]] = {}
    max_queue_len: int = 4096
    facts: ModelFacts = ModelFacts()


class EngineStats(msgspec.Struct, kw_only=True):
    """Gauges at this moment and counters since the start; the metrics endpoint maps them to names.

    ``num_deferred`` of the ``num_waiting`` wait for a grammar or for the prompt of another choice, not for room.
    ``num_rejected`` were given up before they began, ``num_deadlines`` ended by their deadline, ``num_failed`` by an
    error of their own. ``accepted_at[i]`` counts drafts accepted at position i. ``iteration_tokens[i]`` counts steps
    with less than 2**i tokens that i - 1 does not count. ``page_lifetimes``, ``page_idles`` and ``page_gaps`` count ages of cached
    pages (``engine.cache.watch.AGES``; their sum in seconds at the end), where they are measured.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    step_tokens: int = 0
    num_deferred: int = 0
    num_rejected: int = 0
    num_deadlines: int = 0
    num_failed: int = 0
    num_cached_prompt_tokens: int = 0
    num_step_tokens: int = 0
    accepted_at: list[int] = []
    iteration_tokens: list[int] = []
    page_lifetimes: list[float] = []
    page_idles: list[float] = []
    page_gaps: list[float] = []


class GetInfo(msgspec.Struct, tag="info"):
    """Ask for ``EngineInfo``."""


class GetStats(msgspec.Struct, tag="stats"):
    """Ask for ``EngineStats``."""


class ResetPrefixCache(msgspec.Struct, tag="reset_prefix_cache"):
    """Forget every cached prefix that no running sequence uses."""


class CheckPool(msgspec.Struct, tag="check_pool"):
    """Run the page pool's proof (``Pool.check``); the reply is empty or an error."""


class DropFront(msgspec.Struct, tag="drop_front"):
    """A front process is gone: end its requests."""

    front: int


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Stop the loop; with ``drain`` after the running requests have ended."""

    drain: bool = False


Control = GetInfo | GetStats | ResetPrefixCache | CheckPool | DropFront | Shutdown
ControlReply = EngineInfo | EngineStats | None

"""One model over several workers: checks what can be known before any process starts, then launches them. No torch.

engine's process: scheduler, MultiprocExecutor ──plans──> worker 0 (host/worker.py), worker 1, ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from octavo.config import EngineOptions, Resolved
from octavo.engine.executor.multiproc import LOOPBACK, MultiprocExecutor, Node
from octavo.errors import UsageError
from octavo.host.built import Progress
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec, MoE
from octavo.model.describe import describe
from octavo.model.shard import shard
from octavo.model.stage import cut

FACTORY = "octavo.host.worker:build"


@dataclass(frozen=True)
class Facts:
    """What rank 0 decided and found out while it started; ``device`` is one line about the devices, ``memory_use`` its
    memory as planned and as measured."""

    resolved: Resolved
    device: str
    kernels: dict[str, str]
    phases: dict[str, float]
    memory_use: dict[str, tuple[int, int]] = field(default_factory=dict)


def part_of(spec: DecoderSpec, options: EngineOptions) -> DecoderSpec:
    """One tensor parallel rank's slice of the whole model; raises where the model cannot be split as asked."""
    parallel = options.parallel
    if parallel.enable_expert_parallel and not any(isinstance(layer.mlp, MoE) for layer in spec.layers):
        raise UsageError(
            "--enable-expert-parallel is for mixtures of experts; this model has none.", "Leave it out."
        )
    return shard(spec, parallel.tensor_parallel_size, expert_parallel=parallel.enable_expert_parallel)


def launch(
    options: EngineOptions,
    arch: ArchConfig,
    progress: Progress | None = None,
    nodes: Callable[[Callable[[], None]], Sequence[Node]] | None = None,
) -> tuple[MultiprocExecutor, Facts]:
    """Start one worker a rank and wait until all are ready, those of other machines too; raises what the first of them
    has to complain of."""
    parallel = options.parallel
    if arch.implementation != "octavo":
        raise UsageError(
            "Models that transformers computes run on one device.", "Leave out the parallel sizes."
        )
    cut(part_of(describe(arch), options), 0, parallel.pipeline_parallel_size)
    executor = MultiprocExecutor(
        FACTORY,
        {"options": msgspec.to_builtins(options)},
        num_workers=parallel.ranks // parallel.nnodes,
        num_ranks=parallel.ranks,
        nodes=nodes,
        environment=LOOPBACK if parallel.nnodes == 1 else None,
        silence_s=parallel.distributed_timeout_seconds,
        progress=progress,
    )
    return executor, msgspec.json.decode(executor.facts, type=Facts)

"""One model over several workers: checks what can be known before any process starts, then launches them. No torch.

engine's process: scheduler, MultiprocExecutor ──plans──> worker 0 (host/worker.py), worker 1, ...
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from octavo.config import EngineOptions, Resolved
from octavo.engine.executor.multiproc import LOOPBACK, MultiprocExecutor
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
    """What rank 0 decided and found out while it started; ``cards`` is one line about the devices, ``memory_bytes`` its
    memory as planned and as measured."""

    resolved: Resolved
    device: str
    kernels: dict[str, str]
    phases: dict[str, float]
    cards: str = ""
    memory_bytes: dict[str, tuple[int, int]] = field(default_factory=dict)


def part_of(spec: DecoderSpec, options: EngineOptions) -> DecoderSpec:
    """One tensor parallel rank's slice of the whole model; raises where the model cannot be split as asked."""
    parallel = options.parallel
    if parallel.enable_expert_parallel and not any(isinstance(layer.mlp, MoE) for layer in spec.layers):
        raise UsageError(
            "--enable-expert-parallel is for mixtures of experts; this model has none.", "Leave it out."
        )
    return shard(spec, parallel.tensor_parallel_size, expert_parallel=parallel.enable_expert_parallel)


def launch(
    options: EngineOptions, arch: ArchConfig, progress: Progress | None = None
) -> tuple[MultiprocExecutor, Facts]:
    """Start one worker a rank and wait until all are ready; raises what the first of them has to complain of."""
    parallel = options.parallel
    cut(part_of(describe(arch), options), 0, parallel.pipeline_parallel_size)
    if options.model.quantization is not None and options.device.device == "cpu":
        raise UsageError("--quantization on CPUs does not go with several ranks.", "Leave it out.")
    executor = MultiprocExecutor(
        FACTORY,
        {"options": msgspec.to_builtins(options)},
        num_workers=parallel.ranks // parallel.nnodes,
        environment=LOOPBACK if parallel.nnodes == 1 else None,
        silence_s=parallel.distributed_timeout_seconds,
        progress=progress,
    )
    return executor, msgspec.json.decode(executor.facts, type=Facts)


def alone(options: EngineOptions) -> EngineOptions:
    """The same for a model on one device."""
    return replace(
        options, parallel=replace(options.parallel, tensor_parallel_size=1, pipeline_parallel_size=1)
    )

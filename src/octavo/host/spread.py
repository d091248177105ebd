"""One model over several workers: what can be known before any process starts. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.config import EngineOptions, Resolved
from octavo.errors import UsageError
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
    kind: str = "cpu"


def part_of(spec: DecoderSpec, options: EngineOptions) -> DecoderSpec:
    """One tensor parallel rank's slice of the whole model; raises where the model cannot be split as asked."""
    parallel = options.parallel
    if parallel.enable_expert_parallel and not any(isinstance(layer.mlp, MoE) for layer in spec.layers):
        raise UsageError(
            "--enable-expert-parallel is for mixtures of experts; this model has none.", "Leave it out."
        )
    return shard(spec, parallel.tensor_parallel_size, expert_parallel=parallel.enable_expert_parallel)


def check_split(options: EngineOptions, arch: ArchConfig) -> None:
    """Raise where the model cannot be split as asked, before any process is started."""
    if arch.implementation != "octavo":
        raise UsageError(
            "Models that transformers computes run on one device.", "Leave out the parallel sizes."
        )
    cut(part_of(describe(arch), options), 0, options.parallel.pipeline_parallel_size)

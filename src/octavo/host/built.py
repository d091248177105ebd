"""What a backend hands back, and the record of how long the start took."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.config import ModelLimits, Resolved
from octavo.engine.executor.base import Runner
from octavo.host.pooler import Pooler
from octavo.model.arch import ArchConfig
from octavo.runner.memory import MemoryPlan

Progress = Callable[[str, int, int], None]  # phase, done, in all


def limits_of(arch: ArchConfig) -> ModelLimits:
    """What ``config.resolve`` must know of a model."""
    return ModelLimits(max_position=arch.max_position, dtype=arch.dtype, quantized=arch.quantized)


def quiet(phase: str, done: int, total: int) -> None:
    """A progress report that nobody wants."""


@dataclass
class Timeline:
    """How long each phase of the start took, in seconds, in order; and the process, if any, that has got ready beside it
    (``host.rehearsal``)."""

    phases: dict[str, float]
    mark: float
    waiting: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls) -> Timeline:
        """Begin now."""
        return cls({}, time.perf_counter())

    def skip(self) -> None:
        """What has passed since the last mark belongs to no phase."""
        self.mark = time.perf_counter()

    def end(self, phase: str) -> None:
        """The phase that began at the last mark is over."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.mark
        self.mark = now


@dataclass
class Built:
    """A runner and the decisions behind it; ``memory_use``: part -> (planned, measured) bytes."""

    runner: Runner
    arch: ArchConfig
    resolved: Resolved
    memory: MemoryPlan
    device: str
    kernels: dict[str, str]
    memory_use: dict[str, tuple[int, int]] = field(default_factory=dict)
    kind: str = "cpu"
    pooler: Pooler | None = None
    backend: str = ""

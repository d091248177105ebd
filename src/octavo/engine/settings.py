"""What one engine is told: limits and policies (decided by ``config.resolve``) and facts to report."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.config import Resolved
from octavo.engine.scheduler.pace import ALMOST_FREE
from octavo.errors import UsageError
from octavo.protocol.control import ModelFacts


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Limits in tokens and sequences; the rest is passed on in ``EngineInfo``. Ages of the share ``watched_pages`` are measured."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    max_queue_len: int = 4096
    overlap: bool = False
    max_concurrent_batches: int = 1  # steps of different sequences under way, in a pipeline
    max_step_ms: float = 0.0
    watched_pages: float = 0.0
    free_tokens: int = ALMOST_FREE
    seed: int = 0
    model: str = ""
    architecture: str = ""
    dtype: str = ""
    device: str = ""
    kernels: dict[str, str] = field(default_factory=dict)
    timeline_s: dict[str, float] = field(default_factory=dict)
    facts: ModelFacts = field(default_factory=ModelFacts)
    memory_bytes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "vocab_size"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")
        if self.max_queue_len < 0:
            raise UsageError(f"max_queue_len must be at least 0, got {self.max_queue_len}.")

    @classmethod
    def of(
        cls,
        resolved: Resolved,
        *,
        vocab_size: int,
        model: str = "",
        architecture: str = "",
        device: str = "",
        kernels: dict[str, str] | None = None,
        timeline_s: dict[str, float] | None = None,
        facts: ModelFacts | None = None,
        memory_bytes: dict[str, tuple[int, int]] | None = None,
    ) -> EngineSettings:
        """From resolved options and what the host knows of model and device."""
        return cls(
            max_model_len=resolved.max_model_len,
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            vocab_size=vocab_size,
            enable_prefix_caching=resolved.enable_prefix_caching,
            scheduling_policy=resolved.scheduling_policy,
            max_queue_len=resolved.max_queue_len,
            overlap=resolved.overlap,
            max_step_ms=resolved.max_step_ms,
            watched_pages=resolved.watched_pages,
            seed=resolved.seed,
            model=model,
            architecture=architecture,
            dtype=resolved.dtype,
            device=device,
            kernels=kernels or {},
            timeline_s=timeline_s or {},
            facts=facts or ModelFacts(),
            memory_bytes=memory_bytes or {},
        )

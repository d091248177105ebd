"""The seam between deciding and computing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from octavo.engine.cache.layout import CacheLayout
from octavo.protocol.plan import GrammarMask, StepPlan, StepResult


class Runner(Protocol):
    """Computes plans on one device; an ``Executor`` drives one or many.

    Order of calls: ``forward(plan)``, ``sample(masks)`` for the same plan, ``collect()``. With overlap the next
    ``forward`` comes before the last ``collect``; results come back in order.
    """

    layout: CacheLayout
    num_pages: int
    num_slots: int

    def forward(self, plan: StepPlan) -> None:
        """Queue the step's forward pass; returns before the device is done where the device is asynchronous."""

    def sample(self, masks: list[GrammarMask]) -> None:
        """Queue sampling for the plan given to the last ``forward``."""

    def collect(self) -> StepResult:
        """Wait for the oldest sampled step and return its result."""

    def close(self) -> None:
        """Give device memory and helper threads back."""


@dataclass(frozen=True)
class Seat:
    """A worker's place: ``rank`` of ``num_ranks`` in all, ``index`` of ``num_local`` on its machine; workers that one
    process started share a private ``folder``. ``report(phase, done, total)`` tells how far the start is, and that it still
    goes on."""

    rank: int
    num_ranks: int
    index: int
    num_local: int
    folder: str
    report: Callable[[str, int, int], None]


@dataclass(frozen=True)
class Started:
    """What a worker's factory made; ``facts`` are for the executor's owner."""

    runner: Runner
    facts: bytes = b""


# factory(arguments, seat); named as "module:function", arguments must be JSON.
Factory = Callable[[dict[str, Any], Seat], Started]


class Executor(Protocol):
    """One or many runners behind one interface; same call order as ``Runner``."""

    layout: CacheLayout
    num_pages: int
    num_slots: int

    def forward(self, plan: StepPlan) -> None:
        """See ``Runner.forward``."""

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Runner.sample``."""

    def collect(self) -> StepResult:
        """See ``Runner.collect``; raises ``EngineDeadError`` when a worker has died."""

    def watch(self) -> None:
        """Raise ``EngineDeadError`` where a worker has died or hangs; for those who have no step to wait for."""

    def close(self) -> None:
        """Stop the workers."""

"""``LLM(..., distributed_executor_backend="external_launcher")``: this process is one rank of the model.

    rank 0: script ── LLM ── scheduler ── runner ──sums──┐      every rank gets the same calls in the same order, plans the
    rank 1: script ── LLM ── scheduler ── runner ──sums──┘      same steps, and gets the same answers; no plan travels

So nothing may depend on the clock: steps are not cut to a time, and grammars are compiled before a request waits.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace

from octavo.config import EngineOptions
from octavo.device.distributed.world import Meeting, World, external_store, join
from octavo.engine.executor.base import Seat
from octavo.engine.executor.inline import InlineExecutor
from octavo.host.built import Built, Progress, Timeline
from octavo.host.spread import Facts
from octavo.host.torchrun import check_size, launched
from octavo.host.worker import build_part, take_device


class RankExecutor(InlineExecutor):
    """One rank's runner, in step with the others."""

    def __init__(self, built: Built, world: World) -> None:
        super().__init__(built.runner)
        self._runner, self._world = built.runner, world
        self.close = self._leave

    def _leave(self) -> None:
        self._runner.close()
        gc.collect()  # recorded graphs must be gone before the groups that they speak through
        self._world.leave()


def timeless(options: EngineOptions) -> EngineOptions:
    """The same options where no plan depends on how long a step took."""
    return replace(options, scheduler=replace(options.scheduler, max_step_ms=0.0))


def start(options: EngineOptions, progress: Progress) -> tuple[RankExecutor, Facts]:
    """Join the others and load this rank's part."""
    me = launched(os.environ)
    check_size(options, me)
    timeline = Timeline.start()
    seat = Seat(me.rank, me.size, me.local_rank, me.local_size, "", progress)
    options, platform = take_device(timeless(options), seat)
    timeline.end("imports")
    parallel = options.parallel
    meeting = Meeting(
        rank=me.rank,
        size=me.size,
        tensor_size=parallel.tensor_parallel_size,
        timeout_s=parallel.distributed_timeout_seconds,
        address=me.address,
        port=me.port,
    )
    world = join(meeting, platform.device, external_store(meeting, is_served=me.has_store))
    built, cards = build_part(options, world, platform, seat, timeline)
    device = cards or f"{me.size} x {built.device}"
    facts = Facts(built.resolved, device, built.kernels, timeline.phases, built.memory_use, built.kind)
    return RankExecutor(built, world), facts

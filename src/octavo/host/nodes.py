"""Who starts the workers of one model, and where. No torch.

mp                 all in processes of this machine            engine ── MultiprocExecutor ──> workers
--nnodes           machine 0 has the engine, the others an agent each with their workers
external_launcher  the same, a "machine" for every process that torchrun has started (host/torchrun.py)
ray                no worker beside the engine: Ray starts an agent for each, anywhere (host/raycluster.py)
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from octavo.config import EngineOptions, ParallelOptions
from octavo.engine.executor.crew import LOOPBACK, Crew, Node
from octavo.engine.executor.multiproc import MultiprocExecutor
from octavo.engine.executor.node import Agent, NodeHello, accept_nodes, dial, listen
from octavo.host.built import Progress
from octavo.host.raycluster import RayRanks
from octavo.host.spread import Facts
from octavo.host.torchrun import launched

log = logging.getLogger("octavo.distributed")

FACTORY = "octavo.host.worker:build"


def launch(options: EngineOptions, progress: Progress | None = None) -> tuple[MultiprocExecutor, Facts]:
    """Start one worker a rank and wait until all are ready, those of other machines too; raises what the first of them
    has to complain of."""
    parallel = options.parallel
    nodes: Callable[[Callable[[], None]], Sequence[Node]] | None = None
    if parallel.distributed_executor_backend == "ray":
        placed = RayRanks(options, FACTORY, plan_of(options))
        crew, nodes = Crew(0, after=placed.free), placed.start
    elif parallel.nnodes > 1:
        crew, nodes = local_crew(parallel), partial(_wait, options)
    else:
        crew = Crew(parallel.ranks, environment=LOOPBACK)
    executor = MultiprocExecutor(
        FACTORY,
        {"options": msgspec.to_builtins(options)},
        crew=crew,
        num_ranks=parallel.ranks,
        nodes=nodes,
        silence_s=parallel.distributed_timeout_seconds,
        step_s=parallel.execute_model_timeout_seconds,
        progress=progress,
    )
    facts = msgspec.json.decode(executor.facts, type=Facts)
    executor.collects_early = parallel.max_concurrent_batches > 1
    return executor, facts


def plan_of(options: EngineOptions) -> str:
    """What machines must agree about, in one line."""
    parallel = options.parallel
    expert = " with whole experts" if parallel.enable_expert_parallel else ""
    return (
        f"{options.model.model}: {parallel.tensor_parallel_size} slices{expert} x {parallel.pipeline_parallel_size} "
        f"stages on {parallel.nnodes} machines"
    )


def ranks_of(parallel: ParallelOptions) -> list[int]:
    """The ranks of this machine."""
    count = parallel.ranks // parallel.nnodes
    return list(range(parallel.node_rank * count, (parallel.node_rank + 1) * count))


def local_crew(parallel: ParallelOptions) -> Crew:
    """The workers of this machine; where a launcher has started a process for each, that of this process."""
    ranks = ranks_of(parallel)
    if parallel.distributed_executor_backend != "external_launcher":
        return Crew(len(ranks), ranks[0])
    me = launched(os.environ)
    alone = LOOPBACK if me.local_size == me.size else None
    return Crew(1, me.rank, alone, first_index=me.local_rank, num_local=me.local_size)


def _wait(options: EngineOptions, check: Callable[[], None]) -> Sequence[Node]:
    parallel = options.parallel
    listener = listen(parallel.master_addr, parallel.master_port + 1)
    limit_s = parallel.execute_model_timeout_seconds
    return accept_nodes(listener, parallel.nnodes - 1, plan_of(options), check, limit_s=limit_s)


def follow(options: EngineOptions) -> int:
    """Compute for machine 0 until it ends; the exit status is 0 where it ended in order.

    Who stops a group of machines tells all of them at once, but machine 0 may still have answers to finish: the first
    SIGTERM or Ctrl-C only takes note, the second ends this machine.
    """
    parallel = options.parallel
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, partial(_note, number))
    ranks = ranks_of(parallel)
    hello = NodeHello(parallel.node_rank, ranks, plan_of(options))
    connection = dial(parallel.master_addr, parallel.master_port + 1, hello)
    log.info("Computing for %s as ranks %s.", parallel.master_addr, ranks)
    crew = local_crew(parallel)
    crew.build(FACTORY, {"options": msgspec.to_builtins(options)}, parallel.ranks)
    return Agent(connection, crew, parallel.execute_model_timeout_seconds).run()


def _note(expected: int, number: int, frame: object) -> None:
    log.warning("Waiting for machine 0 to end; once more to end at once.")
    signal.signal(expected, signal.SIG_DFL)

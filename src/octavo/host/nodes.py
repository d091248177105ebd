"""Several machines that run one model: machine 0 has the engine, the others an agent each with their workers. No torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from octavo.config import EngineOptions, ParallelOptions
from octavo.engine.executor.multiproc import Crew, Node
from octavo.engine.executor.node import Agent, NodeHello, accept_nodes, dial, listen
from octavo.host.spread import FACTORY

log = logging.getLogger("octavo.distributed")


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


def waiting_for(options: EngineOptions) -> Callable[[Callable[[], None]], Sequence[Node]] | None:
    """What ``MultiprocExecutor`` calls for the other machines' ranks; None where there are none."""
    return partial(_wait, options) if options.parallel.nnodes > 1 else None


def _wait(options: EngineOptions, check: Callable[[], None]) -> Sequence[Node]:
    parallel = options.parallel
    listener = listen(parallel.master_addr, parallel.master_port + 1)
    return accept_nodes(listener, parallel.nnodes - 1, plan_of(options), check)


def follow(options: EngineOptions) -> int:
    """Compute for machine 0 until it ends; the exit status is 0 where it ended in order."""
    parallel = options.parallel
    ranks = ranks_of(parallel)
    hello = NodeHello(parallel.node_rank, ranks, plan_of(options))
    connection = dial(parallel.master_addr, parallel.master_port + 1, hello)
    log.info("Computing for %s as ranks %s.", parallel.master_addr, ranks)
    crew = Crew(len(ranks), ranks[0])
    crew.build(FACTORY, {"options": msgspec.to_builtins(options)}, parallel.ranks)
    return Agent(connection, crew).run()

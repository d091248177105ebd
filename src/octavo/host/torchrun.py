"""Processes that torchrun (or mpirun, or a script) has started, one a rank: what their environment says of them. No torch.

octavo serve   every process is a "machine" of one rank (host/nodes.py): rank 0 serves, the others compute for it
LLM(...)       every process runs the same script and schedules alike (host/external.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from octavo.config import EngineOptions
from octavo.errors import UsageError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SIGN = "TORCHELASTIC_RUN_ID"  # torchrun alone sets it


@dataclass(frozen=True)
class Launched:
    """This process among those that were started together; ``has_store``: torchrun serves a table of keys there."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    has_store: bool


def launched(environ: Mapping[str, str]) -> Launched:
    """What the environment says; raises ``UsageError`` where it says too little."""
    missing = [name for name in NAMES if not environ.get(name)]
    if missing:
        raise UsageError(
            f"--distributed-executor-backend external_launcher is for processes that a launcher starts; the environment has "
            f"no {', '.join(missing)}.",
            "Start it with torchrun --nproc-per-node N, or set them.",
        )
    try:
        rank, size, local_rank, port = (
            int(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        local_size = int(environ.get("LOCAL_WORLD_SIZE") or size)
    except ValueError as error:
        raise UsageError(f"The launcher's environment is not of numbers: {error}.") from None
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size and 0 < port < 65534):
        raise UsageError(
            f"The launcher's environment contradicts itself: RANK {rank}, WORLD_SIZE {size}, LOCAL_RANK {local_rank}, "
            f"LOCAL_WORLD_SIZE {local_size}, MASTER_PORT {port}."
        )
    has_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launched(rank, size, local_rank, local_size, environ["MASTER_ADDR"], port, has_store)


def check_size(options: EngineOptions, me: Launched) -> None:
    """Raise ``UsageError`` where the launcher has started another number of processes than the model needs."""
    parallel = options.parallel
    if me.size != parallel.ranks:
        raise UsageError(
            f"{me.size} processes were started, but --tensor-parallel-size {parallel.tensor_parallel_size} x "
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size} needs {parallel.ranks}.",
            "Make torchrun's --nnodes x --nproc-per-node the same number.",
        )


def as_machine(options: EngineOptions, environ: Mapping[str, str]) -> EngineOptions:
    """``octavo serve`` under a launcher as one of several machines; other options are returned as they are.

    torchrun's own port is taken, so ranks meet at the next one, and plans travel over the one after that.
    """
    parallel = options.parallel
    if parallel.distributed_executor_backend != "external_launcher" and SIGN not in environ:
        return options
    me = launched(environ)
    if parallel.nnodes > 1 or parallel.node_rank > 0:
        raise UsageError("The launcher says which rank this is.", "Leave out --nnodes and --node-rank.")
    check_size(options, me)
    backend = "external_launcher" if me.size > 1 else None
    return replace(
        options,
        parallel=replace(
            parallel,
            distributed_executor_backend=backend,
            nnodes=me.size,
            node_rank=me.rank,
            master_addr=me.address,
            master_port=me.port + 1,
        ),
    )

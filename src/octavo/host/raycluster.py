"""``--distributed-executor-backend ray``: ranks on the machines of a Ray cluster that runs already. No torch.

    engine's process                          Ray: one placement group, a bundle (GPU or CPUs) and an actor a rank
    scheduler ── MultiprocExecutor ──TCP──>   actor (RankHost) ── executor.node.Agent ──ring──> worker (host/worker.py)

Ray only finds the places and starts the agents; plans travel as between machines of ``--nnodes``, and ranks meet at a
port of rank 0's machine. Ranks of one machine are neighbours, and those of the engine's own machine come first.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from octavo import __version__
from octavo.config import EngineOptions
from octavo.engine.executor.crew import LOOPBACK, Crew, Node
from octavo.engine.executor.node import Agent, NodeHello, accept_nodes, dial, listen
from octavo.errors import EngineDeadError, OctavoError, UsageError

log = logging.getLogger("octavo.distributed")

PROBE_S = 5.0
PLACE_S = 60.0  # how long bundles that fit into the cluster may be held by others
# What a rank takes from the engine's environment where its own machine says nothing else.
FORWARDED = ("HF_", "NCCL_", "GLOO_")


@dataclass(frozen=True)
class Place:
    """Where an actor runs: ``index`` is that of its bundle, ``gpus`` what Ray has given it there."""

    index: int
    node: str
    address: str
    gpus: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Task:
    """What an actor is to do."""

    options: bytes
    factory: str
    plan: str
    rank: int
    local_index: int
    num_local: int
    environment: dict[str, str]
    address: str
    port: int


class RankHost:
    """The actor of one rank."""

    def place(self, index: int) -> Place:
        """Where it is."""
        import ray

        gpus = tuple(str(each) for each in ray.get_gpu_ids())
        node = ray.get_runtime_context().get_node_id()
        return Place(index, node, ray.util.get_node_ip_address(), gpus, __version__)

    def free_port(self) -> int:
        """A port of this machine that nobody uses."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def work(self, task: Task) -> int:
        """Be the agent of one rank until its engine ends."""
        options = msgspec.msgpack.decode(task.options, type=EngineOptions)
        parallel = options.parallel
        connection = dial(task.address, task.port, NodeHello(task.rank, [task.rank], task.plan))
        own = [name for name in task.environment if name.startswith(FORWARDED) and name in os.environ]
        environment = {name: value for name, value in task.environment.items() if name not in own}
        crew = Crew(1, task.rank, environment, first_index=task.local_index, num_local=task.num_local)
        crew.build(task.factory, {"options": msgspec.to_builtins(options)}, parallel.ranks)
        return Agent(connection, crew, parallel.execute_model_timeout_seconds).run()


class RayRanks:
    """The ranks of one engine on a Ray cluster; ``start`` is the ``nodes`` of a ``MultiprocExecutor``."""

    def __init__(self, options: EngineOptions, factory: str, plan: str) -> None:
        """Connects; raises ``UsageError`` without Ray, without a cluster, and where it is too small."""
        self._ray, self._is_guest = connect()
        self._plan = plan
        self._factory = factory
        self._group: Any = None
        self._work: list[Any] = []
        self._actors: list[Any] = []
        try:
            self._bundle, self._options = bundle_of(options, self._ray.cluster_resources())
        except OctavoError:
            self.free()
            raise

    def start(self, check: Callable[[], None]) -> Sequence[Node]:
        """Place and start all ranks, and wait until their agents are there."""
        places = self._places()
        first = places[0]
        parallel = replace(
            self._options.parallel,
            distributed_executor_backend="mp",
            nnodes=len(places),
            master_addr=first.address,
            master_port=self._ray.get(self._actors[first.index].free_port.remote()),
        )
        options = msgspec.msgpack.encode(replace(self._options, parallel=parallel))
        here = self._ray.util.get_node_ip_address()
        listener = listen(here, 0)
        address, port = listener.getsockname()[:2]
        for rank, place in enumerate(places):
            neighbours = [other for other in places if other.node == place.node]
            gpus = [gpu for other in neighbours for gpu in other.gpus]
            environment = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
            if len(neighbours) == len(places):
                environment |= LOOPBACK
            task = Task(
                options,
                self._factory,
                self._plan,
                rank,
                neighbours.index(place),
                len(neighbours),
                environment,
                address,
                port,
            )
            self._work.append(self._actors[place.index].work.remote(task))

        def look() -> None:
            check()
            self._look()

        limit_s = parallel.execute_model_timeout_seconds
        return accept_nodes(listener, len(places), self._plan, look, first=0, limit_s=limit_s)

    def free(self) -> None:
        """Give the places back, and leave the cluster where this joined it."""
        if not self._ray.is_initialized():
            return
        for actor in self._actors:
            self._ray.kill(actor)
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
        self._actors, self._group = [], None
        if not self._is_guest:
            self._ray.shutdown()

    def _places(self) -> list[Place]:
        """An actor in every bundle, and where they are, by rank."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ray, count = self._ray, self._options.parallel.ranks
        self._group = ray.util.placement_group([self._bundle] * count, strategy="PACK")
        if not self._group.wait(PLACE_S):
            raise UsageError(
                f"The Ray cluster has had no room for {count} ranks ({told(self._bundle)} each) for {PLACE_S:g} s: others use "
                f"it; free are {told(ray.available_resources())}.",
                "See ray status; end what is not needed.",
            )
        host = ray.remote(RankHost)
        for index in range(count):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            cpus, gpus = self._bundle.get("CPU", 0), self._bundle.get("GPU", 0)
            actor = host.options(
                num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy, max_concurrency=1
            )
            self._actors.append(actor.remote())
        try:
            asked = [actor.place.remote(index) for index, actor in enumerate(self._actors)]
            places: list[Place] = ray.get(asked, timeout=PLACE_S)
        except ray.exceptions.RayError as error:
            raise EngineDeadError(
                f"Ray could not start the ranks: {first_line(error)}",
                f"Octavo {__version__} must be installed on every machine of the cluster, with the same Python.",
            ) from None
        odd = next((place for place in places if place.version != __version__), None)
        if odd is not None:
            raise UsageError(
                f"{odd.address} has Octavo {odd.version}, this machine {__version__}.",
                "Install the same everywhere.",
            )
        mine = ray.get_runtime_context().get_node_id()
        return sorted(places, key=lambda place: (place.node != mine, place.node, place.gpus, place.index))

    def _look(self) -> None:
        """Raise where an actor has ended before its agent came."""
        ended, _ = self._ray.wait(self._work, num_returns=len(self._work), timeout=0)
        for work in ended:
            try:
                self._ray.get(work)
            except self._ray.exceptions.RayError as error:
                raise EngineDeadError(
                    f"Rank {self._work.index(work)} failed on Ray: {first_line(error)}"
                ) from None
            raise EngineDeadError(f"Rank {self._work.index(work)} ended while it started; see its messages.")


def connect() -> tuple[Any, bool]:
    """The module ``ray``, connected to a cluster that runs, and whether it was before."""
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--distributed-executor-backend ray needs Ray, which is not installed.",
            "pip install 'octavo[ray]'",
        ) from None
    if ray.is_initialized():
        return ray, True
    # An address makes Ray join a cluster; without one it would start its own.
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith("ray://"):
        raise UsageError(
            f"RAY_ADDRESS={address} is that of Ray Client; the engine must run on a machine of the cluster.",
            "Start it there, with RAY_ADDRESS unset.",
        )
    try:
        probe(address)
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"No Ray cluster can be reached: {first_line(error)}",
            "Start one (ray start --head, and ray start --address=HEAD:6379 on the other machines), or set RAY_ADDRESS.",
        ) from None
    return ray, False


def probe(address: str) -> None:
    """Raise where nothing listens at a cluster's ``host:port``: Ray itself would try for minutes."""
    name, _, port = address.rpartition(":")
    if name and port.isdigit():
        socket.create_connection((name, int(port)), timeout=PROBE_S).close()


def bundle_of(options: EngineOptions, resources: dict[str, float]) -> tuple[dict[str, float], EngineOptions]:
    """What a rank needs of Ray, and the options with the device that follows; raises where the whole cluster has less."""
    device, ranks = options.device, options.parallel.ranks
    on_gpu = device.device == "cuda" or (device.device == "auto" and resources.get("GPU", 0) > 0)
    if on_gpu:
        kind, needed, bundle = "GPU", ranks, {"GPU": 1.0, "CPU": 1.0}
    else:
        threads = device.threads or 1
        kind, needed, bundle = "CPU", ranks * threads, {"CPU": float(threads)}
        device = replace(device, threads=threads)
    found = resources.get(kind, 0)
    if found < needed:
        raise UsageError(
            f"The Ray cluster has {found:g} {kind}s, but {ranks} ranks need {needed}.",
            "Choose smaller parallel sizes, or add machines (ray start --address=...).",
        )
    return bundle, replace(options, device=replace(device, device="cuda" if on_gpu else "cpu"))


def told(resources: dict[str, float]) -> str:
    """Resources in words."""
    return ", ".join(f"{resources[kind]:g} {kind}" for kind in ("GPU", "CPU") if kind in resources) or "none"


def first_line(error: Exception) -> str:
    """Ray's errors carry whole tracebacks; their last line says what happened."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

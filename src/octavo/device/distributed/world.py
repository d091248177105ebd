"""How ranks find each other, and which groups they form.

    4 ranks, tensor parallel 2, pipeline parallel 2         rank 0 draws tokens, so it belongs to the last stage

        stage 0   ranks 2 3      embedding, first half of the layers ──> hidden states, rank 2 to 0, rank 3 to 1
        stage 1   ranks 0 1      second half, norm, head

Ranks of one machine meet in a private file, those of several at a TCP port of machine 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from octavo.device.distributed.group import Group
from octavo.errors import EngineDeadError, UsageError

JOIN_S = 120.0  # how long a rank waits for the others to appear


@dataclass(frozen=True)
class Meeting:
    """Where this rank meets the others: ``path`` names a file of their own, else ``address`` and ``port`` do."""

    rank: int
    size: int
    tensor_size: int
    timeout_s: float
    path: str = ""
    address: str = ""
    port: int = 0


class World:
    """All ranks, and this one's groups."""

    def __init__(self, meeting: Meeting, store: Store, device: torch.device) -> None:
        """Joins; a collective call of all ranks."""
        self.rank, self.size = meeting.rank, meeting.size
        self.device = device
        self.store = store
        tensor_size = meeting.tensor_size
        self.num_stages = self.size // tensor_size
        self.stage = self.num_stages - 1 - self.rank // tensor_size
        self.is_guest = dist.is_initialized()  # a script that joined its processes before it made an LLM
        self.everyone = Group(self._everyone(meeting), tuple(range(self.size)), self.rank)
        self.tensor = self.everyone
        if self.num_stages > 1:
            for first in range(0, self.size, tensor_size):  # every rank makes every group, as torch wants it
                members = tuple(range(first, first + tensor_size))
                handle = dist.new_group(list(members))
                if self.rank in members and isinstance(handle, dist.ProcessGroup):
                    self.tensor = Group(handle, members, self.rank - first)

    def _everyone(self, meeting: Meeting) -> dist.ProcessGroup:
        """The group of all ranks."""
        timeout = timedelta(seconds=meeting.timeout_s)
        on_gpu = self.device.type == "cuda"
        backend = "nccl" if on_gpu else "gloo"
        if self.is_guest:
            made = dist.new_group(list(range(self.size)), timeout=timeout, backend=backend)
        else:
            dist.init_process_group(
                backend,
                store=self.store,
                rank=self.rank,
                world_size=self.size,
                timeout=timeout,
                device_id=self.device if on_gpu else None,
            )
            made = dist.group.WORLD
        if not isinstance(made, dist.ProcessGroup):
            raise EngineDeadError("The process group was not made.")
        return made

    def leave(self) -> None:
        """Give the groups back, for a process that goes on; a collective call."""
        if not self.is_guest:
            dist.destroy_process_group()
            return
        for group in {self.everyone.name: self.everyone, self.tensor.name: self.tensor}.values():
            dist.destroy_process_group(group.handle)

    @property
    def before(self) -> int | None:
        """The rank that sends hidden states to this one; None in the first stage."""
        return self.rank + self.tensor.size if self.stage > 0 else None

    @property
    def behind(self) -> int | None:
        """The rank that gets this one's hidden states; None in the last stage."""
        return self.rank - self.tensor.size if self.stage < self.num_stages - 1 else None

    def exchange(self, name: str, mine: bytes) -> list[bytes]:
        """What every rank had to say, in order; waits for all of them."""
        self.store.set(f"octavo/{name}/{self.rank}", mine.decode())
        return [bytes(self.store.get(f"octavo/{name}/{rank}")) for rank in range(self.size)]


def join(meeting: Meeting, device: torch.device, store: Store | None = None) -> World:
    """Meet the others, where they are in ``store`` if that is given; raises ``EngineDeadError`` that names who did not
    come, ``UsageError`` for a port in use."""
    store = open_store(meeting) if store is None else store
    wait = timedelta(seconds=min(JOIN_S, meeting.timeout_s))
    names = [f"octavo/here/{rank}" for rank in range(meeting.size)]
    store.set(names[meeting.rank], "1")
    try:
        store.wait(names, wait)
    except RuntimeError:
        absent = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
        raise EngineDeadError(
            f"Rank {', '.join(absent)} of {meeting.size} did not join within {wait.seconds} s.",
            "See its own messages; on other machines check --master-addr, --master-port and the firewall.",
        ) from None
    store.set_timeout(timedelta(seconds=meeting.timeout_s))
    return World(meeting, store, device)


def external_store(meeting: Meeting, *, is_served: bool) -> Store:
    """The table of ranks that others started, at the address they gave; ``is_served`` where its server runs already.

    A script may make several models one after the other: each gets names of its own in the table.
    """
    wait = timedelta(seconds=min(JOIN_S, meeting.timeout_s))
    is_master = not is_served and not dist.is_initialized() and meeting.rank == 0
    try:
        table = TCPStore(
            meeting.address,
            meeting.port,
            is_master=is_master,
            timeout=wait,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise EngineDeadError(
            f"Rank {meeting.rank} does not reach the others at MASTER_ADDR:MASTER_PORT {meeting.address}:{meeting.port}: "
            f"{first_line(error)}",
            "See whether the other ranks run, and whether that port is free.",
        ) from None
    count = table.add(f"octavo/models/{meeting.rank}", 1)
    return PrefixStore(f"octavo/{count}", table)


def open_store(meeting: Meeting) -> Store:
    """The table of keys that all ranks share."""
    if meeting.path:
        return FileStore(meeting.path, meeting.size)
    try:
        return TCPStore(
            meeting.address,
            meeting.port,
            meeting.size,
            is_master=meeting.rank == 0,
            timeout=timedelta(seconds=min(JOIN_S, meeting.timeout_s)),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if meeting.rank == 0:
            raise UsageError(
                f"--master-port {meeting.port} cannot be used: {first_line(error)}", "Choose another port."
            ) from None
        raise EngineDeadError(
            f"Machine 0 does not answer at {meeting.address}:{meeting.port}: {first_line(error)}",
            "Check --master-addr and --master-port, and that it is started.",
        ) from None


def first_line(error: Exception) -> str:
    """torch's errors carry pages of traces below the first line."""
    return str(error).strip().partition("\n")[0]

"""A process group as a value: some ranks, and the exchanges between them (NCCL on GPUs, gloo on CPUs).

Every rank of a group must make the same calls in the same order; each call queues work on the current stream and
may be recorded in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """``members`` are ranks of the world, in order; ``rank`` is this one's place among them."""

    def __init__(self, handle: dist.ProcessGroup, members: tuple[int, ...], rank: int) -> None:
        self.handle = handle
        self.members = members
        self.rank = rank
        self.size = len(members)
        # torch is renaming it.
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    @property
    def name(self) -> str:
        """What torch calls the group."""
        return str(self.handle.group_name)

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over the group, in place."""
        dist.all_reduce(x, group=self.handle)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[T, n] of every rank, side by side in order: [T, size * n]."""
        tokens, width = x.shape
        joined = x.new_empty((self.size * tokens, width))
        self._gather(joined, x.contiguous(), group=self.handle)
        return joined.view(self.size, tokens, width).transpose(0, 1).reshape(tokens, self.size * width)

    def broadcast(self, x: Tensor) -> Callable[[], object]:
        """Begin to make ``x``, in place, the first member's values everywhere; what is returned waits for them."""
        work = dist.broadcast(x, self.members[0], group=self.handle, async_op=True)
        if work is None:
            raise RuntimeError("this process is not of the group")
        wait: Callable[[], object] = work.wait
        return wait

    def send(self, x: Tensor, to: int) -> None:
        """Give ``x`` to a member."""
        dist.send(x, self.members[to], group=self.handle)

    def receive(self, x: Tensor, source: int) -> Tensor:
        """Fill ``x`` with what a member sends."""
        dist.recv(x, self.members[source], group=self.handle)
        return x

    def least(self, values: list[int], device: torch.device) -> list[int]:
        """The smallest of each value over the group; waits for all of them."""
        found = torch.tensor(values, dtype=torch.int64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.handle)
        return [int(value) for value in found.tolist()]

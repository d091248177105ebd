"""Sums of small messages in one kernel: every rank reads all the others' memory over NVLink and adds.

    NCCL's ring passes a message around twice; here it crosses once:
    copy x into my peer-visible buffer │ wait for all │ out = buffer 0 + buffer 1 + ... (same order everywhere) │ wait

torch's symmetric memory maps the buffers and supplies the kernel; it asks for no multicast, which
``engine.executor.multiproc`` keeps off. NCCL remains for what is larger, of another type, or not contiguous.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.device.distributed.group import Group

log = logging.getLogger("octavo.distributed")

LIMIT_BYTES = 512 << 10  # above this NCCL's bandwidth wins
ALIGNMENT = 16  # bytes a thread moves at once
TYPES = (torch.bfloat16, torch.float32)


class OneShot:
    """One buffer a group; sums are queued on the current stream, one after the other."""

    def __init__(self, group: Group, dtype: torch.dtype, limit_bytes: int = LIMIT_BYTES) -> None:
        """A collective call; raises ``RuntimeError`` where the devices cannot read each other's memory."""
        import torch.distributed._symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        self.group = group
        self.name = group.name
        self.buffer = symmetric.empty(limit_bytes // dtype.itemsize, dtype=dtype, device=device)
        self.handle = symmetric.rendezvous(self.buffer, group.name)  # type: ignore[arg-type]
        self.kernel: Callable[[Tensor, Tensor, str, str], Tensor] = (
            torch.ops.symm_mem.one_shot_all_reduce_copy.default
        )

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over the group: a new tensor, or ``x`` itself where NCCL had to do it."""
        count = x.numel()
        fits = 0 < count <= self.buffer.numel() and x.dtype == self.buffer.dtype and x.is_contiguous()
        if not fits or count * x.element_size() % ALIGNMENT or x.data_ptr() % ALIGNMENT:
            return self.group.reduce(x)
        return self.kernel(self.buffer[:count].view_as(x), x, "sum", self.name)


def make_reduce(
    group: Group, dtype: torch.dtype, device: torch.device, *, one_shot: bool
) -> Callable[[Tensor], Tensor]:
    """The sum over a group, by the one-shot kernel where it is wanted and proves itself on this machine."""
    if not one_shot or device.type != "cuda" or dtype not in TYPES or group.size == 1:
        return group.reduce
    made: OneShot | None = None
    try:
        made = OneShot(group, dtype)
    except (RuntimeError, ImportError, AttributeError) as error:
        log.warning("Sums use NCCL alone: %s", str(error).partition("\n")[0])
    # One rank without it means none with it; the kernel would wait for that one for ever.
    if not group.least([int(made is not None)], device)[0] or made is None:
        return group.reduce
    if not group.least([int(proves_itself(made, device))], device)[0]:
        log.warning("Sums use NCCL alone: the one-shot kernel gave wrong sums.")
        return group.reduce
    return made.reduce


def proves_itself(made: OneShot, device: torch.device) -> bool:
    """Whether its sums of whole numbers are exact."""
    x = torch.arange(4096, device=device).remainder(61).to(made.buffer.dtype) + made.group.rank
    wanted = made.group.reduce(x.clone())
    return bool(torch.equal(made.reduce(x), wanted))

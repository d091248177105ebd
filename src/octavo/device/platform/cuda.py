"""NVIDIA GPUs through torch.cuda: one stream, caching allocator, CUDA graphs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.config import Hardware
from octavo.device.ops.bind import OpSpec
from octavo.device.platform.cpu import DTYPE_NAMES
from octavo.device.platform.machine import usable_cores
from octavo.errors import UsageError


class CUDAPlatform:
    """One CUDA device, which becomes the process's current one."""

    kind = "cuda"

    def __init__(self, *, threads: int | None = None, index: int = 0) -> None:
        count = torch.cuda.device_count()
        if index >= count:
            raise UsageError(
                f"{index + 1} GPUs are needed on this machine, but {count} {'is' if count == 1 else 'are'} visible.",
                "Choose a smaller --tensor-parallel-size, or see CUDA_VISIBLE_DEVICES.",
            )
        torch.cuda.set_device(index)
        self.device = torch.device("cuda", index)
        self.threads = threads or usable_cores()
        self.properties = torch.cuda.get_device_properties(self.device)
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self.stream)  # graphs cannot be captured on the default stream
        torch.set_num_threads(min(4, self.threads))  # host-side torch work is tiny

    @staticmethod
    def unavailable() -> str | None:
        """None, or why CUDA cannot be used."""
        if torch.version.cuda is None:
            return "this torch build has no CUDA."
        if not torch.cuda.is_available():
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            return "no CUDA device is visible" + (
                f" (CUDA_VISIBLE_DEVICES={hidden})." if hidden is not None else "."
            )
        return None

    @property
    def capability(self) -> int:
        """Compute capability times ten (90 = Hopper)."""
        return int(self.properties.major * 10 + self.properties.minor)

    def hardware(self) -> Hardware:
        """See ``Platform``."""
        total = int(self.properties.total_memory)
        return Hardware("cuda", str(self.properties.name), total, self.threads, self.capability >= 80)

    def op_spec(self, dtype: torch.dtype) -> OpSpec:
        """See ``Platform``."""
        return OpSpec("cuda", DTYPE_NAMES[dtype], self.capability)

    def free_bytes(self) -> int:
        """What the driver has left once torch has given back what it keeps unused (pools of graphs stay)."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        free, _total = torch.cuda.mem_get_info(self.device)
        return int(free)

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """See ``Platform``."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device) - before)

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """See ``Platform``."""
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def event(self) -> torch.cuda.Event:
        """See ``Platform``."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """See ``Platform``."""
        torch.cuda.synchronize(self.device)

    def capture(self, work: Callable[[], None], pool: object | None) -> tuple[Callable[[], None], object]:
        """See ``Platform``; ``work`` must have run once before, so that its kernels are compiled."""
        graph = torch.cuda.CUDAGraph()
        shared: Any = pool
        # Only this thread is held to the rules of recording: NCCL's watchdog asks its own events meanwhile.
        with torch.cuda.graph(graph, pool=shared, stream=self.stream, capture_error_mode="thread_local"):
            work()
        return graph.replay, graph.pool()

    def bound(self, more: int | None) -> None:
        """See ``Platform``; torch gives unused blocks back before it would ask the driver for more than this."""
        total = int(self.properties.total_memory)
        most = total if more is None else torch.cuda.memory_reserved(self.device) + more
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), self.device)

    def release(self) -> None:
        """See ``Platform``."""
        torch.cuda.empty_cache()

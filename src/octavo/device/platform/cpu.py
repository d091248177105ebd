"""The CPU as a device of plain torch: everything is done when a call returns."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from octavo.config import Hardware
from octavo.device.ops.bind import OpSpec

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut to the cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return cores


def available_bytes() -> tuple[int, int]:
    """(free, total) memory for this process: the machine's, cut to the cgroup's limit."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = page * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            total, free = min(total, int(limit)), min(free, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return free, total


class DoneEvent:
    """An event on a device that never lags."""

    def record(self) -> None:
        """Nothing to mark."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CPUPlatform:
    """Plain torch on the cores this process may use."""

    kind = "cpu"

    def __init__(self, *, threads: int | None = None) -> None:
        self.device = torch.device("cpu")
        self.threads = threads or usable_cores()
        torch.set_num_threads(self.threads)

    @staticmethod
    def unavailable() -> str | None:
        """A CPU is always there."""
        return None

    def hardware(self) -> Hardware:
        """See ``Platform``."""
        return Hardware(
            "cpu", platform.processor() or platform.machine(), available_bytes()[1], self.threads, True
        )

    def op_spec(self, dtype: torch.dtype) -> OpSpec:
        """See ``Platform``."""
        return OpSpec("cpu", DTYPE_NAMES[dtype])

    def free_bytes(self) -> int:
        """See ``Platform``."""
        return available_bytes()[0]

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Not measured: host memory is not ours alone; ``runner.memory`` bounds the cache instead."""
        return 0

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """See ``Platform``."""
        return torch.empty(size, dtype=dtype)

    def event(self) -> DoneEvent:
        """See ``Platform``."""
        return DoneEvent()

    def synchronize(self) -> None:
        """See ``Platform``."""

    def capture(self, work: Callable[[], None], pool: object | None) -> None:
        """A CPU has no graphs."""

    def close(self) -> None:
        """See ``Platform``."""

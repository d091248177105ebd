"""The CPU as a device of plain torch: everything is done when a call returns."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.config import Hardware
from octavo.device.ops.bind import OpSpec
from octavo.device.platform.machine import available_bytes, usable_cores

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class DoneEvent:
    """An event on a device that never lags."""

    def record(self) -> None:
        """Nothing to mark."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CPUPlatform:
    """Plain torch on the cores this process may use."""

    kind = "cpu"

    def __init__(self, *, threads: int | None = None, index: int = 0) -> None:
        """``index`` is for devices of which there may be several."""
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

    def bound(self, more: int | None) -> None:
        """Nothing is kept unused on a CPU."""

    def release(self) -> None:
        """See ``Platform``."""

"""The seam to a device: a few questions, so that adding one is adding a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from octavo.config import Hardware
from octavo.device.ops.bind import OpSpec


class Event(Protocol):
    """A point in the device's queue."""

    def record(self) -> None:
        """Mark the point after everything queued so far."""

    def synchronize(self) -> None:
        """Wait until the device has passed the point."""


class Platform(Protocol):
    """One device."""

    kind: str
    device: torch.device

    def hardware(self) -> Hardware:
        """Facts for ``config.resolve``."""

    def op_spec(self, dtype: torch.dtype) -> OpSpec:
        """Facts that decide which kernels bind."""

    def free_bytes(self) -> int:
        """Memory that can be allocated now."""

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Run ``work`` and return the most bytes it held above what was held before."""

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Host memory the device can copy from and to without waiting (page-locked on GPUs)."""

    def event(self) -> Event:
        """A new event."""

    def synchronize(self) -> None:
        """Wait for everything queued."""

    def capture(
        self, work: Callable[[], None], pool: object | None
    ) -> tuple[Callable[[], None], object] | None:
        """Record ``work`` as a graph: (replay, memory pool to share), or None where devices have no graphs."""

    def bound(self, more: int | None) -> None:
        """Hold at most ``more`` bytes above what is held now, unused ones included; None: as much as there is."""

    def release(self) -> None:
        """Give cached memory back."""

"""Uploads that never wait for the device: page-locked buffers in turn.

A copy from ordinary memory, or one that is not ``non_blocking``, waits until everything queued before it is done: the
device would then idle while the host prepares the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.device.platform.base import Platform

Ints = NDArray[np.int64]


class Staging:
    """A ring of page-locked host buffers; depth 4 outlives every copy in flight (at most two steps are)."""

    DEPTH = 4

    def __init__(self, platform: Platform, size: int) -> None:
        self.platform = platform
        self.buffers = [platform.host_buffer(size, torch.int32) for _ in range(self.DEPTH)]
        self.turn = 0

    def pack(self, columns: Sequence[NDArray[np.integer[Any]]]) -> Tensor:
        """All columns one after the other in the next buffer, as int32."""
        total = sum(len(column) for column in columns)
        self.turn = (self.turn + 1) % self.DEPTH
        if self.buffers[self.turn].numel() < total:
            self.buffers[self.turn] = self.platform.host_buffer(2 * total, torch.int32)
        buffer = self.buffers[self.turn][:total]
        np.concatenate(columns, out=buffer.numpy(), casting="unsafe")
        return buffer

    def upload(self, columns: Sequence[NDArray[np.integer[Any]]]) -> list[Tensor]:
        """Device copies of the columns (int32), by one transfer."""
        packed = self.pack(columns).to(self.platform.device, non_blocking=True)
        return list(torch.split(packed, [len(column) for column in columns]))

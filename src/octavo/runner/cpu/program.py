"""A tape under construction: memory by address, argument tables, instructions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from octavo.device.kernels.numba.library import KernelLibrary
from octavo.model.blocks import Attention, Layer

ALIGNMENT = 64


def aligned(shape: tuple[int, ...] | int, dtype: DTypeLike, zero: bool = False) -> NDArray[Any]:
    """An array whose first byte lies on a cache line. Not cleared unless asked: untouched pages cost no memory."""
    shape = (shape,) if isinstance(shape, int) else shape
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (np.zeros if zero else np.empty)(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def attention_of(layer: Layer) -> Attention:
    """The layer's attention, the only mixer that ``supports`` lets pass."""
    if not isinstance(layer.attention, Attention):
        raise TypeError(f"no compiled kernel for {type(layer.attention).__name__}")
    return layer.attention


class Arena:
    """Many arrays in few large allocations, which the system can back with huge pages (fewer address look-ups)."""

    CHUNK = 32 << 20

    def __init__(self) -> None:
        self._chunk = aligned(0, np.uint8)
        self._used = 0

    def take(self, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """An uninitialized uint8 array on a cache line."""
        nbytes = shape[0] * shape[1]
        if self._used + nbytes > len(self._chunk):
            self._chunk, self._used = aligned(max(self.CHUNK, nbytes), np.uint8), 0
        piece = self._chunk[self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return piece.reshape(shape)


def float_bits(value: float) -> int:
    """A float32 as an entry of an argument table."""
    return int(np.float32(value).view(np.uint32))


@dataclass
class Program:
    """Instructions in order. ``keep`` holds every array whose address is in some argument table."""

    library: KernelLibrary
    keep: list[NDArray[Any]] = field(default_factory=list)
    instructions: list[tuple[int, int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, kernel: str, arguments: list[int], barrier: bool = True) -> NDArray[np.int64]:
        """Append a kernel call; returns its argument table, whose entries may be changed between runs."""
        table = np.array(arguments, np.int64)
        self.keep.append(table)
        self.names.append(kernel)
        self.instructions.append((self.library.address(kernel), table.ctypes.data, int(barrier)))
        return table

    def tape(self) -> NDArray[np.int64]:
        """The finished table [instructions, 3]."""
        return np.array(self.instructions, np.int64).reshape(-1, 3)

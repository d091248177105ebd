"""A tape under construction: memory by address, argument tables, instructions."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
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


def norms_whole(block: Attention) -> bool:
    """Whether q and k are normed over all heads together (OLMoE)."""
    sizes = [norm.size if norm is not None else 0 for norm in (block.q_norm, block.k_norm)]
    return (
        sizes
        == [block.num_heads * block.head_dim, block.num_kv_heads * block.head_dim]
        != [block.head_dim] * 2
    )


class Arena:
    """Many arrays in few large allocations on huge pages where the system grants them: fewer address look-ups."""

    CHUNK = 32 << 20
    HUGE = 2 << 20

    def __init__(self) -> None:
        self._chunk = aligned(0, np.uint8)
        self._used = 0

    def take(self, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """An uninitialized uint8 array on a cache line."""
        nbytes = shape[0] * shape[1]
        if self._used + nbytes > len(self._chunk):
            self._chunk, self._used = self._map(max(self.CHUNK, nbytes)), 0
        piece = self._chunk[self._used : self._used + nbytes]
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return piece.reshape(shape)

    def _map(self, nbytes: int) -> NDArray[np.uint8]:
        """Fresh memory from the border of a huge page on; the arrays keep it mapped."""
        if sys.platform == "linux":
            memory = mmap.mmap(-1, nbytes + self.HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without them: small pages do
                memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            memory = mmap.mmap(-1, nbytes + self.HUGE)
        raw = np.frombuffer(memory, np.uint8)
        start = -raw.ctypes.data % self.HUGE
        return raw[start : start + nbytes]


def float_bits(value: float) -> int:
    """A float32 as an entry of an argument table."""
    return int(np.float32(value).view(np.uint32))


@dataclass(frozen=True)
class Instruction:
    """What the times of an instruction are compared with: bytes of weights it reads, multiplications for a token."""

    kernel: str
    nbytes: int = 0
    products: int = 0


@dataclass(frozen=True)
class Tape:
    """A finished table [instructions, 3] (kernel, arguments, barrier after it)."""

    table: NDArray[np.int64]
    facts: tuple[Instruction, ...]
    address: int

    def __len__(self) -> int:
        return len(self.table)


@dataclass
class Program:
    """Instructions in order. ``keep`` holds every array whose address is in some argument table."""

    library: KernelLibrary
    keep: list[NDArray[Any]] = field(default_factory=list)
    instructions: list[tuple[int, int, int]] = field(default_factory=list)
    facts: list[Instruction] = field(default_factory=list)

    def add(
        self,
        kernel: str,
        arguments: list[int],
        barrier: bool = True,
        nbytes: int = 0,
        products: int = 0,
    ) -> NDArray[np.int64]:
        """Append a kernel call; returns its argument table, whose entries may be changed between runs."""
        table = np.array(arguments, np.int64)
        self.keep.append(table)
        self.facts.append(Instruction(kernel, nbytes, products))
        self.instructions.append((self.library.address(kernel), table.ctypes.data, int(barrier)))
        return table

    def tape(self) -> Tape:
        """The finished table of what was added since the last one."""
        table = np.array(self.instructions, np.int64).reshape(-1, 3)
        tape = Tape(table, tuple(self.facts), int(table.ctypes.data))
        self.instructions, self.facts = [], []
        return tape

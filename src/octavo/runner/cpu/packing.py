"""Block tensors into panels on all threads; what the compiled kernel does not know goes the numpy way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba import formats
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.runner.cpu.program import Program, aligned
from octavo.runner.cpu.threads import Team

# Block type -> float16 fields, words of fifth bits, words of weights, what these are xored with.
SIMPLE = {
    "Q4_0": (1, 0, 4, 0),
    "Q4_1": (2, 0, 4, 0),
    "Q5_0": (1, 1, 4, 0),
    "Q5_1": (2, 1, 4, 0),
    "Q8_0": (1, 0, 8, -0x7F7F7F80),
}


class Packer:
    """Repacks rows of GGUF blocks; ``lower`` receives the second plane of a split matrix."""

    def __init__(self, team: Team, library: KernelLibrary) -> None:
        self.team, self.library = team, library
        self.scratch = aligned((team.threads, 512), np.uint8)

    def pack(
        self,
        dtype: str,
        raw: NDArray[np.uint8],
        inputs: int,
        weights: NDArray[np.uint8],
        scales: NDArray[np.uint8],
        lower: NDArray[np.uint8] | None = None,
    ) -> None:
        """See ``formats.pack``: ``raw`` [rows, row bytes], rows a multiple of 16; the others [rows / 16, panel bytes]."""
        blocks = inputs // formats.BLOCK
        if dtype not in SIMPLE:
            formats.pack(dtype, raw, inputs, weights, scales)
            return
        raw = np.ascontiguousarray(raw)
        program = Program(self.library)
        planes = weights.ctypes.data, scales.ctypes.data, 0 if lower is None else lower.ctypes.data
        program.add(
            "pack_blocks",
            [
                raw.ctypes.data,
                raw.shape[1],
                raw.shape[1] // blocks,
                blocks,
                len(raw) // formats.ROWS,
                *SIMPLE[dtype],
                *planes,
                self.scratch.ctypes.data,
            ],
        )
        self.team.run(program.tape())

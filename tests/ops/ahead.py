"""Compiles our kernels for a GPU that is not here: ``python tests/ops/ahead.py CAPABILITY`` prints, for each launch, the
kernel's name and what it needs, as JSON.

The real launchers run on CPU tensors, over a driver that names a device and never launches: what they would launch is compiled,
down to machine code. A process of its own, because Triton's interpreter is chosen when kernels are imported.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from packed_cases import LAYOUTS
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from octavo.device.kernels.triton import attention, fragments, norm, packed
from octavo.device.ops.packed import Layout, empty_packed, in_fragments

FORMATS = ("awq", "q8_0")
ROWS = {"one": [(1, 90)], "prompt": [(200, 300), (1, 50)], "long": [(1100, 1100), (1, 50)]}


class Absent:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def record(capability: int) -> list[dict[str, Any]]:
    """From now on every launch is compiled and noted instead."""
    driver.set_active(Absent(capability))
    found: list[dict[str, Any]] = []
    run = jit.JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        found.append({"kernel": self.fn.__name__, "shared": kernel.metadata.shared})
        return kernel

    jit.JITFunction.run = compiled
    return found


def products(capability: int) -> None:
    """Packed products at every size of step."""
    fragments.processors = lambda device: 132
    kinds = (
        (fragments.LinearFragmentsHopper, packed.LinearPackedHopper)
        if capability >= 90
        else (fragments.LinearFragments, packed.LinearPacked)
    )
    x = torch.zeros(1, 4096, dtype=torch.bfloat16)

    def warm(kind: Any, layout: Layout) -> None:
        linear = kind()
        linear.counters = torch.zeros(4096, dtype=torch.int32)
        linear._warm(x, empty_packed(layout, 4096, 4096, torch.device("cpu")), None)

    for name in FORMATS:
        warm(kinds[0], in_fragments(LAYOUTS[name]))
    warm(kinds[1], LAYOUTS["q6_k"])


def steps(capability: int) -> None:
    """Attention and norms of a layer with 8 key heads of 128."""
    attend = attention.PagedAttention(large=capability >= 90, pdl=capability >= 90)
    pages = torch.zeros(200, 2, 8, 16, 128, dtype=torch.bfloat16)
    for rows in ROWS.values():
        tokens = sum(new for new, _ in rows)
        starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
        table, lengths = (
            torch.zeros(len(rows), 130, dtype=torch.int32),
            torch.zeros(len(rows), dtype=torch.int32),
        )
        q = torch.zeros(tokens, 32, 128, dtype=torch.bfloat16)
        attend(q, pages, table, starts, lengths, max(new for new, _ in rows), 2048, 0.1)
    norm.rms_norm(torch.zeros(3, 4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16), 1e-5)


def main() -> None:
    capability = int(sys.argv[1])
    found = record(capability)
    products(capability)
    steps(capability)
    json.dump({"triton": triton.__version__, "launches": found}, sys.stdout)


if __name__ == "__main__":
    main()

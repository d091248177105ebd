"""Launch shapes of the one-token products, side by side: which one should this card take?

    python -m octavo.bench.gpu_vector --json vector.json

Times are those of calls inside one CUDA graph, over rotating weights that exceed the L2 cache, with dependent launch
where the card has it. The launch shape bound today is marked; the library's product stands beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from octavo.bench.gpu_fp8 import products
from octavo.bench.gpu_kernels import ROTATE_BYTES, SHAPES, Call, ceilings, normal, time_us
from octavo.device.kernels.triton import fp8, linear
from octavo.device.kernels.triton.linear import Launch
from octavo.device.ops.fp8 import quantize_rows

LAUNCHES = (
    *(Launch(*sizes) for sizes in product((4, 8, 16), (512, 1024), (4, 8))),
    Launch(8, 512, 8, 2),
    Launch(8, 1024, 8, 2),
)
KINDS = ("dense", "gated", "fp8")


@dataclass
class Timing:
    """One launch shape on one product; ``us`` None = it failed, ``why`` says how."""

    model: str
    kind: str
    product: str
    launch: str
    us: float | None
    share: float
    bound: bool
    why: str = ""


def name_of(launch: Launch) -> str:
    """Like 8x512w8s4."""
    return f"{launch.block_n}x{launch.block_k}w{launch.num_warps}s{launch.num_stages}"


def inputs_of(kind: str, n: int, k: int) -> list[tuple[Any, ...]]:
    """Arguments of a kind's function but for the launch shape, for weights that exceed the cache."""
    num_bytes = n * k * (1 if kind == "fp8" else 2)
    sets = max(1, min(16, ROTATE_BYTES // num_bytes))
    if kind == "fp8":
        return [(normal(1, k), *quantize_rows(normal(n, k)), None) for _ in range(sets)]
    last = "silu" if kind == "gated" else None
    return [(normal(1, k), normal(n, k), last) for _ in range(sets)]


def way_of(kind: str, n: int) -> tuple[Callable[..., Any], Launch]:
    """A kind's function, and the launch shape it takes today for a weight of ``n`` rows."""
    if kind == "fp8":
        return fp8.vector, fp8.VECTOR
    if kind == "gated":
        return linear.gated_vector, linear.gated_launch(n // 2)
    return linear.vector, linear.vector_launch(n)


def timings(model: str, kind: str, name: str, size: tuple[int, int], bandwidth: float) -> list[Timing]:
    """Every launch shape on one product."""
    n, k = size
    inputs = inputs_of(kind, n, k)
    repeats = max(1, 16 // len(inputs))
    floor = n * k * (1 if kind == "fp8" else 2) / bandwidth * 1e6
    pdl = torch.cuda.get_device_capability() >= (9, 0)
    way, today = way_of(kind, n)
    library: list[Call] = [partial(F.linear, one[0], normal(n, k)) for one in inputs]
    found = [Timing(model, kind, name, "library bf16", time_us(library, repeats), 0.0, False)]
    for launch in dict.fromkeys((*LAUNCHES, today)):
        row = Timing(model, kind, name, name_of(launch), None, 0.0, launch == today)
        found.append(row)
        try:
            calls: list[Call] = [partial(way, *one, launch, pdl=pdl) for one in inputs]
            row.us = time_us(calls, repeats)
            row.share = floor / row.us
        except Exception as problem:  # noqa: BLE001  a launch shape may exceed what the card has
            row.why = f"{type(problem).__name__}: {str(problem).splitlines()[0][:80]}"
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_vector", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default=SHAPES[0].name, choices=[shape.name for shape in SHAPES])
    parser.add_argument("--kinds", default=",".join(KINDS), help="of dense, gated, fp8")
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("There is no CUDA device here; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    bandwidth, _ = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s")
    everything: list[Timing] = []
    shape = next(shape for shape in SHAPES if shape.name == arguments.model)
    for kind in arguments.kinds.split(","):
        for name, size in products(shape).items():
            if kind == "gated" and name != "gate_up":
                continue
            found = timings(shape.name, kind, name, size, bandwidth)
            everything += found
            good = sorted((row for row in found if row.us), key=lambda row: row.us or 0.0)
            texts = [f"{'*' if row.bound else ''}{row.launch} {row.us:.1f}" for row in good[:6]]
            texts += [f"*{row.launch} {row.us:.1f}" for row in good[6:] if row.bound]
            print(f"{shape.name:13} {kind:6} {name:8} us: {', '.join(texts)}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps([vars(row) for row in everything], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Products with fp8 weights on a GPU: each way at each number of tokens, against its floor and the dense product.

    python -m octavo.bench.gpu_fp8 --tokens 1,4,8,64,256,1024,8192

Times are those of calls inside one CUDA graph, over rotating weights that exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from octavo.bench.gpu_kernels import ROTATE_BYTES, SHAPES, Call, Shape, ceilings, normal, time_us
from octavo.device.kernels.triton import fp8 as kernels
from octavo.device.ops.fp8 import quantize_rows

WAYS: tuple[tuple[str, Callable[..., object], int, int], ...] = (  # name, function, fewest and most tokens
    ("vector", partial(kernels.vector, pdl=True), 1, 1),
    ("tensor-wise", kernels.tensor_wise, 1, 1 << 20),
    ("row-wise", kernels.row_wise, 2, 1 << 20),
)


def products(shape: Shape) -> dict[str, tuple[int, int]]:
    """Sizes (outputs, inputs) of a layer's four products."""
    wide = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return {
        "qkv": (wide, shape.hidden),
        "o": (shape.hidden, shape.heads * shape.head_dim),
        "gate_up": (2 * shape.ffn, shape.hidden),
        "down": (shape.hidden, shape.ffn),
    }


def times(n: int, k: int, tokens: int) -> dict[str, float]:
    """Microseconds of the dense product and of each way that takes so many tokens."""
    sets = max(1, min(16, ROTATE_BYTES // (n * k)))
    inputs = [(normal(tokens, k), *quantize_rows(normal(n, k))) for _ in range(sets)]
    repeats = max(1, 16 // sets)
    calls: list[Call] = [partial(F.linear, x, normal(n, k)) for x, _, _ in inputs]
    found = {"dense": time_us(calls, repeats)}
    for name, way, fewest, most in WAYS:
        if fewest <= tokens <= most:
            calls = [partial(way, *arguments) for arguments in inputs]
            found[name] = time_us(calls, repeats)
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_fp8", description=__doc__)
    parser.add_argument("--model", default=SHAPES[0].name, choices=[shape.name for shape in SHAPES])
    parser.add_argument("--tokens", default="1,4,8,64,256,512,1024,2048,8192", help="comma separated")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("There is no CUDA device here; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    shape = next(shape for shape in SHAPES if shape.name == arguments.model)
    bandwidth, rate = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s, bf16 {rate / 1e12:.0f} TFLOP/s")
    for tokens in map(int, arguments.tokens.split(",")):
        for name, (n, k) in products(shape).items():
            floor = max((n * k + 2 * tokens * (n + k)) / bandwidth, tokens * n * k / rate) * 1e6
            found = times(n, k, tokens)
            columns = "  ".join(f"{way} {us:8.1f} us ({floor / us:4.0%})" for way, us in found.items())
            print(f"{tokens:6} tokens {name:8} floor {floor:8.1f} us  {columns}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Products with quantized weights on a GPU: each format at few and many tokens, against the bytes it must read.

    python -m octavo.bench.gpu_quant --tokens 1,16,256

Times are those of calls inside one CUDA graph, over rotating weights that exceed the L2 cache. The floor is the larger of
bytes over the rate of a copy and operations over the rate of a bfloat16 product; "bf16" is the time of the dense product. "first
order" is that of experts' codes (``device/ops/packed.py``), where matrices of a layer lie in the tensor cores'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.bench.gpu_fp8 import products
from octavo.bench.gpu_kernels import ROTATE_BYTES, SHAPES, Call, ceilings, normal, time_us
from octavo.device.ops import fp8, int8
from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.ops.packed import LINEAR_PACKED, Layout, Packed, empty_packed, in_fragments

LAYOUTS: dict[str, Layout] = {
    "awq g128": Layout(4, 0, 32, 128, scales="zero"),
    "gptq sym g128": Layout(4, 0, 32, 128),
    "w8a16 channel": Layout(8, 0, 32, 0, offset=128),
    "mxfp4": Layout(4, 0, 32, 32, code="e2m1", half=torch.bfloat16),
    "nvfp4": Layout(4, 0, 16, 16, code="e2m1", scales="e4m3"),
    "nf4": Layout(4, 0, 32, 64, code="nf4", scales="float"),
    "Q2_K": Layout(2, 0, 16, 16, scales="k4"),
    "Q3_K": Layout(2, 1, 16, 16, scales="bytes", offset=4),
    "IQ4_NL": Layout(4, 0, 32, 32, code="iq4"),
    "IQ4_XS": Layout(4, 0, 32, 32, code="iq4", scales="bytes"),
    "Q4_0": Layout(4, 0, 32, 32),
    "Q8_0": Layout(8, 0, 32, 32, offset=128),
    "Q4_K": Layout(4, 0, 32, 32, scales="k"),
    "Q5_K": Layout(4, 1, 32, 32, scales="k"),
    "Q6_K": Layout(4, 2, 16, 16, scales="bytes", offset=32),
}
Make = Callable[[int, int], tuple[Callable[[Tensor], Tensor], int]]  # (n, k) -> product, bytes of the weight


def random_packed(layout: Layout, n: int, k: int) -> Packed:
    """Random codes; scales of zeros cost the same time as others."""
    weight = empty_packed(layout, n, k, torch.device("cuda"))
    weight.words.random_(-(1 << 31), (1 << 31) - 1)
    if weight.high is not None:
        weight.high.random_(0, 127)
    return weight


def makers(spec: OpSpec) -> dict[str, Make]:
    """Format to what makes a product with a fresh weight."""
    binder = Binder()

    def packed(layout: Layout, n: int, k: int) -> tuple[Callable[[Tensor], Tensor], int]:
        weight = random_packed(layout, n, k)
        linear = binder.bind(LINEAR_PACKED, spec)
        return lambda x: linear(x, weight, None), weight.num_bytes

    def rows(
        quantize: Callable[[Tensor], tuple[Tensor, Tensor]], op: object, n: int, k: int
    ) -> tuple[Callable[[Tensor], Tensor], int]:
        weight, scale = quantize(normal(n, k))
        linear = binder.bind(op, spec)  # type: ignore[arg-type]
        return lambda x: linear(x, weight, scale, None), n * k + 4 * n

    def blocks(n: int, k: int) -> tuple[Callable[[Tensor], Tensor], int]:
        values, scale = fp8.quantize_rows(normal(n * k // 128, 128))
        weight, scales = values.view(n, k), scale.view(n, -1).t().contiguous()
        linear = binder.bind(fp8.LINEAR_FP8_BLOCK, spec)
        return lambda x: linear(x, weight, scales, None), n * k + 4 * scales.numel()

    found: dict[str, Make] = {name: partial(packed, in_fragments(layout)) for name, layout in LAYOUTS.items()}
    for name, layout in LAYOUTS.items():
        if in_fragments(layout).fragments:
            found[f"{name} first order"] = partial(packed, layout)
    found["int8"] = partial(rows, int8.quantize_rows_int8, int8.LINEAR_INT8)
    if spec.capability >= fp8.MIN_CAPABILITY:
        found["fp8"] = partial(rows, fp8.quantize_rows, fp8.LINEAR_FP8)
        found["fp8 block"] = blocks
    return found


def timed(make: Make, n: int, k: int, tokens: int) -> tuple[float, int]:
    """Microseconds of one product, and the bytes of its weight."""
    first, num_bytes = make(n, k)
    sets = max(1, min(16, ROTATE_BYTES // num_bytes))
    calls: list[Call] = [
        partial(call, normal(tokens, k)) for call in (first, *(make(n, k)[0] for _ in range(sets - 1)))
    ]
    return time_us(calls, max(1, 16 // sets)), num_bytes


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_quant", description=__doc__)
    parser.add_argument("--model", default=SHAPES[0].name, choices=[shape.name for shape in SHAPES])
    parser.add_argument("--tokens", default="1,16,64,256,2048", help="comma separated")
    parser.add_argument("--formats", default="", help="comma separated (default: all)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("There is no CUDA device here; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    formats = makers(OpSpec("cuda", "bfloat16", 10 * major + minor))
    asked = [name for name in arguments.formats.split(",") if name] or list(formats)
    if unknown := set(asked) - set(formats):
        parser.error(f"There is no format {', '.join(sorted(unknown))}; choose from {', '.join(formats)}.")
    sizes = products(next(shape for shape in SHAPES if shape.name == arguments.model))
    bandwidth, rate = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s, bf16 {rate / 1e12:.0f} TFLOP/s")
    for tokens in map(int, arguments.tokens.split(",")):
        dense = {
            name: time_us([partial(F.linear, normal(tokens, k), normal(n, k)) for _ in range(6)], 3)
            for name, (n, k) in sizes.items()
        }
        for kind in asked:
            columns, spent, least = [], 0.0, 0.0
            for name, (n, k) in sizes.items():
                us, num_bytes = timed(formats[kind], n, k, tokens)
                floor = max((num_bytes + 2 * tokens * (n + k)) / bandwidth, 2 * tokens * n * k / rate) * 1e6
                columns.append(f"{name} {us:7.1f} ({floor / us:4.0%})")
                spent, least = spent + us, least + floor
            ratio = sum(dense.values()) / spent
            print(f"{tokens:5} {kind:14} {'  '.join(columns)}  layer {spent:7.1f} us ({least / spent:4.0%} of the floor, bf16 x{ratio:.2f})", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Launch shapes of the attention kernel for rows of any length, side by side: which one should this card take?

    python -m octavo.bench.gpu_attention --json attention.json

Every shape of step is timed with every launch shape (rows of a tile x keys a turn, warps, pipeline depth; "+" = rows of
one token in a kernel of their own) in the frame that ``gpu_kernels`` uses. The one bound today is marked. A launch shape
that does not compile or is wrong says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from octavo.bench.gpu_kernels import SHAPES, Shape, attention_case, ceilings, error_of, time_us
from octavo.device.kernels.triton.attention import PagedAttention, Tiles, varlen_tiles

WRONG = 0.01  # relative error beyond that of bfloat16
LAUNCHES = (
    Tiles(64, 64, 4, 2),
    Tiles(64, 64, 4, 3),
    Tiles(64, 64, 4, 4),
    Tiles(64, 128, 4, 2),
    Tiles(64, 128, 4, 3),
    Tiles(128, 64, 4, 2),
    Tiles(128, 64, 8, 2),
    Tiles(128, 64, 4, 3),
    Tiles(128, 64, 8, 3),
    Tiles(128, 64, 8, 4),
    Tiles(128, 128, 8, 2),
    Tiles(128, 128, 8, 3),
    Tiles(256, 64, 8, 2),
    Tiles(256, 64, 8, 3),
)
STEPS: tuple[tuple[str, list[tuple[int, int]]], ...] = (  # name, rows of (new tokens, keys)
    ("prefill 512", [(512, 512)]),
    ("prefill 4 x 512", [(512, 512)] * 4),
    ("prefill 16 x 512", [(512, 512)] * 16),
    ("prefill 2048", [(2048, 2048)]),
    ("prefill 2 x 4096", [(4096, 4096)] * 2),
    ("224 of 512 + 32 x 600", [(1, 600)] * 32 + [(224, 512)]),
    ("192 of 512 + 64 x 600", [(1, 600)] * 64 + [(192, 512)]),
    ("2 x 512 + 128 x 600", [(1, 600)] * 128 + [(512, 512)] * 2),
    ("2 x 512 + 250 x 600", [(1, 600)] * 250 + [(512, 512)] * 2),
    ("248 of 8192 + 8 x 8192", [(1, 8192)] * 8 + [(248, 8192)]),
)


@dataclass
class Timing:
    """One launch shape on one step; ``us`` None = it failed, ``why`` says how."""

    step: str
    model: str
    launch: str
    us: float | None
    share: float
    bound: bool
    why: str = ""


def name_of(tiles: Tiles, apart: bool) -> str:
    """Like 128x64w8s3+."""
    return f"{tiles.block_m}x{tiles.block_n}w{tiles.num_warps}s{tiles.num_stages}{'+' if apart else ''}"


def timings(
    shape: Shape, name: str, rows: list[tuple[int, int]], large: bool, bandwidth: float, rate: float
) -> list[Timing]:
    """Every launch shape on one step."""
    case = attention_case(shape, name, rows)
    floor = max(case.num_bytes / bandwidth, case.flops / rate) * 1e6
    longest = max(new for new, _ in rows)
    chosen = varlen_tiles(shape.head_dim, False, shape.heads // shape.kv_heads, large, longest)
    mixed = len(rows) > 1 and any(new == 1 for new, _ in rows)
    inputs = [case.make(i) for i in range(4)]
    found = []
    for tiles in dict.fromkeys((*LAUNCHES, chosen)):
        for apart in (False, True) if mixed else (False,):
            today = tiles == chosen and apart == (mixed and chosen.block_m > 128)
            attend = PagedAttention(large=large, tiles=tiles, apart=apart)
            row = Timing(name, shape.name, name_of(tiles, apart), None, 0.0, today)
            found.append(row)
            try:
                error = error_of(case, attend)
                if error > WRONG:
                    row.why = f"wrong: error {error:.4f}"
                    continue
                calls: list[Any] = [partial(attend, *arguments) for arguments in inputs]
                row.us = time_us(calls, 4)
                row.share = floor / row.us
            except Exception as problem:  # noqa: BLE001  a launch shape may exceed what the card has
                row.why = f"{type(problem).__name__}: {str(problem).splitlines()[0][:80]}"
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_attention", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default=SHAPES[0].name, choices=[shape.name for shape in SHAPES])
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("There is no CUDA device here; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    shape = next(shape for shape in SHAPES if shape.name == arguments.model)
    large = torch.cuda.get_device_capability() >= (9, 0)
    bandwidth, rate = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s, bf16 {rate / 1e12:.0f} TFLOP/s")
    everything = []
    for name, rows in STEPS:
        found = timings(shape, name, rows, large, bandwidth, rate)
        everything += found
        good = sorted((row for row in found if row.us), key=lambda row: row.us or 0.0)
        texts = [f"{'*' if row.bound else ''}{row.launch} {row.us:.1f}" for row in good]
        print(f"{name:24} us: {', '.join(texts)}; best {good[0].share:.0%} of the floor", flush=True)
        for row in found:
            if row.why:
                print(f"    {row.launch}: {row.why}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([vars(row) for row in everything], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

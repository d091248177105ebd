"""``python -m octavo.bench.collectives``: sums over the GPUs of this machine by the one-shot kernel and by NCCL.

Recorded in CUDA graphs, many in a row, so that only the device's time counts; both ways are measured in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from octavo.bench.ranks import add_rank_arguments, both, leave, run_ranks
from octavo.device.distributed.one_shot import OneShot
from octavo.device.distributed.world import Meeting, join
from octavo.device.platform.select import open_platform

KIB = 1 << 10
SIZES = tuple(8 * KIB << step for step in range(11))  # 8 KiB to 8 MiB


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m octavo.bench.collectives", description=__doc__)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=2, help="how many GPUs")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    add_rank_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print the table and write it as JSON where asked."""
    args = parse(argv)
    size = args.tensor_parallel_size
    if torch.cuda.device_count() < size:
        print(f"{size} CUDA devices are needed; {torch.cuda.device_count()} are visible.", file=sys.stderr)
        return 1
    if args.rank is None:
        return run_ranks("octavo.bench.collectives", argv, size)
    platform = open_platform("cuda", index=args.rank)
    world = join(Meeting(args.rank, size, size, 120.0, path=f"{args.meeting}/meeting"), platform.device)
    one_shot = OneShot(world.tensor, torch.bfloat16, SIZES[-1])
    rows = []
    for num_bytes in SIZES:
        x = torch.zeros((1, num_bytes // 2), dtype=torch.bfloat16, device=platform.device)
        ours, nccl = both(one_shot.reduce, world.tensor.reduce, x, platform)
        rows.append({"bytes": num_bytes, "one_shot_us": ours * 1e6, "nccl_us": nccl * 1e6})
    if args.rank == 0:
        print(f"{size} x {platform.hardware().name}, sums of bfloat16")
        print(f"{'KiB':>6}{'one-shot us':>14}{'NCCL us':>10}{'speedup':>10}{'one-shot GB/s':>15}")
        for row in rows:
            speedup, rate = row["nccl_us"] / row["one_shot_us"], row["bytes"] / row["one_shot_us"] / 1e3
            print(
                f"{row['bytes'] // KIB:>6}{row['one_shot_us']:>14.1f}{row['nccl_us']:>10.1f}{speedup:>10.2f}"
                f"{rate:>15.1f}"
            )
        if args.output:
            args.output.write_text(json.dumps(rows, indent=1))
    leave()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

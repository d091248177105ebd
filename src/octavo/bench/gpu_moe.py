"""The expert kernels: checked against the reference body, then timed against the floors of this card.

    python -m octavo.bench.gpu_moe --json moe.json

The least bytes of a step are the matrices of the experts that its tokens chose, the least operations those of the
chosen pairs. Choices are uniform, which is the hardest case for a batch that does not reach every expert often.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from octavo.bench.gpu_kernels import Case, ceilings, error_of, measure, normal
from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.ops.moe import EXPERTS


@dataclass(frozen=True)
class Shape:
    """The experts of one layer."""

    name: str
    num: int
    top_k: int
    hidden: int
    inner: int


SHAPES = (
    Shape("qwen3-30b-a3b", 128, 8, 2048, 768),
    Shape("mixtral-8x7b", 8, 2, 4096, 14336),
)


def inputs(shape: Shape, tokens: int, i: int) -> tuple[Any, ...]:
    """Arguments of ``experts``."""
    ids = torch.rand(tokens, shape.num, device="cuda").topk(shape.top_k, dim=-1).indices
    weights = torch.softmax(torch.randn(tokens, shape.top_k, device="cuda"), -1)
    gate_up = normal(shape.num, 2 * shape.inner, shape.hidden).mul_(shape.hidden**-0.5)
    down = normal(shape.num, shape.hidden, shape.inner).mul_(shape.inner**-0.5)
    return normal(tokens, shape.hidden), ids, weights, gate_up, down, "silu"


def case(shape: Shape, tokens: int) -> Case:
    """One number of tokens."""
    reached = shape.num * (
        1 - (1 - shape.top_k / shape.num) ** tokens
    )  # experts that somebody chose, expected
    matrices = 3 * shape.hidden * shape.inner
    return Case(
        EXPERTS,
        shape.name,
        f"{tokens} tokens",
        partial(inputs, shape, tokens),
        2 * reached * matrices + 4 * tokens * shape.hidden,
        2.0 * tokens * shape.top_k * matrices,
    )


def main() -> int:
    """Check and time; 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    binder = Binder()
    function = binder.bind(EXPERTS, OpSpec("cuda", "bfloat16", 10 * major + minor))
    bound = binder.explain()["experts"]
    bandwidth, rate = ceilings()
    rows, wrong = [], 0
    for shape in SHAPES:
        for tokens in (1, 8, 64, 256, 2048, 8192):
            found = case(shape, tokens)
            error = error_of(found, function) if tokens in (1, 256) else 0.0
            wrong += error > 2e-2
            row = measure(found, bound, function, bandwidth, rate)
            rows.append(asdict(row))
            print(
                f"{row.model:16} {row.shape:12} {row.us:9.1f} us  floor {row.floor_us:9.1f} us"
                f"  {100 * row.share:5.1f} %  error {error:.1e}"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

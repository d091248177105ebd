"""The kernels of compressed attention and hyper-connections, timed against the floors of this card.

    python -m octavo.bench.gpu_compressed --json compressed.json

The least bytes of a decode are the window and the entries it sees, once for all heads; the least operations of a prompt its
products with both.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.bench.gpu_kernels import PAGE, Case, normal, scattered, time_cases
from octavo.device.ops.compressed import COMPRESS, COMPRESSED_ATTENTION
from octavo.device.ops.hyper import HYPER_ENTER, HYPER_LEAVE, HYPER_LOGITS


@dataclass(frozen=True)
class Shape:
    """One kind of layer of DeepSeek V4-Flash; ``chosen`` 0 = all entries are seen."""

    name: str
    rate: int
    chosen: int
    overlap: bool
    heads: int = 64
    head_dim: int = 512
    rope: int = 64
    window: int = 128
    hidden: int = 4096
    streams: int = 4

    def seen(self, position: int) -> int:
        """Vectors that the token at a position looks at."""
        entries = (position + 1) // self.rate
        return min(position + 1, self.window) + (min(entries, self.chosen) if self.chosen else entries)


SHAPES = (Shape("sparse, 4 tokens", 4, 512, True), Shape("heavy, 128 tokens", 128, 0, False))


def paged(counts: list[int], width: int) -> tuple[Tensor, Tensor]:
    """(pages of PAGE vectors, table) for rows of so many vectors."""
    table, used = scattered(counts)
    return normal(max(1, used), PAGE, width), table


def visible(rows: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Every new token's row, and how many tokens that has up to it, for rows of (new tokens, tokens)."""
    row = [i for i, (new, _) in enumerate(rows) for _ in range(new)]
    seen = [length - new + 1 + i for new, length in rows for i in range(new)]
    return tuple(torch.tensor(found, dtype=torch.int32, device="cuda") for found in (row, seen))  # type: ignore[return-value]


def attention_inputs(shape: Shape, rows: list[tuple[int, int]], i: int = 0) -> tuple[Any, ...]:
    """Arguments of ``compressed_attention``."""
    pages, table = paged([length for _, length in rows], shape.head_dim)
    entries, homes = paged([length // shape.rate for _, length in rows], shape.head_dim)
    row, seen = visible(rows)
    chosen = None
    if shape.chosen:
        whole = (seen // shape.rate).unsqueeze(1)
        at = torch.arange(shape.chosen, device="cuda").unsqueeze(0)
        number = torch.where(
            whole > shape.chosen, at * whole // shape.chosen, at
        )  # spread over all there are
        home = homes[row.long().unsqueeze(1), (number // PAGE).clamp(max=homes.shape[1] - 1)].long()
        chosen = torch.where(number < whole, home * PAGE + number % PAGE, -1)
    q = normal(len(row), shape.heads, shape.head_dim)
    most = max(length for _, length in rows)
    sinks = torch.zeros(shape.heads, device="cuda")
    scale = shape.head_dim**-0.5
    return q, pages, table, shape.window, entries, homes, shape.rate, chosen, row, seen, most, scale, sinks


def compress_inputs(shape: Shape, rows: list[tuple[int, int]], i: int = 0) -> tuple[Any, ...]:
    """Arguments of ``compress``."""
    width = shape.head_dim * (2 if shape.overlap else 1)
    pages, table = paged([length for _, length in rows], 2 * width)
    entries, homes = paged([length // shape.rate for _, length in rows], shape.head_dim)
    row, seen = visible(rows)
    most = max(length for _, length in rows)
    bias, weight = torch.randn(shape.rate, width, device="cuda"), torch.ones(shape.head_dim, device="cuda")
    angles = torch.rand(most, shape.rope, device="cuda")
    return pages, table, 0, bias, weight, 1e-6, angles, row, seen, entries, homes


def logits_inputs(shape: Shape, tokens: int, i: int = 0) -> tuple[Any, ...]:
    """Arguments of ``hyper_logits``."""
    n, size = shape.streams, shape.streams * shape.hidden
    fn = torch.randn(n * (n + 2), size, device="cuda") * size**-0.5
    return normal(tokens, n, shape.hidden), fn, 1e-6


def enter_inputs(shape: Shape, tokens: int, i: int = 0) -> tuple[Any, ...]:
    """Arguments of ``hyper_enter``."""
    n = shape.streams
    logits, base = torch.randn(tokens, n * (n + 2), device="cuda"), torch.randn(n * (n + 2), device="cuda")
    return normal(tokens, n, shape.hidden), logits, base, torch.ones(3, device="cuda"), 20, 1e-6


def leave_inputs(shape: Shape, tokens: int, i: int = 0) -> tuple[Any, ...]:
    """Arguments of ``hyper_leave``."""
    n = shape.streams
    weights = torch.rand(tokens, n * (n + 1), device="cuda") / n
    return normal(tokens, n, shape.hidden), normal(tokens, shape.hidden), weights


def attention_case(shape: Shape, name: str, rows: list[tuple[int, int]]) -> Case:
    """New tokens over a context. A prompt reads what its tokens share once."""
    pairs = sum(shape.seen(length - new + i) for new, length in rows for i in range(new))
    tokens = sum(new for new, _ in rows)
    vectors = sum(min(length, shape.seen(length - 1) + new) for new, length in rows)
    moved = 2.0 * shape.head_dim * (vectors + 2 * tokens * shape.heads)
    flops = 4.0 * pairs * shape.heads * shape.head_dim
    return Case(COMPRESSED_ATTENTION, shape.name, name, partial(attention_inputs, shape, rows), moved, flops)


def cases(shape: Shape) -> list[Case]:
    """What is timed."""
    width, hidden, n = shape.head_dim * (2 if shape.overlap else 1), shape.hidden, shape.streams
    found = [
        attention_case(shape, f"decode {batch} x {context}", [(1, context)] * batch)
        for batch in (1, 32)
        for context in (1024, 32768)
    ]
    found.append(attention_case(shape, "prefill 2048 after 8192", [(2048, 10240)]))
    moved = 2.0 * (2048 * 2 * width + 2048 // shape.rate * shape.head_dim)
    make = partial(compress_inputs, shape, [(2048, 2048)])
    found.append(Case(COMPRESS, shape.name, "entries of 2048 tokens", make, moved, 0.0))
    for tokens in (1, 32, 2048) if shape is SHAPES[0] else ():
        moved = 2.0 * tokens * hidden * n + 4.0 * n * (n + 2) * n * hidden
        make = partial(logits_inputs, shape, tokens)
        found.append(Case(HYPER_LOGITS, shape.name, f"{tokens} tokens' weights", make, moved, 0.0))
        moved = 2.0 * tokens * hidden * (n + 1)
        enter, leave = partial(enter_inputs, shape, tokens), partial(leave_inputs, shape, tokens)
        found.append(Case(HYPER_ENTER, shape.name, f"{tokens} tokens enter", enter, moved, 0.0))
        moved = 2.0 * tokens * hidden * (2 * n + 1)
        found.append(Case(HYPER_LEAVE, shape.name, f"{tokens} tokens leave", leave, moved, 0.0))
    return found


if __name__ == "__main__":
    sys.exit(time_cases(__doc__, [case for shape in SHAPES for case in cases(shape)]))

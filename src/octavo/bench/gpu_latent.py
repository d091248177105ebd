"""The kernels of latent attention, timed against the floors of this card.

    python -m octavo.bench.gpu_latent --json latent.json

The least bytes of a decode are the cached latents, once for all heads; the least operations of a prompt those of full
heads, the projection of its latents included.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from octavo.bench.gpu_kernels import PAGE, Case, normal, scattered, time_cases
from octavo.device.ops.latent import LATENT_ATTENTION, LATENT_PREFILL, prefill_bytes


@dataclass(frozen=True)
class Shape:
    """The heads of one layer on one device."""

    name: str
    heads: int
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128


SHAPES = (
    Shape("deepseek-v3", 128),
    Shape("deepseek-v3 / 8", 16),
    Shape("glm-4.7-flash", 20, nope=192, value=256),
)


def tables(rows: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(page table, query starts, lengths, pages) of rows of (new tokens, keys), pages in random order."""
    table, used = scattered([keys for _, keys in rows])
    starts = torch.tensor([0] + [new for new, _ in rows]).cumsum(0).int()
    lens = torch.tensor([keys for _, keys in rows], dtype=torch.int32)
    return table, starts.cuda(), lens.cuda(), used


def attention_inputs(shape: Shape, rows: list[tuple[int, int]], i: int = 0) -> tuple[Any, ...]:
    """Arguments of ``latent_attention``."""
    table, starts, lens, pages = tables(rows)
    width = shape.latent + shape.rope
    q = normal(sum(new for new, _ in rows), shape.heads, width)
    bounds = (max(new for new, _ in rows), max(keys for _, keys in rows))
    cached = normal(pages, PAGE, width)
    return q, cached, table, starts, lens, *bounds, (shape.nope + shape.rope) ** -0.5 / 4, shape.latent


def prefill_inputs(shape: Shape, rows: list[tuple[int, int]], i: int = 0) -> tuple[Any, ...]:
    """Arguments of ``latent_prefill``; every row has several queries."""
    table, starts, lens, pages = tables(rows)
    width, both = shape.latent + shape.rope, shape.nope + shape.value
    tokens, keys = sum(new for new, _ in rows), sum(count for _, count in rows)
    slots = [
        table[row, at // PAGE].long() * PAGE + at % PAGE
        for row, (_, count) in enumerate(rows)
        for at in [torch.arange(count, device="cuda")]
    ]
    first_key = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    work = torch.empty(prefill_bytes(keys, width, both, 2) // 2 * 2, dtype=torch.uint8, device="cuda")
    return (
        normal(tokens, shape.heads, shape.value),
        normal(tokens, shape.heads, shape.nope + shape.rope),
        normal(tokens, shape.heads, width),
        normal(shape.heads, both, shape.latent).mul_(shape.latent**-0.5),
        normal(pages, PAGE, width),
        torch.cat(slots),
        starts[:-1],
        starts,
        first_key,
        (shape.nope + shape.rope) ** -0.5,
        work,
    )


def decode_case(shape: Shape, batch: int, context: int) -> Case:
    """Single tokens over a context."""
    width = shape.latent + shape.rope
    pairs = batch * context * shape.heads
    moved = 2 * batch * (context * width + shape.heads * (width + shape.latent))
    return Case(
        LATENT_ATTENTION,
        shape.name,
        f"decode {batch} x {context}",
        partial(attention_inputs, shape, [(1, context)] * batch),
        moved,
        2.0 * pairs * (width + shape.latent),
    )


def prefill_case(shape: Shape, tokens: int, context: int) -> Case:
    """One chunk behind a context."""
    keys, both = context + tokens, shape.nope + shape.value
    pairs = tokens * keys - tokens * (tokens - 1) / 2
    flops = 2.0 * shape.heads * (pairs * (both + shape.rope) + keys * shape.latent * both)
    moved = 2.0 * (keys * (shape.latent + shape.rope) + tokens * shape.heads * (both + shape.rope))
    return Case(
        LATENT_PREFILL,
        shape.name,
        f"prefill {tokens} after {context}",
        partial(prefill_inputs, shape, [(tokens, keys)]),
        moved,
        flops,
    )


def cases(shape: Shape) -> list[Case]:
    """What is timed."""
    decodes = [decode_case(shape, batch, context) for batch in (1, 32, 128) for context in (1024, 8192)]
    return [
        *decodes,
        *(prefill_case(shape, *size) for size in ((512, 0), (2048, 0), (8192, 0), (2048, 16384))),
    ]


if __name__ == "__main__":
    sys.exit(time_cases(__doc__, [case for shape in SHAPES for case in cases(shape)]))

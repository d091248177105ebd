"""The recurrent layers' Triton kernels against their reference bodies: rows of any length, states in shuffled pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.device.ops import recurrence
from octavo.device.ops.recurrence import Heads, StateRows

pytest.importorskip("triton")
from octavo.device.kernels.triton import recurrence as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
PAGE, PAGES = 128, 12
# (tokens computed before, tokens of this step): new rows, one token, the first of a page, many tiles, a last token
ROWS = [(0, 70), (5, 1), (128, 1), (127, 1), (128, 33), (256, 128), (0, 1), (40, 17), (0, 0)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def step_rows(rows: list[tuple[int, int]], padding: int = 3) -> tuple[StateRows, int]:
    """Tables of a step with ``padding``: rows of a token each in a decode step, else tokens that belong to no row."""
    free = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.zeros((len(rows), 4), dtype=torch.int32)
    slots: list[int] = []
    for row, (before, count) in enumerate(rows):
        first, last = max(before - 1, 0) // PAGE, max(before + count - 1, 0) // PAGE
        for number in {first, last}:
            table[row, number] = free.pop()
        slots += [int(table[row, p // PAGE]) * PAGE + p % PAGE for p in range(before, before + count)]
    slots += [-1] * padding
    if max(count for _, count in rows) == 1:
        rows, padding = rows + [(0, 1)] * padding, 0
        table = torch.cat((table, torch.zeros((len(rows) - len(table), 4), dtype=torch.int32)))
    counts = torch.tensor([count for _, count in rows])
    total = int(counts.sum())
    starts = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))).int()
    lengths = torch.tensor([before + count for before, count in rows], dtype=torch.int32)
    mapping = torch.tensor(slots)
    tables = [part.to(DEVICE) for part in (table, mapping, starts, lengths)]
    return StateRows(*tables, int(counts.max()), PAGE), total + padding


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    bound = 2e-4 if dtype == torch.float32 else 2e-2
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), atol=bound, rtol=bound)


CASES = {"mixed": ROWS[:5] + ROWS[7:], "decode": [(5, 1), (128, 1), (127, 1), (0, 1)]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_convolution(case: str, dtype: torch.dtype) -> None:
    rows, total = step_rows(CASES[case])
    x = draw(total, 100, dtype=dtype)[:, :72]
    weight, bias = draw(72, 4), draw(72)
    ours = draw(PAGES, 3, 72, dtype=dtype)
    theirs = ours.clone()
    close(
        kernels.causal_conv(x, weight, bias, ours, rows),
        recurrence.causal_conv(x, weight, bias, theirs, rows),
        dtype,
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["delta", "ssd"])
def test_recurrence(kind: str, case: str, dtype: torch.dtype) -> None:
    rows, total = step_rows(CASES[case])
    heads = Heads(2, 4, 24, 20)
    qkv = draw(total, heads.channels, dtype=dtype)
    rates = draw(total, 8, dtype=dtype)
    a_log, dt_bias, skip = draw(4, seed=1) * 0.3, draw(4, seed=2), draw(4, seed=3)
    ours = draw(PAGES, 4, 24, 20)
    theirs = ours.clone()
    delta = kind == "delta"
    numbers = (
        qkv,
        rates[:, :4],
        rates[:, 4:] if delta else None,
        a_log,
        dt_bias,
        None if delta else skip,
    )
    found = kernels.linear_recurrence(*numbers, ours, rows, heads)
    close(found, recurrence.linear_recurrence(*numbers, theirs, rows, heads), dtype)
    close(ours, theirs, dtype)


def test_equal_keys_do_not_break_the_inverse() -> None:
    """The worst case of a chunk's triangular system: every key the same, every beta 1, no decay."""
    rows, total = step_rows([(0, 64)], padding=0)
    heads = Heads(1, 1, 16, 16)
    qkv = draw(total, heads.channels)
    qkv[:, 16:32] = qkv[0, 16:32]
    rates = torch.cat((torch.full((total, 1), -30.0), torch.full((total, 1), 30.0)), dim=1).to(DEVICE)
    ours = torch.zeros(PAGES, 1, 16, 16, device=DEVICE)
    theirs = ours.clone()
    zero = torch.zeros(1, device=DEVICE)
    numbers = (qkv, rates[:, :1], rates[:, 1:], zero, zero, None)
    found = kernels.linear_recurrence(*numbers, ours, rows, heads)
    close(found, recurrence.linear_recurrence(*numbers, theirs, rows, heads), torch.float32)


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_norm(dtype: torch.dtype, gate_first: bool) -> None:
    y, gate = draw(5, 96, dtype=dtype), draw(5, 200, dtype=dtype)[:, 104:]
    for weight, run in ((draw(24), 24), (draw(96), 48)):
        close(
            kernels.gated_norm(y, gate, weight, 1e-5, run, gate_first),
            recurrence.gated_norm(y, gate, weight, 1e-5, run, gate_first),
            dtype,
        )

"""The reference attention against torch's own, one dense sequence at a time: windows, softcaps, sinks, shared heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.attention import paged_attention

HEADS, KV_HEADS, DIM = 6, 2, 16


def paged(
    lens: list[int], page_size: int, seed: int = 0
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Pages in random order that hold random sequences: (pages, table, keys, values), keys [n, Hkv, D]."""
    torch.manual_seed(seed)
    width = max(-(-n // page_size) for n in lens)
    pages = torch.full((len(lens) * width + 3, 2, KV_HEADS, page_size, DIM), 50.0)
    order = torch.randperm(len(pages))[: len(lens) * width].view(len(lens), width).to(torch.int32)
    keys, values = [], []
    for row, n in enumerate(lens):
        keys.append(torch.randn(n, KV_HEADS, DIM))
        values.append(torch.randn(n, KV_HEADS, DIM))
        for i in range(n):
            pages[order[row, i // page_size], 0, :, i % page_size] = keys[-1][i]
            pages[order[row, i // page_size], 1, :, i % page_size] = values[-1][i]
    return pages, order, keys, values


def naive(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
):
    """q [t, Hq, D] are the last t tokens; loops over tokens and heads."""
    out = torch.zeros_like(q)
    total, count = len(keys), len(q)
    for t in range(count):
        at = total - count + t
        seen = range(max(0, at - window + 1) if window else 0, at + 1)
        for h in range(HEADS):
            shared = h // (HEADS // KV_HEADS)
            scores = torch.stack([q[t, h] @ keys[i, shared] for i in seen]) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                weights = torch.softmax(torch.cat((scores, sinks[h : h + 1])), 0)[:-1]
            else:
                weights = torch.softmax(scores, 0)
            out[t, h] = sum(w * values[i, shared] for w, i in zip(weights, seen))
    return out


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(
    ("window", "softcap", "sink"), [(0, 0.0, False), (5, 0.0, False), (0, 2.0, False), (3, 1.5, True)]
)
def test_equals_naive(page_size: int, window: int, softcap: float, sink: bool) -> None:
    lens, counts = [9, 1, 14, 7], [9, 1, 1, 4]  # a prefill, a first token, a decode, a chunk
    pages, table, keys, values = paged(lens, page_size)
    q = torch.randn(sum(counts), HEADS, DIM)
    start = torch.tensor([0, 9, 10, 11, 15], dtype=torch.int32)
    sinks = torch.randn(HEADS) if sink else None
    kv_lens = torch.tensor(lens, dtype=torch.int32)
    got = paged_attention(q, pages, table, start, kv_lens, 9, 14, 0.3, window, softcap, sinks)
    for row in range(len(lens)):
        part = slice(int(start[row]), int(start[row + 1]))
        want = naive(q[part], keys[row], values[row], 0.3, window, softcap, sinks)
        torch.testing.assert_close(got[part], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (6, 0), (0, 7)])
def test_equals_sdpa(window: int, chunk: int) -> None:
    """A whole prompt against torch.nn.functional.scaled_dot_product_attention."""
    pages, table, keys, values = paged([40], 8)
    q = torch.randn(40, HEADS, DIM)
    got = paged_attention(
        q, pages, table, torch.tensor([0, 40], dtype=torch.int32), torch.tensor([40], dtype=torch.int32), 40, 40,
        DIM**-0.5, window, chunk=chunk,
    )  # fmt: skip
    at = torch.arange(40)
    seen = at[None] <= at[:, None]
    if window:
        seen &= at[None] > at[:, None] - window
    if chunk:
        seen &= at[None] // chunk == at[:, None] // chunk
    want = F.scaled_dot_product_attention(
        q.transpose(0, 1), keys[0].transpose(0, 1), values[0].transpose(0, 1), attn_mask=seen, enable_gqa=True
    )
    torch.testing.assert_close(got, want.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_stale_entries_and_empty_rows_are_not_read() -> None:
    """Entries before the window may name no page at all; a row without queries has no output."""
    pages, table, keys, values = paged([20, 3], 4)
    table[0, :2] = 10**6  # tokens 0..7, behind a window of 5 at token 19
    q = torch.randn(2, HEADS, DIM)
    start = torch.tensor([0, 1, 1], dtype=torch.int32)  # the second row is empty, the second token padding
    lens = torch.tensor([20, 3], dtype=torch.int32)
    got = paged_attention(q, pages, table, start, lens, 1, 20, 0.25, 5)
    want = naive(q[:1], keys[0], values[0], 0.25, 5, 0.0, None)
    torch.testing.assert_close(got[:1], want, atol=1e-5, rtol=1e-5)
    assert got.shape == q.shape


def test_half_types_round_only_at_the_end() -> None:
    pages, table, _, _ = paged([12], 4)
    q = torch.randn(12, HEADS, DIM)
    start, lens = torch.tensor([0, 12], dtype=torch.int32), torch.tensor([12], dtype=torch.int32)
    half, half_pages = q.bfloat16(), pages.bfloat16()
    got = paged_attention(half, half_pages, table, start, lens, 12, 12, 0.25)
    want = paged_attention(half.float(), half_pages.float(), table, start, lens, 12, 12, 0.25)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())

"""Compressed attention and hyper-connections: the Triton kernels against the reference bodies."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_triton_sparse import DEVICE, PAGE, draw, paged, visible
from torch import Tensor

from octavo.device.ops import compressed as ops
from octavo.device.ops import hyper

pytest.importorskip("triton")
from octavo.device.kernels.triton import compressed as kernels
from octavo.device.kernels.triton import compressed_attention as attention
from octavo.device.kernels.triton import hyper as hyper_kernels

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def close(ours: Tensor, theirs: Tensor) -> None:
    bound = 2e-5 if ours.dtype == torch.float32 else 5e-3
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)


@TYPES
@pytest.mark.parametrize(("heads", "size", "rope"), [(3, 16, 16), (9, 24, 6)])
def test_rotation_and_store(heads: int, size: int, rope: int, dtype: torch.dtype) -> None:
    q, key, cos_sin = draw(5, heads, size, dtype=dtype), draw(5, size, dtype=dtype), draw(50, rope).float()
    positions = torch.tensor([0, 3, 49, 7, 8], device=DEVICE)
    for back in (False, True):
        close(
            kernels.rotate_pairs(q, cos_sin, positions, back), ops.rotate_pairs(q, cos_sin, positions, back)
        )
    slots = torch.tensor([5, -1, 16, 0, 23], device=DEVICE)
    weight = draw(size).float()
    ours, theirs = (torch.zeros(3, PAGE, size, dtype=dtype, device=DEVICE) for _ in range(2))
    common = (q, key, weight, 1e-6, cos_sin, positions)
    close(kernels.head_store(*common, ours, slots), ops.head_store(*common, theirs, slots))
    close(ours, theirs)
    assert (ours.flatten(0, 1).abs().sum(-1) > 0).sum() == 4
    pieces = draw(5, 2 * size, dtype=dtype)
    ours, theirs = (torch.zeros(3, PAGE, 2 * size, dtype=dtype, device=DEVICE) for _ in range(2))
    kernels.piece_store(pieces, ours, slots)
    ops.piece_store(pieces, theirs, slots)
    assert torch.equal(ours, theirs)


@TYPES
@pytest.mark.parametrize(("rate", "overlap", "first"), [(4, True, 8), (20, False, 0), (3, True, 0)])
def test_entries(rate: int, overlap: bool, first: int, dtype: torch.dtype) -> None:
    size, rope, rows = 12, 4, [(1, 20), (21, 40), (9, 9), (2, 61)]
    width = size * (2 if overlap else 1)
    pages, table, _, _ = paged(rows, first + 2 * width, dtype)
    row, seen = visible(rows, 2)
    bias, weight, cos_sin = draw(rate, width), draw(size), draw(80, rope)
    per_page = 2
    home = torch.randperm(len(rows) * 16, generator=torch.Generator().manual_seed(1)).view(len(rows), 16)
    found = [torch.zeros(home.numel(), per_page, size, dtype=dtype, device=DEVICE) for _ in range(2)]
    for entries, compress in zip(found, (kernels.compress, ops.compress)):
        compress(
            pages, table, first, bias, weight, 1e-6, cos_sin, row, seen, entries, home.to(DEVICE, torch.int32)
        )
    close(*found)
    made = sum(length // rate - (length - new) // rate for new, length in rows)
    assert (found[0].flatten(0, 1).abs().sum(-1) > 0).sum() == made > 1


@pytest.mark.parametrize("kind", ["window", "all", "chosen"])
@pytest.mark.parametrize(  # many ranges that are merged, and one
    ("heads", "large", "target", "dtype"), [(3, False, 16, torch.float32), (40, True, 1, torch.float16)]
)
def test_attention(
    kind: str, heads: int, large: bool, target: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "RANGES", ((99, target),))
    size, rate, window, rows = 24, 2, 20, [(1, 90), (2, 40), (1, 1)]
    pages, table, _, _ = paged(rows, size, dtype)
    entries, homes, _, _ = paged([(new, length // rate) for new, length in rows], size, dtype)
    row, seen = visible(rows, 1)
    chosen = None
    if kind == "chosen":
        chosen = torch.full((5, 18), -1, dtype=torch.int64, device=DEVICE)
        for token in range(3):
            at = torch.randperm(int(seen[token]) // rate, generator=torch.Generator().manual_seed(token))
            at = at[:18].to(DEVICE)
            chosen[token, : len(at)] = homes[row[token].long(), at // PAGE].long() * PAGE + at % PAGE
    far = (None, None) if kind == "window" else (entries, homes)
    q = draw(5, heads, size, dtype=dtype)
    common = (q, pages, table, window, *far, rate, chosen, row, seen, 90, 0.3, draw(heads).float())
    ours, theirs = attention.compressed_attention(*common, large=large), ops.compressed_attention(*common)
    close(ours, theirs)
    assert (ours[4] == 0).all() and ours[:4].abs().sum(-1).min() > 0


@TYPES
@pytest.mark.parametrize("n", [3, 4])
def test_hyper_connections(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    size, eps = 96, 1e-6
    streams = draw(5, n, size, dtype=dtype)
    fn = draw(n * (n + 2), n * size)
    logits = hyper.hyper_logits(streams, fn, eps)
    many = draw(19, n, size, dtype=dtype)  # more than a tile; in ranges, then in one
    for ranges in (4, 1):
        monkeypatch.setattr(hyper_kernels, "RANGES", ((99, ranges),))
        ours = hyper_kernels.hyper_logits(many, fn, eps)
        torch.testing.assert_close(ours, hyper.hyper_logits(many, fn, eps), atol=1e-4, rtol=1e-4)
    base, scale = draw(n * (n + 2)), draw(3)
    ours = hyper_kernels.hyper_enter(streams, logits, base, scale, 5, eps)
    theirs = hyper.hyper_enter(streams, logits, base, scale, 5, eps)
    for mine, other in zip(ours, theirs):
        close(mine, other)
    matrix = theirs[1][:, n:].view(-1, n, n)
    torch.testing.assert_close(matrix.sum(1), torch.ones(5, n, device=DEVICE), atol=1e-4, rtol=0)
    answer, apart = draw(5, size, dtype=dtype), streams.clone()
    for leave, target in ((hyper_kernels.hyper_leave, streams), (hyper.hyper_leave, apart)):
        partial(leave, target, answer, theirs[1])()
    close(streams, apart)

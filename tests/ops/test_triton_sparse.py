"""Sparse latent attention: the Triton kernels against the reference bodies, those against plain attention with a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.device.ops import latent as dense
from octavo.device.ops import sparse as ops

pytest.importorskip("triton")
from octavo.device.kernels.triton import sparse as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [(1, 1), (5, 5), (0, 7), (1, 40), (7, 33)]
PAGE = 8


def paged(
    rows: list[tuple[int, int]], width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pages, table, query starts, lengths); unused page slots hold NaN, unused entries are garbage."""
    generator = torch.Generator().manual_seed(width)
    most = max(-(-kv // PAGE) for _, kv in rows) + 1
    pages = torch.full((len(rows) * most, PAGE, width), float("nan"))
    table = torch.full((len(rows), most), -(10**6), dtype=torch.int32)
    order = torch.randperm(len(pages), generator=generator)
    used = 0
    for row, (_, length) in enumerate(rows):
        for page in range(-(-length // PAGE)):
            table[row, page] = order[used]
            filled = min(PAGE, length - page * PAGE)
            pages[order[used], :filled] = torch.randn(filled, width, generator=generator)
            used += 1
    starts = torch.tensor([0] + [new for new, _ in rows]).cumsum(0).to(DEVICE, torch.int32)
    lens = torch.tensor([kv for _, kv in rows], dtype=torch.int32, device=DEVICE)
    return pages.to(DEVICE, dtype), table.to(DEVICE), starts, lens


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def visible(rows: list[tuple[int, int]], padding: int) -> tuple[Tensor, Tensor]:
    """Every token's row and the number of keys it sees."""
    row = [i for i, (new, _) in enumerate(rows) for _ in range(new)] + [len(rows) - 1] * padding
    seen = [length - new + 1 + i for new, length in rows for i in range(new)] + [0] * padding
    return (torch.tensor(found, dtype=torch.int32, device=DEVICE) for found in (row, seen))  # type: ignore[return-value]


@pytest.mark.parametrize(("heads", "size"), [(2, 16), (20, 24)])
@pytest.mark.parametrize("first", [0, 3])
def test_scores(heads: int, size: int, first: int) -> None:
    pages, table, starts, _ = paged(ROWS, size)
    tokens = int(starts[-1]) + 2
    rows, seen = visible(ROWS, 2)
    q, weights = draw(tokens, heads, size), draw(tokens, heads)
    common = (q, weights, pages, table, rows, seen, 45, first, tokens - first)
    ours, theirs = kernels.index_scores(*common), ops.index_scores(*common)
    there = torch.arange(45, device=DEVICE) < seen[first:].unsqueeze(1)
    torch.testing.assert_close(ours[there], theirs[there], atol=1e-4, rtol=1e-4)
    at = starts[3] - first  # the single token with 40 keys, by hand
    keys = torch.cat([pages[table[3, i // PAGE], i % PAGE].unsqueeze(0) for i in range(40)])
    by_hand = (torch.relu(q[starts[3]] @ keys.T) * weights[starts[3]].unsqueeze(1)).sum(0)
    torch.testing.assert_close(theirs[at, :40], by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 7, 40, 64, 1500])
@pytest.mark.parametrize("ties", [False, True])
def test_choice(top_k: int, ties: bool) -> None:
    lengths = [0, 1, 39, 40, 41, 1300, 2600]
    count, most = len(lengths), 2600
    generator = torch.Generator().manual_seed(top_k)
    scores = torch.randn(count, most, generator=generator) * 10
    if ties:
        scores = scores.round() * 0.0 if top_k == 7 else scores.round()
    scores = scores.to(DEVICE)
    table = torch.randperm(count * 330, generator=generator).view(count, 330).to(DEVICE, torch.int32)
    rows = torch.arange(count, dtype=torch.int32, device=DEVICE)
    seen = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    ours = kernels.index_choose(scores, table, rows, seen, PAGE, top_k, 0)
    theirs = ops.index_choose(scores, table, rows, seen, PAGE, top_k, 0)
    for i, length in enumerate(lengths):
        position = {int(table[i, at // PAGE]) * PAGE + at % PAGE: at for at in range(length)}
        picked = []
        for found in (ours[i], theirs[i]):
            at = [position[int(slot)] for slot in found if slot >= 0]
            assert len(set(at)) == len(at) == min(top_k, length)
            picked.append(scores[i, at].sort().values)
        assert torch.equal(*picked)  # the same scores; which of equal ones is nobody's business
        if not ties:
            assert torch.equal(ours[i].sort().values, theirs[i].sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "large"), [(3, False), (16, True), (40, True)])
@pytest.mark.parametrize("target", [1, 200])
def test_attention(
    dtype: torch.dtype, heads: int, large: bool, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "TARGET_PROGRAMS", target)
    latent, rope, top_k = 32, 8, 70
    pages, table, _, _ = paged([(1, 90), (2, 40)], latent + rope, dtype)
    q = draw(4, heads, latent + rope, dtype=dtype)
    chosen = torch.full((4, top_k), -1, device=DEVICE)
    counts = torch.tensor(
        [90, 39, 40, 1], device=DEVICE
    )  # the last is padding: it may see one key and has none
    for token, row in ((0, 0), (1, 1), (2, 1)):
        known = min(top_k, int(counts[token]))
        positions = torch.randperm(int(counts[token]), generator=torch.Generator().manual_seed(token))[
            :known
        ].to(DEVICE)
        chosen[token, :known] = table[row, positions // PAGE].long() * PAGE + positions % PAGE
    common = (q, pages, chosen, counts, 0.2, latent)
    ours, theirs = kernels.sparse_attention(*common, large=large), ops.sparse_attention(*common)
    bound = 2e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)
    assert (ours[3] == 0).all() and ours[:3].abs().sum(-1).min() > 0


def test_all_keys_chosen_is_plain_latent_attention() -> None:
    latent, rope = 16, 8
    pages, table, starts, lens = paged([(3, 21)], latent + rope)
    q = draw(3, 4, latent + rope)
    chosen = torch.full((3, 24), -1, device=DEVICE)
    for token in range(3):
        at = torch.arange(19 + token, device=DEVICE)
        chosen[token, : len(at)] = table[0, at // PAGE].long() * PAGE + at % PAGE
    counts = torch.tensor([19, 20, 21], dtype=torch.int32, device=DEVICE)
    want = dense.latent_attention(q, pages, table, starts, lens, 3, 21, 0.3, latent)
    torch.testing.assert_close(
        ops.sparse_attention(q, pages, chosen, counts, 0.3, latent), want, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "size", "rope"), [(4, 16, 16), (11, 24, 6)])
def test_store(heads: int, size: int, rope: int, dtype: torch.dtype) -> None:
    q, key, cos_sin = draw(5, heads, size, dtype=dtype), draw(5, size, dtype=dtype), draw(50, rope).float()
    positions = torch.tensor([0, 3, 49, 7, 8], device=DEVICE)
    slots = torch.tensor([5, -1, 16, 0, 23], device=DEVICE)
    ours, theirs = (torch.zeros(3, PAGE, size, dtype=dtype, device=DEVICE) for _ in range(2))
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    turned = kernels.index_store(q, key, cos_sin, positions, ours, slots)
    torch.testing.assert_close(
        turned, ops.index_store(q, key, cos_sin, positions, theirs, slots), atol=bound, rtol=bound
    )
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)
    assert (ours.flatten(0, 1).abs().sum(-1) > 0).sum() == 4

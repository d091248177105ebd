"""The Triton kernels of sampling against their reference bodies: the same tokens, not just the same distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.device.ops import sampling as ops

pytest.importorskip("triton")
from octavo.device.kernels.triton import draw
from octavo.device.kernels.triton import logits as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 5000  # two chunks


def row_of(kind: str, rows: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, VOCAB, generator=generator) * scale
    if kind == "ties":
        x = x.round()
    if kind == "masked":
        x[:, ::3] = float("-inf")
    return x.to(DEVICE)


def columns(rows: int, heat: float, k: int, p: float, least: float) -> dict[str, Tensor]:
    return {
        "temperature": torch.full((rows,), heat, device=DEVICE),
        "top_k": torch.full((rows,), k, dtype=torch.int32, device=DEVICE),
        "top_p": torch.full((rows,), p, device=DEVICE),
        "min_p": torch.full((rows,), least, device=DEVICE),
        "seeds": torch.arange(rows, device=DEVICE) * 0x1234567890AB - 5,
        "positions": torch.arange(rows, device=DEVICE) * 3,
    }


FILTERS = {
    "greedy": (0.0, 5, 0.5, 0.1),
    "plain": (1.0, 0, 1.0, 0.0),
    "cold": (0.3, -1, 1.0, 0.0),
    "k": (1.0, 20, 1.0, 0.0),
    "k = 1": (1.0, 1, 1.0, 0.0),
    "large k": (2.0, 3000, 1.0, 0.0),
    "p": (1.0, 0, 0.9, 0.0),
    "small p": (1.5, 0, 0.1, 0.0),
    "p = 0": (1.0, 0, 0.0, 0.0),
    "min_p": (1.0, 0, 1.0, 0.2),
    "min_p = 1": (1.0, 0, 1.0, 1.0),
    "all": (0.8, 50, 0.8, 0.02),
    "large k and p": (2.0, 3000, 0.7, 0.001),
}


@pytest.mark.parametrize("kind", ["random", "ties", "masked"])
@pytest.mark.parametrize("name", FILTERS)
def test_draws_the_reference_tokens(name: str, kind: str) -> None:
    logits = row_of(kind, 3, scale=1.0 if name == "p" else 3.0)
    table = columns(3, *FILTERS[name])
    before = logits.clone()
    assert draw.sample(logits, **table).tolist() == ops.sample(logits, **table).tolist()
    assert torch.equal(before, logits)


def test_rows_of_all_kinds_in_one_call_do_not_touch_each_other() -> None:
    """A row draws the same token alone, and as part of a batch of other filters."""
    logits = row_of("random", len(FILTERS))
    parts = [columns(len(FILTERS), *options) for options in FILTERS.values()]
    table = {key: torch.stack([part[key][i] for i, part in enumerate(parts)]) for key in parts[0]}
    together = draw.sample(logits, **table)
    assert together.tolist() == ops.sample(logits, **table).tolist()
    for i in (1, 3, 11):
        alone = {key: value[i : i + 1] for key, value in table.items()}
        assert draw.sample(logits[i : i + 1], **alone).item() == together[i].item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_with_many_equals(dtype: torch.dtype) -> None:
    logits = row_of("random", 2).to(dtype)
    table = columns(2, 1.0, 40, 0.9, 0.0)
    assert draw.sample(logits, **table).tolist() == ops.sample(logits, **table).tolist()


@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value")
def test_broken_logits_still_give_a_token() -> None:
    """A row of NaN (a broken model) must not index outside the vocabulary, hang, or disturb its neighbour."""
    logits = row_of("random", 2)
    logits[0] = float("nan")
    for name in ("plain", "all", "p"):
        table = columns(2, *FILTERS[name])
        token, neighbour = draw.sample(logits, **table).tolist()
        assert 0 <= token < VOCAB
        assert neighbour == ops.sample(logits, **table)[1].item()
    tokens, bad = kernels.greedy(logits)
    assert 0 <= tokens[0].item() < VOCAB and bad.tolist() == [True, False]
    assert tokens[1].item() == ops.greedy(logits)[0][1].item()


@pytest.mark.parametrize("kind", ["random", "ties", "masked"])
def test_greedy_takes_the_lowest_of_equals(kind: str) -> None:
    logits = row_of(kind, 4)
    assert kernels.greedy(logits)[0].tolist() == ops.greedy(logits)[0].tolist()
    assert kernels.greedy(torch.zeros(2, VOCAB, device=DEVICE))[0].tolist() == [0, 0]


def test_penalties_and_counts() -> None:
    logits = row_of("random", 4)
    counts = torch.zeros(3, VOCAB, dtype=torch.int32, device=DEVICE)
    counts[:, 10:20] = ops.IN_PROMPT
    counts[1, 15:4500:7] += 3
    rows = torch.tensor([1, -1, 0, 2], dtype=torch.int32, device=DEVICE)
    floats = torch.tensor([[0.5, 0.2, 1.3]], device=DEVICE).repeat(4, 1)  # columns of a wider table: strided
    ours, theirs = logits.clone(), logits.clone()
    kernels.penalize(ours, counts, rows, floats[:, 0], floats[:, 1], floats[:, 2])
    ops.penalize(theirs, counts, rows, floats[:, 0], floats[:, 1], floats[:, 2])
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[1], logits[1]) and not torch.equal(ours[0], logits[0])
    tokens = torch.tensor([7, 8, 12, 4999], device=DEVICE)
    ours_counts, theirs_counts = counts.clone(), counts.clone()
    kernels.count_tokens(ours_counts, rows, tokens)
    ops.count_tokens(theirs_counts, rows, tokens)
    assert torch.equal(ours_counts, theirs_counts)
    assert (ours_counts - counts).sum().item() == 3


@pytest.mark.parametrize("kind", ["random", "ties", "masked"])
def test_logprobs(kind: str) -> None:
    logits = row_of(kind, 3) + 100.0
    tokens = torch.tensor([1, 2500, 4999], device=DEVICE)
    ours, theirs = kernels.logprobs_of(logits, tokens), ops.logprobs_of(logits, tokens)
    torch.testing.assert_close(ours[0], theirs[0], atol=2e-5, rtol=1e-5)
    assert ours[1].tolist() == theirs[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_a_nan_are_found(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 20_000).to(DEVICE, dtype)
    logits[1, 0] = logits[3, -1] = float("nan")
    logits[4] = float("-inf")
    assert kernels.nan_rows(logits).tolist() == [False, True, False, True, False]
    assert ops.nan_rows(logits).tolist() == [False, True, False, True, False]
    for greedy in (kernels.greedy, ops.greedy):
        tokens, bad = greedy(logits)
        assert bad.tolist() == [False, True, False, True, False]
        assert tokens[[0, 2, 4]].tolist() == [logits[0].argmax().item(), logits[2].argmax().item(), 0]


@pytest.mark.parametrize("vocab", [64, 5001])
def test_masked_tokens_are_forbidden(vocab: int) -> None:
    """Some rows, in any order; bits beyond the vocabulary mean nothing."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(6, vocab, generator=generator).to(DEVICE)
    rows = torch.tensor([4, 0, 3], device=DEVICE)
    words = torch.randint(-(2**31), 2**31, (3, -(-vocab // 32)), generator=generator).int().to(DEVICE)
    expected = logits.clone()
    for row, line in zip(rows.tolist(), words.tolist()):
        for token in range(vocab):
            if not line[token // 32] >> (token % 32) & 1:
                expected[row, token] = float("-inf")
    for masked in (kernels.mask_logits, ops.mask_logits):
        changed = logits.clone()
        masked(changed, rows, words)
        assert torch.equal(changed, expected)

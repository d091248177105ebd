"""The Triton attention kernels against the reference body, on rows of many shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.device.ops.attention import paged_attention as reference
from octavo.runner.warm import MOST_ROWS, row_counts

pytest.importorskip("triton")
from octavo.device.kernels.triton import attention as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split rows as for a small device: the interpreter runs programs one after another."""
    monkeypatch.setattr(kernels, "TARGET_PROGRAMS", 32)


def make(
    rows: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
) -> dict[str, object]:
    """Inputs for rows of (new tokens, keys); unused page slots hold NaN, pages lie in random order."""
    generator = torch.Generator().manual_seed(len(rows) + head_dim)
    max_pages = max(-(-kv // page_size) for _, kv in rows) + 1
    num_pages = len(rows) * max_pages + 1
    order = torch.randperm(num_pages, generator=generator)
    kv = torch.full((num_pages, 2, heads[1], page_size, head_dim), float("nan"))
    table = torch.full(
        (len(rows), max_pages), -(10**6), dtype=torch.int32
    )  # entries past the row are garbage
    next_page = 0
    for row, (_, length) in enumerate(rows):
        for page in range(-(-length // page_size)):
            table[row, page] = order[next_page]
            filled = min(page_size, length - page * page_size)
            kv[order[next_page], :, :, :filled] = torch.randn(
                2, heads[1], filled, head_dim, generator=generator
            )
            next_page += 1
    counts = torch.tensor([0] + [new for new, _ in rows])
    tokens = int(counts.sum())
    q = torch.randn(tokens + padding, heads[0], head_dim, generator=generator)
    return {
        "q": q.to(DEVICE, dtype),
        "kv_pages": kv.to(DEVICE, dtype),
        "page_table": table.to(DEVICE),
        "query_start": counts.cumsum(0).to(DEVICE, torch.int32),
        "kv_lens": torch.tensor([kv for _, kv in rows], dtype=torch.int32, device=DEVICE),
        "max_query": max(new for new, _ in rows),
        "max_kv": max(kv for _, kv in rows),
        "scale": head_dim**-0.5,
    }


def check(inputs: dict[str, object], tolerance: float = 2e-5, large: bool = False, **options: object) -> None:
    tokens = int(inputs["query_start"][-1])  # type: ignore[index]
    expected: Tensor = reference(**inputs, **options)[:tokens].float()  # type: ignore[arg-type]
    actual = kernels.PagedAttention(large=large)(**inputs, **options)[:tokens].float()  # type: ignore[arg-type]
    assert actual.isfinite().all()
    assert ((actual - expected).norm() / expected.norm()).item() < tolerance
    torch.testing.assert_close(actual, expected, atol=20 * tolerance, rtol=20 * tolerance)


MIXED = [(1, 1), (5, 5), (1, 40), (7, 33), (40, 75)]
SINGLE = [(1, 1), (1, 17), (1, 90), (1, 64)]


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2), (14, 2)], ids=str)
def test_head_groups(rows: list[tuple[int, int]], heads: tuple[int, int]) -> None:
    check(make(rows, heads))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (64, 32), (128, 64), (256, 64)], ids=str)
def test_every_launch_shape_computes_the_same(shape: tuple[int, int], apart: bool) -> None:
    """What ``octavo.bench.gpu_attention`` may choose from."""
    attend = kernels.PagedAttention(tiles=kernels.Tiles(*shape, 4, 1), apart=apart)
    for options in ({}, {"window": 20}, {"chunk": 16}):
        inputs = make(MIXED)
        expected = reference(**inputs, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(attend(**inputs, **options), expected, atol=4e-4, rtol=4e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 256])
def test_head_dims(rows: list[tuple[int, int]], head_dim: int) -> None:
    check(make(rows, (2, 1), head_dim))


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_page_sizes(rows: list[tuple[int, int]], page_size: int) -> None:
    check(make(rows, page_size=page_size))


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
@pytest.mark.parametrize("window", [1, 16, 30, 4096])
def test_windows_never_read_pages_before_them(rows: list[tuple[int, int]], window: int) -> None:
    inputs = make(rows)
    table: Tensor = inputs["page_table"]  # type: ignore[assignment]
    for row, (new, length) in enumerate(rows):
        table[row, : max(0, length - new - window + 1) // 16] = -(10**6)
    check(inputs, window=window)


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
@pytest.mark.parametrize("chunk", [1, 16, 30, 4096])
def test_chunks_never_read_pages_before_them(rows: list[tuple[int, int]], chunk: int) -> None:
    inputs = make(rows)
    table: Tensor = inputs["page_table"]  # type: ignore[assignment]
    for row, (new, length) in enumerate(rows):
        table[row, : (length - new) // chunk * chunk // 16] = -(10**6)
    check(inputs, chunk=chunk)


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
def test_softcap_and_sinks(rows: list[tuple[int, int]]) -> None:
    inputs = make(rows)
    check(inputs, softcap=0.5)
    check(inputs, sinks=torch.tensor([0.0, 3.0, -2.0, 1.0], device=DEVICE))
    check(inputs, softcap=2.0, window=20, sinks=torch.tensor([0.0, 3.0, -2.0, 1.0], device=DEVICE))


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                DEVICE == "cpu", reason="the interpreter multiplies bfloat16 as integers"
            ),
        ),
        torch.float16,
    ],
    ids=str,
)
def test_half_precision(rows: list[tuple[int, int]], dtype: torch.dtype) -> None:
    check(make(rows, dtype=dtype), tolerance=4e-3)


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
def test_pages_of_eight_bits(rows: list[tuple[int, int]]) -> None:
    inputs = make(rows, dtype=torch.float16)
    inputs["kv_pages"] = inputs["kv_pages"].to(torch.float8_e4m3fn)  # type: ignore[attr-defined]
    check(inputs, 2e-3)
    scales = torch.tensor([[0.5, 3.0], [0.25, 4.0]], device=DEVICE)  # of each head
    check(inputs, 2e-3, kv_scales=scales, sinks=torch.tensor([0.0, 3.0, -2.0, 1.0], device=DEVICE))


@pytest.mark.parametrize(
    "rows", [[(0, 9), (3, 9), (0, 1)], [(0, 3), (1, 20), (0, 0)]], ids=["mixed", "decode"]
)
def test_rows_without_queries_and_padding_tokens(rows: list[tuple[int, int]]) -> None:
    check(make(rows, padding=3))


def test_the_same_row_in_another_bound_or_layout_of_q() -> None:
    """Bounds may be loose (a captured graph has the model's), and q may be a slice of a wider tensor."""
    inputs = make(SINGLE)
    check({**inputs, "max_kv": 100_000})
    check({**inputs, "max_query": 64})
    q: Tensor = inputs["q"]  # type: ignore[assignment]
    wide = torch.cat((q, torch.full_like(q, float("nan"))), dim=1)
    check({**inputs, "q": wide[:, : q.shape[1]]})


def test_splits_come_from_the_number_of_rows_and_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TARGET_PROGRAMS", 512)
    splits = {kernels.num_splits(r, h, 0, 64) for r in range(1, 300) for h in (1, 2, 8)}
    assert splits == {1, 2, 4, 8, 16, 32, 64}
    assert kernels.num_splits(1, 8, 64, 64) == 2 and kernels.num_splits(256, 8, 0, 64) == 1


def test_long_prompts_leave_single_tokens_to_their_own_kernel() -> None:
    """The bound of the longest row chooses the tiles; half precision, as 4-byte elements always take small ones."""
    inputs = make(MIXED, dtype=torch.float16)
    check({**inputs, "max_query": 2048}, tolerance=2e-3, large=True)
    check({**inputs, "max_query": 2048}, tolerance=2e-3, large=True, window=30)


def test_many_ranges_are_merged_by_their_own_kernel() -> None:
    """One long row: more ranges than one program merges."""
    inputs = make([(1, 700)], heads=(2, 1))
    assert kernels.num_splits(1, 1, 0, 32) > kernels.MERGE_SPLITS
    check(inputs)
    check(inputs, window=333, softcap=3.0)


@pytest.mark.parametrize("rows", [4, 20])
def test_few_ranges_are_merged_by_the_last_program(rows: int) -> None:
    """The counters that tell the last one are clean again for the next call."""
    inputs = make([(1, 1 + 31 * i % 200) for i in range(rows)], heads=(4, 2), head_dim=16)
    splits = kernels.num_splits(rows, 2, 0, 32)
    assert splits == (4 if rows == 4 else 1) <= kernels.MERGE_SPLITS
    attend = kernels.PagedAttention()
    expected = reference(**inputs)  # type: ignore[arg-type]
    for _ in range(2):
        torch.testing.assert_close(attend(**inputs), expected, atol=1e-4, rtol=1e-4)  # type: ignore[arg-type]
    assert (attend.counters is None) == (splits == 1)
    assert attend.counters is None or not attend.counters.any()


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8, 12, 16, 40])
@pytest.mark.parametrize("window", [0, 128, 4096])
def test_warming_meets_every_split(kv_heads: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of any number of single-token rows find their kernel compiled."""
    monkeypatch.setattr(kernels, "TARGET_PROGRAMS", 512)

    def splits(rows: int) -> int:
        return kernels.num_splits(rows, kv_heads, window, 64)

    warmed = {splits(rows) for rows in (1, 2, *row_counts(MOST_ROWS))}
    assert {splits(rows) for rows in range(1, 1025)} <= warmed

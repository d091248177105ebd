"""Latent attention: the Triton kernels against the reference bodies, those against attention in full heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.device.ops import latent as ops

pytest.importorskip("triton")
from octavo.device.kernels.triton import latent as kernels
from octavo.device.kernels.triton import latent_prefill as kernels_prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies bfloat16 as integers"),
    ),
]
MIXED = [(1, 1), (5, 5), (1, 40), (7, 33), (20, 45)]
SINGLE = [(1, 1), (1, 17), (1, 90), (1, 64)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split rows as for a small device: the interpreter runs programs one after another."""
    monkeypatch.setattr(kernels, "TARGET_PROGRAMS", 16)


def make(
    rows: list[tuple[int, int]],
    heads: int = 4,
    dims: tuple[int, int] = (32, 16),
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
) -> dict[str, object]:
    """Inputs for rows of (new tokens, keys); unused page slots hold NaN, pages lie in random order."""
    generator = torch.Generator().manual_seed(len(rows) + heads)
    max_pages = max(-(-kv // page_size) for _, kv in rows) + 1
    num_pages, width = len(rows) * max_pages + 1, sum(dims)
    order = torch.randperm(num_pages, generator=generator)
    pages = torch.full((num_pages, page_size, width), float("nan"))
    table = torch.full(
        (len(rows), max_pages), -(10**6), dtype=torch.int32
    )  # entries past the row are garbage
    next_page = 0
    for row, (_, length) in enumerate(rows):
        for page in range(-(-length // page_size)):
            table[row, page] = order[next_page]
            filled = min(page_size, length - page * page_size)
            pages[order[next_page], :filled] = torch.randn(filled, width, generator=generator)
            next_page += 1
    counts = torch.tensor([0] + [new for new, _ in rows])
    q = torch.randn(int(counts.sum()) + padding, heads, width, generator=generator)
    return {
        "q": q.to(DEVICE, dtype),
        "pages": pages.to(DEVICE, dtype),
        "page_table": table.to(DEVICE),
        "query_start": counts.cumsum(0).to(DEVICE, torch.int32),
        "kv_lens": torch.tensor([kv for _, kv in rows], dtype=torch.int32, device=DEVICE),
        "max_query": max(new for new, _ in rows),
        "max_kv": max(kv for _, kv in rows),
        "scale": width**-0.5,
        "latent_dim": dims[0],
    }


def check(inputs: dict[str, object], tolerance: float = 2e-5, large: bool = False) -> None:
    tokens = int(inputs["query_start"][-1])  # type: ignore[index]
    expected: Tensor = ops.latent_attention(**inputs)[:tokens].float()  # type: ignore[arg-type]
    actual = kernels.LatentAttention(large=large)(**inputs)[:tokens].float()  # type: ignore[arg-type]
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, atol=20 * tolerance, rtol=20 * tolerance)


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
@pytest.mark.parametrize("heads", [1, 4, 5, 16, 40])
def test_heads(rows: list[tuple[int, int]], heads: int) -> None:
    check(make(rows, heads))


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
@pytest.mark.parametrize("dims", [(64, 64), (48, 24), (128, 8)], ids=str)
@pytest.mark.parametrize("page_size", [16, 48])
def test_sizes(rows: list[tuple[int, int]], dims: tuple[int, int], page_size: int) -> None:
    check(make(rows, dims=dims, page_size=page_size))


@pytest.mark.parametrize("rows", [MIXED, SINGLE], ids=["mixed", "decode"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_half_precision(rows: list[tuple[int, int]], dtype: torch.dtype, large: bool) -> None:
    check(make(rows, heads=16, dtype=dtype), tolerance=4e-3, large=large)
    check(make(rows, heads=70, dtype=dtype), tolerance=4e-3, large=large)


@pytest.mark.parametrize(
    "rows", [[(0, 9), (3, 9), (0, 1)], [(0, 3), (1, 20), (0, 0)]], ids=["mixed", "decode"]
)
def test_rows_without_queries_padding_tokens_and_loose_bounds(rows: list[tuple[int, int]]) -> None:
    inputs = make(rows, padding=3)
    check(inputs)
    check({**inputs, "max_query": 64, "max_kv": 100_000})


@pytest.mark.parametrize("target", [1, 1000])
def test_any_number_of_ranges(target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TARGET_PROGRAMS", target)
    assert kernels.num_splits(1, 4, 16) == min(64, 1 << target.bit_length() - 1)
    check(make([(1, 200)], dims=(16, 16)))
    check(make([(3, 70), (1, 5)], dims=(16, 16)))


def test_splits_come_from_the_number_of_tokens_and_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TARGET_PROGRAMS", 264)
    assert {kernels.num_splits(t, 128, 64) for t in range(1, 300)} == {1, 2, 4, 8, 16, 32, 64}
    assert kernels.num_splits(5000, 1, 64) == 1


def test_reference_is_attention_in_full_heads() -> None:
    """Up-project every latent to keys and values of all heads, attend plainly: the same output."""
    heads, nope, rope, value, latent, keys = 3, 6, 4, 5, 8, 9
    generator = torch.Generator().manual_seed(1)
    up_keys, up_values = (torch.randn(heads, n, latent, generator=generator) for n in (nope, value))
    cached = torch.randn(keys, latent + rope, generator=generator)
    q = torch.randn(4, heads, nope + rope, generator=generator)
    wide = torch.cat((torch.einsum("thn,hnl->thl", q[..., :nope], up_keys), q[..., nope:]), -1)
    pages = torch.zeros(3, 4, latent + rope)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    for i in range(keys):
        pages[table[0, i // 4], i % 4] = cached[i]
    mixed = ops.latent_attention(
        wide, pages, table, torch.tensor([0, 4]), torch.tensor([keys]), 4, keys, 0.3, latent
    )
    ours = torch.einsum("thl,hvl->thv", mixed, up_values)
    full_keys = torch.cat(
        (
            torch.einsum("kl,hnl->khn", cached[:, :latent], up_keys),
            cached[:, None, latent:].expand(-1, heads, -1),
        ),
        -1,
    )
    scores = torch.einsum("thd,khd->htk", q, full_keys) * 0.3
    hidden = torch.arange(keys) > torch.arange(keys - 4, keys)[:, None]
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    full_values = torch.einsum("kl,hvl->khv", cached[:, :latent], up_values)
    torch.testing.assert_close(ours, torch.einsum("htk,khv->thv", weights, full_values), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "nope", "dims"), [(4, 16, (32, 16)), (11, 5, (24, 6))])
def test_store(heads: int, nope: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    latent, rope = dims
    generator = torch.Generator().manual_seed(heads)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    projected = draw(6, 10 + latent + rope)  # the compressed part is a slice of a wider projection
    inputs = (
        draw(6, heads, nope + rope),
        projected[:, 10:],
        draw(latent).float(),
        1e-6,
        draw(50, rope).float(),
        torch.tensor([0, 3, 49, 7, 8, 0], device=DEVICE),
    )
    slots = torch.tensor([5, -1, 16, 0, 47, -1], device=DEVICE)
    ours, theirs = (torch.zeros(3, 16, latent + rope, dtype=dtype, device=DEVICE) for _ in range(2))
    bound = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    wide = kernels.latent_store(*inputs, ours, slots)
    expected = ops.latent_store(*inputs, theirs, slots)
    torch.testing.assert_close(wide[..., latent:], expected[..., latent:], **bound)
    torch.testing.assert_close(ours, theirs, **bound)
    assert ours.flatten(0, 1)[[0, 5, 16, 47]].abs().sum(-1).min() > 0
    assert (ours.flatten(0, 1).abs().sum(-1) > 0).sum() == 4


@pytest.mark.parametrize(
    "rows",
    [[(5, 5)], [(7, 33), (20, 45), (3, 3)], [(1, 1), (40, 75), (2, 60)]],
    ids=["one", "three", "mixed"],
)
@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize(("nope", "value"), [(16, 16), (24, 12)])
def test_prefill_in_full_heads(rows: list[tuple[int, int]], heads: int, nope: int, value: int) -> None:
    latent, rope = 32, 8
    inputs = make(rows, heads, (latent, rope), padding=2)
    pages: Tensor = inputs["pages"]  # type: ignore[assignment]
    table: Tensor = inputs["page_table"]  # type: ignore[assignment]
    wide: Tensor = inputs["q"]  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(nope)
    q = torch.randn(wide.shape[0], heads, nope + rope, generator=generator).to(DEVICE)
    up = torch.randn(heads, nope + value, latent, generator=generator).to(DEVICE) / 4
    longer = [i for i, (count, _) in enumerate(rows) if count > 1]
    begins = torch.tensor([sum(count for count, _ in rows[:i]) for i in longer], device=DEVICE)
    first = [
        torch.tensor([0, *(rows[i][which] for i in longer)]).cumsum(0).to(DEVICE, torch.int32)
        for which in (0, 1)
    ]
    slots = torch.cat(
        [
            table[i, at // 16].long() * 16 + at % 16
            for i in longer
            for at in [torch.arange(rows[i][1], device=DEVICE)]
        ]
    )
    bounds = [(int(b), int(b) + rows[i][0]) for b, i in zip(begins, longer)]
    work = torch.full(
        (ops.prefill_bytes(len(slots), latent + rope, nope + value, 4),), 0xFF, dtype=torch.uint8
    )
    work = work[: work.numel() // 4 * 4].to(DEVICE)
    ours, theirs = (torch.full((wide.shape[0], heads, value), 7.0, device=DEVICE) for _ in range(2))
    common = (q, wide, up, pages, slots, begins, *first, 0.2, work)
    kernels_prefill.latent_prefill(ours, *common)
    ops.latent_prefill(theirs, *common)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    untouched = torch.ones(wide.shape[0], dtype=torch.bool)
    for begin, end in bounds:
        untouched[begin:end] = False
        assert not (ours[begin:end] == 7.0).all()
    assert (ours[untouched.to(DEVICE)] == 7.0).all()
    # The same as by comparing with latents, one row at a time.
    for i, (begin, end) in zip(longer, bounds):
        absorbed = torch.einsum("thn,hnl->thl", q[begin:end, :, :nope], up[:, :nope])
        mixed = ops.latent_attention(
            torch.cat((absorbed, wide[begin:end, :, latent:]), -1), pages, table[i : i + 1],
            torch.tensor([0, end - begin]), torch.tensor([rows[i][1]]), end - begin, rows[i][1], 0.2, latent,
        )  # fmt: skip
        want = torch.einsum("thl,hvl->thv", mixed, up[:, nope:])
        torch.testing.assert_close(theirs[begin:end], want, atol=1e-4, rtol=1e-4)

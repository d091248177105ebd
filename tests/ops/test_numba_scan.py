"""The two-pass head: every token that can be the likeliest has its exact logit, and nothing else is claimed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_numba_linear import (
    KERNEL,
    LIBRARY,
    aligned,
    build_body,
    dequantize,
    packed,
    random_rows,
    random_tokens,
)

from octavo.device.kernels.numba import formats, linear, scan
from octavo.device.kernels.numba.target import AVX2, AVX512, PORTABLE, Target, host_features


class Head:
    """Random Q8_0 rows as a split matrix, with every table that the kernels need."""

    def __init__(self, rows: int, size: int, tokens: int, seed: int = 0, vocab: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.raw, self.rows, self.size = random_rows("Q8_0", rows, size, rng), rows, size
        whole, self.scales = packed("Q8_0", self.raw, size)
        self.upper = aligned((len(whole), size // 32 * 384))
        self.lower = aligned((len(whole), size // 32 * 128))
        formats.split_planes(whole, size // 32, self.upper, self.lower)
        self.whole = whole
        self.values, self.quants, self.meta = random_tokens(tokens, size, rng)
        self.count, self.bias = np.array([tokens]), np.zeros(16, np.float32)
        self.out = np.zeros((tokens, rows), np.float32)
        self.lows = np.full((tokens, -(-len(whole) // scan.SEGMENT) * 16), np.nan, np.float32)
        self.leasts = np.zeros(scan.MOST_ROWS, np.float32)
        self.spreads = np.zeros((3 * scan.MOST_ROWS, size // 32), np.float32)
        self.vocab = vocab or rows

    def table(self) -> np.ndarray:
        one = int(np.float32(1).view(np.uint32))
        at = [x.ctypes.data for x in (self.count, self.upper, self.scales)]
        more = [self.quants.ctypes.data, self.meta.ctypes.data, self.out.ctypes.data, self.rows * 4]
        extra = [x.ctypes.data for x in (self.lower, self.spreads, self.lows)]
        return np.array(
            [*at, self.size // 32, len(self.upper), *more, self.bias.ctypes.data, 0, one, 0, *extra, self.vocab,
             self.leasts.ctypes.data], np.int64,
        )  # fmt: skip

    def run(self, name: str, threads: int = 2) -> np.ndarray:
        table = self.table()
        for thread in range(threads):
            KERNEL(LIBRARY.address(name))(table.ctypes.data, thread, threads)
        return self.out.copy()


def test_planes_hold_the_same_bits() -> None:
    head = Head(32, 96, 1)
    vectors = head.whole.reshape(2, 3, 8, 64)
    pairs = head.lower.reshape(2, 3, 2, 64)
    nibbles, high = head.upper.reshape(2, 3, 384)[:, :, :256], head.upper.reshape(2, 3, 384)[:, :, 256:]
    for g in range(8):
        low = pairs[:, :, g // 4] >> (2 * (g % 4)) & 3
        four = nibbles.reshape(2, 3, 4, 64)[:, :, g % 4] >> (4 * (g // 4)) & 15
        two = high.reshape(2, 3, 2, 64)[:, :, g // 4] >> (2 * (g % 4)) & 3
        assert np.array_equal(vectors[:, :, g], two << 6 | four << 2 | low)


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_split_product_has_the_bits_of_the_whole_one(tokens: int) -> None:
    head = Head(64, 160, tokens)
    split = head.run("linear_split8")
    table = head.table()[: linear.ENTRIES].copy()
    table[linear.WEIGHTS], table[linear.BIAS_BYTES] = head.whole.ctypes.data, 0
    KERNEL(LIBRARY.address("linear_zero8"))(table.ctypes.data, 0, 1)
    assert np.array_equal(split, head.out)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_bounds_hold_and_what_can_win_is_exact(seed: int, tokens: int, panels: int, blocks: int) -> None:
    """Weights of any scale and sign: upper and lower bounds enclose the product, whose bits survive the second pass."""
    head = Head(16 * panels, 32 * blocks, tokens, seed)
    exact = head.run("linear_split8")
    upper = head.run("scan")
    assert (upper >= exact).all()
    lows = np.full((tokens, head.lows.shape[1] // 16, scan.SEGMENT, 16), -np.inf, np.float32)
    shown = np.full((tokens, lows.shape[1] * scan.SEGMENT * 16), -np.inf, np.float32)
    shown[:, : exact.shape[1]] = exact
    assert (head.lows.reshape(tokens, -1, 16) <= shown.reshape(lows.shape).max(2)).all()
    head.leasts[:tokens] = head.lows.max(1)
    found = head.run("refine")
    assert np.array_equal(found.argmax(1), exact.argmax(1))
    kept = np.isfinite(found)
    assert np.array_equal(found[kept], exact[kept])
    assert (upper[~kept] < np.repeat(head.leasts[:tokens, None], exact.shape[1], 1)[~kept]).all()


def test_the_k_likeliest_are_exact() -> None:
    head = Head(16 * 700, 64, 1, 5)
    exact = head.run("linear_split8")[0]
    head.run("scan")
    for number in (1, 7, 50):
        head.run("scan")
        head.leasts[0] = np.partition(head.lows[0], -number)[-number]
        found = head.run("refine", threads=3)[0]
        best = np.argsort(-exact, kind="stable")[:number]
        assert np.array_equal(found[best], exact[best])


def test_padding_bounds_nothing_and_nan_is_found() -> None:
    head = Head(48, 64, 1, 3, vocab=41)
    head.upper[:], head.lower[:], head.quants[:] = 0, 0, 127  # every weight is -128 d: logits far below zero
    head.meta.reshape(2, 4)[:] = 1, 32 * 127, 16 * 127, 16 * 127
    scales = head.scales.view(np.float16).reshape(3, 2, 16)
    scales[:], scales[2, :, 9:] = 0.01, 0  # rows of padding are zero, above all others
    head.run("scan")
    assert head.lows.max() < 0
    head.meta[0, 0] = np.nan
    head.run("scan")
    head.leasts[0] = head.lows.max()
    assert np.isnan(head.run("refine")).any()


@pytest.mark.parametrize("target", [PORTABLE, AVX2, AVX512], ids=lambda target: target.name)
def test_other_targets_bound_too(target: Target) -> None:
    needs = {"portable": set(), "avx2": {"avx2"}, "avx512-vnni": {"avx512vnni"}}[target.name]
    if not needs <= host_features():
        pytest.skip(f"this processor has no {target.name}")
    head = Head(32, 96, 2, 11)
    exact = head.run("linear_split8")
    matrix = dequantize("Q8_0", head.raw)
    d = head.meta.reshape(2, 3, 4)[:, :, 0]
    head.spreads[:2] = (
        1.5 * (1 + 3 * scan.SLACK) * d * np.abs(head.quants.astype(int)).reshape(2, 3, 32).sum(-1)
    )

    def body(b: Any, arguments: Any) -> None:
        values = linear.load_args(b, arguments[0], scan.ENTRIES)
        scan.emit_scan(b, target, values, arguments[1], values[scan.SPREADS])

    def second(b: Any, arguments: Any) -> None:
        scan.emit_refine(b, target, linear.load_args(b, arguments[0], scan.ENTRIES), arguments[1])

    engine, other = build_body(body), build_body(second)
    KERNEL(engine.get_function_address("kernel"))(head.table().ctypes.data, 0, 0)
    assert (head.out >= exact - 1e-4 * np.abs(exact)).all()
    head.leasts[:2] = head.lows.max(1)
    for panel in range(2):
        KERNEL(other.get_function_address("kernel"))(head.table().ctypes.data, panel, 0)
    assert np.array_equal(head.out.argmax(1), (head.values @ matrix.T).argmax(1))


def test_rows_of_a_split_table_read_back() -> None:
    head = Head(32, 96, 1, 2)
    out, ids, count = np.zeros((32, 96), np.float32), np.arange(32), np.array([32])
    table = [
        count, ids, head.upper, head.scales, head.upper.shape[1], head.scales.shape[1], formats.SPLIT8.code, 96, out,
        int(np.float32(1).view(np.uint32)), head.lower, head.lower.shape[1],
    ]  # fmt: skip
    data = np.array([x.ctypes.data if isinstance(x, np.ndarray) else x for x in table], np.int64)
    KERNEL(LIBRARY.address("embed"))(data.ctypes.data, 0, 1)
    np.testing.assert_allclose(out, dequantize("Q8_0", head.raw), rtol=3e-7, atol=1e-7)

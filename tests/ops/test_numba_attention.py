"""Rope, the page layout and paged attention against plain numpy; row kernels against their formulas."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llvmlite import ir

from octavo.device.kernels.numba import attention as kernels
from octavo.device.kernels.numba import shared, vector
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.device.kernels.numba.target import AVX512, AVX512_BF16, PORTABLE, Target, host_features

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
LIBRARY = KernelLibrary()


def call(name: str, arguments: list[Any], threads: int = 1) -> None:
    """Run a kernel on all threads one after the other; arrays stand for their addresses, floats for their bits."""
    table = np.array([value(x) for x in arguments], np.int64)
    for thread in range(threads):
        KERNEL(LIBRARY.address(name))(table.ctypes.data, thread, threads)


def value(x: Any) -> int:
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    return int(np.float32(x).view(np.uint32)) if isinstance(x, float) else x


def aligned(shape: Any, dtype: Any) -> np.ndarray:
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float32."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


@dataclass
class Case:
    """One sequence: ``kv`` keys in all, the last ``queries`` of them are new."""

    heads: int
    kv_heads: int
    size: int
    kv: int
    queries: int
    page_size: int = 16
    window: int = 0
    softcap: float = 0.0
    rotary: int = 0
    parts: bool = False
    threads: int = 1


class Sequence:
    """Random qkv rows stored through ``rope_store`` into shuffled pages."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case, rng = case, np.random.default_rng(seed)
        width = (case.heads + 2 * case.kv_heads) * case.size
        self.qkv = rng.standard_normal((case.kv, width)).astype(np.float32)
        self.norms = rng.uniform(0.5, 1.5, (2, case.size)).astype(np.float32)
        self.angles = rng.uniform(-3, 3, (case.kv, case.rotary // 2))
        count = -(-case.kv // case.page_size)
        self.table = rng.permutation(count + 3)[:count].astype(np.int32)
        self.page_bytes = case.page_size * case.kv_heads * case.size * 4
        self.pages = aligned(((count + 3), self.page_bytes), np.uint8)
        self.queries = aligned((case.kv, case.heads * case.size), np.uint16)
        self.broken = np.zeros(case.kv, np.int64)
        at = np.arange(case.kv)
        slots = self.table[at // case.page_size].astype(np.int64) * case.page_size + at % case.page_size
        ropes = np.concatenate([np.cos(self.angles), np.sin(self.angles)], 1).astype(np.float32)
        self.rotated = self.qkv.copy()
        call(
            "rope_store",
            [np.array([case.kv]), self.rotated, case.heads, case.kv_heads, case.size, self.norms[0], self.norms[1],
             1e-6, ropes if case.rotary else 0, case.rotary, slots, self.pages, self.page_bytes, case.page_size,
             self.queries, self.broken],
            case.threads,
        )  # fmt: skip

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v after norm, rope and rounding, float64 [kv, heads, size]."""
        c = self.case
        parts = np.split(
            self.qkv.reshape(c.kv, -1, c.size).astype(np.float64), [c.heads, c.heads + c.kv_heads], axis=1
        )
        for i in range(2):
            x = parts[i] / np.sqrt((parts[i] ** 2).mean(-1, keepdims=True) + 1e-6) * self.norms[i]
            if c.rotary:
                cos, sin = np.cos(self.angles)[:, None], np.sin(self.angles)[:, None]
                first, second = x[..., : c.rotary // 2], x[..., c.rotary // 2 : c.rotary]
                turned = [first * cos - second * sin, second * cos + first * sin, x[..., c.rotary :]]
                x = np.concatenate(turned, -1)
            parts[i] = x
        return tuple(bf16(x).astype(np.float64) for x in parts)

    def attend(self) -> np.ndarray:
        """[queries, heads, size] through the kernels."""
        c = self.case
        first = c.kv - c.queries
        q = aligned((c.queries, c.heads * c.size), np.uint16)
        q[:] = self.queries[first:]
        items, splits = self.items(first)
        places = c.queries + len(items)
        out, stats = aligned((places, c.heads, c.size), np.float32), aligned((places, c.heads, 2), np.float32)
        out[:] = np.nan  # nothing may read what was not written
        scratch = aligned((c.threads, kernels.SCRATCH_BYTES), np.uint8)
        counter, result = np.zeros(1, np.int64), aligned((c.queries, c.heads * c.size), np.float32)
        call(
            "attend",
            [np.array([len(items)]), items, c.heads, c.kv_heads, c.size, q, self.pages, self.page_bytes, c.page_size,
             c.size**-0.5, c.softcap, c.window, out, stats, scratch, counter],
        )  # fmt: skip
        call(
            "combine",
            [np.array([c.queries]), out, stats, c.heads, c.size, splits, result, 0, 0, scratch],
            c.threads,
        )
        return result.reshape(c.queries, c.heads, c.size)

    def items(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Items of 16 queries, or with ``parts`` one a stretch of keys for every query."""
        c, rows, extra = self.case, [], self.case.queries
        splits = np.zeros((c.queries, 2), np.int64)
        for at in range(0, c.queries, 1 if c.parts else 16):
            count = 1 if c.parts else min(16, c.queries - at)
            position = first + at
            low = max(0, position + 1 - c.window) if c.window else 0
            high = position + count
            if not c.parts:
                rows.append([at, count, position, low, high, self.table.ctypes.data, at])
                continue
            edges = range(low // kernels.STRETCH, (high - 1) // kernels.STRETCH + 1)
            splits[at] = extra, len(edges) - 1
            for index, edge in enumerate(edges):
                begin, end = max(low, edge * kernels.STRETCH), min(high, (edge + 1) * kernels.STRETCH)
                place = at if index == 0 else extra + index - 1
                rows.append([at, 1, position, begin, end, self.table.ctypes.data, place])
            extra += len(edges) - 1
        return np.array(rows, np.int64), splits


def naive(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    first, group = case.kv - case.queries, case.heads // case.kv_heads
    scores = np.einsum("thd,khd->thk", q[first:], np.repeat(k, group, 1)) * case.size**-0.5
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    at, keys = np.arange(first, case.kv)[:, None, None], np.arange(case.kv)
    hidden = keys > at
    if case.window:
        hidden |= keys <= at - case.window
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("thk,khd->thd", weights / weights.sum(-1, keepdims=True), np.repeat(v, group, 1))


CASES = {
    "decode": Case(9, 3, 64, 77, 1, rotary=64),
    "prefill": Case(9, 3, 64, 70, 70, rotary=64, threads=3),
    "chunk": Case(8, 2, 128, 300, 37, rotary=128),
    "long": Case(4, 1, 256, 600, 20, page_size=32, rotary=256),
    "parts": Case(6, 2, 64, 900, 3, parts=True),
    "window": Case(4, 4, 32, 400, 60, window=50),
    "window parts": Case(4, 2, 16, 800, 5, window=300, parts=True),
    "softcap": Case(6, 1, 80, 90, 25, softcap=5.0, rotary=40),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_formula(name: str) -> None:
    """Probabilities are rounded to bfloat16 (relative 2^-9), everything before is in the expectation."""
    case = CASES[name]
    sequence = Sequence(case)
    q, k, v = sequence.expected()
    assert not sequence.broken.any()
    stored = (sequence.queries.astype(np.uint32) << 16).view(np.float32).reshape(q.shape)
    assert (np.abs(stored - q) <= np.abs(q) * 2**-7 + 1e-6).all()  # one rounding step apart at most
    got = sequence.attend()
    want = naive(case, stored.astype(np.float64), k, v)
    np.testing.assert_allclose(got, want, atol=0.02)
    assert np.abs(got - want).mean() < 2e-3


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_attention_of_any_shape(data: Any) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    kv = data.draw(st.integers(1, 330))
    case = Case(
        kv_heads * group, kv_heads, 16 * data.draw(st.integers(1, 9)), kv, data.draw(st.integers(1, kv)),
        page_size=data.draw(st.sampled_from([16, 32, 48])), window=data.draw(st.sampled_from([0, 1, 7, 100])),
    )  # fmt: skip
    assume(case.heads * case.size % 32 == 0)  # what the output projection reads
    sequence = Sequence(case, seed=kv)
    q, k, v = sequence.expected()
    np.testing.assert_allclose(sequence.attend(), naive(case, q, k, v), atol=0.03)


def test_parts_and_whole_have_the_same_bits() -> None:
    whole = Sequence(Case(6, 2, 64, 1000, 2)).attend()
    parts = Sequence(Case(6, 2, 64, 1000, 2, parts=True)).attend()
    assert np.array_equal(whole, parts)


def test_values_that_are_not_finite_mark_their_token_and_stay_out_of_the_pages() -> None:
    sequence = Sequence(Case(2, 1, 16, 20, 1))
    qkv = sequence.qkv.copy()
    qkv[5, 3 * 16 + 2], qkv[9, 2 * 16] = np.inf, np.nan
    slots = np.arange(20)
    call(
        "rope_store",
        [np.array([20]), qkv, 2, 1, 16, 0, 0, 0.0, 0, 0, slots, sequence.pages, sequence.page_bytes, 16,
         sequence.queries, sequence.broken],
    )  # fmt: skip
    assert np.flatnonzero(sequence.broken).tolist() == [5, 9]
    assert np.isfinite((sequence.pages.view(np.uint16).astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.parametrize("target", [PORTABLE, AVX512, AVX512_BF16], ids=lambda target: target.name)
def test_pair_products_of_every_target(target: Target) -> None:
    if target.bf16 and "avx512bf16" not in host_features():
        pytest.skip("this processor has no bfloat16 products")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = ir.Module()
    module.triple = llvm.get_process_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [vector.I64] * 3), "kernel")
    b = ir.IRBuilder(function.append_basic_block())
    x, y = (vector.load(b, address, vector.VI, 4) for address in function.args[:2])
    total = vector.load(b, function.args[2], vector.VF, 4)
    vector.store(b, vector.dot_bf16(b, target, total, x, y), function.args[2], 4)
    b.ret_void()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2, jit=True
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    rng = np.random.default_rng(0)
    pairs = rng.standard_normal((2, 16, 2)).astype(np.float32)
    stored = np.ascontiguousarray((bf16(pairs).view(np.uint32) >> 16).astype(np.uint16))
    out = np.ones(16, np.float32)
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(engine.get_function_address("kernel"))
    kernel(stored[0].ctypes.data, stored[1].ctypes.data, out.ctypes.data)
    np.testing.assert_allclose(out, 1 + (bf16(pairs[0]) * bf16(pairs[1])).sum(-1), rtol=1e-5, atol=1e-6)


# Row kernels.


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 and meta of rows by the formula in ``rows``."""
    blocks = x.reshape(len(x), -1, 32).astype(np.float64)
    d = np.abs(blocks).max(-1) / 127
    q = np.rint(np.divide(blocks, d[..., None], out=np.zeros_like(blocks), where=d[..., None] > 0))
    sums = [q.sum(-1), q[..., :16].sum(-1), q[..., 16:].sum(-1)]
    return q.reshape(x.shape), np.stack([d, *[d * s for s in sums]], -1)


def check_forms(want: np.ndarray, plain: np.ndarray, quants: np.ndarray, meta: np.ndarray) -> None:
    np.testing.assert_allclose(plain, want, rtol=3e-6, atol=3e-6)
    q, facts = quantized(plain)
    assert (
        np.abs(quants - q).max() <= 1 and (quants != q).mean() < 1e-3
    )  # a value on the edge may fall either way
    np.testing.assert_allclose(meta.reshape(facts.shape)[..., 0], facts[..., 0], rtol=1e-6)
    blocks = quants.reshape(len(want), -1, 32).astype(np.float64)
    for i, part in enumerate((blocks, blocks[..., :16], blocks[..., 16:])):
        np.testing.assert_allclose(
            meta.reshape(facts.shape)[..., 1 + i], facts[..., 0] * part.sum(-1), rtol=1e-5, atol=1e-6
        )


def forms(count: int, size: int) -> list[np.ndarray]:
    return [
        aligned((count, size), np.float32),
        aligned((count, size), np.int8),
        aligned((count * size // 32, 4), np.float32),
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_norm(threads: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 96)).astype(np.float32) * 10
    x[3, 32:64] = 0
    weight, table, out = rng.uniform(0.5, 1.5, 96).astype(np.float32), np.array([4, 0, 3]), forms(3, 96)
    call("norm", [np.array([3]), x, table, weight, 96, 1e-5, *out], threads)
    wide = x[table].astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    check_forms(want, *out)
    assert not out[1][2, 32:64].any()
    x[4, 50] = np.nan
    call("norm", [np.array([3]), x, table, weight, 96, 1e-5, *out], threads)
    meta = out[2].reshape(3, 3, 4)
    assert np.isnan(meta[0]).all() and np.isfinite(meta[1:]).all()


@pytest.mark.parametrize("kind", shared.ACTIVATIONS)
def test_gate(kind: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 128)).astype(np.float32) * 4
    x[0, :4] = [100, -100, 0, 30]
    out = forms(3, 64)
    call("gate", [np.array([3]), x, 64, shared.ACTIVATIONS[kind], *out], 2)
    gate, up = x[:, :64].astype(np.float64), x[:, 64:]
    if kind == "silu":
        want = gate / (1 + np.exp(-gate)) * up
    elif kind == "gelu":
        want = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / 2**0.5)) * up
    else:
        want = gate * 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    check_forms(want, *out)


def test_add_norm() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 4, 64)).astype(np.float32)
    weight = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    want = x + 0.5 * y / np.sqrt((y.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * weight
    call("add_norm", [np.array([4]), y, weight, 64, 1e-6, 0.5, x], 3)
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)

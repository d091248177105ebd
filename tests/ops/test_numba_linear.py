"""Panels and int8 products: every format, on this processor and on the other targets' instructions."""

from __future__ import annotations

import ctypes
from typing import Any

import gguf
import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir

from octavo.device.kernels.numba import formats, linear, rows, vector
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.device.kernels.numba.target import (
    AVX2,
    AVX512,
    AVX512_BF16,
    NEON,
    PORTABLE,
    Target,
    choose_target,
    host_features,
)

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
LIBRARY = KernelLibrary()
BLOCK_BYTES = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in formats.BY_DTYPE}
SCALE_FIELDS = {
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q6_K": [208],
    "Q4_1": [0, 2],
    "Q5_1": [0, 2],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
}


def random_rows(dtype: str, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks with any quants and float16 scales of either sign over several powers of ten."""
    weights, nbytes = BLOCK_BYTES[dtype]
    blocks = rng.integers(0, 256, (count, size // weights, nbytes), dtype=np.uint8)
    for at in SCALE_FIELDS.get(dtype, [0]):
        scale = 10.0 ** rng.uniform(-4, 0, blocks.shape[:2]) * rng.choice([-1, 1], blocks.shape[:2])
        blocks[:, :, at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(count, -1)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    raw = np.zeros(int(np.prod(shape)) + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + int(np.prod(shape))].reshape(shape)


def packed(dtype: str, raw: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    form = formats.BY_DTYPE[dtype]
    weights = aligned((len(raw) // 16, form.panel_bytes(size)))
    scales = aligned((len(raw) // 16, form.scale_bytes(size)))
    formats.pack(dtype, raw, size, weights, scales)
    return weights, scales


def dequantize(dtype: str, raw: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[dtype])


def random_tokens(
    count: int, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, int8, meta) of quantized tokens, extremes included."""
    quants = rng.integers(-127, 128, (count, size), dtype=np.int8)
    quants[0, :32], quants[-1, -32:] = 127, -127
    d = rng.uniform(0.01, 0.02, (count, size // 32)).astype(np.float32)
    values = quants.reshape(count, -1, 32) * d[..., None].astype(np.float64)
    meta = np.stack([d, values.sum(-1), values[..., :16].sum(-1), values[..., 16:].sum(-1)], -1).astype(
        np.float32
    )
    return values.reshape(count, size), quants, meta


def arguments(
    count: np.ndarray, weights: Any, scales: Any, size: int, source: list[int], out: Any, bias: Any
) -> Any:
    one = int(np.float32(1).view(np.uint32))
    table = [count.ctypes.data, weights.ctypes.data, scales.ctypes.data, size // 32, len(weights), *source]
    return np.array([*table, out.ctypes.data, out.strides[0], bias.ctypes.data, 64, one, 0], np.int64)


def check(function: Any, dtype: str, num_tokens: int, size: int = 512, num_rows: int = 48) -> None:
    rng = np.random.default_rng(num_tokens)
    raw = random_rows(dtype, num_rows, size, rng)
    weights, scales = packed(dtype, raw, size)
    values, quants, meta = random_tokens(num_tokens, size, rng)
    bias = rng.standard_normal(num_rows).astype(np.float32)
    out, count = np.zeros((num_tokens, num_rows), np.float32), np.array([num_tokens])
    table = arguments(count, weights, scales, size, [quants.ctypes.data, meta.ctypes.data], out, bias)
    matrix = dequantize(dtype, raw).astype(np.float64)
    want = values @ matrix.T + bias
    # Errors are relative to what is summed, not to what is left after cancellation.
    bound = 1e-5 * (np.abs(values) @ np.abs(matrix.T) + 1)
    for thread in range(3):
        function(table.ctypes.data, thread, 3)
    assert (np.abs(out - want) < bound).all()
    table[linear.ADD], table[linear.ALPHA] = 1, int(np.float32(0.5).view(np.uint32))
    for thread in range(2):
        function(table.ctypes.data, thread, 2)
    assert (np.abs(out - (want + 0.5 * (want - bias) + bias)) < 3 * bound).all()


def host_kernel(name: str) -> Any:
    return KERNEL(LIBRARY.address(name))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 15, 64])
@pytest.mark.parametrize("dtype", formats.BY_DTYPE)
def test_products_equal_dequantized_weights(dtype: str, num_tokens: int) -> None:
    check(host_kernel(f"linear_{formats.BY_DTYPE[dtype].name}"), dtype, num_tokens)


@pytest.mark.parametrize("dtype", formats.BY_DTYPE)
def test_a_token_has_the_same_bits_in_every_batch(dtype: str) -> None:
    rng = np.random.default_rng(1)
    raw = random_rows(dtype, 32, 256, rng)
    weights, scales = packed(dtype, raw, 256)
    _, quants, meta = random_tokens(13, 256, rng)
    bias, outs = np.zeros(32, np.float32), []
    kernel = host_kernel(f"linear_{formats.BY_DTYPE[dtype].name}")
    for first, number in [(0, 13), (4, 1), (3, 7)]:
        out, count = np.zeros((number, 32), np.float32), np.array([number])
        source = [quants[first:].ctypes.data, meta[first:].ctypes.data]
        kernel(arguments(count, weights, scales, 256, source, out, bias).ctypes.data, 0, 1)
        outs.append(out)
    assert np.array_equal(outs[0][4:5], outs[1]) and np.array_equal(outs[0][3:10], outs[2])


# The other targets' code is built with llvmlite alone, so that this processor runs what it would not choose.


def build_body(body: Any, triple: str | None = None, cpu: str = "", features: str = "") -> Any:
    """(engine or assembly) of ``kernel``, whose code ``body(builder, arguments)`` writes; an engine without ``triple``."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = ir.Module()
    module.triple = triple or llvm.get_process_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [vector.I64] * 3), "kernel")
    b = ir.IRBuilder(function.append_basic_block())
    body(b, function.args)
    b.ret_void()
    if triple is not None:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=2)
        return machine.emit_assembly(llvm.parse_assembly(str(module)))
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2, jit=True
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine


def build(target: Target, form: formats.PanelFormat, *machine: str) -> Any:
    """A target's kernel of one format."""

    def body(b: Any, arguments: Any) -> None:
        linear._emit_panels(b, target, form, linear.load_args(b, arguments[0], 13), *arguments[1:])

    return build_body(body, *machine)


@pytest.mark.parametrize("dtype", formats.BY_DTYPE)
@pytest.mark.parametrize("target", [PORTABLE, AVX2], ids=lambda target: target.name)
def test_other_targets_compute_the_same(target: Target, dtype: str) -> None:
    """Those that this processor also runs, where it has more (with AVX512 the tests above are its own)."""
    if target is AVX2 and "avx2" not in host_features():
        pytest.skip(f"this processor has no {target.name}")
    engine = build(target, formats.BY_DTYPE[dtype])
    check(KERNEL(engine.get_function_address("kernel")), dtype, 5, size=256, num_rows=16)


@pytest.mark.parametrize(
    ("target", "triple", "cpu", "features", "instructions"),
    [
        (NEON, "aarch64-linux-gnu", "neoverse-n1", "+dotprod,+fullfp16", ("sdot", "tbl")),
        (AVX512_BF16, "x86_64-linux-gnu", "sapphirerapids", "", ("vpdpbusd", "vpshufb")),
        (AVX2, "x86_64-linux-gnu", "haswell", "", ("vpmaddubsw", "vpshufb")),
        (PORTABLE, "aarch64-linux-gnu", "cortex-a53", "", ("mla", "mla")),
    ],
    ids=lambda value: value.name if isinstance(value, Target) else "",
)
def test_targets_use_their_instruction(
    target: Target, triple: str, cpu: str, features: str, instructions: tuple[str, str]
) -> None:
    """Products, and looking up values in a table."""
    for form, instruction in zip((formats.SUPER6, formats.TABLE4), instructions):
        text = build(target, form, triple, cpu, features)
        assert instruction in text
        assert "extendhfsf" not in text  # a library call that would not resolve at run time


def test_choice_of_target() -> None:
    assert choose_target(frozenset({"avx2", "fma", "f16c"})) is AVX2
    assert choose_target(frozenset({"neon", "dotprod"})) is NEON
    assert choose_target(frozenset({"sse2"})) is PORTABLE
    wide = {"avx512vnni", "avx512bw", "avx512vl", "avx2", "fma", "f16c"}
    assert choose_target(frozenset(wide)) is AVX512
    assert choose_target(frozenset(wide | {"avx512bf16"})) is AVX512_BF16


@given(st.sampled_from(sorted(formats.BY_DTYPE)), st.integers(0, 2**32 - 1), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_repacking_loses_nothing(dtype: str, seed: int, blocks: int) -> None:
    """Rows read back from the panels equal the ``gguf`` package's numbers, whatever the bits are."""
    rng = np.random.default_rng(seed)
    size = blocks * BLOCK_BYTES[dtype][0]
    size += -size % 32
    raw = random_rows(dtype, 32, size, rng)
    weights, scales = packed(dtype, raw, size)
    form, out = formats.BY_DTYPE[dtype], np.zeros((32, size), np.float32)
    ids, count, one = np.arange(32), np.array([32]), int(np.float32(1).view(np.uint32))
    table = [count, ids, weights, scales, weights.shape[1], scales.shape[1], form.code, size, out, one, 0, 0]
    data = np.array([x.ctypes.data if isinstance(x, np.ndarray) else x for x in table], np.int64)
    host_kernel("embed")(data.ctypes.data, 0, 1)
    np.testing.assert_allclose(out, dequantize(dtype, raw), rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("num_tokens", [1, 5, 8])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_plain_weights(dtype: str, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((32, 96)).astype(np.float32)
    if dtype == "F16":
        raw = values.astype(np.float16)
        values = raw.astype(np.float32)
    elif dtype == "BF16":
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        raw = values
    weights = aligned((2, 96 * 16 * formats.DENSE_BYTES[dtype]))
    formats.pack_dense(dtype, raw.view(np.uint8).reshape(32, -1), weights)
    x, bias = rng.standard_normal((num_tokens, 96)).astype(np.float32), np.ones(32, np.float32)
    out, count = np.zeros((num_tokens, 32), np.float32), np.array([num_tokens])
    table = arguments(count, weights, weights, 96, [x.ctypes.data, 96 * 4], out, bias)
    host_kernel(f"dense_{dtype.lower()}")(table.ctypes.data, 0, 1)
    np.testing.assert_allclose(out, x @ values.T + 1, rtol=1e-4, atol=1e-4)


def test_rows_module_agrees_with_this_processor() -> None:
    assert rows.HOST is linear.HOST is choose_target(host_features())

"""Quantized weights on a real GPU: every layout and product at model shapes against its reference body, graphs, no compile
once warm, and an engine for each format against the CPU's reference bodies."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import build, checkpoint, run, some_prompts
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "models"))
sys.path.append(str(Path(__file__).parents[1] / "ops"))
import published
from packed_cases import LAYOUTS, draw
from test_load import mxfp4_model
from test_quantized import EXPERT_FORMATS, FORMATS, blocks, gguf_model, gguf_moe_model, moe_model

from octavo.device.ops import fp8, int8, moe
from octavo.device.ops.attention import PAGED_ATTENTION
from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.ops.packed import LINEAR_PACKED, in_fragments, linear_packed, pack_codes, unpack
from octavo.device.ops.rope_store import ROPE_STORE
from octavo.files.resolve import open_model
from octavo.model.quantization.int4 import int4_layout, quantize_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
INT4 = int4_layout(4096)
TOKENS = [1, 2, 7, 8, 9, 16, 17, 48, 64, 100, 256, 1000, 1024, 3000]


def bound(op: Any) -> Any:
    major, minor = torch.cuda.get_device_capability()
    binder = Binder()
    function = binder.bind(op, OpSpec("cuda", "bfloat16", 10 * major + minor))
    assert next(iter(binder.choices[op.name])).startswith("triton")
    return function


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(sum(shape))).to(
        dtype
    )


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


FRAGMENTS = {name: in_fragments(layout) for name, layout in LAYOUTS.items() if in_fragments(layout).fragments}
PRODUCTS = {**LAYOUTS, **{f"{name}-fragments": layout for name, layout in FRAGMENTS.items()}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_packed_products(name: str, dtype: torch.dtype) -> None:
    """Every tile and every number of splits; inputs that fill no run."""
    for n, k in ((1536, 4096), (4096, 1280 if PRODUCTS[name].scales in ("k", "k4", "bytes") else 1344)):
        weight, linear, bias = draw(PRODUCTS[name], n, k), bound(LINEAR_PACKED), normal(n, dtype=dtype)
        values = unpack(weight)
        for tokens in TOKENS:
            x = normal(tokens, k, dtype=dtype)
            expected = x.float() @ values.t()
            assert error(linear(x, weight, None), expected) < 4e-3, (tokens, n, k)
            assert error(linear(x, weight, bias), expected + bias.float()) < 4e-3, (tokens, n, k)
            assert torch.equal(linear(x, weight, bias), linear(x, weight, bias)), (
                "splits are added in one order"
            )


@pytest.mark.parametrize("name", ["awq", "awq-fragments"])
def test_packed_in_a_graph(name: str) -> None:
    weight, linear = draw(PRODUCTS[name], 4096, 4096), bound(LINEAR_PACKED)
    for tokens in (1, 16, 64, 2048):
        x = normal(tokens, 4096)
        linear(x, weight, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(x, weight, None)
        for _ in range(3):  # counters are zero again after each
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(out, linear(x, weight, None))


def test_columns_of_a_wider_tensor() -> None:
    linear, x = bound(LINEAR_PACKED), normal(5, 1024)
    parts = [draw(LAYOUTS[name], 512, 1024) for name in ("q4_k", "q6_k")]
    out = torch.empty(5, 1024, dtype=torch.bfloat16, device="cuda")
    for part, columns in zip(parts, torch.split(out, 512, dim=1)):
        linear(x, part, None, columns)
    expected = torch.cat([linear_packed(x, part) for part in parts], dim=1)
    assert error(out, expected) < 4e-3


def test_int8_products() -> None:
    linear = bound(int8.LINEAR_INT8)
    for n, k in ((1536, 4096), (4096, 1344)):
        weight, scale = int8.quantize_rows_int8(normal(n, k, dtype=torch.float32) / k**0.5)
        for tokens in TOKENS:
            x = normal(tokens, k)
            assert error(linear(x, weight, scale, None), int8.linear_int8(x, weight, scale)) < 3e-3, (
                tokens,
                n,
                k,
            )


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8 arithmetic here"
)
def test_block_scaled_products() -> None:
    linear = bound(fp8.LINEAR_FP8_BLOCK)
    for n, k in ((1536, 4096), (4096, 1408)):
        matrix = normal(n, k, dtype=torch.float32) / k**0.5
        values, scale = fp8.quantize_rows(matrix.reshape(-1, 128))
        weight, scales = values.view(n, k), scale.view(n, -1).t().contiguous()
        for tokens in TOKENS:
            x = normal(tokens, k)
            expected = fp8.linear_fp8_block(x, weight, scales)
            assert error(linear(x, weight, scales, None), expected) < 5e-3, (tokens, n, k)


@pytest.mark.parametrize("name", ["q5_k", "q5_k-fragments"])
def test_nothing_compiles_once_warm(name: str, compiled: list[str]) -> None:
    weight, linear = draw(PRODUCTS[name], 2096, 1280), bound(LINEAR_PACKED)
    linear(normal(3, 1280), weight, None)
    assert len(compiled) >= 5
    compiled.clear()
    for tokens in (1, 2, 5, 16, 17, 33, 65, 300, 1024, 2000):
        linear(normal(tokens, 1280), weight, None)
    assert compiled == []


def first_tokens_agree(folder: Path, least: int = 10, **options: Any) -> None:
    """Graphs and launches give the same tokens, and the first ones are those of the reference bodies on a CPU.

    Random weights have flat logits, so that rounding may turn a few rows.
    """
    vocab = open_model(str(folder)).config.get("vocab_size", 128)  # GGUF: that of ``gguf_model``
    prompts = [[token % (vocab - 3) + 3 for token in prompt] for prompt in some_prompts(12, 60)]
    options = {"dtype": "bfloat16", **options}
    expected = run(build(folder, device="cpu", **options), prompts, 4)
    recorded = run(build(folder, device="cuda", **options), prompts, 4)
    launched = run(build(folder, device="cuda", **options, enforce_eager=True), prompts, 4)
    assert sum(a[0] == b[0] for a, b in zip(recorded, expected)) >= least, (recorded, expected)
    assert sum(a == b for a, b in zip(recorded, launched)) >= least, (recorded, launched)


@pytest.mark.parametrize("name", FORMATS)
def test_engines_of_checkpoints(name: str, tmp_path: Path) -> None:
    checkpoint("qwen3", tmp_path)
    config, pack = FORMATS[name]
    published.quantize_folder(tmp_path, config, pack)
    first_tokens_agree(tmp_path, least=9)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_engines_quantized_on_load(name: str, tmp_path: Path) -> None:
    first_tokens_agree(checkpoint("llama", tmp_path), least=9, quantization=name)


@pytest.mark.parametrize(
    "kinds",
    [
        ["Q4_0"], ["Q8_0"], ["Q4_K", "Q6_K"], ["Q5_K", "Q5_0", "Q4_1"], ["Q2_K", "Q3_K"], ["IQ4_XS", "IQ4_NL"],
        ["MXFP4", "Q5_1"],
    ],
    ids=str,
)  # fmt: skip
def test_engines_of_gguf_files(kinds: list[str], tmp_path: Path) -> None:
    path = gguf_model(tmp_path, kinds)
    core = build(path, device="cuda", dtype="bfloat16")
    assert "triton" in core.settings.kernels["linear_packed"]
    core.close()
    first_tokens_agree(path, least=9)


def test_block_types_agree_with_their_decoder() -> None:
    """The public library's blocks, through the GPU's own unpacking."""
    import numpy as np

    from octavo.device.kernels.triton import packed as kernels
    from octavo.device.ops.packed import empty_packed, join_fields, pack_codes
    from octavo.model.quantization.gguf import LAYOUTS as GGUF
    from octavo.model.quantization.gguf import GgufCodes
    from octavo.model.quantization.gguf_blocks import dequantize_blocks

    for kind, layout in GGUF.items():
        matrix = np.random.default_rng(0).normal(0, 0.05, (64, 512)).astype(np.float32)
        raw = blocks(kind, matrix).data
        rows = GgufCodes(kind).read(
            {"blocks": torch.from_numpy(raw.copy()).view(64, -1)}, torch.arange(64), 512
        )
        weight = empty_packed(layout, 64, 512, torch.device("cuda"))
        words, high = pack_codes(rows.codes, layout)
        weight.words, weight.high = words.cuda(), None if high is None else high.cuda()
        weight.scale = join_fields(rows.scale, layout.scale_rows(512)).cuda()
        if rows.outer is not None:
            weight.outer = join_fields(rows.outer, layout.outer_rows(512)).cuda()
        found = kernels.write_out(weight, slice(0, 64), torch.float32).cpu()
        expected = torch.from_numpy(dequantize_blocks(raw, kind).reshape(64, 512))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "awq",
        "symmetric",
        "mxfp4",
        "nvfp4",
        "q2_k",
        "q3_k",
        "q4_k",
        "q6_k",
        "q8_0",
        "iq4_xs",
        "int4-128",
        "fp8",
        "fp8-channel",
    ],
)
def test_packed_experts(name: str, dtype: torch.dtype) -> None:
    """Every block size, up to a whole prompt; experts that are not here give nothing."""
    num, hidden, inner, top_k = 16, 1024, 512, 4
    gate_up = draw(LAYOUTS[name], num * 2 * inner, hidden, seed=1)
    down = draw(LAYOUTS[name], num * hidden, inner, seed=2)
    compute = bound(moe.EXPERTS_PACKED)
    for tokens in (1, 5, 40, 300, 1500):
        x = normal(tokens, hidden, dtype=dtype)
        ids = torch.rand(tokens, num, device="cuda").argsort(1)[:, :top_k].contiguous()
        weights = torch.rand(tokens, top_k, device="cuda")
        expected = moe.experts_packed(x, ids, weights, gate_up, down, "silu")
        assert error(compute(x, ids, weights, gate_up, down, "silu"), expected) < 1e-2, tokens
        ids[:, 0] = num
        expected = moe.experts_packed(x, ids, weights, gate_up, down, "silu", partial=True)
        assert error(compute(x, ids, weights, gate_up, down, "silu", partial=True), expected) < 1e-2, tokens


@pytest.mark.parametrize("name", ["awq-32", "fp8-tensor", "fp8-block"])
def test_engines_of_quantized_experts(name: str, tmp_path: Path) -> None:
    moe_model(tmp_path, stacked=False)
    config, pack = EXPERT_FORMATS[name]
    published.quantize_folder(tmp_path, config, pack)
    first_tokens_agree(tmp_path, least=9)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_engines_of_experts_quantized_on_load(name: str, tmp_path: Path) -> None:
    moe_model(tmp_path, stacked=True)
    first_tokens_agree(tmp_path, least=9, quantization=name)


def test_engine_of_gpt_oss_blocks(tmp_path: Path) -> None:
    mxfp4_model(tmp_path)
    core = build(tmp_path, device="cuda", dtype="bfloat16")
    assert "triton" in core.settings.kernels["experts_packed"]
    core.close()
    prompts = [[token % 120 + 3 for token in prompt] for prompt in some_prompts(12, 60)]
    expected = run(build(tmp_path, device="cpu", dtype="bfloat16"), prompts, 4)
    found = run(build(tmp_path, device="cuda", dtype="bfloat16"), prompts, 4)
    assert sum(a[0] == b[0] for a, b in zip(found, expected)) >= 9, (found, expected)


def test_engine_of_experts_in_blocks(tmp_path: Path) -> None:
    first_tokens_agree(gguf_moe_model(tmp_path, "IQ4_XS", "Q3_K"), least=9)


def test_int4_is_quick() -> None:
    """Quantization on load of 8 billion weights must take less than 20 s."""
    values = torch.randn(4096, 14336, device="cuda")

    def quantize() -> None:
        for rows in values.split((1 << 22) // 14336):  # as the loader does
            pack_codes(quantize_groups(rows, 32).codes, INT4)

    quantize()
    torch.cuda.synchronize()
    start = time.perf_counter()
    quantize()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) * 8e9 / values.numel()
    print(f"8 billion weights in {seconds:.1f} s")
    assert seconds < 20


@pytest.mark.parametrize("tokens", [1, 300])
def test_scales_of_cached_heads(tokens: int) -> None:
    """Stored divided by a scale for each key head, read multiplied by it; decodes and prompts."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 arithmetic here")
    heads, kv_heads, dim, page = 8, 4, 128, 16
    qkv = normal(tokens, (heads + 2 * kv_heads) * dim)
    scales = torch.tensor([[0.02, 0.5, 1.0, 3.0], [2.0, 0.1, 0.7, 1.0]], device="cuda")
    slots, positions = torch.arange(tokens, device="cuda") + page, torch.arange(tokens, device="cuda")
    pages = torch.zeros(tokens // page + 3, 2, kv_heads, page, dim, dtype=torch.float8_e4m3fn, device="cuda")
    q = bound(ROPE_STORE)(qkv, None, None, 1e-6, None, positions, pages, slots, heads, scales)
    key, value = qkv.view(tokens, -1, dim)[:, heads:].float().split(kv_heads, 1)
    plain = torch.zeros(pages.shape, device="cuda")
    plain[slots // page, 0, :, slots % page], plain[slots // page, 1, :, slots % page] = key, value
    table = torch.arange(1, len(pages), dtype=torch.int32, device="cuda").unsqueeze(0)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    rows = table, ends, ends[1:], tokens, tokens, dim**-0.5
    found = bound(PAGED_ATTENTION)(q, pages, *rows, kv_scales=scales)
    stored = pages.float() * scales.view(2, kv_heads, 1, 1)
    assert error(found, PAGED_ATTENTION.reference(q.float(), plain, *rows)) < 0.06
    assert error(found, PAGED_ATTENTION.reference(q.float(), stored, *rows)) < 5e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_engines_with_an_fp8_cache(family: str, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 arithmetic here")
    first_tokens_agree(checkpoint(family, tmp_path), least=9, kv_cache_dtype="fp8")

"""Kernels of other packages: FlashAttention 3 by a stand-in with its interface, and when it is bound at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.bench.gpu_kernels import Case
from octavo.bench.vendors import measure
from octavo.device.kernels.vendor.flash_attention import FlashAttention3
from octavo.device.ops.attention import PAGED_ATTENTION, paged_attention
from octavo.device.ops.bind import Binder, OpSpec
from octavo.errors import UsageError
from octavo.host import measured
from octavo.host.measured import Finding, Timing, keep, proven, record_path

HOPPER = OpSpec("cuda", "bfloat16", 90)
NAME = ("paged_attention", "flash-attention-3")


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """What the package documents of these arguments, one row at a time; caches are [pages, page, heads, dim]."""
    assert causal and k_cache.stride(-1) == v_cache.stride(-1) == 1
    out = torch.empty_like(q)
    group, page = q.shape[1] // k_cache.shape[2], k_cache.shape[1]
    for row, length in enumerate(cache_seqlens.tolist()):
        begin, end = cu_seqlens_q[row].item(), cu_seqlens_q[row + 1].item()
        assert end - begin <= max_seqlen_q
        pages = page_table[row, : -(-length // page)].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:length].float().repeat_interleave(group, 1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("thd,khd->htk", q[begin:end].float(), keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(length - (end - begin), length)[:, None]
        key_at = torch.arange(length)[None]
        hidden = key_at > at
        if window_size[0] >= 0:
            hidden |= key_at < at - window_size[0]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("htk,khd->thd", weights, values).to(q.dtype)
    return out


def inputs(rows: list[tuple[int, int]], dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """Arguments of the op for rows of (new tokens, keys): 4 heads over 2, pages of 16 in random order."""
    torch.manual_seed(0)
    pages = [-(-keys // 16) for _, keys in rows]
    order = torch.randperm(sum(pages)).int()
    table = torch.zeros(len(rows), max(pages), dtype=torch.int32)
    for row, count in enumerate(pages):
        table[row, :count] = order[sum(pages[:row]) :][:count]
    starts = torch.tensor([0] + [new for new, _ in rows]).cumsum(0).int()
    return [
        torch.randn(int(starts[-1]), 4, 32).to(dtype),
        torch.randn(sum(pages), 2, 2, 16, 32).to(dtype),
        table,
        starts,
        torch.tensor([keys for _, keys in rows], dtype=torch.int32),
        max(new for new, _ in rows),
        max(keys for _, keys in rows),
        0.2,
    ]


@pytest.mark.parametrize("more", [(), (20,), (0, 5.0), (7, 30.0)], ids=["plain", "window", "softcap", "both"])
def test_the_vendors_kernel_reads_our_pages(more: tuple[Any, ...]) -> None:
    arguments = [*inputs([(5, 5), (40, 40), (1, 33), (9, 50)]), *more]
    attend = FlashAttention3(flash_attn_with_kvcache, paged_attention)
    torch.testing.assert_close(attend(*arguments), paged_attention(*arguments), atol=2e-2, rtol=2e-2)


def test_what_it_does_not_cover_is_ours() -> None:
    calls: list[str] = []

    def note(name: str) -> Callable[..., Tensor]:
        def call(q: Tensor, *_: Any, **__: Any) -> Tensor:
            calls.append(name)
            return q

        return call

    attend = FlashAttention3(note("vendor"), note("ours"))
    prompt, decode = inputs([(5, 9)]), inputs([(1, 9)])
    attend(*prompt)
    attend(*decode)
    attend(*inputs([(5, 9)], torch.float32))
    attend(*prompt, 0, 0.0, torch.zeros(4))  # sinks
    attend(*prompt, 0, 0.0, None, 8)  # chunks
    attend(prompt[0], prompt[1].to(torch.float8_e4m3fn), *prompt[2:])
    assert calls == ["vendor"] + ["ours"] * 5


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("flash_attn_interface")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    return module


def bound(binder: Binder, spec: OpSpec = HOPPER) -> str:
    binder.bind(PAGED_ATTENTION, spec)
    return binder.explain()["paged_attention"]


def test_it_is_bound_only_where_it_is_there_and_proven(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bound(Binder()) == "triton-hopper x1"
    assert bound(Binder(proven=frozenset({NAME}))) == "flash-attention-3 x1"
    assert bound(Binder(forced={"paged_attention": "flash-attention-3"})) == "flash-attention-3 x1"
    for spec in (
        OpSpec("cuda", "float32", 90),
        OpSpec("cuda", "bfloat16", 89),
        OpSpec("cuda", "bfloat16", 100),
    ):
        assert "triton" in bound(Binder(proven=frozenset({NAME})), spec)
    assert bound(Binder(proven=frozenset({NAME})), OpSpec("cpu", "bfloat16")) == "reference x1"
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert bound(Binder(proven=frozenset({NAME}))) == "triton-hopper x1"


def finding(*rows: tuple[float, float, float], problem: str = "") -> Finding:
    return Finding(*NAME, [Timing("s", us, ours, error) for us, ours, error in rows], problem)


def test_better_is_right_everywhere_and_faster_in_all() -> None:
    assert finding((80, 100, 0.001), (100, 100, 0.001)).is_better
    for bad in (
        finding(),
        finding((80, 100, 0.02)),
        finding((80, 100, float("nan"))),
        finding((99, 100, 0.001)),
        finding((50, 100, 0.001), (101, 100, 0.001)),
        finding((50, 100, 0.001), problem="it broke"),
    ):
        assert not bad.is_better


def test_a_record_counts_for_its_card_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert proven("NVIDIA H100 80GB HBM3") == frozenset()
    path = keep("NVIDIA H100 80GB HBM3", [finding((80, 100, 0.001))])
    assert path == record_path("NVIDIA H100 80GB HBM3") and path.name == "nvidia-h100-80gb-hbm3.json"
    assert proven("NVIDIA H100 80GB HBM3") == {NAME}
    assert proven("NVIDIA H200") == frozenset()
    with monkeypatch.context() as other:
        other.setattr(measured, "versions", lambda: {"torch": "9"})
        assert proven("NVIDIA H100 80GB HBM3") == frozenset()
    path.write_text(json.dumps({"versions": 1}))
    assert proven("NVIDIA H100 80GB HBM3") == frozenset()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    with pytest.raises(UsageError, match="cannot be kept"):
        keep("card", [])


def test_measuring_checks_before_it_times(package: ModuleType) -> None:
    case = Case(PAGED_ATTENTION, "model", "prefill 5", lambda i: tuple(inputs([(5, 5)])), 1.0)
    times = iter([80.0, 100.0])
    (found,) = measure(PAGED_ATTENTION, HOPPER, [case], lambda *_: 0.001, lambda calls, repeats: next(times))
    assert found.is_better and found.timings == [Timing("prefill 5", 80.0, 100.0, 0.001)]
    assert measure(PAGED_ATTENTION, OpSpec("cuda", "bfloat16", 80), [case]) == []

    def broken(*_: Any) -> float:
        raise TypeError("unexpected keyword argument 'page_table'")

    (found,) = measure(PAGED_ATTENTION, HOPPER, [case], broken)
    assert found.problem == "TypeError: unexpected keyword argument 'page_table'" and not found.is_better
    del package.flash_attn_with_kvcache
    (found,) = measure(PAGED_ATTENTION, HOPPER, [case], lambda *_: 0.0)
    assert found.problem.startswith("AttributeError")

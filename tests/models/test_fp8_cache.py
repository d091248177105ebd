"""Keys and values in 8-bit floats: ops against their reference bodies, models near unrounded ones, scales of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Driver
from test_load import rewrite
from test_parity import oracle, prompts
from test_shard import Group

from octavo import host
from octavo.config import EngineOptions
from octavo.device.ops.attention import paged_attention
from octavo.device.ops.fp8 import FP8
from octavo.device.ops.rope_store import rope_store
from octavo.errors import ModelFileError, UsageError
from octavo.files.resolve import open_model
from octavo.host.choose import choose_backend
from octavo.model.layers.attention import AttentionLayer
from octavo.model.read_arch import read_arch


def layers(driver: Driver) -> list[AttentionLayer]:
    return [layer.attention for layer in driver.network.layers if isinstance(layer.attention, AttentionLayer)]


def test_stored_and_read_back() -> None:
    """k / k_scale and v / v_scale are rounded to three bits of mantissa and cut at 448; attention reads them."""
    qkv = torch.randn(6, (2 + 2) * 16, generator=torch.Generator().manual_seed(0)) * 3
    qkv[0, 2 * 16] = 1e6  # of the only key head
    pages = torch.zeros(3, 2, 1, 4, 16, dtype=FP8)
    slots = torch.tensor([4, 5, 6, 7, 8, -1])
    scales = torch.tensor([[0.5], [2.0]])
    q = rope_store(qkv, None, None, 0.0, None, torch.arange(6), pages, slots, 2, scales)
    heads = qkv.view(6, 4, 16)
    assert torch.equal(q, heads[:, :2])
    stored = torch.cat((pages[1], pages[2]), dim=2).float()  # [2, 1, 8, 16]
    assert torch.equal(stored[0, 0, :5], (heads[:5, 2] / 0.5).clamp(-448, 448).to(FP8).float())
    assert torch.equal(stored[1, 0, :5], (heads[:5, 3] / 2.0).to(FP8).float())
    table, starts, lens = torch.tensor([[1, 2]]), torch.tensor([0, 5]), torch.tensor([5])
    found = paged_attention(q, pages, table, starts, lens, 5, 5, 0.3)
    assert torch.equal(found, paged_attention(q, pages.float(), table, starts, lens, 5, 5, 0.3))
    found = paged_attention(q, pages, table, starts, lens, 5, 5, 0.3, kv_scales=scales)
    restored = pages.float() * scales.view(2, 1, 1, 1)
    torch.testing.assert_close(found, paged_attention(q, restored, table, starts, lens, 5, 5, 0.3))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_models_stay_near(name: str, tmp_path: Path) -> None:
    oracle(name, tmp_path)
    files = open_model(str(tmp_path))
    ours, plain = Driver(files, cache_dtype=FP8), Driver(files)
    assert all(layer.pages.dtype == FP8 for layer in layers(ours))
    assert 4 * ours.layout.page_bytes == plain.layout.page_bytes
    ids = prompts(3)[-1]
    found = []
    for driver in (ours, plain):
        row = driver.row()
        found.append(
            torch.cat([driver.step([row], [part])[0] for part in (ids[:9], ids[9:10], ids[10:]) if part])
        )
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert 1e-4 < error < 0.15, error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ],
)
def test_calibrated_scales(key: str, value: str, tmp_path: Path) -> None:
    """Read by all their names; without an fp8 cache they change nothing."""
    oracle("qwen3", tmp_path)
    plain = Driver(open_model(str(tmp_path)))

    def scaled(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scales: dict[str, Any] = {}
        for i in range(3):
            scales[f"model.layers.{i}.{key}"] = torch.tensor(0.03 + i)
            scales[f"model.layers.{i}.{value}"] = torch.tensor([0.5])
        return {**found, **scales}

    rewrite(tmp_path, scaled)
    files = open_model(str(tmp_path))
    ours, same = Driver(files, cache_dtype=FP8), Driver(files)
    for i, layer in enumerate(layers(ours)):
        assert layer.scales.factors is not None
        assert torch.equal(layer.scales.factors, torch.tensor([0.03 + i, 0.5]).unsqueeze(1).expand(2, 2))
    assert all(layer.scales.factors is None for layer in layers(same))
    ids = prompts(3)[-1]
    a, b, c = (driver.step([driver.row()], [ids])[0] for driver in (ours, same, plain))
    assert torch.equal(b, c)
    assert 1e-4 < (a - c).norm() / c.norm() < 0.15


@pytest.mark.parametrize("size", [1, 2, 4])
def test_scales_of_heads(size: int, tmp_path: Path) -> None:
    """compressed-tensors' "attn_head": each rank takes those of its heads, copies of a head the same."""
    oracle("qwen3", tmp_path)
    keys, values = torch.tensor([0.02, 0.5]), torch.tensor([3.0, 0.25])

    def scaled(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for i in range(3):
            found[f"model.layers.{i}.self_attn.k_scale"] = keys.view(2, 1, 1).bfloat16()
            found[f"model.layers.{i}.self_attn.v_scale"] = values.clone()
        return found

    plain = Driver(open_model(str(tmp_path)))
    rewrite(tmp_path, scaled)
    files = open_model(str(tmp_path))
    expected = torch.stack((keys.bfloat16().float(), values))
    for rank in range(size):
        ours = Driver(files, cache_dtype=FP8, ranks=Group(size).ranks()[rank])
        held = slice(0, 2) if size == 1 else slice(rank * 2 // size, rank * 2 // size + 1)
        for layer in layers(ours):
            assert layer.scales.factors is not None
            assert torch.equal(layer.scales.factors, expected[:, held])
    if size == 1:
        ids = prompts(3)[-1]
        a, b = (driver.step([driver.row()], [ids])[0] for driver in (ours, plain))
        assert 1e-4 < (a - b).norm() / b.norm() < 0.15


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.tensor([0.5, -1.0]), torch.tensor(float("nan"))])
def test_scales_that_fit_no_heads(wrong: torch.Tensor, tmp_path: Path) -> None:
    oracle("qwen3", tmp_path)
    rewrite(tmp_path, lambda found: {**found, "model.layers.1.self_attn.v_scale": wrong})
    with pytest.raises(ModelFileError, match=r"layers\.1\.self_attn: the scales of cached values"):
        Driver(open_model(str(tmp_path)), cache_dtype=FP8)


def test_the_option_reaches_the_cache(tmp_path: Path) -> None:
    oracle("llama", tmp_path)
    files = open_model(str(tmp_path))
    options = EngineOptions.of(
        model=str(tmp_path),
        kv_cache_dtype="fp8_e4m3",
        device="cpu",
        num_gpu_blocks_override=20,
        max_num_seqs=4,
    )
    assert choose_backend(options, files, read_arch(files)) == "torch"
    built = host.build_runner(options, files)
    assert built.resolved.kv_cache_dtype == "fp8"
    network = built.runner.network  # type: ignore[attr-defined]
    assert network.layers[0].attention.pages.dtype == FP8


def test_what_is_refused(tmp_path: Path) -> None:
    oracle("deepseek_v3", tmp_path)
    options = EngineOptions.of(
        model=str(tmp_path), kv_cache_dtype="fp8", device="cpu", num_gpu_blocks_override=20
    )
    with pytest.raises(UsageError, match="latent attention"):
        host.build_runner(options, open_model(str(tmp_path)))

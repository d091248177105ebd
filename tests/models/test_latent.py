"""Latent attention in a network: which way a step takes, what a random model of DeepSeek's shape costs to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Driver
from test_parity import close, expected, oracle, prompts

from octavo.engine.cache.spec import FullKV
from octavo.files.dummy import PRESETS
from octavo.files.resolve import open_model
from octavo.model.batch import Prompts
from octavo.model.blocks import LatentAttention, MoE
from octavo.model.describe import describe
from octavo.model.layers.latent import LatentLayer
from octavo.model.read_arch import from_hf


def layers_of(driver: Driver) -> list[LatentLayer]:
    return [layer.attention for layer in driver.network.layers if isinstance(layer.attention, LatentLayer)]


def chunk(queries: int, before: int) -> Prompts:
    """One row of so many queries behind cached keys."""
    pairs = queries * before + queries * (queries + 1) // 2
    none = torch.zeros(0, dtype=torch.int64)
    return Prompts(none, none, queries, queries + before, pairs)


def test_a_step_takes_the_way_of_fewer_multiplications(tmp_path: Path) -> None:
    """The tiny layer's dimensions are DeepSeek-V3's for the sum: 131072 a key against 768 a pair, so 171 queries."""
    oracle("deepseek_v3", tmp_path)
    layer = layers_of(Driver(open_model(str(tmp_path))))[0]
    published = describe(from_hf(PRESETS["deepseek-v3-small"])).layers[0].attention
    assert isinstance(published, LatentAttention)
    layer.block = published
    assert not layer._full_heads_are_cheaper(chunk(100, 20_000))
    assert not layer._full_heads_are_cheaper(chunk(170, 1_000_000))
    assert layer._full_heads_are_cheaper(chunk(172, 1_000_000))
    assert layer._full_heads_are_cheaper(chunk(2, 0)) and layer._full_heads_are_cheaper(chunk(8192, 0))


def test_both_ways_are_taken_and_agree(tmp_path: Path) -> None:
    model, ids = oracle("deepseek_v3", tmp_path), prompts(9)[0]
    driver = Driver(open_model(str(tmp_path)))
    calls = {"absorbed": 0, "full": 0}
    for layer in layers_of(driver):
        attend, prefill = layer.attend, layer.prefill

        def absorbed(*arguments, attend=attend):  # type: ignore[no-untyped-def]
            calls["absorbed"] += 1
            return attend(*arguments)

        def full(*arguments, prefill=prefill):  # type: ignore[no-untyped-def]
            calls["full"] += 1
            return prefill(*arguments)

        layer.attend, layer.prefill = absorbed, full
    one, other, wanted = driver.row(), driver.row(), expected(model, ids)
    close(driver.step([one], [ids[:30]])[0], wanted[:30])
    assert calls == {"absorbed": 0, "full": 3}
    mixed = driver.step([one, other], [ids[30:31], ids])  # a single token beside a prompt: each in its own way
    close(mixed[0], wanted[30:31])
    close(mixed[1], wanted)
    assert calls == {"absorbed": 3, "full": 6}
    close(driver.step([one], [ids[31:33]])[0], wanted[31:33])  # two queries behind 31 keys
    assert calls == {"absorbed": 6, "full": 6}


@pytest.mark.parametrize(("name", "latents"), [("deepseek-v3-small", True), ("mixtral-8x7b-small", False)])
def test_presets_have_the_published_layers(name: str, latents: bool) -> None:
    spec = describe(from_hf(PRESETS[name]))
    sparse = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoE)]
    assert len(sparse) == (2 if latents else 16)
    if latents:
        assert {layer.attention.cache(16, 2) for layer in spec.layers} == {FullKV(16, 1152)}
        assert sparse[0].router.scoring == "sigmoid" and sparse[0].router.top_groups == 4


def test_experts_that_nobody_chose_are_not_read(tmp_path: Path) -> None:
    oracle("mixtral", tmp_path)  # 4 experts of 96 channels, 2 a token, in 3 layers
    network = Driver(open_model(str(tmp_path))).network
    experts = 3 * 4 * 3 * 64 * 96
    assert network.idle_elements(1) == {torch.float32: experts / 2}
    assert network.idle_elements(3) == {torch.float32: experts / 8}
    assert network.idle_elements(1)[torch.float32] < network.matrix_elements()[torch.float32]

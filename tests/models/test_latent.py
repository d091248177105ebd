"""Latent attention in a network: which way a step takes, what a random model of DeepSeek's shape costs to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Driver
from published import fp8_blocks, quantize_folder
from test_parity import ROWS, close, expected, oracle, prompts
from test_shard import Group

from octavo.engine.cache.spec import FullKV
from octavo.files.dummy import PRESETS
from octavo.files.resolve import open_model
from octavo.model.batch import Prompts
from octavo.model.blocks import LatentAttention, MoE
from octavo.model.describe import describe
from octavo.model.layers.latent import LatentLayer
from octavo.model.quantization.dense import DenseWeight
from octavo.model.quantization.fp8 import BlockFp8Weight
from octavo.model.quantization.whole import whole
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
    mixed = driver.step(
        [one, other], [ids[30:31], ids]
    )  # a single token beside a prompt: each in its own way
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


WIDE = {  # whole blocks of 128 x 128, but for the rows of the rotated key
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32"])
@pytest.mark.parametrize("size", [1, 2])
def test_checkpoints_in_blocks_of_fp8(
    family: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's own format: every projection quantized, what is multiplied from both sides decoded to the bit."""
    name, extra = ROWS[family]
    index = {"index_n_heads": 8, "index_head_dim": 32, "index_topk": 8} if family == "deepseek_v32" else {}
    inner = {"moe_intermediate_size": 256} if size == 2 else {}  # ranks take whole blocks of experts
    monkeypatch.setitem(ROWS, family, (name, {**extra, **WIDE, **index, **inner}))
    oracle(family, tmp_path)
    dense = quantize_folder(tmp_path, BLOCKS, fp8_blocks(), lambda module: module.endswith("weights_proj"))
    for rank in range(size):
        ranks = Group(size).ranks()[rank]
        ours, theirs = (Driver(open_model(str(path)), ranks=ranks) for path in (tmp_path, dense))
        for mine, plain in zip(layers_of(ours), layers_of(theirs), strict=True):
            assert isinstance(mine.down.weight, BlockFp8Weight) and isinstance(plain.down.weight, DenseWeight)
            assert mine.up.quantized is None
            assert torch.equal(mine.up.matrix, plain.up.matrix)
            assert torch.equal(whole(mine.query.weight), plain.query.weight.matrix)
            assert torch.equal(whole(mine.down.weight), plain.down.weight.matrix)
    if size == 1 and family == "deepseek_v3":
        ids = prompts(1)[-1]
        found, wanted = (driver.step([driver.row()], [ids])[0] for driver in (ours, theirs))
        assert 0.001 < (found - wanted).norm() / wanted.norm() < 0.15

"""Every published format of quantized checkpoints: values to the bit, and logits of whole models against dense ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from harness import Driver
from published import Packer, quantize_folder
from test_fp8_models import projections
from test_load import mxfp4_model, rewrite
from test_parity import GPT_OSS, ROWS, oracle, prompts, to_gguf
from test_shard import Group

from octavo.device.ops.packed import empty_packed, join_fields, pack_codes, unpack
from octavo.errors import ModelFileError, UsageError
from octavo.files.dummy import open_dummy
from octavo.files.gguf import GGUFFile
from octavo.files.gguf_write import StoredTensor, write_gguf
from octavo.files.resolve import open_model
from octavo.model.layers.moe import MoELayer
from octavo.model.layers.packed_experts import PackedExpertWeights
from octavo.model.network import Network
from octavo.model.quantization.bytes import ByteWeight
from octavo.model.quantization.choose import SplitWeight
from octavo.model.quantization.dense import DenseWeight
from octavo.model.quantization.fp8 import BlockFp8Weight, Fp8Weight
from octavo.model.quantization.gguf import LAYOUTS as GGUF_LAYOUTS
from octavo.model.quantization.int4 import Int4Weight, int4_layout, quantize_groups
from octavo.model.quantization.packed import PackedWeight


def ct(
    weights: dict[str, Any], packing: str = "pack-quantized", inputs: Any = None, **more: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": packing, "config_groups": {"group_0": group}, "ignore": ["lm_head"], **more}  # fmt: skip


def gptq(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False, **more}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
try:
    CT = {
        "w4a16": (ct(INT4), published.compressed(4, 32, True)),
        "w4a16-zero": (ct({**INT4, "symmetric": False}), published.compressed(4, 32, False)),
        "w8a16-channel": (
            ct({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
            published.compressed(8, -1, True),
        ),
    }
except ImportError:
    CT = {}
FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "awq-32": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}, published.awq(32)),
    "awq-channel": (
        {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True},
        published.awq(-1),
    ),
    "gptq-4": (gptq(4, 32), published.gptq(4, 32)),
    "gptq-2": (gptq(2, 16), published.gptq(2, 16)),
    "gptq-3": (gptq(3, 32, sym=False), published.gptq(3, 32, symmetric=False)),
    "gptq-8": (gptq(8, -1), published.gptq(8, -1)),
    "gptq-zero": (gptq(4, 32, sym=False), published.gptq(4, 32, symmetric=False)),
    "gptq-v2": (
        gptq(4, 32, sym=False, checkpoint_format="gptq_v2"),
        published.gptq(4, 32, symmetric=False, v2=True),
    ),
    "gptq-order": (gptq(4, 32, desc_act=True), published.gptq(4, 32, act_order=True)),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, published.fp8(False)),
    "fp8-channel": (
        ct({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized", TOKEN),
        published.fp8(True, static=False),
    ),
    "modelopt-fp8": (
        {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        },
        published.fp8(False),
    ),
    "int8": (
        ct(
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            "int-quantized",
            {**TOKEN, "type": "int"},
        ),
        published.int8,
    ),
    "nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        published.nvfp4(True),
    ),
    "nvfp4-compressed": (
        ct(
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            "nvfp4-pack-quantized",
        ),
        published.nvfp4(False),
    ),
    **CT,
}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def values(weight: Any) -> torch.Tensor:
    """What a projection stands for, inputs in the operand's order."""
    if isinstance(weight, SplitWeight):
        return torch.cat([values(part) for part in weight.weights])
    if isinstance(weight, PackedWeight):
        found = unpack(weight.packed)
        order = weight.packed.order
        return found if order is None else found[:, torch.argsort(order)]
    if isinstance(weight, ByteWeight):
        return weight.matrix.float() * weight.scale[:, None]
    if isinstance(weight, BlockFp8Weight):
        return weight.matrix.float() * weight.scale.t().repeat_interleave(128, 1)
    assert isinstance(weight, DenseWeight)
    return weight.matrix.float()


def pairs(ours: Network, dense: Network) -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
    for a, b in zip(projections(ours), projections(dense), strict=True):
        yield values(a.weight), values(b.weight), a.weight


def same(ours: Driver, dense: Driver, kinds: tuple[type, ...]) -> None:
    count = 0
    for found, expected, weight in pairs(ours.network, dense.network):
        assert isinstance(weight, kinds)
        assert torch.equal(found, expected)
        count += 1
    assert count >= 4


def logits_agree(ours: Driver, dense: Driver, bound: float = 2e-4) -> None:
    """Over a prefill and decodes."""
    for ids in prompts(1):
        found = []
        for driver in (ours, dense):
            row = driver.row()
            parts = (ids[: len(ids) // 2], ids[len(ids) // 2 : -1], ids[-1:])
            found.append(torch.cat([driver.step([row], [part])[0] for part in parts if part]))
        torch.testing.assert_close(found[0], found[1], atol=bound, rtol=bound)


@pytest.mark.parametrize("name", FORMATS)
def test_values_and_logits(name: str, tmp_path: Path) -> None:
    config, pack = FORMATS[name]
    oracle("llama-bias" if name == "awq-32" else "qwen3", tmp_path)
    dense = Driver(open_model(str(quantize_folder(tmp_path, config, pack))))
    ours = Driver(open_model(str(tmp_path)))
    same(ours, dense, (ByteWeight, PackedWeight))
    if not isinstance(next(projections(ours.network)).weight, ByteWeight):  # which quantize activations too
        logits_agree(ours, dense)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["awq-32", "gptq-3", "gptq-8", "fp8-tensor", *list(CT)[1:]])
def test_a_rank(name: str, rank: int, tmp_path: Path) -> None:
    """Column and row shards of packed tensors; 64 inputs a rank are two groups."""
    config, pack = FORMATS[name]
    oracle("qwen3", tmp_path)
    rewrite(tmp_path, wider)
    dense_folder = quantize_folder(
        tmp_path, config, pack, change=lambda found: found.update(intermediate_size=128)
    )
    ranks = Group(2).ranks()[rank]
    ours, dense = (Driver(open_model(str(folder)), ranks=ranks) for folder in (tmp_path, dense_folder))
    same(ours, dense, (Fp8Weight, PackedWeight))


def wider(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An MLP of 128 channels, so that halves are whole groups."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in found.items():
        if ".mlp." in name:
            shape = (64, 128) if "down" in name else (128, 64)
            found[name] = torch.randn(shape, generator=generator) * 0.15
        else:
            found[name] = tensor
    return found


def test_cuts_inside_groups_are_refused(tmp_path: Path) -> None:
    """96 channels are three groups of 32."""
    config, pack = FORMATS["awq-32"]
    oracle("qwen3", tmp_path)
    quantize_folder(tmp_path, config, pack)
    with pytest.raises(UsageError, match="48 inputs a device are no whole groups of 32"):
        Driver(open_model(str(tmp_path)), ranks=Group(2).ranks()[0])


def test_ordered_inputs_are_not_split(tmp_path: Path) -> None:
    config, pack = FORMATS["gptq-order"]
    oracle("qwen3", tmp_path)
    quantize_folder(tmp_path, config, pack)
    with pytest.raises(UsageError, match="desc_act"):
        Driver(open_model(str(tmp_path)), ranks=Group(2).ranks()[0])


def test_fused_and_plain_parts(tmp_path: Path) -> None:
    """Phi 3 stores qkv in one tensor; v alone is left plain in the other model, beside quantized q and k."""
    config, pack = FORMATS["gptq-4"]
    oracle("phi3", tmp_path / "fused")
    dense = Driver(open_model(str(quantize_folder(tmp_path / "fused", config, pack))))
    same(Driver(open_model(str(tmp_path / "fused"))), dense, (PackedWeight,))
    oracle("llama", tmp_path / "split")
    config = {**config, "dynamic": {r"-:.*v_proj": {}}}
    folder = quantize_folder(tmp_path / "split", config, pack, plain=lambda module: module.endswith("v_proj"))
    dense, ours = Driver(open_model(str(folder))), Driver(open_model(str(tmp_path / "split")))
    same(ours, dense, (PackedWeight, SplitWeight))
    logits_agree(ours, dense)


def test_a_bias_of_zeros_is_ignored(tmp_path: Path) -> None:
    """Old GPTQ files have one for every matrix; one that is not zero would be lost silently."""
    config, pack = FORMATS["gptq-4"]
    oracle("qwen3", tmp_path)
    quantize_folder(tmp_path, config, lambda weight: with_bias(pack, weight, 0.0))
    Driver(open_model(str(tmp_path)))
    oracle("qwen3", tmp_path)
    quantize_folder(tmp_path, config, lambda weight: with_bias(pack, weight, 0.5))
    with pytest.raises(ModelFileError, match="bias is not zero"):
        Driver(open_model(str(tmp_path)))


def with_bias(
    pack: Packer, weight: torch.Tensor, value: float
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    stored, found = pack(weight)
    return {**stored, "bias": torch.full((weight.shape[0],), value)}, found


def test_wrong_files(tmp_path: Path) -> None:
    config, pack = FORMATS["gptq-4"]
    oracle("qwen3", tmp_path)
    quantize_folder(tmp_path, {**config, "group_size": 64}, pack)
    with pytest.raises(ModelFileError, match="not of one size"):
        Driver(open_model(str(tmp_path)))
    oracle("qwen3", tmp_path)
    quantize_folder(tmp_path, {**config, "sym": True}, published.gptq(4, 32, symmetric=False))
    with pytest.raises(ModelFileError, match="says sym"):
        Driver(open_model(str(tmp_path)))
    oracle("qwen3", tmp_path)
    quantize_folder(tmp_path, config, pack)
    rewrite(
        tmp_path,
        lambda found: {k: v for k, v in found.items() if not k.endswith("layers.1.mlp.up_proj.qzeros")},
    )
    with pytest.raises(ModelFileError, match=r"up_proj\.qzeros"):
        Driver(open_model(str(tmp_path)))


def test_a_contradicting_flag(tmp_path: Path) -> None:
    config, pack = FORMATS["awq-32"]
    oracle("qwen3", tmp_path)
    quantize_folder(tmp_path, config, pack)
    Driver(open_model(str(tmp_path)), quantization="awq_marlin")
    with pytest.raises(UsageError, match="quantized already, as awq"):
        Driver(open_model(str(tmp_path)), quantization="fp8")


@pytest.mark.parametrize("name", ["fp8", "compressed"])
@pytest.mark.parametrize("size", [1, 2])
def test_block_scaled_fp8(name: str, size: int, tmp_path: Path) -> None:
    """Blocks of 128 x 128, some of them cut off at the edge; logits stay near the dense model's."""
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    pack = published.fp8_blocks()
    if name == "compressed":
        weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
        config, pack = ct(weights, "float-quantized", TOKEN), published.fp8_blocks("weight_scale")
    large_model(tmp_path)
    folder = quantize_folder(tmp_path, config, pack)
    for rank in range(size):
        ranks = Group(size).ranks()[rank]
        ours, dense = (Driver(open_model(str(path)), ranks=ranks) for path in (tmp_path, folder))
        same(ours, dense, (BlockFp8Weight,))
    if size == 1:
        ids = prompts(1)[-1]
        found, expected = (driver.step([driver.row()], [ids])[0] for driver in (ours, dense))
        assert 0.001 < (found - expected).norm() / expected.norm() < 0.15


def large_model(folder: Path) -> None:
    """256 channels; keys and values of 128 rows."""
    import transformers

    torch.manual_seed(5)
    config = transformers.Qwen3Config(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).eval().save_pretrained(folder)


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.06), ("int4", 0.5)])
def test_on_load(name: str, bound: float, tmp_path: Path) -> None:
    """Logits move as far as so many bits must, and no further; the head is left alone."""
    oracle("qwen3", tmp_path)
    ours, dense = (Driver(open_model(str(tmp_path)), quantization=kind) for kind in (name, None))
    for found, expected, weight in pairs(ours.network, dense.network):
        error = (found - expected).norm() / expected.norm()
        assert 0.002 < error < (0.11 if isinstance(weight, Int4Weight) else 0.01), error
    assert ours.network.head is not None and isinstance(ours.network.head.weight, DenseWeight)
    ids = prompts(1)[-1]
    found, expected = (driver.step([driver.row()], [ids])[0] for driver in (ours, dense))
    assert 0.002 < (found - expected).norm() / expected.norm() < bound


def expert_values(network: Network) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both stacks of every layer that has experts."""
    for layer in network.layers:
        if isinstance(layer.mlp, MoELayer):
            experts = layer.mlp.experts
            if isinstance(experts, PackedExpertWeights):
                num, hidden, inner = experts.down.shape
                yield (
                    unpack(experts.stacks[0].packed).view(num, 2 * inner, hidden),
                    unpack(experts.stacks[1].packed).view(num, hidden, inner),
                )
            else:
                yield experts.gate_up, experts.down


def same_experts(ours: Network, dense: Network) -> None:
    count = 0
    for found, expected in zip(expert_values(ours), expert_values(dense), strict=True):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        count += 1
    assert count and all(isinstance(layer.mlp.experts, PackedExpertWeights) for layer in ours.layers if isinstance(layer.mlp, MoELayer))  # fmt: skip


def moe_model(folder: Path, stacked: bool) -> None:
    """Experts of 128 channels over 256; one tensor an expert, or stacks."""
    import transformers

    torch.manual_seed(5)
    config = transformers.Qwen3MoeConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=256, norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.08)
    model.save_pretrained(folder)

    def split(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name, tensor in found.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                base = name.rsplit(".", 1)[0]
                for i, matrix in enumerate(tensor):
                    if name.endswith("down_proj"):
                        out[f"{base}.{i}.down_proj.weight"] = matrix
                    else:
                        gate, up = matrix.chunk(2)
                        out |= {f"{base}.{i}.gate_proj.weight": gate, f"{base}.{i}.up_proj.weight": up}
            else:
                out[name] = tensor
        return {name: tensor.contiguous() for name, tensor in out.items()}

    def join(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {name: tensor for name, tensor in found.items() if ".experts." not in name}
        for layer in range(2):
            base = f"model.layers.{layer}.mlp.experts"
            parts = [
                [found[f"{base}.{i}.{name}_proj.weight"] for i in range(4)] for name in ("gate", "up", "down")
            ]
            out[f"{base}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(*parts[:2])])
            out[f"{base}.down_proj"] = torch.stack(parts[2])
        return out

    rewrite(folder, split)
    if stacked:
        rewrite(folder, join)


EXPERT_FORMATS = {
    name: FORMATS[name] for name in ("awq-32", "gptq-zero", "nvfp4", "fp8-tensor", "int8", "fp8-channel")
} | {
    "fp8-block": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        published.fp8_blocks(),
    ),
    "nf4": (NF4, published.nf4(False)),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", EXPERT_FORMATS)
def test_experts(name: str, size: int, tmp_path: Path) -> None:
    """To the bit; ranks take channels of every expert, in whole groups."""
    config, pack = EXPERT_FORMATS[name]
    moe_model(tmp_path, stacked=False)
    folder = quantize_folder(tmp_path, config, pack)
    if name == "fp8-block" and size == 2:
        with pytest.raises(UsageError, match="no whole groups of 128"):
            Driver(open_model(str(tmp_path)), ranks=Group(size).ranks()[0])
        return
    for rank in range(size):
        ranks = Group(size).ranks()[rank]
        ours, dense = (Driver(open_model(str(path)), ranks=ranks) for path in (tmp_path, folder))
        same(ours, dense, (ByteWeight, BlockFp8Weight, PackedWeight))
        same_experts(ours.network, dense.network)
    if size == 1 and name in ("awq-32", "gptq-zero"):
        logits_agree(ours, dense)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.1), ("int8", 0.04), ("int4", 0.3)])
def test_experts_on_load(name: str, bound: float, stacked: bool, tmp_path: Path) -> None:
    moe_model(tmp_path, stacked)
    ours, dense = (Driver(open_model(str(tmp_path)), quantization=kind) for kind in (name, None))
    for found, expected in zip(expert_values(ours.network), expert_values(dense.network), strict=True):
        for a, b in zip(found, expected):
            assert 0.002 < (a - b).norm() / b.norm() < (0.12 if name == "int4" else 0.04)
    ids = prompts(1)[-1]
    a, b = (driver.step([driver.row()], [ids])[0] for driver in (ours, dense))
    assert 0.002 < (a - b).norm() / b.norm() < bound


@pytest.mark.parametrize("size", [1, 2])
def test_gpt_oss_stays_packed(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MXFP4 blocks: the same values as decoded ones, on every rank."""
    monkeypatch.setitem(ROWS, "gpt_oss-wide", ("GptOss", {**GPT_OSS, "intermediate_size": 128}))
    mxfp4_model(tmp_path, "gpt_oss-wide")
    for rank in range(size):
        ranks = Group(size).ranks()[rank]
        ours = Driver(open_model(str(tmp_path)), ranks=ranks, quantization="mxfp4")
        dense = Driver(open_model(str(tmp_path)), ranks=ranks)
        same_experts(ours.network, dense.network)
        if size == 1:
            logits_agree(ours, dense)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4(nested: bool, tmp_path: Path) -> None:
    """Scales for 64 weights, or 8-bit codes of them; nested ones are multiplied in another order."""
    large_model(tmp_path)
    dense = Driver(
        open_model(
            str(
                quantize_folder(tmp_path, {**NF4, "bnb_4bit_use_double_quant": nested}, published.nf4(nested))
            )
        )
    )
    ours = Driver(open_model(str(tmp_path)))
    for found, expected, weight in pairs(ours.network, dense.network):
        assert isinstance(weight, PackedWeight)
        torch.testing.assert_close(
            found, expected, atol=0.0 if not nested else 1e-7, rtol=0.0 if not nested else 1e-6
        )
    logits_agree(ours, dense)


GGUF_KINDS = [*GGUF_LAYOUTS, "F16"]


HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def blocks(kind: str, values: np.ndarray) -> StoredTensor:
    """A matrix in a block type: by the public library, or of random bits where that cannot write it."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    try:
        raw = np.ascontiguousarray(gguf.quants.quantize(values, number)).view(np.uint8).reshape(-1)
    except NotImplementedError:
        size, width = gguf.GGML_QUANT_SIZES[number]
        rng = np.random.default_rng(values.size)
        found = rng.integers(0, 256, (values.size // size, width), dtype=np.uint8)
        if kind == "MXFP4":
            found[:, 0] = rng.integers(116, 124, len(found))
        for at in HALVES.get(kind, ()):
            scale = rng.uniform(0.5e-4, 2e-4, len(found)).astype(np.float16)
            found[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
        raw = found.reshape(-1)
    return StoredTensor(kind, values.shape, raw)


def gguf_model(folder: Path, kinds: list[str]) -> Path:
    """A llama whose matrices take turns in block types, so that parts of fused ones differ."""
    import transformers

    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    matrices = itertools.cycle(kinds)
    return in_blocks(transformers.LlamaForCausalLM(config), "llama", folder, lambda _: next(matrices))


def in_blocks(model: Any, architecture: str, folder: Path, kind_of: Callable[[str], str]) -> Path:
    """A GGUF file whose matrices but embedding and router are in the block types that their names get."""
    folder.mkdir(parents=True, exist_ok=True)
    to_gguf(model.eval(), architecture, folder / "plain.gguf")
    plain = GGUFFile(folder / "plain.gguf", "plain")
    tensors: dict[str, Any] = {}
    for key, info in plain.tensors.items():
        matrix = plain.read(key).view(np.float32).reshape(info.shape).copy()
        tensors[key] = matrix
        if len(info.shape) > 1 and key != "token_embd.weight" and "gate_inp" not in key:
            tensors[key] = blocks(kind_of(key), matrix)
    write_gguf(folder / "model.gguf", dict(plain.config), tensors)
    return folder / "model.gguf"


def gguf_moe_model(folder: Path, kind: str, last: str) -> Path:
    """A mixture of experts in one block type, and its down projections in another."""
    import transformers

    torch.manual_seed(5)
    config = transformers.Qwen3MoeConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=256, norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    return in_blocks(model, "qwen3moe", folder, lambda name: last if "down" in name else kind)


@pytest.mark.parametrize(
    ("kind", "last"), [("Q4_0", "Q8_0"), ("Q3_K", "Q4_K"), ("IQ4_XS", "Q6_K"), ("MXFP4", "Q2_K")]
)
def test_experts_of_gguf_files(kind: str, last: str, tmp_path: Path) -> None:
    """Stacks of experts stay in their blocks, those of down projections often in another type; ranks take whole ones."""
    path = gguf_moe_model(tmp_path, kind, last)
    for size in (1, 2) if last == "Q8_0" else (1,):
        ranks = Group(size).ranks()[size - 1]
        ours = Driver(open_model(str(path)), ranks=ranks, quantization="gguf")
        dense = Driver(open_model(str(path)), ranks=ranks)
        same(ours, dense, (PackedWeight,))
        same_experts(ours.network, dense.network)
    if last == "Q8_0":
        with pytest.raises(UsageError, match="no whole groups of 256"):
            Driver(
                open_model(str(gguf_moe_model(tmp_path, "Q4_0", "Q4_K"))),
                ranks=ranks,
                quantization="gguf",
            )


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_gguf_blocks_stay(kind: str, tmp_path: Path) -> None:
    """To the bit what the block decoders give; the head too."""
    path = gguf_model(tmp_path, [kind])
    ours, dense = Driver(open_model(str(path)), quantization="gguf"), Driver(open_model(str(path)))
    same(ours, dense, (DenseWeight,) if kind == "F16" else (PackedWeight,))
    assert ours.network.head is not None and dense.network.head is not None
    assert torch.equal(values(ours.network.head.weight), values(dense.network.head.weight))
    if kind in ("Q4_0", "Q8_0", "Q5_1"):
        logits_agree(ours, dense)


@pytest.mark.parametrize("size", [1, 2])
def test_gguf_types_mixed(size: int, tmp_path: Path) -> None:
    """Parts of fused matrices differ; ranks take whole blocks."""
    path = gguf_model(tmp_path, ["Q4_K", "Q6_K", "Q4_K", "Q8_0"] if size == 1 else ["Q4_0", "Q8_0", "Q4_0"])
    for rank in range(size):
        ranks = Group(size).ranks()[rank]
        ours = Driver(open_model(str(path)), ranks=ranks, quantization="gguf")
        dense = Driver(open_model(str(path)), ranks=ranks)
        same(ours, dense, (PackedWeight, SplitWeight))
        assert size == 2 or any(isinstance(layer.weight, SplitWeight) for layer in projections(ours.network))


@pytest.mark.parametrize("name", ["awq-32", "gptq-8", "fp8-tensor", "nvfp4", "int8"])
def test_random_weights_of_a_quantized_configuration(name: str, tmp_path: Path) -> None:
    """--load-format dummy: products keep the size of their operand."""
    oracle("qwen3", tmp_path)
    quantize_folder(tmp_path, *FORMATS[name])
    network = Driver(open_dummy(tmp_path)).network
    for layer in projections(network):
        found = values(layer.weight)
        assert 0.5 < float(found.std()) * found.shape[1] ** 0.5 < 2.0
        assert abs(float(found.mean())) < 0.2 * float(found.std())


@pytest.mark.parametrize("inputs", [576, 1000, 8192])
def test_int4_fits_its_groups(inputs: int) -> None:
    """Nearer than rounding between each group's extremes, whatever the size of the values; zeros and constants stay."""
    layout = int4_layout(inputs)
    assert layout.group == {576: 32, 1000: 0, 8192: 128}[inputs]
    matrix = torch.randn(40, inputs, generator=torch.Generator().manual_seed(0))
    matrix[1] *= 1e-6
    matrix[2] *= 1e4
    matrix[3], matrix[4], matrix[5] = 0.0, 0.25, -7.0
    packed = empty_packed(layout, 40, inputs, torch.device("cpu"))
    rows = quantize_groups(matrix, layout.group)
    packed.words = pack_codes(rows.codes, layout)[0]
    packed.scale = join_fields(rows.scale, packed.scale.shape[0])
    if rows.outer is not None and packed.outer is not None:
        packed.outer = join_fields(rows.outer, packed.outer.shape[0])
    found = unpack(packed)
    error = (found - matrix).norm(dim=1) / matrix.norm(dim=1).clamp(min=1e-30)
    assert error[3] == 0 and float(error[4:6].max()) < 0.02
    size = layout.group or inputs
    parts = matrix[6:, : inputs // size * size].reshape(-1, size)
    low, step = parts.amin(1, keepdim=True), (parts.amax(1, keepdim=True) - parts.amin(1, keepdim=True)) / 15
    plain = ((parts - low) / step).round() * step + low - parts
    usual = float(plain.norm() / parts.norm())
    assert float(error[[0, 1, 2, *range(6, 40)]].mean()) < 0.95 * usual
    assert (float(error[6:].mean()) < 0.075) == (size == 32)


def test_gpt_oss_of_a_gguf_file(tmp_path: Path) -> None:
    """Experts in MXFP4 blocks with biases, the rest in others."""
    model = oracle("gpt_oss", tmp_path)
    path = in_blocks(
        model, "gpt-oss", tmp_path / "blocks", lambda name: "MXFP4" if "exps" in name else "Q8_0"
    )
    ours, dense = (Driver(open_model(str(path)), quantization=kind) for kind in ("gguf", None))
    same_experts(ours.network, dense.network)
    logits_agree(ours, dense)

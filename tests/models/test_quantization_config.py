"""What checkpoints say of their quantization, read from each quantizer's own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.files.dummy import open_dummy
from octavo.model.quantization.describe import Scheme, describe_quantization

LAYER = "model.layers.3.self_attn.q_proj"
FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


def compressed(packing: str, weights: dict[str, Any], inputs: Any = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


CASES: dict[str, tuple[dict[str, Any], str, Scheme]] = {
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        "awq",
        Scheme("int", "awq", 4, 128, symmetric=False),
    ),
    "awq-file": (
        {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
        "awq",
        Scheme("int", "awq", 4, 64, symmetric=False),
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 3, "group_size": -1, "desc_act": True, "sym": False},
        "gptq",
        Scheme("int", "gptq", 3, 0, symmetric=False, act_order=True),
    ),
    "gptq_v2": (
        {"bits": 8, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"},
        "gptq",
        Scheme("int", "gptq_v2", 8, 32),
    ),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8", Scheme("fp8", "fp8", 8, rows=0)),
    "deepseek": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "fp8",
        Scheme("fp8", "fp8", 8, group=128, rows=128),
    ),
    "modelopt": (
        {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        },
        "modelopt",
        Scheme("fp8", "modelopt", 8, rows=0),
    ),
    "nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        "modelopt",
        Scheme("nvfp4", "modelopt", 4, group=16),
    ),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes",
        Scheme("nf4", "bitsandbytes", 4, group=64),
    ),
    "w4a16": (
        compressed(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": False},
        ),
        "compressed-tensors",
        Scheme("int", "compressed", 4, 128, symmetric=False),
    ),
    "w8a16": (
        compressed("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
        "compressed-tensors",
        Scheme("int", "compressed", 8, 0),
    ),
    "w8a8-fp8": (
        compressed(
            "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, FP8_TOKEN,
            kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"},
        ),
        "compressed-tensors",
        Scheme("fp8", "compressed", 8),
    ),
    "w8a8-int8": (
        compressed(
            "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True},
        ),
        "compressed-tensors",
        Scheme("int8", "compressed", 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_schemes(name: str) -> None:
    given, method, scheme = CASES[name]
    found = describe_quantization({"quantization_config": given})
    assert found is not None and found.method == method
    assert found.of(LAYER) == scheme and found.schemes() == (scheme,)
    assert found.of("lm_head") is None
    assert (found.kv_cache == "fp8") == (name in ("modelopt", "w8a8-fp8"))


@pytest.mark.parametrize(
    ("bits", "strategy", "kind"), [(8, "attn_head", "fp8"), (8, "tensor", "fp8"), (4, "tensor", None)]
)
def test_caches_of_compressed_tensors(bits: int, strategy: str, kind: str | None) -> None:
    scheme = {"type": "float", "num_bits": bits, "strategy": strategy, "dynamic": False, "symmetric": True}
    given = {**CASES["w8a8-fp8"][0], "kv_cache_scheme": scheme}
    found = describe_quantization({"quantization_config": given})
    assert found is not None and found.kv_cache == kind


def test_plain_models_have_none() -> None:
    assert describe_quantization({}) is None


def test_left_out_modules() -> None:
    given = {**CASES["awq"][0], "modules_to_not_convert": ["visual", "mlp.gate"]}
    found = describe_quantization({"quantization_config": given})
    assert found is not None
    assert found.of("visual.blocks.0.fc1") is None
    assert found.of("model.layers.0.mlp.gate") is None
    assert found.of("model.layers.0.mlp.gate_proj") is not None
    given = {**CASES["w8a8-fp8"][0], "ignore": ["re:.*layers\\.0\\..*", "model.layers.1.mlp.down_proj"]}
    found = describe_quantization({"quantization_config": given})
    assert found is not None and found.of("model.layers.0.mlp.up_proj") is None
    assert found.of("model.layers.1.mlp.down_proj") is None and found.of("model.layers.10.mlp.down_proj")
    assert found.of("lm_head") is not None
    given = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "exclude_modules": ["model.layers.1.*", "lm_head"],
    }
    found = describe_quantization({"quantization_config": given})
    assert found is not None and found.of("model.layers.1.mlp.up_proj") is None
    assert found.of("model.layers.11.mlp.up_proj") is not None


def test_gptq_overrides() -> None:
    dynamic = {r"-:.*layers\.0\..*": {}, r"+:.*down_proj": {"bits": 8, "group_size": 64}}
    given = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "dynamic": dynamic,
        "lm_head": True,
    }
    found = describe_quantization({"quantization_config": given})
    assert found is not None
    assert found.of("model.layers.0.mlp.down_proj") is None
    assert found.of("model.layers.1.mlp.down_proj") == Scheme("int", "gptq", 8, 64)
    assert found.of("model.layers.1.mlp.up_proj") == found.of("lm_head") == Scheme("int", "gptq", 4, 128)


def test_bits_per_weight() -> None:
    assert Scheme("int", "awq", 4, 128, symmetric=False).bits_per_weight(4096) == 4 + 24 / 128
    assert Scheme("int", "gptq", 3, 0).bits_per_weight(4096) == 4 + 16 / 4096
    assert Scheme("fp8", "fp8", 8).bits_per_weight(4096) == 8 + 32 / 4096
    assert Scheme("mxfp4", "gpt_oss", 4, group=32).bits_per_weight(4096) == 4.5


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"quant_method": "quip"}, "'quip'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "5 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 48}, "Groups of 48"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "64, 64"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        (compressed("marlin-24", {"num_bits": 4, "type": "int"}), "marlin-24"),
        (compressed("pack-quantized", {"num_bits": 4}, sparsity_config={"format": "sparse"}), "Sparse"),
    ],
)
def test_what_is_not_read(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        describe_quantization({"quantization_config": given})


@pytest.mark.parametrize(
    "given",
    [
        "awq",
        {"quant_method": "gptq", "bits": "4", "group_size": 128},
        {"quant_method": "compressed-tensors"},
        {**CASES["w8a8-fp8"][0], "ignore": ["re:(("]},
    ],
)
def test_nonsense(given: Any) -> None:
    with pytest.raises(ModelFileError):
        describe_quantization({"quantization_config": given})


def test_files_beside_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "quant_config.json").write_text(json.dumps(CASES["awq-file"][0]))
    found = describe_quantization(open_dummy(tmp_path).config)
    assert found is not None and found.method == "awq"

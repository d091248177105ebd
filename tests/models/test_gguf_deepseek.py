"""GGUF files of DeepSeek's architecture, in the layout of older converters (kv_b whole) and of newer ones (split)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Driver
from test_parity import ROWS, YARN_LATENT, close, expected, oracle, prompts

from octavo.errors import ModelFileError
from octavo.files.gguf_write import write_gguf
from octavo.files.resolve import open_model
from octavo.model.describe import describe
from octavo.model.read_arch import read_arch

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}


def layer_tensors(config: Any, rest: str, array: np.ndarray, split: bool) -> dict[str, np.ndarray]:
    if ".experts.gate_up_proj" in rest:
        gate, up = np.split(array, 2, axis=1)
        return {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
    if ".experts.down_proj" in rest:
        return {"ffn_down_exps.weight": array}
    if rest in NAMES:
        return {NAMES[rest]: array}
    base, kind = rest.rsplit(".", 1)
    if split and base == "self_attn.kv_b_proj":
        heads = array.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = heads[:, : config.qk_nope_head_dim], heads[:, config.qk_nope_head_dim :]
        return {"attn_k_b.weight": keys.swapaxes(1, 2), "attn_v_b.weight": values}
    return {f"{NAMES[base]}.{kind}": array}


def to_gguf(model: Any, path: Path, split: bool, version: int) -> None:
    config, tensors = model.config, {}
    for name, value in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            found = layer_tensors(config, rest, value.numpy(), split)
            tensors |= {f"blk.{layer}.{key}": array for key, array in found.items()}
        else:
            whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            tensors[f"{whole[name.removesuffix('.weight')]}.weight"] = value.numpy()
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1 if split else config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + rope if split else nope + rope,
        "attention.value_length": config.kv_lora_rank if split else config.v_head_dim,
        "rope.dimension_count": rope,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": version == 3 and bool(config.norm_topk_prob),
        "expert_gating_func": 2 if version == 3 else 1,
    }
    if split:
        keys |= {"attention.key_length_mla": nope + rope, "attention.value_length_mla": config.v_head_dim}
    if config.q_lora_rank:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if config.n_group and config.n_group > 1:
        keys |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if config.rope_parameters["rope_type"] == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.rope_parameters["factor"],
            "rope.scaling.original_context_length": config.rope_parameters[
                "original_max_position_embeddings"
            ],
            "rope.scaling.yarn_log_multiplier": 0.1 * config.rope_parameters["mscale_all_dim"],
        }
    metadata = {
        "general.architecture": "deepseek2",
        **{f"deepseek2.{key}": value for key, value in keys.items()},
    }
    write_gguf(
        path, metadata, {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    )


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("name", "version"), [("deepseek_v2", 2), ("deepseek_v2-groups", 2), ("deepseek_v3", 3)]
)
def test_logits(
    name: str, version: int, split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, extra = ROWS[name]
    if "rope_parameters" in extra:  # GGUF knows one of the two numbers
        extra = {**extra, "rope_parameters": {**YARN_LATENT, "mscale": 0.7, "mscale_all_dim": 0.7}}
    monkeypatch.setitem(ROWS, name, (family, extra))
    model = oracle(name, tmp_path / "hf")
    path = tmp_path / "model.gguf"
    to_gguf(model, path, split, version)
    files = open_model(str(path))
    assert read_arch(files).model_type == f"deepseek_v{version}"
    driver, ids = Driver(files), prompts(4)[0]
    close(driver.step([driver.row()], [ids])[0], expected(model, ids))


def test_absurd_sizes_are_named(tmp_path: Path) -> None:
    to_gguf(oracle("deepseek_v3", tmp_path / "hf"), tmp_path / "m.gguf", True, 3)
    files = open_model(str(tmp_path / "m.gguf"))
    files.config = {**files.config, "deepseek2.attention.key_length_mla": 8}
    with pytest.raises(ModelFileError, match="keys of 8 values cannot hold 8 that rotate"):
        describe(read_arch(files))

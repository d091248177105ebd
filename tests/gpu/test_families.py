"""Every family on a GPU: greedy tokens of the whole engine equal the CPU's in float32 (the first six in ``test_engine``), and
logits in bfloat16 stay near those of the float32 reference bodies.

python -m pytest tests/gpu/test_families.py --parity-json tests/gpu/bf16_parity.json     # then tests/models/parity_table.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bf16 import distance
from test_engine import BASE, build, run, some_prompts
from test_engine import FAMILIES as FIRST_FAMILIES
from test_engine import checkpoint as first_checkpoint
from written import write_random

from octavo.device.ops.bind import OpSpec

pytestmark = pytest.mark.gpu

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
LATENT = {
    **MOE,
    "n_routed_experts": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
}
DIRECT = {**LATENT, "q_lora_rank": None}
LLAMA4 = {
    "head_dim": 64,
    "num_local_experts": 4,
    "intermediate_size_mlp": 128,
    "attention_chunk_size": 40,
    "floor_scale": 16,
}
DELTA = {
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
}
GRANITE = {
    "shared_intermediate_size": 96,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
V4 = {
    **MOE,
    "n_routed_experts": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 48,
    "layer_types": [
        "sliding_attention",
        "heavily_compressed_attention",
        *["compressed_sparse_attention"] * 2,
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    "sliding_window": 24,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 8,
    "num_hash_layers": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_inner": 96, "num_key_value_heads": 4}),
    "starcoder2": ("Starcoder2", {"sliding_window": 24}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "gemma": ("Gemma", {"head_dim": 64}),
    "cohere": ("Cohere", {"logit_scale": 5.0}),
    "glm4": ("Glm4", {"head_dim": 64}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 64}),
    "seed_oss": ("SeedOss", {"head_dim": 64}),
    "arcee": ("Arcee", {}),
    "nemotron": ("Nemotron", {}),
    "exaone4": ("Exaone4", {"sliding_window": 24}),
    "dots1": ("Dots1", {**MOE, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}),
    "smollm3": ("SmolLM3", {}),
    "olmo3": ("Olmo3", {"sliding_window": 24}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 24}),
    "qwen2_moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 64}),
    "deepseek_v2": ("DeepseekV2", {**DIRECT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "n_group": 4, "topk_group": 2}),
    "deepseek_v32": (
        "DeepseekV32",
        {**LATENT, "n_group": 4, "topk_group": 2, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 40},
    ),
    "deepseek_v4": ("DeepseekV4", V4),
    "glm4_moe_lite": ("Glm4MoeLite", LATENT),
    "llama4_text": ("Llama4", LLAMA4),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "cohere2": ("Cohere2", {"sliding_window": 24, "logit_scale": 5.0}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "head_dim": 64, "norm_topk_prob": True}),
    "glm4_moe": ("Glm4Moe", {**MOE, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "head_dim": 64}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 24}),
    "qwen3_next": ("Qwen3Next", {**MOE, **DELTA, "shared_expert_intermediate_size": 48}),
    "qwen3_5_text": ("Qwen3_5Text", DELTA),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", {**MOE, **DELTA, "shared_expert_intermediate_size": 48}),
    "granitemoehybrid": ("GraniteMoeHybrid", {**GRANITE, "num_local_experts": 0}),
    "granitemoehybrid-experts": ("GraniteMoeHybrid", {**GRANITE, "num_local_experts": 8, "num_experts_per_tok": 3}),
    "bamba": ("Bamba", {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "attn_layer_indices": [1, 3]}),
}  # fmt: skip


HEADS = {
    "GPT2": "GPT2LMHeadModel",
    "Qwen3_5Text": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeText": "Qwen3_5MoeForCausalLM",
}
WRITTEN = {  # that only newer versions of transformers have: their files are written by hand
    "DeepseekV4": "deepseek_v4"
}


def checkpoint(family: str, folder: Path) -> Path:
    """A tiny random model, saved."""
    import transformers

    name, extra = FAMILIES[family]
    options = {**BASE, "hidden_size": 256, **extra}
    if name in WRITTEN:
        del options["intermediate_size"]
        return write_random({**options, "model_type": WRITTEN[name]}, folder)
    config_name = f"{name}TextConfig" if name == "Llama4" else f"{name}Config"
    config = getattr(transformers, config_name)(**options)
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(name, f"{name}ForCausalLM"))(config).to(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_cpu(family: str, tmp_path: Path) -> None:
    checkpoint(family, tmp_path)
    prompts = some_prompts(12, 90)
    expected = run(build(tmp_path, device="cpu"), prompts, 24)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert run(build(tmp_path, device="cuda"), prompts, 24) == expected


@pytest.mark.parametrize("family", [*FIRST_FAMILIES, *FAMILIES])
def test_bfloat16_stays_near_float32(family: str, tmp_path: Path, parity_results: dict[str, Any]) -> None:
    folder = (first_checkpoint if family in FIRST_FAMILIES else checkpoint)(family, tmp_path)
    major, minor = torch.cuda.get_device_capability()
    found = distance(folder, OpSpec("cuda", "bfloat16", 10 * major + minor))
    assert found.is_near(family), found
    parity_results[family] = found.rounded()

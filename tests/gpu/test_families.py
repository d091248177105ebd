"""Families whose blocks the first six do not use, in the whole engine on a GPU: greedy tokens equal the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import BASE, build, run, some_prompts

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
LLAMA4 = {"head_dim": 64, "num_local_experts": 4, "intermediate_size_mlp": 128, "attention_chunk_size": 40, "floor_scale": 16}
DELTA = {
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
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
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_d_state": 32,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        },
    ),
    "bamba": ("Bamba", {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "attn_layer_indices": [1, 3]}),
}  # fmt: skip


HEADS = {"GPT2": "GPT2LMHeadModel", "Qwen3_5Text": "Qwen3_5ForCausalLM", "Qwen3_5MoeText": "Qwen3_5MoeForCausalLM"}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_cpu(family: str, tmp_path: Path) -> None:
    import transformers

    name, extra = FAMILIES[family]
    config_name = f"{name}TextConfig" if name == "Llama4" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**BASE, "hidden_size": 256, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(name, f"{name}ForCausalLM"))(config).to(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(tmp_path)
    prompts = some_prompts(12, 90)
    expected = run(build(tmp_path, device="cpu"), prompts, 24)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert run(build(tmp_path, device="cuda"), prompts, 24) == expected

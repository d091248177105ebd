"""Families whose blocks the first six do not use, in the whole engine on a GPU: greedy tokens equal the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import BASE, build, run, some_prompts

pytestmark = pytest.mark.gpu

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
DELTA = {
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "cohere2": ("Cohere2", {"sliding_window": 24, "logit_scale": 5.0}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "head_dim": 64, "norm_topk_prob": True}),
    "glm4_moe": ("Glm4Moe", {**MOE, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "head_dim": 64}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 24}),
    "qwen3_next": ("Qwen3Next", {**MOE, **DELTA, "shared_expert_intermediate_size": 48}),
    "bamba": ("Bamba", {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "attn_layer_indices": [1, 3]}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_cpu(family: str, tmp_path: Path) -> None:
    import transformers

    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**BASE, "hidden_size": 256, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(tmp_path)
    prompts = some_prompts(12, 90)
    expected = run(build(tmp_path, device="cpu"), prompts, 24)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert run(build(tmp_path, device="cuda"), prompts, 24) == expected

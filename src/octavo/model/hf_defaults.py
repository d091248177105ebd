"""What config.json may leave out because transformers fills it in, and how older families spell their keys."""

from __future__ import annotations

from typing import Any

DEEPSEEK_RENAMED = {"n_routed_experts": "num_experts", "num_local_experts": "num_experts"}
# Spelling of a family -> the common spelling.
HF_RENAMED: dict[str, dict[str, str]] = {
    "bert": {"layer_norm_eps": "rms_norm_eps"},
    "roberta": {"layer_norm_eps": "rms_norm_eps"},
    "xlm-roberta": {"layer_norm_eps": "rms_norm_eps"},
    "cohere": {"layer_norm_eps": "rms_norm_eps"},
    "cohere2": {"layer_norm_eps": "rms_norm_eps"},
    "deepseek_v2": DEEPSEEK_RENAMED,
    "deepseek_v3": DEEPSEEK_RENAMED,
    "deepseek_v32": DEEPSEEK_RENAMED,
    "deepseek_v4": DEEPSEEK_RENAMED,
    "kimi_k2": DEEPSEEK_RENAMED,
    "glm4_moe": DEEPSEEK_RENAMED,
    "glm4_moe_lite": DEEPSEEK_RENAMED,
    "gpt_oss": {"num_local_experts": "num_experts"},
    "llama4_text": {"num_local_experts": "num_experts"},
    "mixtral": {"num_local_experts": "num_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "gpt2": {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
    "gpt_neox": {
        "layer_norm_eps": "rms_norm_eps",
        "rotary_pct": "partial_rotary_factor",
        "rotary_emb_base": "rope_theta",
    },
    "starcoder2": {"norm_epsilon": "rms_norm_eps"},
    "dots1": {"n_routed_experts": "num_experts", "num_local_experts": "num_experts"},
    "nemotron": {"norm_eps": "rms_norm_eps"},
}
GEMMA_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
BERT_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "type_vocab_size": 2,
    "max_position_embeddings": 512,
}
QWEN_HYBRID: dict[str, Any] = {
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 32768,
}
# Families with recurrent layers, and every how many layers one has attention (0 = the configuration lists them).
HF_HYBRID = {"qwen3_next": 4, "qwen3_5_text": 4, "qwen3_5_moe_text": 4, "bamba": 0, "granitemoehybrid": 0}
DEEPSEEK_V3_DEFAULTS: dict[str, Any] = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": BERT_DEFAULTS,
    "roberta": BERT_DEFAULTS,
    "xlm-roberta": BERT_DEFAULTS,
    "bamba": {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "max_position_embeddings": 262144},
    "qwen3_next": QWEN_HYBRID,
    "qwen3_5_text": QWEN_HYBRID,
    "qwen3_5_moe_text": QWEN_HYBRID,
    "cohere": {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True},
    "cohere2": {
        "rms_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "deepseek_v2": {
        "num_experts": 64,
        "n_shared_experts": 2,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    "deepseek_v3": DEEPSEEK_V3_DEFAULTS,
    "deepseek_v32": DEEPSEEK_V3_DEFAULTS,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 512,
        "num_experts": 256,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048,
        "max_position_embeddings": 1048576,
        "sliding_window": 128,
    },
    "kimi_k2": DEEPSEEK_V3_DEFAULTS,
    "ernie4_5": {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "head_dim": 128, "tie_word_embeddings": True},
    "gemma": {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma2": {**GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    # Gemma 3's multimodal checkpoints do leave out most of these.
    "gemma3_text": {
        **GEMMA_DEFAULTS,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "glm4_moe": {
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "glm4_moe_lite": {
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
    },
    "gpt_oss": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "attention_bias": True,
        "num_experts_per_tok": 4,
    },
    "llama4_text": {
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "num_experts": 16,
        "attention_chunk_size": 8192,
    },
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "gpt2": {
        "vocab_size": 50257,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "partial_rotary_factor": 0.25,
        "attention_bias": True,
    },
    "arcee": {"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
    "dots1": {"norm_topk_prob": False},
    "exaone4": {"rms_norm_eps": 1e-5},
    "nemotron": {"rms_norm_eps": 1e-5, "hidden_act": "relu2", "partial_rotary_factor": 0.5},
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
    "olmoe": {"rms_norm_eps": 1e-5},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "qwen3": {"head_dim": 128},
    "seed_oss": {"head_dim": 128, "attention_bias": True},
    "smollm3": {"tie_word_embeddings": True, "rope_theta": 2e6},
    "starcoder2": {
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
# Families whose attention alternates where config.json does not list layer_types: every n-th layer is full.
HF_PATTERN = {"cohere2": 4, "gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "olmo3": 4, "exaone4": 4}
# Families that look through the window in every layer once config.json gives one.
HF_ALL_SLIDING = ("mistral", "mixtral", "phi3", "starcoder2")
# Families that scale the rope of full layers only where config.json gives one set of parameters.
HF_FULL_SCALING = ("olmo3",)

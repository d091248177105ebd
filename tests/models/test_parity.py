"""Rule R4: every family's logits equal transformers' within 1e-4 (tiny random weights, CPU, float32): whole prefill,
token by token, random chunks, rows of different lengths in one batch."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Driver

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.files.gguf_write import StoredTensor, write_gguf
from octavo.files.resolve import open_model
from octavo.model.describe import describe
from octavo.model.read_arch import read_arch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {"long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
LAYER_KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
GLM = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}
DELTA = {"head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
         "linear_value_head_dim": 24}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 24}
GRANITE = {
    **MAMBA,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 96,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.1,
    "logits_scaling": 0.4,
}
HEADS = {
    "GPT2": "GPT2LMHeadModel",
    "Qwen3_5Text": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeText": "Qwen3_5MoeForCausalLM",
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    **GLM,
}
YARN_LATENT = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 32, "beta_slow": 1}
LLAMA4 = {  # chunks, and positions whose queries are sharpened, well within the prompts
    "head_dim": 16,
    "num_hidden_layers": 5,
    "num_local_experts": 4,
    "intermediate_size_mlp": 80,
    "attention_chunk_size": 12,
    "floor_scale": 6,
    "attn_scale": 0.4,
}
V4 = {
    **GLM,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "sliding_window": 8,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 5,
    "num_hash_layers": 2,
    "hc_sinkhorn_iters": 4,
}
FOREIGN = {  # keys of BASE that a family does not have
    "GPT2": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "max_position_embeddings"),
    "GPTNeoX": ("num_key_value_heads",),
}  # fmt: skip
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-gelu": ("Llama", {"hidden_act": "gelu"}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 8}),
    "mistral-full": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4, "query_pre_attn_scalar": 24},
    ),
    "gemma2-softcaps": (  # low enough to bend every score
        "Gemma2",
        {"head_dim": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0},
    ),
    "gemma3_text": ("Gemma3", {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7}),
    "gemma3_text-scaled": (
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": ("Phi3", {}),
    "phi3-partial-window": (
        "Phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "sliding_window": 8,
            "tie_word_embeddings": True,
        },
    ),
    "phi3-long": (  # 16 values a head, half of them rotated; runs beyond 16 positions take the long set
        "Phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 16,
                **LONG,
            },
            "original_max_position_embeddings": 16,
        },
    ),
    "phi3-short": (
        "Phi3",
        {
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 1024,
                **LONG,
            },
            "original_max_position_embeddings": 1024,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3-list": ("SmolLM3", {"no_rope_layers": [0, 1, 1], "tie_word_embeddings": False}),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 8,
            "layer_types": LAYER_KINDS,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.4,
        },
    ),
    "cohere2": ("Cohere2", {"sliding_window": 8, "num_hidden_layers": 4, "logit_scale": 5.0}),
    "starcoder2": ("Starcoder2", {"sliding_window": 8}),
    "starcoder2-plain": (
        "Starcoder2",
        {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False},
    ),
    "gpt_neox": ("GPTNeoX", {"intermediate_size": 128}),
    "gpt_neox-serial": (
        "GPTNeoX",
        {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2-inner": ("GPT2", {**GPT2, "n_inner": 96, "activation_function": "gelu"}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "cohere": ("Cohere", {"logit_scale": 5.0}),
    "glm4": ("Glm4", {"head_dim": 16, "attention_bias": True}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16}),
    "ernie4_5-bias": ("Ernie4_5", {"head_dim": 32, "use_bias": True, "tie_word_embeddings": False}),
    "seed_oss": ("SeedOss", {"head_dim": 16, "attention_out_bias": True}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "mixtral-full": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 3}),
    "qwen3_moe-all": ("Qwen3Moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "head_dim": 32, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    "glm4_moe": ("Glm4Moe", {**GLM, "use_qk_norm": True, "routed_scaling_factor": 1.5}),
    "glm4_moe-groups": (
        "Glm4Moe",
        {**GLM, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "attention_bias": True},
    ),
    "qwen3_next": (
        "Qwen3Next",
        {**MOE, **DELTA, "shared_expert_intermediate_size": 48, "num_hidden_layers": 5},
    ),
    "qwen3_next-dense": (
        "Qwen3Next",
        {
            **MOE,
            **DELTA,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [0, 2],
            "linear_num_key_heads": 4,
            "num_hidden_layers": 4,
        },
    ),
    "qwen3_5_text": ("Qwen3_5Text", {**DELTA, "num_hidden_layers": 5}),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeText",
        {**MOE, **DELTA, "shared_expert_intermediate_size": 48, "num_hidden_layers": 4},
    ),
    "bamba": ("Bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "bamba-groups": ("Bamba", {**MAMBA, "attn_layer_indices": [2], "mamba_n_groups": 2}),
    "granitemoehybrid": ("GraniteMoeHybrid", {**GRANITE, "num_local_experts": 0}),
    "granitemoehybrid-experts": (
        "GraniteMoeHybrid",
        {**GRANITE, "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32},
    ),
    "deepseek_v2": (  # V2-Lite: queries without a latent, the best experts of all
        "DeepseekV2",
        {**MLA, "q_lora_rank": None, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v2-groups": (
        "DeepseekV2",
        {
            **MLA,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": YARN_LATENT,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **MLA,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN_LATENT, "mscale": 1.3},
        },
    ),
    "deepseek_v3-halves": (  # one group, as Kimi-K2
        "DeepseekV3",
        {
            **MLA,
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            "attention_bias": True,
            "first_k_dense_replace": 0,
        },
    ),
    "deepseek_v32": (  # fewer keys than the prompts have
        "DeepseekV32",
        {
            **MLA,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "index_n_heads": 16,  # with few heads many scores are exactly 0, and who is chosen among them is nobody's business
            "index_head_dim": 16,
            "index_topk": 7,
        },
    ),
    "deepseek_v32-all": (
        "DeepseekV32",
        {**MLA, "n_group": 1, "topk_group": 1, "index_head_dim": 24, "index_n_heads": 2},
    ),
    "deepseek_v4": ("DeepseekV4", V4),
    "deepseek_v4-yarn": (  # all layers sparse, and fewer entries than a sequence has; one layer by token ids
        "DeepseekV4",
        {
            **V4,
            "layer_types": ["compressed_sparse_attention"] * 3,
            "index_topk": 2,
            "num_hash_layers": 1,
            "swiglu_limit": 0.3,
            "hc_mult": 2,
            "rope_scaling": YARN,
        },
    ),
    "glm4_moe_lite": ("Glm4MoeLite", MLA),
    "llama4_text": ("Llama4", LLAMA4),  # Scout
    "llama4_text-dense": (  # Maverick: every second layer is dense, no norm of queries and keys
        "Llama4",
        {**LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False, "rope_parameters": LLAMA3},
    ),
    "arcee": ("Arcee", {}),
    "arcee-bias": ("Arcee", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
    "nemotron": ("Nemotron", {}),
    "nemotron-bias": ("Nemotron", {"mlp_bias": True, "attention_bias": True, "head_dim": 32}),
    "exaone4": ("Exaone4", {"sliding_window": 8, "num_hidden_layers": 5}),
    "exaone4-full": (
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "rope_parameters": LLAMA3},
    ),
    "dots1": (
        "Dots1",
        {**GLM, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
    ),
    "dots1-groups": (
        "Dots1",
        {**GLM, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "norm_topk_prob": True},
    ),
    "gpt_oss": ("GptOss", GPT_OSS),
    "gpt_oss-limits": (  # low enough to clamp often
        "GptOss",
        {**GPT_OSS, "swiglu_limit": 0.5, "swiglu_alpha": 1.2, "layer_types": LAYER_KINDS[::-1]},
    ),
}


TEXT = ("Gemma3", "Llama4")  # whose configuration is the text part's


def oracle(name: str, folder: Path) -> Any:
    """A tiny random transformers model, saved to ``folder``."""
    family, extra = ROWS[name]
    config_class = getattr(transformers, f"{family}TextConfig" if family in TEXT else f"{family}Config")
    torch.manual_seed(5)
    base = {key: value for key, value in BASE.items() if key not in FOREIGN.get(family, ())}
    model_class = HEADS.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, model_class)(config_class(**{**base, **extra})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
            elif buffer_name.endswith("tid2eid"):  # different experts for every token
                buffer.copy_(torch.rand(len(buffer), 8).topk(buffer.shape[1]).indices)
    model.save_pretrained(folder)
    return model


def expected(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits.float()


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 128) for _ in range(length)] for length in (41, 1, 17)]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", ROWS)
def test_logits(name: str, tmp_path: Path) -> None:
    model = oracle(name, tmp_path)
    driver = Driver(open_model(str(tmp_path)))
    rng = random.Random(7)
    sequences = prompts(3)
    wanted = [expected(model, ids) for ids in sequences]
    assert wanted[0].std() > 0.1  # not a constant
    close(driver.step([driver.row()], [sequences[0]])[0], wanted[0])  # whole prefill
    one = driver.row()
    got = [driver.step([one], [[token]])[0] for token in sequences[0]]  # paged decode
    close(torch.cat(got), wanted[0])
    rows = [driver.row() for _ in sequences]  # chunks of random size, rows of different lengths together
    pieces: list[list[torch.Tensor]] = [[] for _ in rows]
    while any(row.computed < len(ids) for row, ids in zip(rows, sequences)):
        active = [i for i, row in enumerate(rows) if row.computed < len(sequences[i])]
        chunks = [sequences[i][rows[i].computed :][: rng.randint(1, 9)] for i in active]
        for i, logits in zip(active, driver.step([rows[i] for i in active], chunks)):
            pieces[i].append(logits)
    for found, theirs in zip(pieces, wanted):
        close(torch.cat(found), theirs)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_stacked_experts(name: str, tmp_path: Path) -> None:
    """Checkpoints may hold all experts of a layer in one tensor, as transformers does in memory."""
    from safetensors.torch import load_file, save_file

    model = oracle(name, tmp_path)
    path = tmp_path / "model.safetensors"
    base = "block_sparse_moe" if name == "mixtral" else "mlp"
    kept = {key: value for key, value in load_file(path).items() if ".experts." not in key}
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            for part in ("gate_up_proj", "down_proj"):
                value = getattr(layer.mlp.experts, part).detach().clone()
                kept[f"model.layers.{i}.{base}.experts.{part}"] = value
    save_file(kept, path, metadata={"format": "pt"})
    driver, ids = Driver(open_model(str(tmp_path))), prompts(5)[0]
    close(driver.step([driver.row()], [ids])[0], expected(model, ids))


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",  # phi3 leaves them fused, under this name
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
}
SANDWICH = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NORMS = {
    "llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "gemma2": SANDWICH,
    "gemma3": SANDWICH,
    "gpt-oss": {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"},
}


def gpt_oss_experts(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Gate and up, which alternate in the last dimension, apart; matrices as [E, out, in]."""
    kind = "bias" if name.endswith("_bias") else "weight"
    turned = array if kind == "bias" else array.swapaxes(1, 2)
    if "down_proj" in name:
        return {f"ffn_down_exps.{kind}": turned}
    return {f"ffn_{part}_exps.{kind}": turned[:, i::2] for i, part in enumerate(("gate", "up"))}


def to_gguf(model: Any, architecture: str, path: Path) -> None:
    """Write the oracle's weights as llama.cpp's converter lays them out: names, turned q/k rows, 1 + w norms."""
    config = model.config
    tensors: dict[str, np.ndarray] = {}
    names = {**GGUF_NAMES, **NORMS.get(architecture, NORMS["llama"])}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if "norm" in name and architecture.startswith("gemma"):
            array = array + 1
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            if rest == "self_attn.sinks":
                tensors[f"blk.{layer}.attn_sinks.weight"] = array
                continue
            if ".experts." in rest and architecture == "gpt-oss":
                tensors |= {
                    f"blk.{layer}.{name}": value for name, value in gpt_oss_experts(rest, array).items()
                }
                continue
            if ".experts." in rest:
                halves = {"gate": array[:, : array.shape[1] // 2], "up": array[:, array.shape[1] // 2 :]}
                for part, rows in halves.items() if "gate_up" in rest else [("down", array)]:
                    tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = rows
                continue
            base, kind = rest.rsplit(".", 1)
            if architecture == "llama" and base in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in base else config.num_key_value_heads
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            tensors[f"blk.{layer}.{names[base]}.{kind}"] = array
        elif name == "model.embed_tokens.weight":
            tensors["token_embd.weight"] = array
        elif name == "model.norm.weight":
            tensors["output_norm.weight"] = array
        elif name == "lm_head.weight" and not config.tie_word_embeddings:
            tensors["output.weight"] = array
    head_dim = model.model.layers[0].self_attn.head_dim
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.key_length": head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if architecture == "gemma3":
        metadata["gemma3.attention.sliding_window"] = config.sliding_window
        metadata["gemma3.rope.freq_base"] = 1000000.0
    else:
        rope = config.rope_parameters
        metadata[f"{architecture}.rope.freq_base"] = rope["rope_theta"]
        metadata[f"{architecture}.rope.dimension_count"] = int(
            head_dim * rope.get("partial_rotary_factor", 1.0)
        )
        if rope["rope_type"] == "longrope":
            original = rope["original_max_position_embeddings"]
            metadata[f"{architecture}.rope.scaling.original_context_length"] = original
            for which in ("long", "short"):
                tensors[f"rope_factors_{which}.weight"] = np.array(rope[f"{which}_factor"])
    if getattr(config, "num_local_experts", 0):
        metadata[f"{architecture}.expert_count"] = config.num_local_experts
        metadata[f"{architecture}.expert_used_count"] = config.num_experts_per_tok
        metadata[f"{architecture}.expert_feed_forward_length"] = getattr(
            config, "moe_intermediate_size", config.intermediate_size
        )
    if config.model_type in ("phi3", "mixtral", "gemma2", "gpt_oss") and config.sliding_window:
        metadata[f"{architecture}.attention.sliding_window"] = config.sliding_window
    if getattr(config, "rope_parameters", {}).get("rope_type") == "yarn":
        metadata[f"{architecture}.rope.scaling.type"] = "yarn"
        metadata[f"{architecture}.rope.scaling.factor"] = config.rope_parameters["factor"]
        original = config.rope_parameters["original_max_position_embeddings"]
        metadata[f"{architecture}.rope.scaling.original_context_length"] = original
    if architecture == "gemma2":
        metadata["gemma2.attn_logit_softcapping"] = config.attn_logit_softcapping
        metadata["gemma2.final_logit_softcapping"] = config.final_logit_softcapping
    write_gguf(path, metadata, {k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()})


GGUF_ROWS = {
    "llama": "llama",
    "gemma": "gemma",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "phi3-partial-window": "phi3",
    "phi3-long": "phi3",
    "qwen3_moe-all": "qwen3moe",
    "mixtral-full": "llama",
    "qwen2": "qwen2",
    "qwen2-yarn": "qwen2",
    "qwen3": "qwen3",
    "gemma2-softcaps": "gemma2",
    "gpt_oss": "gpt-oss",
}


@pytest.mark.parametrize(("name", "architecture"), GGUF_ROWS.items())
def test_gguf_logits(name: str, architecture: str, tmp_path: Path) -> None:
    model = oracle(name, tmp_path / "hf")
    if architecture in ("gemma2", "gemma3"):  # GGUF does not say the scale; the reader takes the head's size
        head_dim = model.model.layers[0].self_attn.head_dim
        for layer in model.model.layers:
            layer.self_attn.scaling = head_dim**-0.5
    to_gguf(model, architecture, tmp_path / "model.gguf")
    driver = Driver(open_model(str(tmp_path / "model.gguf")))
    ids = prompts(4)[0]
    close(driver.step([driver.row()], [ids])[0], expected(model, ids))


def test_gguf_mxfp4_experts_are_decoded_as_the_reference_does(tmp_path: Path) -> None:
    import gguf

    model = oracle("gpt_oss", tmp_path / "hf")
    to_gguf(model, "gpt-oss", tmp_path / "plain.gguf")
    plain = open_model(str(tmp_path / "plain.gguf"))
    kind = gguf.GGMLQuantizationType.MXFP4
    packed: dict[str, Any] = {}
    values: dict[str, np.ndarray] = {}
    for name, info in plain.tensors.items():
        array = plain.read(name).view(np.float32).reshape(info.shape)
        packed[name] = values[name] = array
        if "_exps.weight" in name:
            raw = gguf.quantize(array, kind)
            values[name] = gguf.dequantize(raw, kind).reshape(info.shape)
            packed[name] = StoredTensor("MXFP4", info.shape, raw.reshape(-1).view(np.uint8))
    metadata = {key: value for key, value in plain.config.items() if not key.startswith("GGUF.")}
    write_gguf(tmp_path / "packed.gguf", metadata, packed)
    write_gguf(tmp_path / "values.gguf", metadata, values)
    ids = prompts(4)[0]
    drivers = [Driver(open_model(str(tmp_path / f"{name}.gguf"))) for name in ("packed", "values")]
    ours, theirs = (driver.step([driver.row()], [ids])[0] for driver in drivers)
    assert torch.equal(ours, theirs) and ours.std() > 0.1


def test_unknown_architecture_names_the_nearest(tmp_path: Path) -> None:
    oracle("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "lama"'))
    with pytest.raises(UnsupportedModelError, match="Nearest supported: llama"):
        describe(read_arch(open_model(str(tmp_path))))


def test_missing_and_unused_tensors_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    oracle("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.gate_proj.extra"] = tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelFileError) as caught:
        Driver(open_model(str(tmp_path)))
    assert "1 tensors are missing: model.layers.1.mlp.down_proj.weight" in caught.value.cause
    assert "not used by this architecture: model.layers.0.mlp.gate_proj.extra" in caught.value.cause


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    oracle("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 80'))
    with pytest.raises(ModelFileError, match=r"mlp.gate_proj.weight has shape \[96, 64\].*asks \[80, 64\]"):
        Driver(open_model(str(tmp_path)))

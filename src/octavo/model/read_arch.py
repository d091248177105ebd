"""Reads ``ArchConfig`` from config.json or GGUF metadata; every missing or absurd key is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.files.base import ModelFiles
from octavo.files.dtypes import BLOCK_TYPES
from octavo.model.arch import ArchConfig
from octavo.model.blocks import Activation
from octavo.model.hf_defaults import (
    HF_ALL_SLIDING,
    HF_DEFAULTS,
    HF_FULL_SCALING,
    HF_HYBRID,
    HF_PATTERN,
    HF_RENAMED,
)
from octavo.model.keys import Keys
from octavo.model.quantization.describe import describe_quantization

SOFTMAX = 1  # GGUF's number of that gating function
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
INDEXED = "indexed_attention"
COMPRESSED_SPARSE, HEAVILY_COMPRESSED = "compressed_sparse_attention", "heavily_compressed_attention"
LINEAR = "linear_attention"
MULTIMODAL = {  # whose text part has a family
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
OLD_KINDS = {
    "attention": FULL,
    "mamba": LINEAR,
    "deepseek_sparse_attention": FULL,
}  # other spellings of layer types
GGUF_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "deepseek2": "deepseek_v3",
}
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
# Keys that a multimodal config.json may hold beside its text_config.
OUTER_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
    "quantization_config",
)
MAX_LAYERS = 4096
KINDS = {
    "llama4_text": {FULL, CHUNKED},
    "deepseek_v32": {FULL, INDEXED},
    "deepseek_v4": {SLIDING, COMPRESSED_SPARSE, HEAVILY_COMPRESSED},
}  # of attention, where they are not the usual ones


def read_arch(files: ModelFiles) -> ArchConfig:
    """The architecture of a model; raises ``ModelFileError`` or ``UnsupportedModelError`` naming the key."""
    if files.format == "gguf":
        return from_gguf(files)
    return from_hf(files.config)


def from_hf(config: Mapping[str, Any]) -> ArchConfig:
    """From config.json, in transformers' old and new spellings."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelFileError("config.json has no model_type.")
    nested = config.get("text_config")
    if model_type in MULTIMODAL and isinstance(nested, Mapping):
        model_type = MULTIMODAL[model_type]
        config = {**{key: config[key] for key in OUTER_KEYS if key in config}, **nested}
    renamed = HF_RENAMED.get(model_type, {})
    present = {renamed.get(key, key): value for key, value in config.items() if value is not None}
    keys = Keys({**HF_DEFAULTS.get(model_type, {}), **present}, "config.json")
    _refuse_variants(keys)
    layers = keys.integer("num_hidden_layers", most=MAX_LAYERS)
    heads, kv_heads = keys.heads("num_attention_heads", "num_key_value_heads")
    hidden = keys.integer("hidden_size")
    inner = 4 * hidden if model_type == "gpt2" else keys.source.get("moe_intermediate_size")
    layer_types = _layer_types(keys, model_type, layers)
    query_scale = keys.number("query_pre_attn_scalar", 0.0)
    bos = keys.source.get("bos_token_id")
    return ArchConfig(
        model_type=model_type,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size", inner),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=keys.integer("head_dim", hidden // heads),
        max_position=keys.integer("max_position_embeddings", 2048),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        layer_types=layer_types,
        rope=_hf_rope(keys, model_type, set(layer_types)),
        sliding_window=keys.integer("sliding_window") if SLIDING in layer_types else 0,
        attention_bias=keys.flag("attention_bias", False),
        mlp_bias=keys.flag("mlp_bias", False),
        activation=_activation(keys),
        attention_softcap=keys.number("attn_logit_softcapping", 0.0),
        logit_softcap=keys.number("final_logit_softcapping", 0.0),
        query_scale=query_scale if query_scale > 0 else None,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        quantized=describe_quantization(config) is not None,
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=token_ids(keys.source.get("eos_token_id")),
        raw=keys.source,
    )


def token_ids(value: Any) -> tuple[int, ...]:
    """One id or a list of ids as a tuple; anything else as none."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _activation(keys: Keys) -> Activation:
    """The block's name of the activation."""
    name = keys.source.get("hidden_activation") or keys.source.get("hidden_act") or "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: the activation {name!r} is not supported.", f"Supported: {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def _refuse_variants(keys: Keys) -> None:
    """What would load and answer nonsense must not load."""
    if keys.source.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            "config.json: use_bidirectional_attention makes this an embedding model, not a decoder."
        )


def _layer_types(keys: Keys, model_type: str, layers: int) -> tuple[str, ...]:
    """One attention type a layer, from ``layer_types`` or from the older switches."""
    listed = keys.source.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != layers:
            raise ModelFileError(f"config.json: layer_types must list one type for each of {layers} layers.")
        listed = [OLD_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in listed]
        unknown = sorted({str(kind) for kind in listed} - KINDS.get(model_type, {FULL, SLIDING, LINEAR}))
        if unknown:
            raise UnsupportedModelError(
                f"config.json: layers of type {', '.join(unknown)} are not supported."
            )
        return tuple(listed)
    if model_type in HF_HYBRID:
        every = keys.integer("full_attention_interval", HF_HYBRID[model_type], least=0)
        full = keys.source.get("attn_layer_indices") or (range(every - 1, layers, every) if every else ())
        return tuple(FULL if i in full else LINEAR for i in range(layers))
    if model_type == "llama4_text":
        chunked = keys.source.get("attention_chunk_size")
        return tuple(CHUNKED if chunked and rotated else FULL for rotated in keys.rope_layers(layers))
    if model_type == "deepseek_v4":
        return _compressed_types(keys, layers)
    if not keys.source.get("sliding_window"):
        return (FULL,) * layers
    if model_type in HF_PATTERN:
        every = keys.integer("sliding_window_pattern", HF_PATTERN[model_type])
        return tuple(FULL if (i + 1) % every == 0 else SLIDING for i in range(layers))
    if model_type in HF_ALL_SLIDING:
        return (SLIDING,) * layers
    if keys.flag("use_sliding_window", False):
        if model_type == "qwen3_moe":
            return (SLIDING,) * layers
        first = keys.integer("max_window_layers", 28, least=0)
        if model_type == "qwen2_moe":
            return tuple(SLIDING if i < first and i % 2 == 0 else FULL for i in range(layers))
        return tuple(SLIDING if i >= first else FULL for i in range(layers))
    return (FULL,) * layers


def _compressed_types(keys: Keys, layers: int) -> tuple[str, ...]:
    """DeepSeek V4's, from the tokens that an entry stands for (0 = no entries); else the last two kinds by turns."""
    ratios = keys.source.get("compress_ratios")
    if ratios is None:
        turns = [COMPRESSED_SPARSE if i % 2 else HEAVILY_COMPRESSED for i in range(layers)]
        return (HEAVILY_COMPRESSED, HEAVILY_COMPRESSED, *turns)[:layers]
    kinds = {0: SLIDING, 4: COMPRESSED_SPARSE, 128: HEAVILY_COMPRESSED}
    if not isinstance(ratios, list) or len(ratios) < layers or not set(ratios[:layers]) <= set(kinds):
        raise ModelFileError(
            f"config.json: compress_ratios must list 0, 4 or 128 for each of {layers} layers."
        )
    return tuple(kinds[ratio] for ratio in ratios[:layers])


def _hf_rope(keys: Keys, model_type: str, kinds: set[str]) -> dict[str, Mapping[str, Any]]:
    """Rope parameters by layer type."""
    given = keys.mapping("rope_parameters")
    if kinds & set(given):
        by_kind = Keys(given, "config.json: rope_parameters")
        return {kind: by_kind.mapping(kind) for kind in kinds}
    original = keys.source.get("original_max_position_embeddings")
    base = dict(given or keys.mapping("rope_scaling"))
    base.setdefault("rope_theta", keys.number("rope_theta", 10000.0))
    base.setdefault("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0))
    if original is not None:
        base.setdefault("original_max_position_embeddings", original)
    rope: dict[str, Mapping[str, Any]] = dict.fromkeys(kinds, base)
    if SLIDING in kinds and model_type in HF_FULL_SCALING:
        rope[SLIDING] = {"rope_theta": base["rope_theta"]}
    if SLIDING in kinds and keys.source.get("rope_local_base_freq"):
        rope[SLIDING] = {"rope_theta": keys.number("rope_local_base_freq", 10000.0)}
    return rope


def from_gguf(files: ModelFiles) -> ArchConfig:
    """From GGUF metadata; the architecture's name prefixes its keys."""
    meta = files.config
    name = str(meta.get("general.architecture"))
    if name not in GGUF_TYPES:
        raise UnsupportedModelError(
            f"GGUF architecture {name!r} is not supported.",
            f"Supported: {', '.join(GGUF_TYPES)}. Or take the model's safetensors files: more families read those, and "
            "--model-impl transformers any other.",
        )
    keys = Keys({k.removeprefix(f"{name}."): v for k, v in meta.items()}, f"GGUF metadata {name}.*")
    experts = _gguf_experts(keys)
    model_type = "mixtral" if name == "llama" and experts else GGUF_TYPES[name]
    latent = _gguf_latent(keys) if name == "deepseek2" else {}
    if latent and keys.integer("expert_gating_func", SOFTMAX) == SOFTMAX:
        model_type = "deepseek_v2"
    layers = keys.integer("block_count", most=MAX_LAYERS)
    heads, kv_heads = keys.heads("attention.head_count", "attention.head_count_kv")
    hidden = keys.integer("embedding_length")
    window = keys.integer("attention.sliding_window", 0, least=0)
    every = HF_PATTERN.get(model_type)
    layer_types = tuple(SLIDING if window and every and (i + 1) % every else FULL for i in range(layers))
    if window and model_type == "phi3":
        layer_types = (SLIDING,) * layers
    bos = meta.get("tokenizer.ggml.bos_token_id")
    return ArchConfig(
        model_type=model_type,
        vocab_size=_gguf_vocab_size(files, keys),
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length", experts.get("moe_intermediate_size")),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=keys.integer("attention.key_length", hidden // heads),
        max_position=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        tie_embeddings="output.weight" not in files.tensors,
        layer_types=layer_types,
        rope=_gguf_ropes(files, keys, model_type, set(layer_types)),
        sliding_window=window if SLIDING in layer_types else 0,
        attention_bias="blk.0.attn_q.bias" in files.tensors,
        activation="gelu_tanh" if name.startswith("gemma") else "silu",
        attention_softcap=keys.number("attn_logit_softcapping", 50.0 if name == "gemma2" else 0.0),
        logit_softcap=keys.number("final_logit_softcapping", 30.0 if name == "gemma2" else 0.0),
        query_scale=_gguf_query_scale(name, keys, hidden, heads),
        dtype="float16",
        quantized=any(tensor.dtype in BLOCK_TYPES for tensor in files.tensors.values()),
        from_gguf=True,
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=token_ids(meta.get("tokenizer.ggml.eos_token_id")),
        raw={**meta, **experts, **latent},
    )


def _gguf_latent(keys: Keys) -> dict[str, Any]:
    """Latent attention and routing in Hugging Face's words. Newer files give a latent's sizes as those of a head, and
    the head's own beside them."""
    rope_dim = keys.integer("rope.dimension_count")
    key = keys.integer("attention.key_length_mla", keys.integer("attention.key_length"))
    if key <= rope_dim:
        raise ModelFileError(f"{keys.where}: keys of {key} values cannot hold {rope_dim} that rotate.")
    groups = keys.integer("expert_group_count", 0, least=0)
    found: dict[str, Any] = {
        "q_lora_rank": keys.integer("attention.q_lora_rank", 0, least=0),
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key - rope_dim,
        "v_head_dim": keys.integer("attention.value_length_mla", keys.integer("attention.value_length")),
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0, least=0),
        "n_shared_experts": keys.integer("expert_shared_count", 1),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
    }
    if groups > 1:
        used = keys.integer("expert_group_used_count")
        found |= {"n_group": groups, "topk_group": used, "topk_method": "group_limited_greedy"}
    return found


def _gguf_experts(keys: Keys) -> dict[str, Any]:
    """The experts in Hugging Face's words; {} where there are none. Qwen's weights are renormalized, which GGUF implies."""
    num = keys.integer("expert_count", 0, least=0)
    if not num:
        return {}
    return {
        "num_experts": num,
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer(
            "expert_feed_forward_length", keys.integer("feed_forward_length", 1)
        ),
        "norm_topk_prob": True,
    }


def _gguf_vocab_size(files: ModelFiles, keys: Keys) -> int:
    """Rows of the embedding: some files hold more of them than tokens."""
    embedding = files.tensors.get("token_embd.weight")
    if embedding is not None:
        return embedding.shape[0]
    tokens = files.config.get("tokenizer.ggml.tokens")
    return keys.integer("vocab_size", len(tokens) if isinstance(tokens, Sequence) else None)


def _gguf_query_scale(name: str, keys: Keys, hidden: int, heads: int) -> float | None:
    """Only the 27B Gemmas scale by hidden / heads instead of the head's size; GGUF does not say it."""
    if name == "gemma2" and keys.integer("block_count") == 46:
        return hidden / heads
    if name == "gemma3" and keys.integer("block_count") == 62:
        return hidden / heads
    return None


def _gguf_ropes(
    files: ModelFiles, keys: Keys, model_type: str, kinds: set[str]
) -> dict[str, Mapping[str, Any]]:
    """Rope parameters by layer type."""
    theta = keys.number("rope.freq_base", 10000.0)
    rope: dict[str, Mapping[str, Any]] = {FULL: _gguf_rope(files, keys, theta)}
    if SLIDING in kinds:
        local = 10000.0 if model_type == "gemma3_text" else theta
        rope[SLIDING] = {"rope_theta": keys.number("rope.freq_base_swa", local)}
    if model_type == "gpt_oss":  # scaled alike in all layers, by whole dimensions nowhere
        rope = {kind: {**rope[FULL], "truncate": False} for kind in rope}
    if model_type == "phi3":
        head_dim = keys.integer("embedding_length") // keys.integer("attention.head_count")
        rotated = keys.integer("rope.dimension_count", head_dim) / head_dim
        rope = {kind: {**rope[FULL], "partial_rotary_factor": rotated} for kind in rope}
    return rope


def _gguf_rope(files: ModelFiles, keys: Keys, theta: float) -> dict[str, Any]:
    """Scaling keys as rope parameters; llama3's scaling comes as a tensor of divisors."""
    if "rope_freqs.weight" in files.tensors:
        factors = _gguf_numbers(files, "rope_freqs.weight")
        return {"rope_theta": theta, "rope_type": "factors", "factors": factors}
    if "rope_factors_long.weight" in files.tensors:
        return {
            "rope_theta": theta,
            "long_factor": _gguf_numbers(files, "rope_factors_long.weight"),
            "short_factor": _gguf_numbers(files, "rope_factors_short.weight"),
            "original_max_position_embeddings": keys.source.get("rope.scaling.original_context_length"),
            "attention_factor": keys.source.get("rope.scaling.attn_factor"),
        }
    kind = keys.source.get("rope.scaling.type")
    if kind in (None, "none"):
        return {"rope_theta": theta}
    # DeepSeek's files hold 0.1 x mscale_all_dim; its two numbers are the same in every published model.
    sharp = keys.number("rope.scaling.yarn_log_multiplier", 0.0) * 10
    mscales: dict[str, Any] = {"mscale": sharp, "mscale_all_dim": sharp} if sharp else {}
    return {
        **mscales,
        "rope_theta": theta,
        "rope_type": kind,
        "factor": keys.number("rope.scaling.factor", 1.0),
        "original_max_position_embeddings": keys.source.get("rope.scaling.original_context_length"),
        "attention_factor": keys.source.get("rope.scaling.attn_factor"),
    }


def _gguf_numbers(files: ModelFiles, name: str) -> list[float]:
    """A small F32 tensor as numbers."""
    if name not in files.tensors or files.tensors[name].dtype != "F32":
        raise ModelFileError(f"{files.name}: {name} must be there and F32.")
    return [float(value) for value in np.frombuffer(files.read(name).tobytes(), np.float32)]

"""Reads ``ArchConfig`` from config.json or GGUF metadata; every missing or absurd key is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.files.base import ModelFiles
from octavo.model.arch import ArchConfig

FULL, SLIDING = "full_attention", "sliding_attention"
GGUF_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
QUANTIZED_TYPES = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}
# Families whose attention alternates where config.json does not list layer_types: every n-th layer is full.
DEFAULT_PATTERN = {"gemma2": 2, "gemma3_text": 6}


def read_arch(files: ModelFiles) -> ArchConfig:
    """The architecture of a model; raises ``ModelFileError`` or ``UnsupportedModelError`` naming the key."""
    if files.format == "gguf":
        return from_gguf(files)
    return from_hf(files.config)


class Keys:
    """A mapping that says which key is wrong."""

    def __init__(self, source: Mapping[str, Any], where: str) -> None:
        self.source = source
        self.where = where

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``."""
        value = self.source.get(key)
        if value is None:
            if default is None:
                raise ModelFileError(f"{self.where} has no {key!r}.")
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise ModelFileError(
                f"{self.where}: {key} must be a whole number from {least} on, got {value!r}."
            )
        return value

    def number(self, key: str, default: float) -> float:
        """A number; None counts as absent."""
        value = self.source.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelFileError(f"{self.where}: {key} must be a number, got {value!r}.")
        return float(value)


def from_hf(config: Mapping[str, Any]) -> ArchConfig:
    """From config.json, in transformers' old and new spellings."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelFileError("config.json has no model_type.")
    if model_type == "gemma3" and isinstance(config.get("text_config"), Mapping):
        config = {**config["text_config"], "model_type": "gemma3_text"}
        model_type = "gemma3_text"
    keys = Keys(config, "config.json")
    layers, heads = keys.integer("num_hidden_layers"), keys.integer("num_attention_heads")
    hidden = keys.integer("hidden_size")
    layer_types = _layer_types(config, model_type, layers)
    eos = config.get("eos_token_id")
    gemma = model_type.startswith("gemma")
    query_scale = config.get("query_pre_attn_scalar")
    return ArchConfig(
        model_type=model_type,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", hidden // heads),
        max_position=keys.integer("max_position_embeddings", 2048),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        tie_embeddings=bool(config.get("tie_word_embeddings", gemma)),
        layer_types=layer_types,
        rope=_hf_rope(config, set(layer_types)),
        sliding_window=keys.integer("sliding_window", 0, least=0) if SLIDING in layer_types else 0,
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        activation=str(config.get("hidden_activation") or config.get("hidden_act") or "silu"),
        attention_softcap=keys.number("attn_logit_softcapping", 0.0),
        logit_softcap=keys.number("final_logit_softcapping", 0.0),
        query_scale=float(query_scale) if query_scale else None,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        bos_token_id=config.get("bos_token_id") if isinstance(config.get("bos_token_id"), int) else None,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,) if isinstance(eos, int) else (),
        raw=config,
    )


def _layer_types(config: Mapping[str, Any], model_type: str, layers: int) -> tuple[str, ...]:
    """One attention type a layer, from ``layer_types`` or from the older switches."""
    listed = config.get("layer_types")
    if isinstance(listed, list):
        unknown = set(listed) - {FULL, SLIDING}
        if unknown or len(listed) != layers:
            raise UnsupportedModelError(
                f"config.json: layer_types has {len(listed)} entries for {layers} layers, of kinds {sorted(set(listed))}."
            )
        return tuple(listed)
    if not config.get("sliding_window"):
        return (FULL,) * layers
    if model_type in DEFAULT_PATTERN:
        every = config.get("sliding_window_pattern") or DEFAULT_PATTERN[model_type]
        return tuple(FULL if (i + 1) % every == 0 else SLIDING for i in range(layers))
    if model_type == "mistral":
        return (SLIDING,) * layers
    if config.get("use_sliding_window"):
        first = config.get("max_window_layers", 0)
        return tuple(SLIDING if i >= first else FULL for i in range(layers))
    return (FULL,) * layers


def _hf_rope(config: Mapping[str, Any], kinds: set[str]) -> dict[str, Mapping[str, Any]]:
    """Rope parameters by layer type."""
    given = config.get("rope_parameters")
    if isinstance(given, Mapping) and kinds & set(given):
        return {kind: given[kind] for kind in kinds}
    theta = config.get("rope_theta", 10000.0)
    scaling = config.get("rope_scaling")
    base = dict(given) if isinstance(given, Mapping) else {"rope_theta": theta, **(scaling or {})}
    base.setdefault("rope_theta", theta)
    base.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    rope: dict[str, Mapping[str, Any]] = dict.fromkeys(kinds, base)
    if SLIDING in kinds and config.get("rope_local_base_freq"):
        rope[SLIDING] = {"rope_theta": config["rope_local_base_freq"]}
    return rope


def from_gguf(files: ModelFiles) -> ArchConfig:
    """From GGUF metadata; the architecture's name prefixes its keys."""
    meta = files.config
    name = str(meta.get("general.architecture"))
    if name not in GGUF_TYPES:
        raise UnsupportedModelError(
            f"GGUF architecture {name!r} is not supported.", f"Supported: {', '.join(GGUF_TYPES)}."
        )
    model_type = GGUF_TYPES[name]
    keys = Keys({k.removeprefix(f"{name}."): v for k, v in meta.items()}, f"GGUF metadata {name}.*")
    layers, heads = keys.integer("block_count"), keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    tokens = meta.get("tokenizer.ggml.tokens")
    vocab = files.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in files.tensors else 0
    vocab = vocab or keys.integer("vocab_size", len(tokens) if isinstance(tokens, list) else None)
    window = keys.integer("attention.sliding_window", 0, least=0)
    every = DEFAULT_PATTERN.get(model_type)
    layer_types = tuple(SLIDING if window and every and (i + 1) % every else FULL for i in range(layers))
    head_dim = keys.integer("attention.key_length", hidden // heads)
    theta = keys.number("rope.freq_base", 10000.0)
    rope: dict[str, Mapping[str, Any]] = {FULL: _gguf_rope(files, keys, theta)}
    if SLIDING in layer_types:
        local = 10000.0 if model_type == "gemma3_text" else theta
        rope[SLIDING] = {"rope_theta": keys.number("rope.freq_base_swa", local)}
    eos = meta.get("tokenizer.ggml.eos_token_id")
    return ArchConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        tie_embeddings="output.weight" not in files.tensors,
        layer_types=layer_types,
        rope=rope,
        sliding_window=window if SLIDING in layer_types else 0,
        attention_bias=name == "qwen2",
        activation="gelu_tanh" if name.startswith("gemma") else "silu",
        attention_softcap=keys.number("attn_logit_softcapping", 50.0 if name == "gemma2" else 0.0),
        logit_softcap=keys.number("final_logit_softcapping", 30.0 if name == "gemma2" else 0.0),
        query_scale=_gguf_query_scale(name, keys, hidden, heads),
        dtype="float16",
        quantized=any(tensor.dtype in QUANTIZED_TYPES for tensor in files.tensors.values()),
        from_gguf=True,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=(eos,) if isinstance(eos, int) else (),
        raw=meta,
    )


def _gguf_query_scale(name: str, keys: Keys, hidden: int, heads: int) -> float | None:
    """Only the 27B Gemmas scale by hidden / heads instead of the head's size; GGUF does not say it."""
    if name == "gemma2" and keys.integer("block_count") == 46:
        return hidden / heads
    if name == "gemma3" and keys.integer("block_count") == 62:
        return hidden / heads
    return None


def _gguf_rope(files: ModelFiles, keys: Keys, theta: float) -> dict[str, Any]:
    """Scaling keys as rope parameters; llama3's scaling comes as a tensor of divisors."""
    if "rope_freqs.weight" in files.tensors:
        factors = np.frombuffer(files.read("rope_freqs.weight").tobytes(), np.float32).tolist()
        return {"rope_theta": theta, "rope_type": "factors", "factors": factors}
    kind = keys.source.get("rope.scaling.type")
    if kind in (None, "none"):
        return {"rope_theta": theta}
    return {
        "rope_theta": theta,
        "rope_type": kind,
        "factor": keys.number("rope.scaling.factor", 1.0),
        "original_max_position_embeddings": keys.number("rope.scaling.original_context_length", 0.0),
    }

"""config.json and GGUF metadata: both spellings, defaults that files leave out, and every bad value named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFileError, OctavoError, UnsupportedModelError
from octavo.files.gguf_write import write_gguf
from octavo.files.resolve import open_model
from octavo.model.arch import ArchConfig
from octavo.model.describe import cache_specs, describe, supported
from octavo.model.read_arch import from_hf, read_arch
from octavo.model.rope import build_rope

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}
GLM = {**LLAMA, "model_type": "glm4_moe", "n_routed_experts": 8, "first_k_dense_replace": 0}
PHI3 = {**LLAMA, "model_type": "phi3", "rope_scaling": {"type": "su", "long_factor": [1.0] * 8}}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**MIXTRAL, "num_experts_per_tok": 5}, "5 of 4 experts"),
        ({**MIXTRAL, "num_local_experts": 0}, "num_experts"),
        ({**GLM, "n_group": 3}, "of 3 groups"),
        ({**GLM, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "3 of 8 experts in 1 of 4"),
        ({**GLM, "num_experts_per_tok": 2, "moe_intermediate_size": -1}, "moe_intermediate_size"),
        (PHI3, "short_factor"),
        (
            {**PHI3, "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 7 + ["x"]}},
            "short_factor",
        ),
        ({**LLAMA, "model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
        ({**LLAMA, "model_type": "granite", "logits_scaling": 0}, "logits_scaling"),
        ({**LLAMA, "model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers"),
        ({**LLAMA, "model_type": "gpt2", "scale_attn_weights": False}, "attention scales"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_of_one_family_are_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(OctavoError, match=named):
        describe(from_hf(config))


def test_longrope_is_chosen_once_for_a_run() -> None:
    scaling = {"type": "su", "long_factor": [4.0] * 8, "short_factor": [1.0] * 8}
    config = {**PHI3, "rope_scaling": scaling, "original_max_position_embeddings": 64}
    rope = ropes(config)[0]
    assert rope.frequencies(64) == tuple(f * 4 for f in rope.frequencies(65)) != rope.frequencies(65)
    assert rope.scale == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)  # 256 positions / 64


def ropes(config: dict[str, Any]) -> list[Any]:
    return [layer.attention.rope for layer in describe(from_hf(config)).layers]


def test_old_and_new_rope_spellings_agree() -> None:
    old = {**LLAMA, "rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    new = {**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    assert ropes(old) == ropes(new)
    assert ropes(old) != ropes({**LLAMA, "rope_theta": 500000.0})
    gemma = {**LLAMA, "model_type": "gemma3_text", "sliding_window": 8, "num_hidden_layers": 6}
    by_kind = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    explicit = ropes({**gemma, "rope_parameters": by_kind})
    assert explicit == ropes({**gemma, "rope_theta": 1e6, "rope_local_base_freq": 1e4}) == ropes(gemma)
    assert explicit[0] != explicit[5] and explicit[0] == explicit[4]


def test_multimodal_gemma3_leaves_out_what_transformers_fills_in() -> None:
    """The published 4B: heads, vocabulary and rope bases are missing; ids and dtype stand outside text_config."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    outer = {"model_type": "gemma3", "torch_dtype": "bfloat16", "eos_token_id": [1, 106], "text_config": text}
    arch = from_hf(outer)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.vocab_size) == (8, 4, 256, 262208)
    assert (arch.dtype, arch.eos_token_ids, arch.tie_embeddings) == ("bfloat16", (1, 106), True)
    assert (arch.query_scale, arch.activation, arch.max_position) == (256, "gelu_tanh", 131072)
    assert arch.layer_types[:7] == ("sliding_attention",) * 5 + ("full_attention", "sliding_attention")
    full, local = describe(arch).layers[5].attention, describe(arch).layers[0].attention
    assert full.rope == build_rope(256, {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, 0)
    assert local.rope == build_rope(256, {"rope_theta": 1e4}, 0)
    assert (full.window, local.window) == (0, 1024)


def test_cache_kinds_follow_the_windows() -> None:
    arch = from_hf(
        {**LLAMA, "model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 32, "head_dim": 16}
    )
    kinds = cache_specs(describe(arch), 16, 2)
    assert [kinds[i].kind for i in range(4)] == ["window", "full", "window", "full"]
    assert kinds[1].page_bytes == 16 * 2 * 2 * 16 * 2  # tokens, k and v, heads, values, bytes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": "100"}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": None}, "model_type"),
    ],
    ids=str,
)
def test_bad_values_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFileError, match=named):
        describe(from_hf({**LLAMA, **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llamma"}, "llama"),
        ({"model_type": "qwen5"}, "qwen"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"layer_types": ["full_attention", "magic"]}, "magic"),
        ({"quantization_config": {"quant_method": "exl9"}}, "exl9"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
    ids=str,
)
def test_what_would_answer_nonsense_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        describe(from_hf({**LLAMA, **changes}))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.lists(st.one_of(st.text(max_size=4), st.integers(), st.lists(st.integers(), max_size=2)), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "full_attention", "x"]), st.text(max_size=6)),
)  # fmt: skip
KEYS = [
    *LLAMA, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window",
    "use_sliding_window", "max_window_layers", "sliding_window_pattern", "hidden_act", "tie_word_embeddings",
    "attention_bias", "partial_rotary_factor", "query_pre_attn_scalar", "eos_token_id", "text_config",
    "quantization_config", "final_logit_softcapping", "rope_local_base_freq", "dtype",
    "num_experts", "num_experts_per_tok", "n_group", "topk_group", "mlp_only_layers", "decoder_sparse_step",
    "no_rope_layers", "use_bias", "logits_scaling", "rotary_pct", "first_k_dense_replace", "swiglu_limit",
]  # fmt: skip


@given(st.sampled_from(supported()), st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=3))
@settings(max_examples=300, deadline=None)
def test_junk_never_raises_anything_but_our_errors(model_type: str, junk: dict[str, Any]) -> None:
    config = {**LLAMA, "model_type": model_type, **junk}
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > 64:  # legal up to the bound, but slow to describe
        config["num_hidden_layers"] = 2
    try:
        assert isinstance(from_hf(config), ArchConfig)
        describe(from_hf(config))
    except OctavoError as error:
        assert len(str(error)) > 20


def gguf(path: Path, changes: dict[str, Any], tensors: dict[str, Any] | None = None) -> ArchConfig:
    """The architecture of a file with llama's keys, changed."""
    keys = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 256,
        "llama.embedding_length": 64, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    keys = {key: value for key, value in {**keys, **changes}.items() if value is not None}
    given_tensors = {"token_embd.weight": np.zeros((100, 64), np.float32), **(tensors or {})}
    write_gguf(path / "tiny.gguf", keys, given_tensors)
    files = open_model(str(path / "tiny.gguf"))
    try:
        arch = read_arch(files)
        describe(arch)
        return arch
    finally:
        files.close()


def test_gguf_keys(tmp_path: Path) -> None:
    arch = gguf(tmp_path, {"tokenizer.ggml.eos_token_id": 7})
    assert (arch.vocab_size, arch.head_dim, arch.tie_embeddings, arch.eos_token_ids) == (100, 16, True, (7,))
    assert not arch.quantized and not arch.attention_bias
    divisors = np.linspace(1, 8, 8).astype(np.float32)
    scaled = gguf(tmp_path, {"llama.rope.freq_base": 5e5}, {"rope_freqs.weight": divisors})
    found = describe(scaled).layers[0].attention.rope
    plain = build_rope(16, {"rope_theta": 5e5}, 0).inv_freq
    assert found is not None
    np.testing.assert_allclose(found.inv_freq, np.array(plain) / divisors, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"llama.block_count": None}, "block_count"),
        ({"llama.attention.head_count_kv": 3}, "head_count_kv"),
        ({"llama.embedding_length": 2.5}, "embedding_length"),
        ({"general.architecture": "lama"}, "lama"),
        ({"llama.rope.scaling.type": "spiral"}, "spiral"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -2.0}, "factor"),
    ],
    ids=str,
)
def test_bad_gguf_keys_are_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match=named):
        gguf(tmp_path, changes)

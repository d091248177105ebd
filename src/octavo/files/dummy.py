"""``--load-format dummy``: a model's shape without its weights, from a config.json or a built-in preset.

The runner fills the weights with random values of the right types, which is all that speed measurements need.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ModelFileError
from octavo.files.base import TensorInfo
from octavo.files.folder import ModelFolder, with_quantization

LLAMA_3_1_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA_3_1_70B: Mapping[str, Any] = {
    **LLAMA_3_1_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN3_0_6B: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
QWEN3_5_9B: Mapping[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000.0,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _llama_2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, positions: int = 4096
) -> Any:
    """Llama 2 in one of its sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0 if positions == 4096 else 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


# One dense layer and two of the 58 with experts, which hold 22 GB each: DeepSeek-V3's layers on one GPU.
DEEPSEEK_V3_SMALL: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# 16 of Mixtral 8x7B's 32 layers.
MIXTRAL_SMALL: Mapping[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "deepseek-v3-small": DEEPSEEK_V3_SMALL,
    "mixtral-8x7b-small": MIXTRAL_SMALL,
    "qwen3-0.6b": QWEN3_0_6B,
    "llama-2-7b": _llama_2(4096, 11008, 32, 32, 32),
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.1-70b": LLAMA_3_1_70B,
    "qwen3.5-9b": QWEN3_5_9B,
    "llama-2-13b": _llama_2(5120, 13824, 40, 40, 40),
    "codellama-34b": _llama_2(8192, 22016, 48, 64, 8, 16384),
    "llama-2-70b": _llama_2(8192, 28672, 80, 64, 8),
}


class DummyFiles:
    """A model with a config and no tensors (see ``ModelFiles``)."""

    def __init__(
        self, name: str, path: Path, config: Mapping[str, Any], folder: ModelFolder | None = None
    ) -> None:
        self.name = name
        self.path = path
        self.format = "dummy"
        self.config: Mapping[str, Any] = dict(config)
        self.generation_config: Mapping[str, Any] = folder.json("generation_config.json") if folder else {}
        self.chat_template: str | None = folder.chat_template() if folder else None
        self.tensors: Mapping[str, TensorInfo] = {}

    def read(self, name: str) -> NDArray[np.uint8]:
        """Dummy models have no bytes: always a ``ModelFileError``."""
        raise ModelFileError(f"{self.name} was opened with --load-format dummy: it has no tensor {name!r}.")

    def close(self) -> None:
        """Nothing to release."""


def open_dummy(source: Path | str | Mapping[str, Any], name: str | None = None) -> DummyFiles:
    """Open a folder (its config.json and tokenizer), a preset's name ("llama-3.1-8b"), or a config dict."""
    if isinstance(source, Mapping):
        return DummyFiles(name or "dummy", Path("dummy"), source)
    if isinstance(source, str) and source in PRESETS:
        return DummyFiles(name or source, Path(source), PRESETS[source])
    path = Path(source)
    if not path.is_dir():
        raise ModelFileError(
            f"--load-format dummy needs a folder with config.json or a preset, not {source}.",
            f"Presets: {', '.join(PRESETS)}.",
        )
    folder = ModelFolder(path)
    return DummyFiles(name or path.name, path, with_quantization(folder.config(), folder), folder)

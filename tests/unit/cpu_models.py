"""Tiny random models in memory and a driver that plays the engine's part, for the tests of the CPU runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.engine.cache.layout import CacheLayout, plan_layout
from octavo.files.base import TensorInfo
from octavo.model.blocks import DecoderSpec, Experts, FeedForward, Linear, MoE, Norm
from octavo.model.describe import cache_specs, describe
from octavo.model.read_arch import from_hf
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import GrammarMask, PageWrite, SlotInit, StepPlan, StepResult
from octavo.runner.cpu.runner import CPURunner
from octavo.runner.cpu.weights import expert_names

BASE = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 20,
    "head_dim": 32,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0},
    "gemma3_text": {
        **GEMMA,
        "num_hidden_layers": 6,
        "rope_local_base_freq": 1000.0,
        "sliding_window_pattern": 6,
    },
    "gemma": {**GEMMA, "hidden_act": "gelu_pytorch_tanh"},
    "phi3": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 512,
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i / 4 for i in range(8)],
        },
        "original_max_position_embeddings": 512,
    },
    "glm4": {"head_dim": 32, "partial_rotary_factor": 0.5, "attention_bias": True},
    "ernie4_5": {"head_dim": 32, "use_bias": True},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "seed_oss": {"head_dim": 32, "attention_bias": True, "attention_out_bias": True},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 64},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
        "mlp_only_layers": [1],
        "num_hidden_layers": 3,
    },
    "qwen3_moe": {
        "num_experts": 18,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "num_key_value_heads": 4},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
}


class MemoryFiles:
    """``ModelFiles`` over arrays: name -> (dtype, shape, raw bytes)."""

    def __init__(self, tensors: dict[str, tuple[str, tuple[int, ...], NDArray[np.uint8]]], kind: str) -> None:
        self.name, self.path, self.format = "tiny", Path("."), kind
        self.config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] = {}
        self.chat_template = None
        self.raw = {name: raw for name, (_, _, raw) in tensors.items()}
        self.tensors = {n: TensorInfo(n, d, s, raw.nbytes) for n, (d, s, raw) in tensors.items()}

    def read(self, name: str) -> NDArray[np.uint8]:
        return self.raw[name]

    def close(self) -> None:
        self.raw.clear()


def spec_of(family: str, **changes: Any) -> DecoderSpec:
    """The blocks of a tiny model of a family."""
    return describe(from_hf({"model_type": family, **BASE, **FAMILIES[family], **changes}))


def random_block(
    dtype: str, shape: tuple[int, ...], rng: np.random.Generator, scale: float
) -> NDArray[np.uint8]:
    """Raw bytes of a random tensor, values around ``scale``."""
    values = rng.standard_normal(shape).astype(np.float32) * np.float32(scale)
    if dtype == "F32":
        return values.view(np.uint8).reshape(-1)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint8).reshape(-1)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
    return random_quants(dtype, shape[0], shape[1], rng, scale)


def random_quants(
    dtype: str, rows: int, size: int, rng: np.random.Generator, scale: float
) -> NDArray[np.uint8]:
    """Random GGUF blocks: any quants, sane float16 scales; values come out around ``scale``."""
    weights, nbytes = {
        "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
        "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
        "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    }[dtype]  # fmt: skip
    blocks = rng.integers(0, 256, (rows, size // weights, nbytes), dtype=np.uint8)
    spread = {
        "Q4_0": 4,
        "Q4_1": 4,
        "Q5_0": 9,
        "Q5_1": 9,
        "Q8_0": 74,
        "Q4_K": 150,
        "Q5_K": 300,
        "Q6_K": 1400,
        "Q2_K": 14,
        "Q3_K": 40,
        "IQ4_NL": 70,
        "IQ4_XS": 1200,
    }[dtype]

    def halves(low: float, high: float) -> NDArray[np.uint8]:
        values = rng.uniform(low, high, (*blocks.shape[:2], 1)).astype(np.float16)
        return values.view(np.uint8).reshape(*blocks.shape[:2], 2)

    d = scale / spread
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(dtype, 0)
    blocks[:, :, at : at + 2] = halves(d / 2, d)
    if dtype == "Q2_K":
        blocks[:, :, 82:84] = halves(d, d * 1.5)
    if dtype in ("Q4_1", "Q5_1"):  # the minimum that centres the values
        blocks[:, :, 2:4] = halves(-spread * 1.8 * d, -spread * 1.4 * d)
    if dtype in ("Q4_K", "Q5_K"):
        blocks[:, :, 2:4] = halves(d * spread / 40, d * spread / 30)
    return blocks.reshape(-1)


def random_files(
    spec: DecoderSpec, dtype: str | list[str] = "F32", seed: int = 0, gguf: bool = False
) -> MemoryFiles:
    """Random weights for every tensor of a spec; matrices take the types of ``dtype`` in turn."""
    rng = np.random.default_rng(seed)
    kinds = [dtype] if isinstance(dtype, str) else dtype
    tensors: dict[str, tuple[str, tuple[int, ...], NDArray[np.uint8]]] = {}
    prefixes = spec.gguf_layer_prefix if gguf else spec.hf_layer_prefix

    def put(name: str, kind: str, shape: tuple[int, ...], raw: NDArray[np.uint8]) -> None:
        tensors[name] = (kind, shape, raw)

    def norm(block: Norm | None, prefix: str) -> None:
        if block is not None:
            values = (rng.uniform(0.5, 1.5, block.size) - (0 if gguf else block.offset)).astype(np.float32)
            put(
                prefix + (block.gguf if gguf else block.hf) + ".weight",
                "F32",
                (block.size,),
                values.view(np.uint8),
            )

    def linear(block: Linear, prefix: str) -> None:
        for part in block.parts:
            name, rows = prefix + (part.gguf if gguf else part.hf), part.total or part.out_features
            shape = rows, block.in_features
            if name + ".weight" in tensors:  # several parts share it
                continue
            kind = kinds[len(tensors) % len(kinds)]
            put(name + ".weight", kind, shape, random_block(kind, shape, rng, block.in_features**-0.5))
            if block.bias:
                values = rng.standard_normal(rows).astype(np.float32) * np.float32(0.3)
                put(name + ".bias", "F32", (rows,), values.view(np.uint8))

    def experts(block: Experts, prefix: str) -> None:
        sizes = [(block.intermediate, block.hidden)] * 2 + [(block.hidden, block.intermediate)]
        for names, (rows, inputs) in zip(expert_names(block, gguf, prefix), sizes):
            kind = kinds[len(tensors) % len(kinds)]
            for name in names:
                shape = (block.num, rows, inputs) if gguf else (rows, inputs)
                flat = (shape[0] * shape[1], inputs) if gguf else shape
                put(name, kind, shape, random_block(kind, flat, rng, inputs**-0.5))

    def mlp(block: FeedForward, prefix: str) -> None:
        if isinstance(block, MoE):
            linear(block.router.linear, prefix)
            experts(block.experts, prefix)
            if block.shared is not None:
                mlp(block.shared, prefix)
            if block.shared_gate is not None:
                linear(block.shared_gate, prefix)
            return
        linear(block.gate_up, prefix)
        linear(block.down, prefix)

    shape = (spec.embedding.vocab_size, spec.embedding.hidden)
    name = (spec.embedding.gguf if gguf else spec.embedding.hf) + ".weight"
    put(name, kinds[0], shape, random_block(kinds[0], shape, rng, 0.5 / spec.embedding.scale))
    for index, layer in enumerate(spec.layers):
        prefix = prefixes.format(index)
        for block in (layer.input_norm, layer.post_attention_norm, layer.pre_mlp_norm, layer.post_mlp_norm):
            norm(block, prefix)
        norm(layer.attention.q_norm, prefix)
        norm(layer.attention.k_norm, prefix)
        for matrix in (layer.attention.qkv, layer.attention.output):
            linear(matrix, prefix)
        mlp(layer.mlp, prefix)
    norm(spec.norm, "")
    if spec.head is not None:
        linear(spec.head, "")
    return MemoryFiles(tensors, "gguf" if gguf else "safetensors")


class Driver:
    """Feeds a runner like the engine would: slots, shuffled pages, one group table each."""

    def __init__(
        self, spec: DecoderSpec, files: Any, *, num_slots: int = 8, max_len: int = 1024, **options: Any
    ) -> None:
        self.layout: CacheLayout = plan_layout(cache_specs(spec, options.pop("page_size", 16), 2))
        pages = self.layout.pages_for(max_len, max_len) * num_slots
        self.runner = CPURunner(
            spec, files, self.layout, num_pages=pages, num_slots=num_slots, max_num_batched_tokens=512,
            max_model_len=max_len, **{"threads": 1, **options},
        )  # fmt: skip
        self.free = np.random.default_rng(1).permutation(pages).tolist()
        self.step = 0
        self.held: dict[tuple[int, int], list[int]] = {}

    def admit(self, slot: int, tokens: list[int], num_prompt: int | None = None, **sampling: Any) -> SlotInit:
        """A sequence for the next ``run``; greedy, and with all logits, unless ``sampling`` says otherwise."""
        for group in range(len(self.layout.groups)):
            self.free += self.held.pop((group, slot), [])
        stops = sampling.pop("stop_ids", [])
        seed = sampling.pop("slot_seed", 0)
        params = SamplingParams(**{"temperature": 0.0, "logprobs": 0, **sampling})
        return SlotInit(slot, tokens, num_prompt or len(tokens), params, seed, stops)

    def run(
        self,
        rows: list[tuple[int, int, int]],
        admits: list[SlotInit] | None = None,
        sample: bool | list[bool] = True,
        masks: list[GrammarMask] | None = None,
    ) -> StepResult:
        """One step of (slot, start, count) rows."""
        writes = []
        for slot, start, count in rows:
            for group, kind in enumerate(self.layout.groups):
                held = self.held.setdefault((group, slot), [])
                need = -(-(start + count) // kind.spec.page_size) - len(held)
                if need > 0:
                    fresh = [self.free.pop() for _ in range(need)]
                    writes.append(PageWrite(group, slot, len(held), fresh))
                    held += fresh
        wants = sample if isinstance(sample, list) else [sample] * len(rows)
        slots, starts, counts = (list(column) for column in zip(*rows))
        self.step += 1
        plan = StepPlan(self.step, slots, starts, counts, [0] * len(rows), wants, admits or [], writes, [])
        self.runner.forward(plan)
        self.runner.sample(masks or [])
        return self.runner.collect()

    def logits(self, rows: int = 1) -> NDArray[np.float32]:
        """Copies of the last step's logits rows."""
        return self.runner.logits[:rows, : self.runner.vocab_size].copy()

"""How much cache mixed kinds of layers really hold, against the least that attention allows.

The least, after n tokens of a sequence: each layer keeps the keys and values that the next token can still see, and not one
more. The layouts are those of published models; the scheduler, the pool and the page tables are the real ones.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from octavo.engine.cache.layout import CacheLayout, plan_layout
from octavo.engine.cache.spec import (
    ChunkedKV,
    CompressedKV,
    FullKV,
    KVSpec,
    LayerKV,
    StateKV,
    WindowKV,
    kinds_of,
)
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.model.describe import cache_specs, describe
from octavo.model.read_arch import from_hf
from octavo.protocol.control import CheckPool
from octavo.protocol.generate import GenerateRequest, SamplingParams

COMMON = {"vocab_size": 1000, "max_position_embeddings": 131072}
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 128, "sliding_window": 1024, **COMMON}
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, **COMMON,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma-3-1b": {
        **GEMMA3, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    },
    "gemma-3-4b": {
        **GEMMA3, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256,
    },
    "gemma-3-27b": {
        **GEMMA3, "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16,
    },
    "gpt-oss-20b": {**GPT_OSS, "num_hidden_layers": 24},
    "gpt-oss-120b": {**GPT_OSS, "num_hidden_layers": 36},
    "llama-4-scout": {"model_type": "llama4_text", **COMMON},
    "qwen-3.5": {
        "model_type": "qwen3_5_text", "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8, **COMMON,
    },
    "deepseek-v4-flash": {
        "model_type": "deepseek_v4", "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, **COMMON,
    },
}  # fmt: skip


def kinds(name: str) -> dict[int, LayerKV]:
    return cache_specs(describe(from_hf(CONFIGS[name])), 16, 2)


def least(spec: KVSpec, n: int) -> int:
    """Bytes of one layer that the token at position n needs of those before it."""
    if isinstance(spec, StateKV):
        return spec.state_bytes
    if isinstance(spec, CompressedKV):
        return n // spec.rate * spec.entry_bytes
    seen = n
    if isinstance(spec, WindowKV):
        seen = min(n, spec.window - 1)
    elif isinstance(spec, ChunkedKV):
        seen = n % spec.chunk
    return seen * spec.token_bytes


def engine(layout: CacheLayout) -> EngineCore:
    runner = NullRunner(layout, num_pages=1 << 16, num_slots=16, vocab_size=1000)
    settings = EngineSettings(
        max_model_len=40_000,
        max_num_seqs=16,
        max_num_batched_tokens=8192,
        vocab_size=1000,
        enable_prefix_caching=False,
    )
    return EngineCore(InlineExecutor(runner), settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_held_is_within_a_tenth_of_the_least(name: str) -> None:
    specs = kinds(name)
    layout = plan_layout(specs)
    core = engine(layout)
    rng = random.Random(5)
    for id in range(24):
        sampling = SamplingParams(max_tokens=rng.randint(20, 200), ignore_eos=True, seed=id)
        prompt = [1] * rng.choice([1500, 3000, 6000, 12_000, 24_000])
        core.submit(GenerateRequest(id=id, prompt_token_ids=prompt, sampling=sampling))
    held = wanted = 0
    while core.has_work:
        core.step()
        for seq in core.scheduler.running():
            if seq.num_computed < seq.num_prompt:  # its next chunk's pages are held already
                continue
            pages = sum(len(group.pages) for group in seq.table.groups)
            held += pages * layout.pool_page_bytes
            wanted += sum(least(spec, seq.num_computed) for kept in specs.values() for spec in kinds_of(kept))
    core.control(CheckPool())
    assert wanted > 0
    print(f"{name}: {held / wanted:.3f} of the least")
    assert held <= 1.1 * wanted


@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_kinds_keep_their_books(name: str) -> None:
    """Random lives over these layouts with few pages: the pool proves itself after every step."""
    specs = kinds(name)
    layout = plan_layout(specs)
    step, longest = 256, 3000
    for seed in range(2):
        rng = random.Random(seed)
        runner = NullRunner(
            layout, num_pages=int(layout.pages_for(longest, step) * 1.5), num_slots=6, vocab_size=1000
        )
        settings = EngineSettings(
            max_model_len=longest,
            max_num_seqs=6,
            max_num_batched_tokens=step,
            vocab_size=1000,
            overlap=bool(seed),
        )
        core = EngineCore(InlineExecutor(runner), settings)
        shared = [1 + i % 7 for i in range(longest)]
        for id in range(12):
            prompt = shared[: rng.randint(1, 2000)] + [
                rng.randrange(1, 999) for _ in range(rng.randint(1, 300))
            ]
            sampling = SamplingParams(max_tokens=rng.randint(1, 60), ignore_eos=True, seed=id)
            core.submit(GenerateRequest(id=id, prompt_token_ids=prompt, sampling=sampling))
        steps = 0
        while core.has_work:
            core.step()
            core.check()
            steps += 1
            if steps % 40 == 0:
                core.abort([rng.randrange(12)])
        assert steps > 30


def test_groups_leave_few_places_empty() -> None:
    """Gemma 3 27B has 52 windows and 10 full layers: groups of 10 would leave 8 places empty, groups of 5 leave 3."""
    layout = plan_layout(kinds("gemma-3-27b"))
    assert layout.layers_per_group == 5 and len(layout.groups) == 13
    full = FullKV(16, 64)
    assert plan_layout(dict.fromkeys(range(61), full)).layers_per_group == 61
    mixed = {i: WindowKV(16, 64, 128) if i % 2 else full for i in range(36)}
    assert plan_layout(mixed).layers_per_group == 18
    uneven: dict[int, KVSpec] = {i: full if i < 7 else WindowKV(16, 64, 128) for i in range(150)}
    many = plan_layout(uneven)  # neither 7 nor 1 divides into few enough groups
    assert many.layers_per_group == 8 and len(many.groups) == 19
    assert {layer for group in many.groups for layer in group.layers} == set(range(150))

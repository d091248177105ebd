"""The whole engine on a GPU: greedy tokens of tiny random checkpoints equal the CPU reference in float32; graphs
equal eager; a row alone equals the same row in a batch; bfloat16 stays within its noise of transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.core import EngineCore
from octavo.protocol.control import CheckPool
from octavo.protocol.generate import GenerateRequest, SamplingParams

pytestmark = pytest.mark.gpu

BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 64}),
    "mistral": ("Mistral", {"head_dim": 64, "sliding_window": 24}),
    "qwen2": ("Qwen2", {"hidden_size": 256}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "gemma2": ("Gemma2", {"head_dim": 64, "sliding_window": 24}),
    "gemma3_text": ("Gemma3", {"head_dim": 64, "sliding_window": 24}),
}


def checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """A tiny random model saved as Hugging Face would."""
    import transformers

    name, extra = FAMILIES[family]
    config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**BASE, **extra})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return folder


def build(folder: Path, **options: Any) -> EngineCore:
    chosen = EngineOptions.of(
        **{
            "model": str(folder),
            "dtype": "float32",
            "cpu_backend": "torch",
            "max_num_seqs": 64,
            "max_num_batched_tokens": 256,
            "num_gpu_blocks_override": 2048,
            "threads": 1,  # many test processes share the cores
            **options,
        }
    )
    return host.build_core(chosen, host.open_files(chosen))


def run(core: EngineCore, prompts: list[list[int]], num_tokens: int, **sampling: Any) -> list[list[int]]:
    out: dict[int, list[int]] = {}
    for key, prompt in enumerate(prompts):
        out[key] = []
        core.submit(
            GenerateRequest(
                id=key,
                prompt_token_ids=prompt,
                sampling=SamplingParams(
                    **{"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True, **sampling}
                ),
            )
        )
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason in (None, "length"), delta
            out[delta.id] += delta.tokens
    core.control(CheckPool())
    core.close()
    return [out[key] for key in range(len(prompts))]


def some_prompts(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 256) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_cpu(family: str, tmp_path: Path) -> None:
    folder = checkpoint(family, tmp_path)
    prompts = some_prompts(12, 90)
    expected = run(build(folder, device="cpu"), prompts, 40)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert run(build(folder, device="cuda"), prompts, 40) == expected, "graphs"
    assert run(build(folder, device="cuda", enforce_eager=True), prompts, 40) == expected, "eager"
    assert run(build(folder, device="cuda", overlap=False), prompts, 40) == expected, "no overlap"


def test_row_alone_equals_row_of_64(tmp_path: Path) -> None:
    folder = checkpoint("qwen3", tmp_path)
    prompts = some_prompts(64, 60, seed=3)
    together = run(build(folder, device="cuda"), prompts, 24)
    for key in (0, 17, 63):
        assert run(build(folder, device="cuda"), [prompts[key]], 24) == [together[key]]


def test_sampled_tokens_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    folder = checkpoint("llama", tmp_path)
    prompts = some_prompts(16, 60, seed=4)
    asked = {"temperature": 0.9, "top_p": 0.9, "seed": 11}
    together = run(build(folder, device="cuda"), prompts, 24, **asked)
    for key in (0, 9):
        assert run(build(folder, device="cuda"), [prompts[key]], 24, **asked) == [together[key]]


def test_preemption_keeps_tokens(tmp_path: Path) -> None:
    folder = checkpoint("gemma3_text", tmp_path)
    prompts = some_prompts(10, 60, seed=5)
    free = run(build(folder, device="cuda"), prompts, 40)
    tight = build(folder, device="cuda", num_gpu_blocks_override=60, max_model_len="128")
    assert run(tight, prompts, 40) == free


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_never_waits_for_the_device_but_in_collect(tmp_path: Path) -> None:
    """torch raises where a call would wait for the device; requests of all kinds come and go."""
    core = build(checkpoint("qwen3", tmp_path), device="cuda", dtype="bfloat16")
    rng = random.Random(7)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 1},
        {"repetition_penalty": 1.2},
        {"logit_bias": {5: 1.0}},
        {"logprobs": 2},
    ]
    for key in range(40):
        prompt = [rng.randrange(3, 256) for _ in range(rng.randrange(1, 120))]
        sampling = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **rng.choice(kinds)})
        core.submit(GenerateRequest(id=key, prompt_token_ids=prompt, sampling=sampling))
        torch.cuda.set_sync_debug_mode("error")
        try:
            core.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    while core.has_work:
        core.step()
    core.close()

"""Recurrent layers in the engine: checkpoints of states, prefixes found there, preemption; all equal to transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Driver
from test_parity import close, expected, oracle

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.cache.spec import FullKV, StateKV
from octavo.engine.core import EngineCore
from octavo.files.resolve import open_model
from octavo.protocol.generate import GenerateRequest, SamplingParams

FAMILIES = ["qwen3_next", "qwen3_5_text", "bamba"]


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 128) for _ in range(count)]


@pytest.mark.parametrize("name", FAMILIES)
def test_two_sequences_go_on_from_one_checkpoint(name: str, tmp_path: Path) -> None:
    model = oracle(name, tmp_path)
    driver = Driver(open_model(str(tmp_path)))
    checkpoint = max(group.spec.page_size for group in driver.layout.groups)
    prefix = tokens(checkpoint, 1)
    first, second = driver.row(), driver.row()
    for at in (0, 100):
        driver.step([first], [prefix[at : at + 100] if at == 0 else prefix[at:]])
    second.computed, second.pages = first.computed, [list(pages) for pages in first.pages]
    tails = [tokens(9, 2), tokens(5, 3)]
    whole = [expected(model, prefix + tail)[len(prefix) :] for tail in tails]
    got = [[driver.step([row], [tail[:2]])[0]] for row, tail in zip((first, second), tails)]
    for row, logits in zip((0, 1), driver.step([first, second], [tail[2:] for tail in tails])):
        got[row].append(logits)
    for found, theirs in zip(got, whole):
        close(torch.cat(found), theirs)


def build(folder: Path, **options: Any) -> EngineCore:
    chosen = EngineOptions.of(
        **{
            "model": str(folder),
            "device": "cpu",
            "cpu_backend": "torch",
            "dtype": "float32",
            "block_size": 1,  # a checkpoint every 64 tokens
            "max_num_seqs": 8,
            "max_num_batched_tokens": 100,
            "max_model_len": "256",
            "threads": 1,
            **options,
        }
    )
    return host.build_core(chosen, host.open_files(chosen))


def run(core: EngineCore, prompts: list[list[int]], num_tokens: int = 12) -> list[list[int]]:
    out: dict[int, list[int]] = {key: [] for key in range(len(prompts))}
    for key, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        core.submit(GenerateRequest(id=key, prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason in (None, "length"), delta
            out[delta.id] += delta.tokens
        core.check()
    return list(out.values())


def greedy(model: Any, prompt: list[int], num_tokens: int = 12) -> list[int]:
    """By whole passes, without any cache."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(expected(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_engine_equals_transformers(name: str, tmp_path: Path) -> None:
    model = oracle(name, tmp_path)
    shared = tokens(130, 4)
    prompts = [shared + tokens(7, 5), shared + tokens(20, 6), tokens(3, 7), tokens(90, 8)]
    wanted = [greedy(model, prompt) for prompt in prompts]
    core = build(tmp_path)
    kinds = {type(group.spec) for group in core.executor.layout.groups}
    assert kinds == {StateKV, FullKV}
    assert run(core, prompts) == wanted  # batched, in chunks
    before = core.pages.num_hits
    assert run(core, prompts[:1]) == wanted[:1]
    checkpoint = max(group.spec.page_size for group in core.executor.layout.groups)
    assert core.pages.num_hits - before == 137 // checkpoint * checkpoint >= checkpoint
    overlapped = build(tmp_path, overlap=True, enable_prefix_caching=False)
    assert run(overlapped, prompts) == wanted
    assert overlapped.pages.num_hits == 0


def test_preempted_sequences_start_again_from_what_is_left(tmp_path: Path) -> None:
    model = oracle("qwen3_next", tmp_path)
    prompts = [tokens(20 + 9 * i, 20 + i) for i in range(5)]
    wanted = [greedy(model, prompt, 50) for prompt in prompts]
    layout = build(tmp_path).executor.layout
    tight = build(tmp_path, max_model_len="128", num_gpu_blocks_override=layout.pages_for(128, 100) + 6)
    assert run(tight, prompts, 50) == wanted
    assert tight.stats().num_preemptions > 0

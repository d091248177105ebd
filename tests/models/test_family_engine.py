"""Every family in the whole engine on a CPU: cached prefixes are hit, sequences are preempted, and every token is the one
that transformers finds most likely."""

from __future__ import annotations

import random
from math import lcm
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import ROWS, expected, oracle

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.cache.layout import plan_layout
from octavo.engine.core import EngineCore
from octavo.files.resolve import open_model
from octavo.model.describe import cache_specs, describe
from octavo.model.read_arch import read_arch
from octavo.protocol.control import CheckPool
from octavo.protocol.generate import GenerateRequest, SamplingParams

PAGE, NEW_TOKENS, ROWS_AT_ONCE = 4, 8, 8
SLACK = 1e-3  # logits closer than this may be chosen either way


def family_of(row: str) -> str:
    """The model_type that a row of the parity table belongs to."""
    return row.partition("-")[0]


FIRST_ROWS = list({family_of(name): name for name in reversed(ROWS)}.values())[::-1]
MORE_ROWS = [
    "granitemoehybrid-experts",
    "deepseek_v4-yarn",
]  # whose blocks those of their family's first row are not


def build(folder: Path, pages: int, max_len: int, step_tokens: int) -> EngineCore:
    options = EngineOptions.of(
        model=str(folder),
        dtype="float32",
        device="cpu",
        cpu_backend="torch",
        threads=1,  # more only wait for each other, and for those of other tests
        block_size=PAGE,
        max_num_seqs=ROWS_AT_ONCE,
        max_num_batched_tokens=step_tokens,
        max_model_len=str(max_len),
        num_gpu_blocks_override=pages,
    )
    return host.build_core(options, open_model(str(folder)))


def run(core: EngineCore, prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """All prompts together, greedily; tokens and how many of each prompt were cached."""
    out: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    cached = [0] * len(prompts)
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        core.submit(GenerateRequest(id=i, prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason in (None, "length"), delta
            out[delta.id] += delta.tokens
            cached[delta.id] = delta.num_cached_tokens
        core.control(CheckPool())
    return [out[i] for i in range(len(prompts))], cached


def most_likely(model: Any, prompt: list[int], tokens: list[int]) -> None:
    """Every token has the highest logit (or one as high) after those before it."""
    assert len(tokens) == NEW_TOKENS
    logits = expected(model, prompt + tokens)[len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    assert (logits.max(1).values - chosen).max() < SLACK


@pytest.mark.parametrize("name", FIRST_ROWS + MORE_ROWS)
def test_prefix_hits_and_preemption(name: str, tmp_path: Path) -> None:
    model = oracle(name, tmp_path)
    layout = plan_layout(cache_specs(describe(read_arch(open_model(str(tmp_path)))), PAGE, 4))
    sizes = [group.spec.page_size for group in layout.groups]
    common = max(32, lcm(*sizes))  # tokens after which a prefix can be found, in every group
    rng = random.Random(11)
    base, tail, *short = [
        [rng.randrange(3, 128) for _ in range(length)]
        for length in (common + 9, 5, *(max(3, min(sizes)) - i % 3 for i in range(ROWS_AT_ONCE)))
    ]
    step = max(24, common)  # the short ones begin at about the same time
    # One long sequence fits, or the beginnings of the short ones, and hardly more.
    pages = max(layout.pages_for(common + 32, step), sum(layout.pages_for(len(ids)) for ids in short))
    core = build(tmp_path, pages + 1, common + 32, step)
    first, _ = run(core, [base])
    again, cached = run(core, [base[: common + 4] + tail])
    assert cached[0] >= common
    together, _ = run(core, short)  # they all begin, and grow until the pages are gone
    assert core.scheduler.counters.num_preemptions > 0
    assert core.settings.max_model_len == common + 32
    core.close()
    most_likely(model, base, first[0])
    most_likely(model, base[: common + 4] + tail, again[0])
    for prompt, tokens in zip(short, together):
        most_likely(model, prompt, tokens)

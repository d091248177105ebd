"""``octavo bench soak``: passes on a sound engine, and names what is wrong with an unsound one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.bench import soak
from octavo.cli import main
from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import FullKV
from octavo.engine.client.inprocess import InProcessClient
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.protocol.plan import StepPlan, StepResult

VOCAB = 300
TINY: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


class Runner(NullRunner):
    """A null runner that may go wrong."""

    fail_row_at = -1

    def collect(self) -> StepResult:
        result = super().collect()
        if result.step == self.fail_row_at:
            result.errors = {0: "made up"}
        return result


def core(num_pages: int = 64) -> EngineCore:
    runner = Runner(plan_layout({0: FullKV(16, 64)}), num_pages=num_pages, num_slots=64, vocab_size=VOCAB)
    settings = EngineSettings(
        max_model_len=400, max_num_seqs=64, max_num_batched_tokens=256, vocab_size=VOCAB, overlap=True
    )
    return EngineCore(InlineExecutor(runner), settings)


def steady() -> tuple[int, int, int | None]:
    return (1000 * soak.MIB, 100 * soak.MIB, 5000 * soak.MIB)


def run(engine: EngineCore, seconds: float = 3.0, watch: Callable[[], Any] = steady) -> soak.Report:
    mix = soak.Mix(concurrency=32, longest_prompt=200, longest_answer=100, seed=3)

    async def all_of_it() -> soak.Report:
        client = InProcessClient(engine)
        try:
            return await soak.Soak(client, mix, seconds, watch, lambda line: None).run()
        finally:
            await client.close()

    return asyncio.run(all_of_it())


def test_a_sound_engine_passes() -> None:
    report = run(core())
    assert report.problems == []
    assert report.answered > 100 and report.aborted > 5 and report.preemptions > 0
    assert report.pool_checks >= 4 and len(report.memory) >= 4
    assert "Soak passed." in soak.summary(report)
    json.dumps(soak.as_json(report))


def test_a_cache_that_is_large_enough_proves_nothing() -> None:
    assert any("preempted" in problem for problem in run(core(num_pages=4000), 1.5).problems)


def test_a_failed_answer_is_told() -> None:
    engine = core()
    runner = engine.executor.forward.__self__  # type: ignore[attr-defined]
    runner.fail_row_at = 40
    assert any("made up" in problem for problem in run(engine).problems)


def test_a_leaked_page_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = core()
    forward = engine.executor.forward
    steps = 0

    def leaking(plan: StepPlan) -> None:
        nonlocal steps
        steps += 1
        if steps == 30:
            engine.pages.pool._ref[next(i for i, n in enumerate(engine.pages.pool._ref) if n)] += 1
        forward(plan)

    monkeypatch.setattr(engine.executor, "forward", leaking)
    assert any("does not add up" in problem for problem in run(engine).problems)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_memory_that_grows_is_told(which: int) -> None:
    size = 0

    def growing() -> tuple[int, int, int | None]:
        nonlocal size
        size += 200 * soak.MIB
        values = list(steady())
        values[which] += size  # type: ignore[operator]
        return values[0] or 0, values[1] or 0, values[2]

    name = ("engine", "own", "device")[which]
    assert any(f"Memory of {name} grew" in problem for problem in run(core(), 3.0, growing).problems)


def test_silence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "STALL_S", 0.5)
    engine = core()
    monkeypatch.setattr(engine, "step", list)
    report = run(engine)
    assert any("Nothing for" in problem for problem in report.problems)


def test_requests_are_of_every_kind() -> None:
    import random

    mix, rng = soak.Mix(longest_prompt=100, longest_answer=50), random.Random(1)
    requests = [mix.request(number, rng, VOCAB) for number in range(400)]
    lengths = [len(request.prompt_token_ids) for request in requests]
    assert min(lengths) == 1 and max(lengths) > 80
    heads = {tuple(request.prompt_token_ids[:4]) for request in requests if len(request.prompt_token_ids) > 4}
    assert len(heads) < len([n for n in lengths if n > 4]), "some share a beginning"
    for field in ("top_p", "top_k", "logprobs", "prompt_logprobs", "logit_bias", "repetition_penalty"):
        assert len({str(getattr(request.sampling, field)) for request in requests}) > 1, field


def test_the_command_runs_a_real_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    status = main(
        [
            *("bench", "soak", str(tmp_path / "model"), "--load-format", "dummy", "--device", "cpu"),
            *("--cpu-backend", "torch", "--duration", "8", "--concurrency", "8", "--max-num-seqs", "8"),
            *("--longest-prompt", "16", "--longest-answer", "64", "--num-gpu-blocks-override", "7"),
            *("--output-json", str(tmp_path / "out.json")),
        ]
    )
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["problems"] == [], capsys.readouterr().out
    assert status == 0 and written["answered"] > 5 and written["preemptions"] > 0

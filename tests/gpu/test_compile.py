"""Nothing compiles after the engine is built: random shapes and parameters, a counter in the compiler."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from test_engine import build, checkpoint

from octavo.protocol.generate import GenerateRequest, SamplingParams

pytestmark = pytest.mark.gpu


def test_no_kernel_compiles_in_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    core = build(
        checkpoint("qwen3", tmp_path),
        device="cuda",
        dtype="bfloat16",
        max_num_batched_tokens=2048,
        max_num_seqs=48,
        max_model_len="512",
        num_gpu_blocks_override=1200,
    )
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **info: compiled.append(str(info.get("repr")))
    )
    rng = random.Random(0)
    open_requests = 0
    for number in range(300):
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 5]),
            min_p=rng.choice([0.0, 0.1]),
            presence_penalty=rng.choice([0.0, 0.5]),
            logprobs=rng.choice([None, None, 3]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
            max_tokens=rng.randint(1, 30),
            min_tokens=0,
        )
        prompt = [rng.randrange(3, 256) for _ in range(rng.choice([1, 2, 7, 50, 130, 400, 480]))]
        core.submit(GenerateRequest(id=number, prompt_token_ids=prompt, sampling=sampling))
        open_requests += 1
        for _ in range(rng.randint(0, 4)):
            open_requests -= sum(delta.finish_reason is not None for delta in core.step())
    while core.has_work:
        open_requests -= sum(delta.finish_reason is not None for delta in core.step())
    core.check()
    core.close()
    assert open_requests == 0
    assert compiled == []

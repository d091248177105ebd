"""--gpu-memory-utilization means what it says: no load makes an engine exceed it, and graphs take what was measured."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.core import EngineCore
from octavo.errors import OutOfMemoryError
from octavo.protocol.generate import GenerateRequest, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

SHARE = 0.5
SLACK = 256 << 20  # kernels that libraries load late, and what the allocator rounds up


def used() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def build(**changes: Any) -> EngineCore:
    options = EngineOptions.of(
        **{
            "model": "qwen3-0.6b",
            "load_format": "dummy",
            "device": "cuda",
            "max_model_len": "8192",
            "gpu_memory_utilization": SHARE,
            "max_num_seqs": 512,
            **changes,
        }
    )
    return host.build_core(options, host.open_files(options))


def test_no_request_exceeds_the_share() -> None:
    gc.collect()  # what tests before left behind is no engine's
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    core = build()
    assert used() <= SHARE * total + SLACK
    assert used() >= (SHARE - 0.1) * total, "and it is made use of"
    rng = random.Random(0)
    for number in range(600):
        length = rng.choice([1, 10, 500, 8000]) if number % 50 == 0 else rng.randint(1, 40)
        sampling = SamplingParams(
            temperature=1.0,
            top_p=0.9,
            top_k=20,
            repetition_penalty=1.1,
            logprobs=20,
            prompt_logprobs=20,
            logit_bias={5: 1.0},
            max_tokens=4,
            ignore_eos=True,
        )
        prompt = [rng.randrange(1000, 20000) for _ in range(length)]
        core.submit(GenerateRequest(id=number, prompt_token_ids=prompt, sampling=sampling))
    highest, reasons = 0, set()
    while core.has_work:
        reasons |= {delta.finish_reason for delta in core.step()}
        highest = max(highest, used())
    core.check()
    core.close()
    assert reasons == {None, "length"}
    assert highest <= SHARE * total + SLACK


def test_a_start_that_cannot_fit_says_so() -> None:
    with pytest.raises(OutOfMemoryError) as error:
        build(model="llama-3.1-8b", gpu_memory_utilization=0.05)
    assert error.value.cure

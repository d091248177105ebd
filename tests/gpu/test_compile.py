"""Nothing compiles after the engine is built: random shapes and parameters, a counter in the compiler."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import BASE, build
from test_families import V4

from octavo.engine.core import EngineCore
from octavo.protocol.generate import GenerateRequest, SamplingParams

pytestmark = pytest.mark.gpu

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}


def engine(
    tmp_path: Path, longest: int, quantization: str | None, eager: bool, config: dict[str, Any] = CONFIG
) -> EngineCore:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return build(
        tmp_path,
        device="cuda",
        load_format="dummy",
        dtype="bfloat16",
        quantization=quantization,
        enforce_eager=eager,
        max_num_batched_tokens=4096,
        max_num_seqs=96,
        max_model_len=str(longest),
        num_gpu_blocks_override=4000,
    )


def serve(core: EngineCore, longest: int, num_requests: int, seed: int) -> None:
    """Requests of all lengths and kinds that arrive a few at a time."""
    rng = random.Random(seed)
    open_requests = 0
    for number in range(num_requests):
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 5]),
            min_p=rng.choice([0.0, 0.1]),
            presence_penalty=rng.choice([0.0, 0.5]),
            logprobs=rng.choice([None, None, 3]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
            max_tokens=rng.randint(1, 60),
            min_tokens=0,
        )
        length = rng.choice([1, 2, 7, 50, 130, 400, 480, longest // 2, longest - 70])
        prompt = [rng.randrange(3, 1000) for _ in range(length)]
        core.submit(GenerateRequest(id=number, prompt_token_ids=prompt, sampling=sampling))
        open_requests += 1
        for _ in range(rng.randint(0, 4)):
            open_requests -= sum(delta.finish_reason is not None for delta in core.step())
    while core.has_work:
        open_requests -= sum(delta.finish_reason is not None for delta in core.step())
    core.check()
    assert open_requests == 0


@pytest.mark.parametrize(
    ("longest", "quantization", "eager"),
    [(512, None, False), (4096, None, False), (4096, None, True), (4096, "fp8", False)],
)
def test_no_kernel_compiles_in_service(
    longest: int, quantization: str | None, eager: bool, tmp_path: Path, compiled: list[str]
) -> None:
    if quantization == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 arithmetic here")
    core = engine(tmp_path, longest, quantization, eager)
    compiled.clear()
    serve(core, longest, 300, seed=0)
    core.close()
    assert compiled == []


OF_COMPRESSED_ATTENTION = ("_rotate", "_head_store", "_piece", "_compress", "_attention", "_merge", "_scores", "_choose",
                           "_logits", "_sum", "_enter", "_leave")  # fmt: skip


@pytest.mark.parametrize("eager", [False, True])
def test_no_kernel_of_compressed_attention_compiles_in_service(
    eager: bool, tmp_path: Path, compiled: list[str]
) -> None:
    config = {**BASE, **V4, "hidden_size": 256, "vocab_size": 1024, "max_position_embeddings": 2048}
    del config["intermediate_size"]
    core = engine(tmp_path, 2048, None, eager, {**config, "model_type": "deepseek_v4"})
    compiled.clear()
    serve(core, 2048, 150, seed=1)
    core.close()
    assert [name for name in compiled if name.startswith(OF_COMPRESSED_ATTENTION)] == []


def test_the_counter_counts(compiled: list[str]) -> None:
    """A counter that saw nothing here would prove nothing above."""
    from octavo.device.kernels.triton.norm import rms_norm

    size = 1000 + random.SystemRandom().randrange(500)  # a size that no other test has met
    rms_norm(torch.ones(2, size, device="cuda"), torch.ones(size, device="cuda"), 1e-5)
    assert len(compiled) == 1

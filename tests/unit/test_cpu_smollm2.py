"""The demo model on the compiled CPU path against its dequantized weights in float32."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_models import Driver
from cpu_reference import Reference

from octavo.api.text.gguf_tokenizer import build_from_gguf
from octavo.files.resolve import open_model
from octavo.model.describe import describe
from octavo.model.read_arch import read_arch

pytestmark = pytest.mark.model

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a small village by the sea, there lived",
    "1, 2, 4, 8, 16,",
    "Die Hauptstadt von Deutschland ist",
]


def divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """KL(want || got) of rows of logits."""
    logs = []
    for x in (want.astype(np.float64), got.astype(np.float64)):
        x = x - x.max(-1, keepdims=True)
        logs.append(x - np.log(np.exp(x).sum(-1, keepdims=True)))
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)


def agreement(name: str, prompts: list[str], count: int) -> tuple[float, float]:
    """(share of greedy tokens that float32 would choose too, mean KL) over ``count`` tokens of each prompt."""
    files = open_model(name)
    spec = describe(read_arch(files))
    tokenizer = build_from_gguf(files.config).backend
    texts = [tokenizer.encode(prompt).ids for prompt in prompts]
    driver = Driver(spec, files, num_slots=len(texts), max_len=512, threads=2)
    rows = [(slot, 0, len(tokens)) for slot, tokens in enumerate(texts)]
    admits = [driver.admit(slot, tokens) for slot, tokens in enumerate(texts)]
    drawn = [driver.run(rows, admits).tokens]
    logits = [driver.logits(len(texts))]
    for at in range(count - 1):
        drawn.append(driver.run([(slot, len(tokens) + at, 1) for slot, tokens in enumerate(texts)]).tokens)
        logits.append(driver.logits(len(texts)))
    driver.runner.close()
    reference, agreed, kl = Reference(spec, files, np.float32), [], []
    for slot, tokens in enumerate(texts):
        answer = [step[slot][0] for step in drawn]
        want = reference.logits(tokens + answer[:-1])[len(tokens) - 1 :]
        agreed += (want.argmax(-1) == np.array(answer)).tolist()
        kl += divergence(want, np.stack([step[slot] for step in logits])).tolist()
    files.close()
    return float(np.mean(agreed)), float(np.mean(kl))


def test_greedy_agreement_with_float32() -> None:
    """int8 activations and bfloat16 keys move few greedy choices: those between near-equal tokens."""
    agreed, kl = agreement("smollm2:135m", PROMPTS[:3], 24)
    assert agreed >= 0.93
    assert kl < 0.01

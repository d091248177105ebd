"""octavo bench quality: divergence by hand, logits of the engine's own step, a whole run on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from octavo.bench import quality
from octavo.config import EngineOptions


def test_divergence_by_hand() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1]]).log()
    ours = torch.tensor([[0.25, 0.5, 0.25], [0.6, 0.3, 0.1]]).log()
    found = quality.compare(ours, reference)
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.mean == pytest.approx(first / 2) and found.agreement == 0.5
    assert found.high == pytest.approx(first * 0.99)


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokens = [(7 * i) % 120 + 3 for i in range(40)]
    options = EngineOptions.of(
        model=str(tmp_path), device="cpu", cpu_backend="torch", dtype="float32", num_gpu_blocks_override=20
    )
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    found = quality.logits_of(options, tokens)
    assert len(found) >= len(tokens) - 1
    torch.testing.assert_close(found[: len(tokens) - 1], expected[: len(tokens) - 1], atol=1e-4, rtol=1e-4)

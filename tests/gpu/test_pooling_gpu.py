"""Vectors on the GPU equal those of the CPU: a decoder in chunks beside captured graphs, and an encoder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo import host
from octavo.config import EngineOptions
from octavo.protocol.generate import GenerateRequest, Pooling, SamplingParams

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "cls")


def vectors(folder: Path, device: str, dtype: str) -> list[np.ndarray]:
    options = EngineOptions.of(
        model=str(folder),
        device=device,
        dtype=dtype,
        runner="pooling",
        max_num_batched_tokens=64,
        max_num_seqs=16,
        kv_cache_memory_bytes=64 << 20,
    )
    core = host.build_core(options, host.open_files(options))
    generator = np.random.default_rng(3)
    texts = [generator.integers(3, 512, size=n).tolist() for n in (1, 5, 63, 64, 65, 200, 120, 7, 33, 90)]
    for i, ids in enumerate(texts):
        pooling = POOLINGS[i % 3]
        sampling = SamplingParams(max_tokens=1)
        core.submit(GenerateRequest(id=i, prompt_token_ids=ids, sampling=sampling, pooling=pooling))
    found: dict[int, np.ndarray] = {}
    while core.has_work:
        for delta in core.step():
            assert delta.embedding is not None, delta.error
            found[delta.id] = np.frombuffer(delta.embedding, "<f4")
    core.close()
    return [found[i] for i in range(len(texts))]


@pytest.mark.parametrize("family", ["Qwen3", "Bert"])
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.9999), ("bfloat16", 0.995)])
def test_vectors_equal_the_cpus(family: str, dtype: str, least: float, tmp_path: Path) -> None:
    torch.manual_seed(1)
    if family == "Qwen3":
        config = transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=64)
        transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    else:
        transformers.BertModel(transformers.BertConfig(**SHAPE), add_pooling_layer=False).save_pretrained(
            tmp_path
        )
    for ours, reference in zip(vectors(tmp_path, "cuda", dtype), vectors(tmp_path, "cpu", "float32")):
        cosine = ours @ reference / (np.linalg.norm(ours) * np.linalg.norm(reference))
        assert cosine > least

"""Vectors out of real networks through the whole engine: equal to transformers' hidden states within 1e-4, whole or in
chunks, alone or together, with cached prefixes, in the same loop as text that is generated."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.core import EngineCore
from octavo.errors import RequestError, UnsupportedModelError, UsageError
from octavo.files.pooler import read_pooler
from octavo.protocol.generate import GenerateRequest, Pooling, SamplingParams

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
DECODER = {**BASE, "num_key_value_heads": 2, "max_position_embeddings": 256}
ENCODERS = {"Bert": "BertModel", "Roberta": "RobertaModel", "XLMRoberta": "XLMRobertaModel"}
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "cls")


def saved(folder: Path, family: str, **config: Any) -> Any:
    """A tiny random model in ``folder`` and its transformers form without a head."""
    torch.manual_seed(7)
    made = getattr(transformers, f"{family}Config")(**config)
    kind = ENCODERS.get(family, f"{family}ForCausalLM")
    arguments = {"add_pooling_layer": False} if family in ENCODERS else {}
    model = getattr(transformers, kind)(made, **arguments).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder)
    return model if family in ENCODERS else model.model


def core_of(folder: Path, **options: Any) -> EngineCore:
    chosen = EngineOptions.of(model=str(folder), device="cpu", dtype="float32", threads=1, **options)
    return host.build_core(chosen, host.open_files(chosen))


def embedded(core: EngineCore, asked: list[tuple[list[int], Pooling]]) -> list[np.ndarray]:
    """The vectors of texts that are all there at once."""
    one = SamplingParams(max_tokens=1, temperature=0.0)
    for i, (ids, pooling) in enumerate(asked):
        core.submit(GenerateRequest(id=i, prompt_token_ids=ids, sampling=one, pooling=pooling))
    found: dict[int, np.ndarray] = {}
    while core.has_work:
        for delta in core.step():
            assert delta.error is None and delta.finish_reason == "stop" and not delta.tokens
            assert delta.embedding is not None
            found[delta.id] = np.frombuffer(delta.embedding, "<f4")
        core.check()
    return [found[i] for i in range(len(asked))]


def reference(model: Any, ids: list[int], pooling: Pooling) -> np.ndarray:
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0]
    vector = {"last": hidden[-1], "mean": hidden.mean(dim=0), "cls": hidden[0]}[pooling]
    return np.asarray(vector.float().numpy())


def texts(count: int, longest: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 128) for _ in range(rng.randrange(1, longest + 1))] for _ in range(count)]


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family, **BASE, type_vocab_size=2)
    core = core_of(tmp_path, max_num_batched_tokens=48, max_num_seqs=8)
    assert core.info.facts.can_pool and not core.info.facts.can_generate
    longest = core.info.max_model_len
    assert longest == (130 if family == "Bert" else 128)
    asked = [(ids, POOLINGS[i % 3]) for i, ids in enumerate([*texts(20, longest, 1), [5] * longest])]
    for (ids, pooling), vector in zip(asked, embedded(core, asked)):
        np.testing.assert_allclose(vector, reference(model, ids, pooling), atol=1e-4)
    with pytest.raises(RequestError, match="generates no text"):
        core.submit(GenerateRequest(id=1, prompt_token_ids=[5], sampling=SamplingParams()))
    with pytest.raises(RequestError, match="tokens"):
        core.submit(
            GenerateRequest(
                id=1, prompt_token_ids=[5] * (longest + 1), sampling=SamplingParams(), pooling="cls"
            )
        )


@pytest.mark.parametrize(("family", "overlap"), [("Qwen3", False), ("Qwen3", True), ("Gemma2", True)])
def test_decoders(family: str, overlap: bool, tmp_path: Path) -> None:
    extra = {"sliding_window": 16, "head_dim": 16} if family == "Gemma2" else {"head_dim": 16}
    model = saved(tmp_path, family, **DECODER, **extra)
    core = core_of(
        tmp_path, runner="pooling", overlap=overlap, max_num_batched_tokens=24, max_num_seqs=6, block_size=8
    )
    assert not core.info.facts.can_generate
    for round_ in range(2):  # the second time prefixes are cached, which "last" uses and the others must not
        found = texts(12, 100, 3)
        asked = [(ids, POOLINGS[(i + round_) % 3]) for i, ids in enumerate(found)]
        for (ids, pooling), vector in zip(asked, embedded(core, asked)):
            np.testing.assert_allclose(vector, reference(model, ids, pooling), atol=1e-4)
    assert core.stats().prefix_cache_hits > 0


def test_preempted_and_aborted_sequences_leave_no_trace_in_later_vectors(tmp_path: Path) -> None:
    model = saved(tmp_path, "Qwen3", **DECODER, head_dim=16)
    core = core_of(
        tmp_path,
        runner="pooling",
        max_model_len="128",
        max_num_batched_tokens=16,
        max_num_seqs=2,
        num_gpu_blocks_override=20,
        block_size=8,
    )
    one = SamplingParams(max_tokens=1)
    ids = [9] * 100
    core.submit(GenerateRequest(id=99, prompt_token_ids=ids, sampling=one, pooling="mean"))
    core.step()
    core.step()
    core.abort([99])  # in the middle of its prompt
    asked: list[tuple[list[int], Pooling]] = [(text, "mean") for text in texts(4, 60, 5)]
    asked.append(([9] * 100, "last"))
    for (text, pooling), vector in zip(asked, embedded(core, asked)):
        np.testing.assert_allclose(vector, reference(model, text, pooling), atol=1e-4)


def test_text_and_vectors_in_the_same_steps(tmp_path: Path) -> None:
    model = saved(tmp_path, "Qwen3", **DECODER, head_dim=16)
    alone = core_of(tmp_path, cpu_backend="torch", max_num_batched_tokens=24, max_num_seqs=16)
    assert alone.info.facts.can_generate and alone.info.facts.can_pool
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = texts(4, 40, 8)

    def generated(core: EngineCore, vectors: list[list[int]]) -> tuple[list[list[int]], list[np.ndarray]]:
        for i, ids in enumerate(prompts):
            core.submit(GenerateRequest(id=i, prompt_token_ids=ids, sampling=sampling))
        for i, ids in enumerate(vectors, 100):
            core.submit(GenerateRequest(id=i, prompt_token_ids=ids, sampling=sampling, pooling="mean"))
        tokens: list[list[int]] = [[] for _ in prompts]
        found: dict[int, np.ndarray] = {}
        while core.has_work:
            for delta in core.step():
                if delta.embedding is not None:
                    found[delta.id] = np.frombuffer(delta.embedding, "<f4")
                else:
                    tokens[delta.id] += delta.tokens
        return tokens, [found[i] for i in sorted(found)]

    expected, _ = generated(alone, [])
    pooled = texts(5, 60, 9)
    tokens, vectors = generated(
        core_of(tmp_path, cpu_backend="torch", max_num_batched_tokens=24, max_num_seqs=16), pooled
    )
    assert tokens == expected
    for ids, vector in zip(pooled, vectors):
        np.testing.assert_allclose(vector, reference(model, ids, "mean"), atol=1e-4)


def test_the_compiled_kernels_leave_vectors_to_torch(tmp_path: Path) -> None:
    saved(tmp_path, "Qwen3", **{**DECODER, "hidden_size": 256, "intermediate_size": 512}, head_dim=64)
    options = EngineOptions.of(model=str(tmp_path), device="cpu", runner="pooling")
    core = host.build_core(options, host.open_files(options))
    assert core.info.facts.can_pool and core.info.dtype == "float32"


def modules(folder: Path, mode: str, normalize: bool) -> None:
    made = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    made.append({"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"})
    if normalize:
        made.append({"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"})
    (folder / "modules.json").write_text(json.dumps(made))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({mode: True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 60}))


def test_pooling_is_what_the_files_say_unless_the_flag_says_otherwise(tmp_path: Path) -> None:
    saved(tmp_path, "Bert", **BASE, type_vocab_size=2)
    info = core_of(tmp_path).info
    assert (info.facts.pooling, info.facts.normalize, info.max_model_len) == ("cls", True, 130)
    modules(tmp_path, "pooling_mode_mean_tokens", normalize=False)
    info = core_of(tmp_path).info
    assert (info.facts.pooling, info.facts.normalize, info.max_model_len) == ("mean", False, 60)
    info = core_of(tmp_path, pooler_config='{"pooling_type": "LAST", "normalize": true}').info
    assert (info.facts.pooling, info.facts.normalize) == ("last", True)
    modules(tmp_path, "pooling_mode_max_tokens", normalize=False)
    with pytest.raises(UnsupportedModelError, match="pools in a way"):
        read_pooler(tmp_path)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("Bert", {"runner": "generate"}, "encoder"),
        ("Bert", {"pooler_config": "{"}, "--pooler-config"),
        ("Bert", {"pooler_config": '{"pooling_type": "MAX"}'}, "--pooler-config"),
        ("Bert", {"quantization": "fp8"}, "--quantization"),
        ("Qwen3", {"runner": "pooling", "convert": "none"}, "--convert"),
    ],
)
def test_wrong_options(family: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    if family == "Bert":
        saved(tmp_path, family, **BASE, type_vocab_size=2)
    else:
        saved(tmp_path, family, **DECODER, head_dim=16)
    with pytest.raises(UsageError, match=words):
        core_of(tmp_path, **options)

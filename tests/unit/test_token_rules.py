"""``allowed_token_ids`` and ``bad_words`` on both CPU backends, through ``LLM``: masks reach the draw, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.llm import LLM
from octavo.protocol.generate import SamplingParams

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 318,
    "eos_token_id": 319,
}


@pytest.fixture(scope="module", params=["torch", "auto"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    options: dict[str, Any] = {"load_format": "dummy", "num_gpu_blocks_override": 64, "max_num_seqs": 4}
    with LLM(str(folder), cpu_backend=request.param, **options) as made:
        yield made


def tokens(llm: LLM, **sampling: Any) -> list[int]:
    params = SamplingParams(**{"max_tokens": 40, "seed": 5, "ignore_eos": True, **sampling})
    (output,) = llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
    return output.outputs[0].token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens(llm: LLM, temperature: float) -> None:
    found = tokens(llm, temperature=temperature, allowed_token_ids=[65, 66, 200])
    assert len(found) == 40 and set(found) <= {65, 66, 200}


def test_bad_words_are_not_written(llm: LLM) -> None:
    free = tokens(llm, allowed_token_ids=[97, 98], temperature=1.0)
    text = bytes(free).decode()
    word = max(("ab", "ba", "aa", "bb"), key=text.count)
    assert word in text
    found = bytes(tokens(llm, allowed_token_ids=[97, 98], temperature=1.0, bad_words=[word]))
    assert word.encode() not in found and len(found) == 40


def most_repeated(tokens: list[int], size: int) -> int:
    pieces = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return max(map(pieces.count, pieces))


@pytest.mark.parametrize("grammar", [None, {"regex": "[a-z]*"}])
def test_dry_ends_repetitions(llm: LLM, grammar: Any) -> None:
    letters = [*range(97, 123)]
    free = {"temperature": 0.0, "allowed_token_ids": letters, "structured_outputs": grammar}
    assert most_repeated(tokens(llm, **free), 4) > 1
    dry = {"dry_multiplier": 100.0, "dry_base": 4.0, "dry_allowed_length": 3}
    assert most_repeated(tokens(llm, **free, **dry), 4) == 1
    # A breaker hides what stands before it.
    assert tokens(llm, **free, **dry, dry_sequence_breakers=[*"abcdefghijklmnop"]) == tokens(llm, **free)


def test_rules_leave_other_requests_alone(llm: LLM) -> None:
    alone = tokens(llm, temperature=0.7)
    params = [
        SamplingParams(max_tokens=40, seed=5, ignore_eos=True, temperature=0.7, **more)
        for more in ({}, {"allowed_token_ids": [7, 8]}, {"bad_words": ["x"]}, {"dry_multiplier": 9.0})
    ]
    outputs = llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 4, params, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == alone
    assert set(outputs[1].outputs[0].token_ids) <= {7, 8}


def test_choices_share_the_prompt(llm: LLM) -> None:
    """Eight answers to a long prompt: its whole pages are computed once."""
    before = llm.client.core.stats().num_step_tokens  # type: ignore[attr-defined]
    prompt = {"prompt_token_ids": [(i * 13) % 300 for i in range(100)]}
    (output,) = llm.generate(
        prompt, SamplingParams(n=4, max_tokens=2, seed=1, ignore_eos=True), use_tqdm=False
    )
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1
    computed = llm.client.core.stats().num_step_tokens - before  # type: ignore[attr-defined]
    assert computed <= 100 + 3 * (100 - 96) + 4

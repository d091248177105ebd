"""Beam search against transformers on tiny random models: the search alone, and through the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from octavo import host
from octavo.api.beam import Beam, BeamSearch
from octavo.api.frontend import Frontend
from octavo.api.text.byte_tokenizer import build_byte_tokenizer
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer
from octavo.config import EngineOptions
from octavo.errors import RequestError
from octavo.llm import LLM
from octavo.protocol.generate import BeamSearchParams, Logprob

VOCAB, EOS = 300, 257
ENDS = [EOS, *range(5, 300, 25)]  # many, so that answers end at every length


def model(seed: int) -> LlamaForCausalLM:
    """Sharp enough that beams differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        made.lm_head.weight.mul_(12.0)
    return made


def reference(
    made: LlamaForCausalLM, prompt: list[int], params: BeamSearchParams, ends: list[int]
) -> list[tuple[list[int], float]]:
    """What transformers finds: (generated tokens, score)."""
    config = GenerationConfig(
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        do_sample=False,
        early_stopping=False,
        length_penalty=params.length_penalty,
        eos_token_id=None if params.ignore_eos else ends,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = torch.tensor([prompt])
    out: Any = made.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    found = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist()):
        tokens = row[len(prompt) :]
        end = next((i for i, token in enumerate(tokens) if token in ends and not params.ignore_eos), None)
        if end is not None:
            tokens = tokens[: end + 1]
        found.append((tokens, score))
    return found


def likeliest(made: LlamaForCausalLM, prompt: list[int], beam: Beam, count: int) -> list[Logprob]:
    with torch.inference_mode():
        logits = made(torch.tensor([[*prompt, *beam.tokens]])).logits[0, -1]
    top = torch.topk(torch.log_softmax(logits.float(), -1), count)
    return [Logprob(t, v, i + 1) for i, (t, v) in enumerate(zip(top.indices.tolist(), top.values.tolist()))]


def assert_same(mine: Sequence[tuple[list[int], float]], wanted: list[tuple[list[int], float]]) -> None:
    assert len(mine) == len(wanted)
    for (tokens, score), (other, other_score) in zip(mine, wanted):
        assert math.isclose(score, other_score, rel_tol=1e-4, abs_tol=1e-4)
        assert tokens == other


PARAMS = [
    BeamSearchParams(beam_width=width, max_tokens=length, length_penalty=penalty, ignore_eos=ignore)
    for width, length, penalty, ignore in (
        (2, 6, 1.0, False),
        (3, 10, 1.0, False),
        (4, 16, 0.0, False),
        (4, 12, 2.0, False),
        (5, 8, 0.6, True),
    )
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_search_is_that_of_transformers(seed: int, params: BeamSearchParams) -> None:
    made, prompt = model(seed), [(seed * 17 + i * 29) % 256 for i in range(7)]
    search = BeamSearch(params, ENDS, params.max_tokens)
    while search.beams:
        count = search.sampling.logprobs or 0
        search.advance([likeliest(made, prompt, beam, count) for beam in search.beams])
    mine = [(list(beam.tokens), beam.score(params.length_penalty)) for beam in search.answers()]
    assert_same(mine, reference(made, prompt, params, ENDS))


def test_these_models_end_answers_early() -> None:
    """Else the comparison above would say nothing about ends."""
    params, ended = PARAMS[2], 0
    for seed in range(6):
        prompt = [(seed * 17 + i * 29) % 256 for i in range(7)]
        ended += sum(tokens[-1] in ENDS for tokens, _ in reference(model(seed), prompt, params, ENDS))
    assert ended >= 6


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    model(0).save_pretrained(tmp_path)
    tokenizer = Tokenizer(build_byte_tokenizer({"vocab_size": VOCAB, "eos_token_id": EOS}))

    def front(options: EngineOptions, files: Any, client: Any, ahead: Any) -> Frontend:
        return Frontend(client, tokenizer, ChatTemplate(None), model_name="tiny")

    monkeypatch.setattr(host, "build_frontend", front)
    with LLM(
        str(tmp_path), cpu_backend="torch", dtype="float32", num_gpu_blocks_override=64, max_num_seqs=8
    ) as made:
        yield made


def test_through_the_engine(llm: LLM) -> None:
    params = PARAMS[1]
    prompts = [[(k * 31 + i * 29) % 256 for i in range(n)] for k, n in enumerate((7, 40, 18))]
    found = llm.beam_search([{"prompt_token_ids": ids} for ids in prompts], params)
    for prompt, output in zip(prompts, found):
        mine = []
        for beam in output.sequences:
            assert beam.tokens[: len(prompt)] == prompt
            tokens = beam.tokens[len(prompt) :]
            mine.append((tokens, beam.cum_logprob / len(tokens) ** params.length_penalty))
            assert beam.finish_reason == ("stop" if tokens[-1] == EOS else "length")
        assert_same(mine, reference(model(0), prompt, params, [EOS]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 65}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bounds(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **fields})
    assert caught.value.param == param

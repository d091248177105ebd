"""The demo models' greedy tokens equal transformers' (dequantized weights, float32): alone, batched, chunked, after
preemption and with prefix hits. Identical, not close."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo import host
from octavo.config import EngineOptions
from octavo.engine.core import EngineCore
from octavo.files.resolve import pull
from octavo.protocol.control import CheckPool, GetStats
from octavo.protocol.generate import GenerateRequest, SamplingParams

pytestmark = pytest.mark.model

NUM_TOKENS = 64
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a land far away, there lived a fisherman who",
    "Water boils at one hundred degrees. Explain to a child why the pot whistles, step by step, and then",
]
# The ends of sequence, which neither side may draw before its NUM_TOKENS are out.
EOS = {"smollm2:135m": [2], "gemma3:270m": [1, 106]}


@pytest.fixture(scope="module", params=EOS)
def reference(request: pytest.FixtureRequest) -> tuple[str, list[list[int]], list[list[int]]]:
    """(model name, prompts, transformers' greedy continuations)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(pull(request.param))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    core = build(request.param)
    found = run(core, dict(enumerate(prompts)), dict.fromkeys(range(len(prompts)), EOS[request.param]))
    core.close()
    for key, prompt in enumerate(prompts):
        # Tokens are greedy if each is the most likely after those before it: one forward pass shows all of them.
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + found[key]])).logits[0, len(prompt) - 1 : -1]
            logits[:, EOS[request.param]] = float("-inf")
        assert logits.argmax(dim=-1).tolist() == found[key], "greedy, as transformers has it"
    return request.param, prompts, [found[key] for key in range(len(prompts))]


def build(model: str, **options: object) -> EngineCore:
    """An engine on the torch path in float32."""
    chosen = EngineOptions.of(
        **{
            "model": model,
            "dtype": "float32",
            "cpu_backend": "torch",
            "max_model_len": "256",
            "threads": 1,  # two test workers share the cores
            "num_gpu_blocks_override": 400,  # few pages: the pool proves itself after every step
            **options,
        }
    )
    return host.build_core(chosen, host.open_files(chosen))


def run(
    core: EngineCore,
    requests: dict[int, list[int]],
    stops: dict[int, list[int]],
    num_tokens: int = NUM_TOKENS,
) -> dict[int, list[int]]:
    """Submit all at once and step until done."""
    out: dict[int, list[int]] = {key: [] for key in requests}
    for key, prompt in requests.items():
        sampling = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, min_tokens=num_tokens, stop_token_ids=stops.get(key, [])
        )
        core.submit(GenerateRequest(id=key, prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason in (None, "length"), delta
            out[delta.id] += delta.tokens
        core.control(CheckPool())
    return out


def test_greedy_equals_transformers(reference: tuple[str, list[list[int]], list[list[int]]]) -> None:
    model, prompts, answers = reference
    expected = dict(enumerate(answers))
    stops = dict.fromkeys(expected, EOS[model])
    core = build(model)
    try:
        for key, prompt in enumerate(prompts[:2]):
            assert run(core, {key: prompt}, stops) == {key: answers[key]}, "alone"
        before = core.control(GetStats()).prefix_cache_hits
        assert run(core, dict(enumerate(prompts)), stops) == expected, "batched, with prefix hits"
        long = prompts[2] + answers[2][:48]
        hit = run(core, {9: long}, {9: EOS[model]}, num_tokens=16)[9]
        assert hit == answers[2][48:], "a prompt whose prefix is cached"
        assert core.control(GetStats()).prefix_cache_hits > before
    finally:
        core.close()


def test_chunked_and_preempted(reference: tuple[str, list[list[int]], list[list[int]]]) -> None:
    model, prompts, answers = reference
    stops = dict.fromkeys(range(len(prompts)), EOS[model])
    chunked = build(model, max_num_batched_tokens=7, max_num_seqs=4, enable_prefix_caching=False)
    try:
        assert run(chunked, dict(enumerate(prompts)), stops) == dict(enumerate(answers)), "chunks of 7 tokens"
    finally:
        chunked.close()
    layout = chunked.executor.layout
    longest = max(len(prompt) for prompt in prompts) + NUM_TOKENS
    pages = layout.pages_for(longest, 16) * 2 + 2
    tight = build(
        model,
        max_model_len=str(longest + 1),
        num_gpu_blocks_override=pages,
        max_num_seqs=4,
        max_num_batched_tokens=16,
    )
    try:
        assert run(tight, dict(enumerate(prompts)), stops) == dict(enumerate(answers)), "with preemption"
        assert tight.control(GetStats()).num_preemptions > 0
    finally:
        tight.close()

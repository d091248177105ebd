"""The compiled CPU runner against a numpy decoder, for every family, and its exactness under batching."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_models import FAMILIES, Driver, MemoryFiles, random_files, spec_of
from cpu_reference import Reference

from octavo.errors import ModelFileError, UnsupportedModelError, UsageError
from octavo.protocol.plan import CopyPage, GrammarMask, StepPlan, ZeroPage
from octavo.runner.cpu.runner import NOT_FINITE
from octavo.runner.cpu.support import kernels_for, supports


@pytest.fixture
def drive() -> Iterator[Any]:
    """Makes drivers and closes their runners."""
    made: list[Driver] = []

    def make(*args: Any, **options: Any) -> Driver:
        made.append(Driver(*args, **options))
        return made[-1]

    yield make
    for driver in made:
        driver.runner.close()


def prompt(count: int, seed: int = 3, vocab: int = 90) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def close(got: Any, want: Any, tolerance: float) -> None:
    """Largest error, in standard deviations of the reference."""
    assert np.abs(got - want).max() < tolerance * want.std(), (np.abs(got - want).max(), want.std())


@pytest.mark.parametrize("gguf", [False, True], ids=["hf", "gguf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_reference(family: str, gguf: bool, drive: Any) -> None:
    """Prefill and decode in plain float32 weights: only keys, values and probabilities are rounded (bfloat16)."""
    spec = spec_of(family)
    files = random_files(spec, gguf=gguf)
    driver, reference, tokens = drive(spec, files), Reference(spec, files), prompt(50)
    want = reference.logits(tokens)
    driver.run([(0, 0, 40)], [driver.admit(0, tokens)])
    close(driver.logits()[0], want[39], 0.03)
    for at in range(40, 50):
        driver.run([(0, at, 1)])
        close(driver.logits()[0], want[at], 0.03)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("F16", 0.03), ("BF16", 0.03), ("Q8_0", 0.1), ("Q4_0", 0.1), ("Q4_1", 0.1), ("Q5_0", 0.1), ("Q5_1", 0.1),
        ("Q4_K", 0.1), ("Q5_K", 0.1), ("Q6_K", 0.1), (["Q4_K", "Q8_0", "F32", "Q6_K"], 0.1), ("Q2_K", 0.1),
        (["IQ4_XS", "Q3_K", "IQ4_NL"], 0.1),
    ],
    ids=str,
)  # fmt: skip
def test_formats_equal_reference(dtype: Any, tolerance: float, drive: Any) -> None:
    """Every stored type, also mixed within one linear; int8 activations cost a few percent of a logit's spread."""
    spec = spec_of("qwen3", hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=88)
    files = random_files(spec, dtype)
    driver, tokens = drive(spec, files), prompt(24, vocab=88)
    driver.run([(0, 0, 24)], [driver.admit(0, tokens)])
    close(driver.logits()[0], Reference(spec, files).logits(tokens)[-1], tolerance)


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen2_moe", "Q8_0"), ("mixtral", ["Q4_K", "F32", "Q8_0"])], ids=str
)
@pytest.mark.parametrize("gguf", [False, True], ids=["hf", "gguf"])
def test_experts_in_blocks_equal_reference(family: str, dtype: Any, gguf: bool, drive: Any) -> None:
    """Many tokens at once; int8 activations may change a close choice of an expert, so the median row counts."""
    size = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256}
    spec = spec_of(family, **size, shared_expert_intermediate_size=256)
    files = random_files(spec, dtype, gguf=gguf)
    driver, tokens = drive(spec, files, threads=2), prompt(40)
    want = Reference(spec, files).logits(tokens)
    driver.run([(0, 0, 30)], [driver.admit(0, tokens)])
    errors = [np.abs(driver.logits()[0] - want[29]).max()]
    for at in range(30, 40):
        driver.run([(0, at, 1)])
        errors.append(np.abs(driver.logits()[0] - want[at]).max())
    assert np.median(errors) < 0.1 * want.std()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["Q8_0", "F32"])
def test_numbers_do_not_depend_on_the_batch(family: str, dtype: str, drive: Any) -> None:
    """Whole prompt, chunks, token by token, in a batch, on three threads, with other pages: the same bits."""
    spec = spec_of(family)
    files = random_files(spec, dtype)
    tokens, count = prompt(700), 700
    alone = drive(spec, files)
    alone.run([(0, 0, count)], [alone.admit(0, tokens)])
    want = alone.logits()[0]

    chunked = drive(spec, files, threads=3)
    start, rng = 0, np.random.default_rng(5)
    chunked.run([(3, 0, 1)], [chunked.admit(3, prompt(30, 8)), chunked.admit(5, tokens)])
    position = 1
    while start < 690:
        size = int(rng.integers(1, 200))
        size = min(size, 690 - start)
        chunked.run([(3, position, 1), (5, start, size)])
        start, position = start + size, position + 1
    for at in range(690, count):
        chunked.run([(5, at, 1)] if at % 2 else [(5, at, 1), (3, position, 1)])
        position += at % 2 == 0
    assert np.array_equal(chunked.logits()[0], want)

    wide = drive(spec, files, threads=2, page_size=32)
    rows = [(slot, 0, 150 + slot) for slot in range(3)] + [(7, 0, count)]
    wide.run(rows, [wide.admit(slot, prompt(160, slot)) for slot in range(3)] + [wide.admit(7, tokens)])
    assert np.array_equal(wide.logits(4)[3], want)


def test_two_engines_with_more_threads_than_cores(drive: Any) -> None:
    """Eight threads in all, at the same time: the same bits as on one thread alone, and an end."""
    spec = spec_of("llama")
    files, tokens = random_files(spec, "Q8_0"), prompt(60)
    drivers = [drive(spec, files, threads=count) for count in (1, 4, 4)]

    def answer(driver: Driver) -> list[int]:
        drawn = list(driver.run([(0, 0, 60)], [driver.admit(0, tokens)]).tokens[0])
        for at in range(60, 72):
            drawn += driver.run([(0, at, 1)]).tokens[0]
        return drawn

    want = answer(drivers[0])
    with ThreadPoolExecutor(2) as pool:
        assert [found.result(120) for found in [pool.submit(answer, d) for d in drivers[1:]]] == [want, want]
    assert np.array_equal(drivers[1].logits(), drivers[0].logits())


def test_decode_reads_what_was_drawn_and_resumes_after_preemption(drive: Any) -> None:
    spec = spec_of("llama")
    driver = drive(spec, random_files(spec, "Q8_0"))
    tokens = prompt(20)
    drawn = list(driver.run([(0, 0, 20)], [driver.admit(0, tokens)]).tokens[0])
    for at in range(20, 30):
        drawn += driver.run([(0, at, 1)]).tokens[0]
    known = tokens + drawn[:5]
    resumed = driver.run([(4, 0, 25)], [driver.admit(4, known, num_prompt=20)]).tokens[0]
    for at in range(25, 30):
        resumed += driver.run([(4, at, 1)]).tokens[0]
    assert resumed == drawn[5:]


def test_stale_window_pages_and_nan_pages_do_not_matter(drive: Any) -> None:
    """Pages behind the window are reused by others, even by a sequence that turned to NaN."""
    spec = spec_of("mistral")
    files = random_files(spec)
    driver, other, tokens = drive(spec, files), drive(spec, files), prompt(200)
    for d in (driver, other):
        d.run([(0, 0, 150)], [d.admit(0, tokens)])
    page = driver.held[(0, 0)][0]
    driver.runner.pages[page] = 0x7F  # large finite numbers
    for d in (driver, other):
        d.run([(0, 150, 50)])
    assert np.array_equal(driver.logits(), other.logits())


def test_a_row_of_nan_fails_alone(drive: Any) -> None:
    spec = spec_of("llama")
    files = random_files(spec)
    table = files.raw["model.embed_tokens.weight"].view(np.float32).reshape(90, 64)
    table[7] = np.nan
    driver = drive(spec, files)
    result = driver.run([(0, 0, 3), (1, 0, 3)], [driver.admit(0, [1, 7, 2]), driver.admit(1, [1, 3, 2])])
    assert result.errors == {0: NOT_FINITE}
    clean = drive(spec, files)
    assert clean.run([(0, 0, 3)], [clean.admit(0, [1, 3, 2])]).tokens[0] == result.tokens[1]
    # The pages it leaves hold no NaN.
    assert np.isfinite((driver.runner.pages.view(np.uint16).astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}], ids=str)
def test_a_narrow_head_draws_the_same_tokens(sampling: dict[str, Any], drive: Any) -> None:
    """Where the likeliest tokens decide, the two-pass head runs; it never changes what is drawn."""
    spec = spec_of("gemma3_text", vocab_size=700)
    files = random_files(spec, "Q8_0")
    drawn = []
    for logprobs in (None, 0):
        driver = drive(spec, files, threads=2)
        admits = [
            driver.admit(slot, prompt(9 + slot), logprobs=logprobs, slot_seed=slot, **sampling)
            for slot in range(3)
        ]
        tokens = [driver.run([(slot, 0, 9 + slot) for slot in range(3)], admits).tokens]
        for at in range(12):
            tokens.append(driver.run([(slot, 9 + slot + at, 1) for slot in range(3)]).tokens)
        drawn.append(tokens)
        assert np.isinf(driver.logits(3)).any() == (logprobs is None)
    assert drawn[0] == drawn[1]


def test_a_mask_that_comes_after_a_narrow_head_sees_all_logits(drive: Any) -> None:
    spec = spec_of("llama", tie_word_embeddings=True, vocab_size=96)
    driver = drive(spec, random_files(spec, "Q8_0"))
    want = driver.run([(0, 0, 9)], [driver.admit(0, prompt(9))])
    logits = driver.logits()[0]
    allowed = np.argsort(logits)[:40]  # what the likeliest tokens do not include
    bits = np.zeros(96, np.uint8)
    bits[allowed] = 1
    mask = GrammarMask(0, np.packbits(bits, bitorder="little").tobytes())
    got = driver.run([(1, 0, 9)], [driver.admit(1, prompt(9), logprobs=None)], masks=[mask])
    assert got.tokens[0] == [int(allowed[-1])] != want.tokens[0]
    assert driver.runner.masked == {1}
    driver.run([(1, 9, 1)])  # from now on this slot's heads are whole from the start
    assert not np.isinf(driver.logits()).any()


def test_page_operations(drive: Any) -> None:
    spec = spec_of("llama")
    driver = drive(spec, random_files(spec))
    driver.run([(0, 0, 16)], [driver.admit(0, prompt(16))])
    source, target = driver.held[(0, 0)][0], driver.free[0]
    pages = driver.runner.pages
    driver.runner.forward(
        StepPlan(9, [], [], [], [], [], [], [], [CopyPage(source, target), ZeroPage(source)])
    )
    driver.runner.sample([])
    assert driver.runner.collect().tokens == []
    assert pages[target].any()
    assert not pages[source].any()


def test_prompt_logprobs_and_logprobs(drive: Any) -> None:
    spec = spec_of("llama")
    files = random_files(spec)
    driver, tokens = drive(spec, files), prompt(40)
    admit = driver.admit(0, tokens, prompt_logprobs=2, logprobs=3)
    first = driver.run([(0, 0, 23)], [admit], sample=False)
    second = driver.run([(0, 23, 17)])
    found = first.prompt_logprobs[0] + second.prompt_logprobs[0]
    want = Reference(spec, files).logits(tokens)
    want = want - np.log(np.exp(want).sum(-1, keepdims=True))
    assert [entry[0].token_id for entry in found] == tokens[1:]
    for at, entry in enumerate(found):
        assert entry[0].logprob == pytest.approx(want[at, tokens[at + 1]], abs=0.05)
        assert len(entry) == 3
        assert entry[1].rank == 1 and entry[1].logprob >= entry[2].logprob
    answer = second.logprobs[0][0]
    assert len(answer) == 4 and answer[0].token_id == second.tokens[0][0] and answer[0].rank == 1


def test_refusals(drive: Any) -> None:
    spec = spec_of("llama")
    files = random_files(spec)
    assert supports(spec, files) is None
    odd = spec_of("llama", head_dim=24, hidden_size=96)
    assert "head size 24" in str(supports(odd, random_files(odd)))
    narrow = spec_of("llama", hidden_size=48)
    assert "multiple of 32" in str(supports(narrow, random_files(narrow)))
    for changes, words in (
        ({"parallel": True}, "Layer.parallel = True"),
        ({"input_norm": None}, "without its norm"),
    ):
        layers = (replace(spec.layers[0], **changes), *spec.layers[1:])
        assert words in str(supports(replace(spec, layers=layers), files))
    centred = replace(spec, norm=replace(spec.norm, kind="layer"))
    assert "Norm.kind = 'layer'" in str(supports(centred, files))
    with pytest.raises(UnsupportedModelError, match="multiple of 16"):
        drive(spec, files, page_size=8)
    extra = dict.fromkeys(["model.layers.0.self_attn.surprise.weight"], ("F32", (4,), np.zeros(16, np.uint8)))
    known = {n: (i.dtype, i.shape, files.raw[n]) for n, i in files.tensors.items()}
    with pytest.raises(ModelFileError, match="surprise"):
        drive(spec, MemoryFiles({**known, **extra}, "safetensors"))
    missing = {n: t for n, t in known.items() if n != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.up_proj"):
        drive(spec, MemoryFiles(missing, "safetensors"))


@pytest.mark.parametrize("quantization", [None, "Q8_0", "Q4_0"])
def test_quantization_on_load(quantization: str | None, drive: Any) -> None:
    """bfloat16 weights become blocks, and exactly the announced kernels are used."""
    spec = spec_of("gemma3_text")
    files = random_files(spec, "BF16")
    driver, tokens = drive(spec, files, quantization=quantization), prompt(30)
    driver.run([(0, 0, 30)], [driver.admit(0, tokens)])
    want = Reference(spec, files).logits(tokens)[-1]
    close(driver.logits()[0], want, {None: 0.03, "Q8_0": 0.12, "Q4_0": 1.5}[quantization])
    used = set(driver.runner.lowered.kernels) | {"draw", "pack_blocks"}
    assert used == set(kernels_for(spec, files, quantization)) - (set() if quantization else {"linear_zero8"})
    with pytest.raises(UsageError, match="Q4_0"):
        drive(spec, files, quantization="int3")

"""Sampling of the CPU runner against the reference ops, and the rules around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cpu_models import Driver, random_files, spec_of
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.device.kernels.numba.library import KernelLibrary
from octavo.device.ops import sampling as ops
from octavo.engine.cache.layout import CacheLayout
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import GrammarMask, SlotInit
from octavo.runner.cpu.program import aligned
from octavo.runner.cpu.sampling import Row, Sampler, threshold
from octavo.runner.cpu.slots import Slots
from octavo.runner.cpu.threads import Team

LIBRARY = KernelLibrary()


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(2, LIBRARY)
    yield team
    team.close()


class Bench:
    """A sampler over ``num_slots`` slots whose logits the test sets."""

    def __init__(self, team: Team, vocab: int, num_slots: int) -> None:
        self.vocab = vocab
        self.slots = Slots(num_slots, 64, CacheLayout((), 0, 0))
        self.logits = aligned((num_slots, -(-vocab // 16) * 16), np.float32)
        self.sampler = Sampler(self.slots, self.logits, vocab, team, LIBRARY)

    def admit(self, slot: int, tokens: list[int], num_prompt: int, seed: int = 0, **sampling: Any) -> None:
        init = SlotInit(slot, tokens, num_prompt, SamplingParams(**sampling), seed, [3, 5])
        self.slots.admit([init])
        self.sampler.admit([init])

    def draw(
        self, logits: Any, positions: list[int], masks: dict[int, GrammarMask] | None = None
    ) -> list[int]:
        self.logits[: len(logits), : self.vocab] = logits
        rows = [
            Row(i, i, at, (masks or {}).get(i), int(np.argmax(logits[i]))) for i, at in enumerate(positions)
        ]
        return self.sampler.draw(rows)


@pytest.mark.parametrize("vocab", [40, 1000, 40000])
def test_draws_equal_the_reference(team: Team, vocab: int) -> None:
    """The same tokens as the torch op for the same seeds, with every filter, batched or not."""
    rng, count = np.random.default_rng(vocab), 48
    bench = Bench(team, vocab, count)
    logits = (rng.standard_normal((count, vocab)) * 3).astype(np.float32)
    settings = []
    for slot in range(count):
        chosen = {
            "temperature": float(rng.choice([0.0, 0.5, 1.0, 2.0])),
            "top_k": int(rng.choice([0, 1, 7, 100])),
            "top_p": float(rng.choice([1.0, 0.3, 0.95])),
            "min_p": float(rng.choice([0.0, 0.05])),
        }
        settings.append(chosen)
        bench.admit(slot, [1, 2], 2, seed=int(rng.integers(-(2**62), 2**62)), **chosen)
    positions = rng.integers(0, 60, count)
    want = ops.sample(
        torch.from_numpy(logits),
        *(
            torch.tensor([s[name] for s in settings], dtype=kind)
            for name, kind in (
                ("temperature", torch.float32), ("top_k", torch.int32), ("top_p", torch.float32), ("min_p", torch.float32),
            )
        ),
        torch.from_numpy(bench.slots.seeds),
        torch.from_numpy(positions),
    )  # fmt: skip
    assert bench.draw(logits, positions.tolist()) == want.tolist()
    bench.slots.seeds[0] = bench.slots.seeds[7]
    bench.slots.sampling[0] = bench.slots.sampling[7]
    assert bench.draw(logits[7:8], [int(positions[7])]) == [int(want[7])]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 3, 50, 999]), st.sampled_from([1.0, 0.1, 0.9, 0.999]),
       st.sampled_from([0.0, 0.01, 0.5]), st.sampled_from([0.01, 1.0, 30.0]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_threshold_equals_the_sorting_reference(
    seed: int, k: int, p: float, least: float, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(600) * spread).astype(np.float32)
    logits[:40] = logits[40]  # equals stay together
    sampling = SamplingParams(temperature=0.7, top_k=k, top_p=p, min_p=least)
    z = torch.from_numpy(logits / np.float32(0.7)).unsqueeze(0)
    arguments = (torch.tensor([k], dtype=torch.int32), torch.tensor([p]), torch.tensor([least]))
    want = z[0] >= ops._threshold(z, *arguments)[0]
    got = logits / np.float32(0.7) >= np.float32(threshold(logits, sampling))
    # float32 and float64 sums may differ by a token at the edge of the mass
    assert abs(int(got.sum()) - int(want.sum())) <= (1 if p < 1 else 0)


def test_draws_follow_the_distribution(team: Team) -> None:
    bench = Bench(team, 4, 64)
    for slot in range(64):
        bench.admit(slot, [0], 1, seed=slot, temperature=1.0)
    logits = np.log(np.tile([0.5, 0.25, 0.2, 0.05], (64, 1)))
    counts = np.zeros(4)
    for position in range(60):
        counts += np.bincount(bench.draw(logits, [position] * 64), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), [0.5, 0.25, 0.2, 0.05], atol=0.03)


def test_masks_bias_and_min_tokens(team: Team) -> None:
    bench = Bench(team, 40, 3)
    bench.admit(0, [1], 1, temperature=0.0)
    bench.admit(1, [1, 2], 2, temperature=0.0, logit_bias={9: 50.0, 2: -50.0})
    bench.admit(2, [1, 2], 2, temperature=0.0, min_tokens=3)
    logits = np.tile(-np.arange(40.0), (3, 1))
    logits[2, 3], logits[2, 5] = 10, 9  # the stop tokens
    allowed = np.zeros(64, np.uint8)
    allowed[[17, 33]] = 1
    mask = GrammarMask(0, np.packbits(allowed, bitorder="little").tobytes())
    assert bench.draw(logits, [1, 2, 4], {0: mask}) == [17, 9, 0]
    assert bench.draw(logits, [1, 2, 5]) == [0, 9, 3]  # three tokens are out: stop tokens are allowed again


def test_penalties_equal_the_reference(team: Team) -> None:
    bench = Bench(team, 40, 1)
    bench.admit(
        0,
        [4, 4, 7, 9, 9],
        3,
        temperature=0.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
    )
    logits = np.random.default_rng(0).standard_normal((1, 40)).astype(np.float32)
    logits[0, 9] = 3.0
    counts = torch.zeros((1, 40), dtype=torch.int32)
    counts[0, [4, 7]] = ops.IN_PROMPT
    counts[0, 9] = 2
    for position in range(5, 11):
        want = torch.from_numpy(logits.copy())
        ops.penalize(
            want, counts, torch.zeros(1, dtype=torch.int32), *(torch.tensor([x]) for x in (0.5, 0.25, 1.5))
        )
        token = bench.draw(logits, [position])[0]
        np.testing.assert_allclose(bench.logits[0, :40], want[0], rtol=1e-6)
        assert token == int(want.argmax())
        counts[0, token] += 1
    bench.admit(0, [1], 1, temperature=0.0)  # the next sequence in the slot has no penalties
    assert bench.draw(logits, [1]) == [int(logits.argmax())]


def test_a_seeded_request_repeats_in_any_company() -> None:
    spec = spec_of("llama")
    files = random_files(spec, "Q8_0")
    runs = []
    for company in (0, 3):
        driver = Driver(spec, files)
        admits = [driver.admit(0, [5, 6, 7], temperature=1.0, top_p=0.9, slot_seed=42)]
        admits += [driver.admit(s, [s, 9], temperature=1.3, slot_seed=s) for s in range(1, company + 1)]
        rows = [(0, 0, 3), *((s, 0, 2) for s in range(1, company + 1))]
        drawn = [driver.run(rows, admits).tokens[0][0]]
        for at in range(12):
            rows = [(0, 3 + at, 1), *((s, 2 + at, 1) for s in range(1, company + 1))]
            drawn.append(driver.run(rows).tokens[0][0])
        driver.runner.close()
        runs.append(drawn)
    assert runs[0] == runs[1] and len(set(runs[0])) > 3

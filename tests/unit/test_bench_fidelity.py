"""``octavo bench fidelity``: what its figures mean, and that both paths see the same text at every token."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_models import BASE, random_files, spec_of

from octavo import host
from octavo.bench.fidelity import Compiled, Reference, compare, render
from octavo.config import EngineOptions
from octavo.files.resolve import open_model
from octavo.host import compiled_engine
from octavo.host.built import Timeline, quiet
from octavo.model.read_arch import from_hf
from octavo.runner.cpu.runner import CPURunner
from octavo.runner.runner import TorchRunner


class Shifted:
    """Logits that depend on the text alone, plus a constant, plus noise."""

    def __init__(self, shift: float = 0.0, noise: float = 0.0) -> None:
        self.shift, self.noise = shift, noise
        self.seen: list[list[int]] = []

    def logits(self, texts: list[list[int]], done: int) -> list[np.ndarray]:
        self.seen += [list(text) for text in texts]
        found = []
        for text in texts:
            rng = np.random.default_rng(text)
            row = rng.standard_normal(40) * 3 + self.shift
            found.append((row + rng.standard_normal(40) * self.noise).astype(np.float32))
        return found


def test_a_constant_changes_no_probability_and_is_shown_as_an_offset() -> None:
    reference, same, noisy = Shifted(), Shifted(0.5), Shifted(0.0, 2.0)
    verdicts = compare(reference, {"same": same, "noisy": noisy}, [[1, 2], [3]], 5, [7])
    assert reference.seen == same.seen == noisy.seen
    assert [len(text) for text in reference.seen] == [2, 1, 3, 2, 4, 3, 5, 4, 6, 5]
    assert not any(7 in text[2:] for text in reference.seen)
    assert verdicts[0].tokens == 10 and verdicts[0].agreement == 1.0
    assert verdicts[0].mean_kl == pytest.approx(0, abs=1e-9)
    assert verdicts[0].offset == pytest.approx(0.5, abs=1e-6)
    assert verdicts[1].agreement < 1 and verdicts[1].mean_kl > 0.05 and verdicts[1].spread > 1
    assert "100.0%" in render(verdicts)


@pytest.mark.model
def test_both_paths_agree_on_the_demo_model() -> None:
    options = {
        "model": "smollm2:135m",
        "device": "cpu",
        "max_num_seqs": 2,
        "max_model_len": "64",
        "threads": 1,
    }
    files = open_model("smollm2:135m")
    ours = host.build_runner(EngineOptions.of(**options), files).runner
    exact = EngineOptions.of(**options, cpu_backend="torch", dtype="float32")
    reference = host.build_runner(exact, files).runner
    assert isinstance(ours, CPURunner) and isinstance(reference, TorchRunner)
    prompts = [[504, 3575, 282, 4649, 314], [6403, 1980, 253, 655]]
    subjects = {"ours": Compiled(ours, 2, 48)}
    (verdict,) = compare(Reference(reference, 2, 48), subjects, prompts, 8, [2])
    ours.close()
    reference.close()
    assert verdict.agreement >= 0.8 and verdict.mean_kl < 0.02


def test_all_logits_are_compared_although_greedy_tokens_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = spec_of("llama", tie_word_embeddings=True)
    arch = from_hf({"model_type": "llama", **BASE, "tie_word_embeddings": True})
    options = EngineOptions.of(model="tiny", max_model_len="64", num_gpu_blocks_override=8, threads=1)
    built = compiled_engine.build(options, random_files(spec, "Q8_0"), arch, Timeline.start(), quiet)
    assert isinstance(built.runner, CPURunner)
    first = Compiled(built.runner, 2, 32).logits([[1, 2, 3], [4, 5]], 0)
    assert np.isfinite(first).all() and len(first) == 2
    built.runner.close()

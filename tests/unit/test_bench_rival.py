"""``octavo bench compare --rival``: turns, ratios, and what it refuses. llama.cpp itself is not installed here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from octavo.bench import rival
from octavo.bench.compare import main
from octavo.bench.llamacpp import load_library
from octavo.bench.rival import Load, Ours
from octavo.cli import commands
from octavo.cli.flags import Parser
from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import FullKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.errors import UsageError
from octavo.files.gguf import GGUFFile
from octavo.files.gguf_write import StoredTensor, write_gguf
from octavo.host.requantize import requantize
from octavo.model.quantization.gguf_blocks import dequantize_blocks, quantize_blocks


class Scripted:
    """A contestant whose every run takes the next of some seconds."""

    def __init__(self, name: str, log: list[str], seconds: list[float]) -> None:
        self.name, self.log, self.seconds = name, log, seconds

    def prompt(self, tokens: list[int]) -> float:
        self.log.append(f"{self.name} prompt {len(tokens)}")
        return self.seconds.pop(0)

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        self.log.append(f"{self.name} {len(prompts)} x {steps}")
        return self.seconds.pop(0)


def arguments(*words: str) -> argparse.Namespace:
    parser = Parser()
    commands.COMMANDS["bench compare"].add_arguments(parser)
    return parser.parse(list(words))


def test_rounds_alternate_and_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival, "PAUSE_S", 0.0)
    log: list[str] = []
    sides = Scripted("a", log, [9, 1.0, 2.0, 4.0]), Scripted("b", log, [9, 2.0, 2.0, 12.0])
    (row,) = rival.play(sides, [Load("prompt", tokens=24)], 3, 1000)
    assert log == [f"{side} prompt 24" for side in "baabbaab"]
    assert (row.ours, row.theirs) == (12.0, 12.0)
    assert (row.ratio, row.lowest, row.highest) == (2.0, 1.0, 3.0)
    assert "2.00x  1.00-3.00" in rival.render([row])


def test_the_rows_are_a_prompt_one_user_eight_and_peak() -> None:
    rows = rival.loads(arguments("--rival", "llama.cpp", "--peak-concurrency", "32", "--output-len", "40"))
    assert [(row.tokens, row.streams, row.steps) for row in rows] == [
        (512, 0, 0), (0, 1, 40), (0, 8, 40), (0, 32, 10),
    ]  # fmt: skip
    assert [row.num_tokens for row in rows] == [512, 40, 320, 320]


def test_our_side_times_whole_steps_and_leaves_nothing_behind() -> None:
    settings = EngineSettings(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64, vocab_size=50)
    runner = NullRunner(plan_layout({0: FullKV(16, 4)}), num_pages=64, num_slots=4, vocab_size=50)
    core = EngineCore(InlineExecutor(runner), settings)
    ours = Ours(core)
    assert ours.decode([[1] * 16] * 4, 8) > 0
    assert ours.prompt(list(range(40))) > 0
    assert not core.has_work and core.stats().num_running == 0
    core.check()


def test_requantized_files_differ_in_their_coarse_matrices_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix, table, norm = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((32, 64), (10, 64), (64,))
    )
    tensors = {
        "blk.0.a.weight": StoredTensor("Q4_1", (32, 64), quantize_blocks(matrix, "Q4_1").reshape(-1)),
        "token_embd.weight": StoredTensor("Q8_0", (10, 64), quantize_blocks(table, "Q8_0").reshape(-1)),
        "norm.weight": norm,
    }
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama", "tokens": ["a", "b"]}, tensors)
    files = GGUFFile(tmp_path / "m.gguf")
    path = requantize(files, "Q4_0", tmp_path)
    other = GGUFFile(path)
    assert other.config == files.config
    assert {name: info.dtype for name, info in other.tensors.items()} == {
        "blk.0.a.weight": "Q4_0", "token_embd.weight": "Q8_0", "norm.weight": "F32",
    }  # fmt: skip
    assert np.array_equal(other.read("token_embd.weight"), files.read("token_embd.weight"))
    near = dequantize_blocks(other.read("blk.0.a.weight"), "Q4_0").reshape(32, 64)
    assert np.abs(near - matrix).max() < 0.6
    with pytest.raises(UsageError, match="Q4_0"):
        requantize(files, "Q3_K", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rival", "llama.cpp"], "needs a model file"),
        (["http://a", "--rival", "llama.cpp"], "not with a URL"),
        (["http://a"], "1 were named"),
        (["http://a", "http://b", "--rival", "http://c"], "3 were named"),
        (["http://a", "http://b", "--requantize", "Q4_0"], "belong to --rival llama.cpp"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(arguments(*words))


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UsageError, match=r"llama\.cpp cannot be loaded") as caught:
        load_library()
    assert "GGML_NATIVE=ON" in str(caught.value.cure)

"""``octavo bench table``: floors are those of the card's arithmetic, stages run real servers and engines, failures show."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.bench import table, table_check
from octavo.bench.floors import Ceilings, Costs
from octavo.bench.load import TokenIds
from octavo.bench.table_rows import Load, Row, Stage, stages
from octavo.errors import UsageError
from octavo.files.dummy import LLAMA_3_1_8B

H100 = Ceilings(copy=3.028e12, bf16=780e12, fp8=1400e12)
TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
IDS = TokenIds(3, 200)
FLAGS = {"max-model-len": "256", "max-num-seqs": "8", "device": "cpu", "cpu-backend": "torch"}


def test_floors_are_those_of_the_card() -> None:
    costs = Costs.of(LLAMA_3_1_8B)
    assert 2 * (costs.layer_elements + costs.head_elements) == pytest.approx(15.01e9, rel=1e-3)
    assert 1 / costs.step_s(1, 0, H100) == pytest.approx(202, abs=1)
    assert costs.kv_bytes == 131072
    assert 1 / (costs.prefill_s(4096, 0, H100) / 4096) == pytest.approx(52_000, rel=0.05)
    # The measured 618 TFLOP/s of the peer's 41,100 tok/s of prefill, from the same counts.
    flops = 2 * costs.layer_elements + costs.pair_flops * 2048
    assert 41_100 * flops == pytest.approx(618e12, rel=0.03)
    assert Costs.of(LLAMA_3_1_8B, fp8=True).step_s(1, 0, H100) < costs.step_s(1, 0, H100)


def test_no_target_lies_above_its_floor() -> None:
    for stage in stages():
        for row in stage.rows:
            config = table.PRESETS[stage.model]
            floor = table.floor_of(Costs.of(config, stage.quantization == "fp8"), row, H100)
            assert row.peer < floor and row.must < floor, row.name


def test_rows_have_names_of_their_own_and_patterns_choose_them() -> None:
    everything = stages()
    names = [row.name for stage in everything for row in stage.rows]
    assert len(set(names)) == len(names)
    picked = table.chosen(["8b/32", "start/second"], everything)
    assert [[row.name for row in stage.rows] for stage in picked] == [["8b/32"], []]
    assert [stage.start for stage in picked] == [None, ("start/second", 86, 15)]
    with pytest.raises(UsageError, match="matches no row"):
        table.chosen(["8b/33"], everything)


def test_misses_name_what_was_missed() -> None:
    row = stages()[0].rows[4]
    good = table.Result(row, 6000.0, must=row.must, ttft_ms=(250, 900), itl_ms=(8, 70))
    assert good.misses == []
    slow = table.Result(row, 5700.0, must=row.must, ttft_ms=(2000, 3000), itl_ms=(8, 90))
    assert slow.misses == ["5800 tok/s", "TTFT p50 937 ms", "ITL p99 80 ms"]
    start = Row("start/second", Load(0, 0), 86, 15, unit="s")
    assert table.Result(start, 16.0, must=15).misses == ["15 s"]
    assert table.ratio(table.Result(start, 8.6, must=15)) == pytest.approx(10)


def runner(tmp_path: Path, minutes: float = 3) -> tuple[table.Runner, list[str]]:
    lines: list[str] = []
    made = table.Table({"version": "test"})
    return table.Runner(made, table.Clock.of(minutes), 1, IDS, lambda: None), lines


def tiny(tmp_path: Path, kind: Any, rows: tuple[Row, ...], **changes: Any) -> Stage:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY))
    return Stage("tiny", kind, str(folder), rows, flags=FLAGS, **changes)


def test_a_serve_stage_starts_loads_and_stops_a_server(tmp_path: Path) -> None:
    rows = (
        Row("t/2", Load(2, 6, 12, 64), 1.0, 10.0),  # long enough that an answer does not come in one piece
        Row("t/sampled", Load(2, 4, 12, 5, temperature=1.0, top_p=0.9), 1.0, 1.0, share_of=("t/2", 0.5)),
        Row("t/prefix", Load(2, 4, 4, 3, prefix=32), 1.0, 1e9),
    )
    made, lines = runner(tmp_path)
    made.stage(tiny(tmp_path, "serve", rows, start=("start/cold", 100, 60)), tmp_path, lines.append)
    assert made.table.errors == []
    results = {result.row.name: result for result in made.table.results}
    assert list(results) == ["start/cold", "t/2", "t/sampled", "t/prefix"]
    assert all(result.value and result.value > 0 for result in results.values())
    assert results["t/2"].ttft_ms[0] > 0 and results["t/2"].itl_ms[1] > 0
    two = results["t/2"].value
    assert two is not None and results["t/sampled"].must == pytest.approx(0.5 * two)
    assert results["t/prefix"].misses == ["1e+09 tok/s"]
    assert any("MISSED" in line for line in lines)
    json.dumps(made.table.json())


def test_an_offline_stage_reports_every_row(tmp_path: Path) -> None:
    rows = (
        Row("o/decode", Load(4, 4, 8, 6), 1.0, 9.0),
        Row("o/prefill", Load(3, 3, 40, 1), 1.0, 9.0, unit="prompt tok/s"),
        Row("o/requests", Load(3, 3, 8, 4), 1.0, 0.1, unit="req/s"),
    )
    made, lines = runner(tmp_path)
    made.stage(tiny(tmp_path, "offline", rows), tmp_path, lines.append)
    assert made.table.errors == []
    by_name = {result.row.name: result for result in made.table.results}
    decode, prefill, requests = (by_name[f"o/{name}"] for name in ("decode", "prefill", "requests"))
    assert decode.value == pytest.approx(24 / decode.seconds)
    assert prefill.value == pytest.approx(120 / prefill.seconds)
    assert requests.value == pytest.approx(3 / requests.seconds)
    assert "start_s" in made.table.timelines["tiny"]


def test_a_stage_that_breaks_is_an_error_and_its_rows_say_so(tmp_path: Path) -> None:
    made, lines = runner(tmp_path)
    rows = (Row("x/1", Load(1, 1), 1.0, 1.0),)
    bad = Stage("bad", "serve", str(tmp_path / "nothing"), rows)
    made.stage(bad, tmp_path, lines.append)
    assert len(made.table.errors) == 1 and "ended" in made.table.errors[0]
    assert made.table.results[0].value is None and "failed" in lines[0]


def test_rows_that_do_not_fit_in_the_time_are_listed(tmp_path: Path) -> None:
    made, lines = runner(tmp_path, minutes=0.01)
    began = time.monotonic()
    for stage in stages():
        made.stage(stage, tmp_path, lines.append)
    assert time.monotonic() - began < 5
    assert len(lines) == sum(len(stage.rows) for stage in stages())
    assert all("not run (time" in line for line in lines)


def test_proofs_hold_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_check, "PAGES", 512)
    findings = {finding.name: finding for finding in table_check.prove(TINY, 4)}
    assert set(findings) == set(table_check.BOUNDS)
    assert all(finding.holds for finding in findings.values()), findings
    assert 0.001 < findings["reference"].error < 0.05
    assert "transformers" in findings["reference"].note


def test_proofs_see_a_wrong_page_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_check, "PAGES", 512)
    prober = table_check.Prober(table_check.build_runner(TINY), table_check.some_prompts(3, 300))
    right = prober.logits([0, 1, 2])
    assert table_check.error(prober.logits([0, 1, 2], scattered=True), right) == 0.0
    width = prober.runner.slots.tables[0].width
    step = prober._step

    def broken(slots: list[int], starts: list[int], counts: list[int], last: bool) -> torch.Tensor:
        if counts == [1, 1, 1]:  # before the decode step one page of the first row becomes another row's
            prober.runner.slots.flat_tables[0] = prober.runner.slots.flat_tables[width]
        return step(slots, starts, counts, last)

    monkeypatch.setattr(prober, "_step", broken)
    assert table_check.error(prober.logits([0, 1, 2]), right) > 0.05
    assert not table_check.Finding("x", float("nan"), 1.0).holds


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--rows", "8b/1"]) == 2
    assert "no CUDA device" in capsys.readouterr().err

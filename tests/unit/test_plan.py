"""octavo plan: the published sizes, the same arithmetic as the start, sentences that name the cure, and no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import host
from octavo.cli import main
from octavo.config import EngineOptions, Hardware, resolve
from octavo.device.platform.gpus import GIB, GPU, GPUS, find_gpu
from octavo.errors import OutOfMemoryError, UsageError
from octavo.files.dummy import PRESETS, open_dummy
from octavo.files.gguf_write import write_gguf
from octavo.files.resolve import open_model
from octavo.host import compiled_engine, torch_engine
from octavo.host.budget import StartBudget
from octavo.host.built import Timeline, limits_of, quiet
from octavo.host.plan import CONTEXT_BYTES, Planner, graphs_of, layout_of
from octavo.model.footprint import DENSE, FP8, INT4, RECORDING_BYTES, forward_bytes
from octavo.runner import measure
from octavo.runner.sizes import recorded_sizes

GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}


def planner(model: str = "llama-3.1-8b", **options: Any) -> Planner:
    return Planner(EngineOptions.of(model=model, **options), open_dummy(model))


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status = main(["plan", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_table_of_common_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    _, rows = plan(capsys, "--table")
    published = {"7B": (14, 8), "13B": (26, 14), "34B": (68, 36), "70B": (140, 76)}  # GB in FP16 and FP8
    assert [row["size"] for row in rows] == list(published)
    for row in rows:
        fp16, fp8 = published[row["size"]]
        forms = row["forms"]
        assert forms["fp16"]["weight_bytes"] / 1e9 == pytest.approx(fp16, rel=0.04)
        assert fp8 * 0.85 < forms["fp8"]["weight_bytes"] / 1e9 <= fp8
        assert forms["int4"]["weight_bytes"] < 0.65 * forms["fp8"]["weight_bytes"]
    assert [row["forms"]["fp16"]["needs"] for row in rows] == ["L4", "RTX 5090", "H100", "B200"]
    assert main(["plan", "--table"]) == 0
    assert "codellama-34b" in capsys.readouterr().out


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from octavo.cli import main; main(['plan', 'llama-3.1-8b', '--gpu', 'h100']); "
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "H100" in result.stdout and "128.0 KiB a token" in result.stdout


def test_figures_of_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, facts = plan(capsys, "llama-3.1-8b", "--gpu", "h100")
    assert status == 0
    assert facts["parameters"] == 8_030_261_248
    assert facts["cache_groups"] == {"full": {"layers": 32, "bytes_per_token": 131072, "state_bytes": 0}}
    assert facts["sequence_bytes"] == {str(n): n * 131072 for n in (4096, 32768, 131072)}
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3))
    _, facts = plan(capsys, str(tmp_path), "--gpu", "h100")
    token = 2 * 2 * 64 * 2  # keys and values of two heads of 64 in two bytes
    groups = facts["cache_groups"]
    assert groups["window 512"] == {"layers": 10, "bytes_per_token": 10 * token, "state_bytes": 0}
    assert groups["full"] == {"layers": 2, "bytes_per_token": 2 * token, "state_bytes": 0}
    # Beyond its window a layer keeps 512 tokens and what a page rounds up.
    assert facts["sequence_bytes"]["32768"] <= 2 * token * 32768 + 10 * token * (512 + 32)


def test_concurrency_is_pages_over_pages(capsys: pytest.CaptureFixture[str]) -> None:
    _, facts = plan(capsys, "llama-3.1-8b", "--gpu", "h100")
    for case in facts["cases"]:
        for length, count in case["concurrency"].items():
            assert count == case["cache_bytes"] // (int(length) * 131072 // case["tensor_parallel_size"])
    whole = {case["tensor_parallel_size"]: case["weight_bytes"] for case in facts["cases"][:4]}
    assert whole[1] > whole[2] > whole[4] > whole[8] > whole[1] / 8  # embeddings are not split


@pytest.mark.parametrize(
    ("model", "gpu", "options", "sentence"),
    [
        ("qwen3-0.6b", "rtx3060", {}, "It fits on RTX 3060 12GB as it is"),
        ("llama-3.1-8b", "4090", {"max_model_len": "128K"}, "It fits with --max-model-len "),
        ("llama-3.1-8b", "rtx3080", {}, "It fits with --quantization int4 on RTX 3080"),
        ("llama-2-70b", "h100", {}, "It fits with --quantization fp8 on H100"),
        ("llama-2-70b", "a100", {"quantization": "fp8"}, "It fits on H100, with"),
        ("codellama-34b", "l4", {}, "It fits with --quantization int4 on L4"),
        (
            "llama-2-70b",
            "l4",
            {},
            "--quantization int4 --tensor-parallel-size 2 on 2 x L4",
        ),
    ],
)
def test_the_cheapest_change_is_named(model: str, gpu: str, options: dict[str, Any], sentence: str) -> None:
    assert sentence in planner(model, **options).advice(find_gpu(gpu))


def test_the_change_that_is_named_does_fit() -> None:
    card = find_gpu("4090")
    named = re.search(
        r"--max-model-len (\d+) on RTX 4090", planner("llama-3.1-8b", max_model_len="128K").advice(card)
    )
    assert named is not None
    length = int(named[1])
    assert not planner("llama-3.1-8b", max_model_len=str(length)).case(card, DENSE, 1).problem
    longer = str(length + 1000)
    assert f"{longer} tokens" in planner("llama-3.1-8b", max_model_len=longer).case(card, DENSE, 1).problem


def test_cards_without_fp8_say_so() -> None:
    case = planner().case(find_gpu("a10"), FP8, 1)
    assert "no fp8 arithmetic (compute capability 8.6" in case.problem


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3080", "RTX 3080 10GB"),
        ("a100", "A100 40GB"),
        ("A100-80GB", "A100 80GB"),
        ("l40s", "L40S"),
        ("L4", "L4"),
    ],
)
def test_cards_by_any_spelling(name: str, found: str) -> None:
    assert find_gpu(name).name == found


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="not in the table"):
        find_gpu("voodoo")
    assert main(["plan", "llama-3.1-8b", "--gpu-memory-gib", "0"]) == 2
    assert main(["plan"]) == 2
    assert main(["plan", "llama-2-7b", "--max-model-len", "9999"]) == 2
    assert "more than the model's 4096 positions" in capsys.readouterr().err
    assert main(["plan", "llama-2-70b", "--gpu-memory-gib", "4", "--quantization", "fp8"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "It fits on H100" in out


def test_gguf_is_planned_from_its_header(tmp_path: Path) -> None:
    shapes = {"token_embd": (64, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, size in (("attn_q", 32), ("attn_k", 32), ("attn_v", 32), ("attn_output", 32)):
        shapes[f"blk.0.{name}"] = (size, 32)
    shapes |= {"blk.0.ffn_gate": (96, 32), "blk.0.ffn_up": (96, 32), "blk.0.ffn_down": (32, 96)}
    tensors = {f"{name}.weight": np.zeros(shape, np.float16) for name, shape in shapes.items()}
    keys = {
        "block_count": 1, "context_length": 8192, "embedding_length": 32, "feed_forward_length": 96,
        "attention.head_count": 2, "attention.head_count_kv": 2,
    }  # fmt: skip
    metadata = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in keys.items()}}
    write_gguf(tmp_path / "m.gguf", metadata, tensors)
    found = Planner(EngineOptions.of(model="m"), open_model(str(tmp_path / "m.gguf")))
    case = found.case(GPUS[0], found.schemes[0], 1)
    norms = sum(2 * array.nbytes for name, array in tensors.items() if "norm" in name)  # held in float32
    matrices = sum(array.nbytes for name, array in tensors.items() if "norm" not in name)
    assert case.parts is not None and case.parts.weights == norms + matrices


def test_graphs_hold_the_outputs_of_every_recording() -> None:
    found = planner("qwen3-0.6b", max_num_seqs=4, max_num_batched_tokens=128)
    resolved = found.resolved(find_gpu("h100"))
    mixed, decode = recorded_sizes(4, 128)
    assert (mixed, decode) == ([64, 128], [1, 2, 4])
    rows = 4 + 4 + 1 + 2 + 4
    kept = forward_bytes(found.spec, 128, 2) + rows * 1024 * 2 + 5 * RECORDING_BYTES
    assert graphs_of(found.spec, resolved) == kept + measure.SLACK_BYTES


class FakePlatform:
    """A card with so many GiB free."""

    kind = "cuda"

    def __init__(self, free_gib: float) -> None:
        self.free = int(free_gib * GIB)

    def free_bytes(self) -> int:
        return self.free

    def synchronize(self) -> None:
        pass


def start(gpu: GPU, platform: FakePlatform, **options: Any) -> StartBudget:
    chosen = EngineOptions.of(model="llama-3.1-8b", **options)
    found = Planner(chosen, open_dummy("llama-3.1-8b"))
    hardware = Hardware("cuda", gpu.name, gpu.memory_bytes, 8, True)
    resolved = resolve(chosen, hardware, limits_of(found.arch))
    layout = layout_of(found.spec, resolved)
    budget = StartBudget(
        chosen, resolved, found.arch, found.spec, layout, hardware, platform, gpu.capability, found.files
    )  # type: ignore[arg-type]
    budget.require_room()
    return budget


def test_a_start_plans_what_plan_says() -> None:
    gpu = find_gpu("h100")
    platform = FakePlatform(gpu.memory_gib - CONTEXT_BYTES / GIB)
    budget = start(gpu, platform)
    case = planner().case(gpu, DENSE, 1)
    assert budget.parts == case.parts
    assert budget.cache == pytest.approx(case.cache_bytes, rel=1e-3)
    platform.free -= 15 * GIB
    budget.weights_loaded()
    budget.step_measured(GIB)
    assert budget.use["weights"][1] == 15 * GIB and budget.use["step"][1] == GIB


def test_a_start_that_cannot_fit_is_refused_with_the_cure() -> None:
    with pytest.raises(OutOfMemoryError, match=r"14\.96 GiB for its weights") as caught:
        start(find_gpu("rtx3080"), FakePlatform(9.2))
    assert "RTX 3080 10GB has 9.20 GiB of 9.77 GiB free" in str(caught.value)
    assert "It fits with --quantization int4" in str(caught.value)
    with pytest.raises(OutOfMemoryError, match="It fits with --quantization fp8 on H100"):
        start(find_gpu("h100"), FakePlatform(22))  # somebody else has the rest


def test_nothing_is_allocated_before_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise RuntimeError("allocated")

    monkeypatch.setattr(torch_engine, "Network", forbidden)
    monkeypatch.setattr("octavo.device.platform.cpu.CPUPlatform.free_bytes", lambda self: 1 << 30)
    options = EngineOptions.of(model="qwen3-0.6b", load_format="dummy", device="cpu")
    with pytest.raises(OutOfMemoryError, match=r"2\.22 GiB for its weights, but .* has 1\.00 GiB"):
        host.build_core(options, host.open_files(options))


def test_the_compiled_backend_refuses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, {"a": np.zeros(1 << 20, np.float32)})
    monkeypatch.setattr(compiled_engine, "available_bytes", lambda: (1 << 20, 1 << 30))
    files, arch = open_model(str(tmp_path / "m.gguf")), planner().arch
    with pytest.raises(OutOfMemoryError, match=r"for its weights, but .* are free"):
        compiled_engine.build(EngineOptions.of(model="m"), files, arch, Timeline.start(), quiet)


def test_every_preset_has_a_plan() -> None:
    for name in PRESETS:
        assert not planner(name).case(GPUS[-1], INT4, 1).problem

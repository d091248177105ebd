"""Several GPUs of one machine: ranks answer like one device, sums are exact, a dead rank is no hang."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("distributed", "models")]

from ranks import options, run_ranks, whole
from service import add_tokenizer, kill_a_rank, serve_prompts
from test_parity import ROWS, oracle

from octavo.files.resolve import open_model
from octavo.host import torch_engine
from octavo.llm import LLM
from octavo.model.blocks import MoE
from octavo.model.describe import describe
from octavo.model.read_arch import read_arch
from octavo.protocol.generate import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

FAMILIES = list({ROWS[name][0]: name for name in reversed(ROWS)}.values())
PARTS = 3
STAGED = ("llama", "gemma2", "gpt2", "qwen3_moe", "smollm3")


@pytest.fixture(autouse=True)
def only_what_is_met_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole warm-up of each of many tiny models would take minutes."""
    monkeypatch.setattr(torch_engine, "warm", lambda runner, max_model_len: 0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A tiny random checkpoint of a family, made when it is first asked for."""

    @cache
    def make(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        oracle(name, folder)
        add_tokenizer(folder)
        return str(folder)

    return make


@cache
def one_device(model: str) -> list[list[int]]:
    """What a single GPU answers."""
    return whole(model, device="cuda")


def is_sparse(path: str) -> bool:
    return any(isinstance(layer.mlp, MoE) for layer in describe(read_arch(open_model(path))).layers)


def check(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Both ranks' tokens, recorded graphs included, are those of one device; every job that differs is named."""
    wrong = []
    for job, *found in zip(jobs, *run_ranks(folder, jobs, timeout_s=280), strict=True):
        wanted = one_device(job["model"])
        if any(answer != wanted for answer in found):
            wrong.append(f"{job}: {found}, not {wanted}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(290)
@pytest.mark.parametrize("part", range(PARTS))
def test_tensor_parallel_families(part: int, checkpoints: Callable[[str], str], tmp_path: Path) -> None:
    shared = {"device": "cuda", "tensor_parallel_size": 2}
    paths = [checkpoints(name) for name in FAMILIES[part::PARTS]]
    jobs: list[dict[str, Any]] = [{"model": path, **shared} for path in paths]
    jobs += [{"model": path, **shared, "enable_expert_parallel": True} for path in paths if is_sparse(path)]
    if part == 0:
        jobs.append({"model": checkpoints("llama"), **shared, "enforce_eager": True})
        jobs.append({"model": checkpoints("llama"), **shared, "disable_custom_all_reduce": True})
    check(jobs, tmp_path)


@pytest.mark.timeout(290)
def test_pipeline_parallel_families(checkpoints: Callable[[str], str], tmp_path: Path) -> None:
    jobs = [{"model": checkpoints(name), "device": "cuda", "pipeline_parallel_size": 2} for name in STAGED]
    check(jobs, tmp_path)


@pytest.mark.timeout(200)
def test_copies_of_a_model(checkpoints: Callable[[str], str]) -> None:
    prompts = [[3 + id] * (5 + 8 * id) for id in range(4)]
    one, two = (
        serve_prompts(options(checkpoints("llama"), device="cuda", data_parallel_size=count), prompts)
        for count in (1, 2)
    )
    assert one == two


@pytest.mark.timeout(200)
def test_a_killed_rank_and_a_restart(checkpoints: Callable[[str], str]) -> None:
    chosen = options(checkpoints("llama"), device="cuda", tensor_parallel_size=2)
    kill_a_rank(chosen, 1)
    kill_a_rank(chosen, 0)  # the start works again each time
    two = whole(checkpoints("llama"), device="cuda", tensor_parallel_size=2)
    assert two == one_device(checkpoints("llama"))


def test_too_many_ranks_are_refused(checkpoints: Callable[[str], str]) -> None:
    count = torch.cuda.device_count()
    size = 2 * count
    flags = {"tensor_parallel_size": min(size, 4), "pipeline_parallel_size": 3}
    with pytest.raises(Exception, match=f"but {count} are visible"):
        whole(checkpoints("llama"), device="cuda", **flags)


def test_sums_by_both_ways(tmp_path: Path) -> None:
    """The benchmark runs, and the one-shot kernel has proved its sums before it is used (``make_reduce``)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "octavo.bench.collectives", "--output", str(tmp_path / "sums.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sums.json").is_file()


@pytest.mark.timeout(200)
def test_bfloat16_stays_as_near_to_float32_as_one_device(tmp_path: Path) -> None:
    """At the width of an 8B model: what two ranks add to the error of bfloat16 is below half of it."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=3, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[1] ** -0.5)
        model.lm_head.weight.mul_(3.0)  # sharp enough to be a language model's
    model.save_pretrained(tmp_path)
    add_tokenizer(tmp_path, 1024)
    del model
    torch.cuda.empty_cache()
    prompts = torch.randint(3, 1024, (6, 200), generator=torch.Generator().manual_seed(1)).tolist()
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    found = []
    for extra in (
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "tensor_parallel_size": 2},
    ):
        chosen = options(
            str(tmp_path),
            device="cuda",
            max_num_batched_tokens=512,
            max_model_len="400",
            enforce_eager=True,
            **extra,
        )
        with LLM(chosen) as llm:
            outputs = llm.generate(prompts, asked, use_tqdm=False)
        values = [
            step[token].logprob
            for output in outputs
            for token, step in zip(
                output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True
            )
            if step is not None
        ]
        found.append(torch.tensor(values, dtype=torch.float64))
    exact, one, two = found
    one_error, two_error = ((each - exact).pow(2).mean().sqrt().item() for each in (one, two))
    print(f"rms error of log probabilities: one device {one_error:.4f}, two ranks {two_error:.4f}")
    assert len(exact) == 6 * 199
    assert 0 < two_error < 1.5 * one_error

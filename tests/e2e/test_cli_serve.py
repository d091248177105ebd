"""The commands as a user starts them: a model with random weights, served, loaded, talked to and stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.cli import main

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
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
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 318,
    "eos_token_id": 319,
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
ENGINE = (
    "--load-format",
    "dummy",
    "--cpu-backend",
    "torch",
    "--max-num-seqs",
    "16",
    "--num-gpu-blocks-override",
    "400",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "octavo", "serve", model, *ENGINE, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if process.stdout is None:
            raise RuntimeError("no standard output")
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if not found:
            process.kill()
            pytest.fail(f"no URL in {line!r}; {process.communicate()[1][-2000:]}")
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def test_load_from_many_clients(
    server: tuple[subprocess.Popen[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [
        "--num-prompts",
        "64",
        "--max-concurrency",
        "32",
        "--random-input-len",
        "48",
        "--random-output-len",
        "12",
    ]
    ids = ["--first-token-id", "3", "--num-token-ids", "300", "--ignore-eos", "--disable-tqdm"]
    out = ["--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    assert main(["bench", "serve", "--base-url", server[1], *items, *ids, *out]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["failed"]) == (64, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (64 * 48, 64 * 12)
    assert result["output_lens"] == [12] * 64
    assert "Successful requests:                     64" in capsys.readouterr().out


def test_chat_and_complete_with_the_server(
    server: tuple[subprocess.Popen[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    items = ["--url", server[1], "--max-tokens", "5", "--temperature", "0", "--verbose"]
    assert main(["chat", *items, "-q", "hello"]) == 0
    assert main(["complete", *items, "-q", "hello"]) == 0
    captured = capsys.readouterr()
    # Random weights: the same five tokens for the same prompt, with and without the template that adds nothing.
    first, second = captured.err.splitlines()
    assert first.startswith("5 prompt tokens")
    assert second.startswith("5 prompt tokens")
    assert "5 tokens in" in first or "finish: stop" in first


def test_a_refused_request_is_one_sentence(
    server: tuple[subprocess.Popen[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["complete", "--url", server[1], "-q", "x" * 600]) == 1
    error = capsys.readouterr().err
    assert "answered 400" in error
    assert "512" in error
    assert error.count("\n") == 1


def test_port_in_use_is_a_usage_error(server: tuple[subprocess.Popen[str], str], model: str) -> None:
    port = server[1].rsplit(":", 1)[1]
    command = [sys.executable, "-m", "octavo", "serve", model, *ENGINE, "--port", port]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("octavo: ")
    assert port in result.stderr
    assert "Traceback" not in result.stderr


def test_run_with_piped_input(model: str) -> None:
    command = [
        sys.executable,
        "-m",
        "octavo",
        "run",
        model,
        *ENGINE,
        "--max-tokens",
        "4",
        "--verbose",
        "--raw",
    ]
    result = subprocess.run(
        [*command, "Say"], input="this", check=False, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "9 prompt tokens" in result.stderr  # "Say", an empty line, "this": one token a byte
    assert result.stdout.endswith("\n")


def test_offline_bench_and_doctor(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.json"
    load = ["--input-len", "16", "--output-len", "4", "--first-token-id", "3", "--num-token-ids", "300"]
    assert (
        main(["bench", "offline", model, *ENGINE, *load, "--num-prompts", "6", "--output-json", str(out)])
        == 0
    )
    assert json.loads(out.read_text())["total_num_tokens"] == 6 * 20
    latency = ["--mode", "latency", "--batch-size", "3", "--num-iters", "2", "--num-iters-warmup", "1"]
    assert main(["bench", "offline", model, *ENGINE, *load, *latency, "--output-json", str(out)]) == 0
    assert len(json.loads(out.read_text())["latencies"]) == 2
    assert main(["doctor", model, *ENGINE, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.split("Output tokens/s", 1)[1].split("\n", 1)[1])
    assert report["model"]["generates"].startswith("4 tokens")
    assert report["model"]["architecture"] == "llama"
    assert report["device"]["cores"] >= 1


def test_a_signal_ends_the_server_cleanly(server: tuple[subprocess.Popen[str], str]) -> None:
    process = server[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_ctrl_c_ends_the_loading(model: str) -> None:
    command = [sys.executable, "-m", "octavo", "serve", model, *ENGINE, "--port", "0"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        while not (
            found := children.read_text().split()
        ):  # the engine's process, which will import torch for seconds
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, output) == (130, "")
    assert "Traceback" not in errors
    for _ in range(500):  # nobody waits for a process whose parent has gone; it ends by itself
        if not Path(f"/proc/{found[0]}").exists():
            break
        time.sleep(0.02)
    assert not Path(f"/proc/{found[0]}").exists()

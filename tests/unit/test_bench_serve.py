"""``octavo bench serve`` and ``bench compare`` against a scripted server: counts are exact."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from bench_server import BenchServer, Script

from octavo.bench import arguments, compare, serve
from octavo.bench.client import Answer
from octavo.bench.load import Sample
from octavo.cli import main
from octavo.errors import OctavoError, UsageError


def flags(*items: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_serve_arguments(parser)
    return parser.parse_args(["--disable-tqdm", *items])


def test_the_reference_load_is_sent_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    """Closed loop of N streaming clients, token-id prompts all distinct, ignore_eos, 512 in / 128 out, greedy."""
    with BenchServer(Script(hold=6, hold_after=1)) as server:
        result = serve.execute(
            flags(
                *("--base-url", server.url, "--num-prompts", "24", "--max-concurrency", "6", "--ignore-eos"),
                *("--random-input-len", "512", "--random-output-len", "128"),
                *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"),
            )
        )
    bodies = server.seen.bodies[1:]  # the first is the trial request
    assert len(bodies) == 24
    assert len({tuple(body["prompt"][:16]) for body in server.seen.bodies}) == 25
    for body in bodies:
        assert len(body["prompt"]) == 512
        assert body["max_tokens"] == 128
        assert body["temperature"] == 0.0
        assert body["ignore_eos"] is True
        assert body["stream"] is True
        assert body["model"] == "served-model"
    assert server.seen.most_open == 6
    assert (result["completed"], result["failed"]) == (24, 0)
    assert result["total_input_tokens"] == 24 * 512
    assert result["total_output_tokens"] == 24 * 128
    assert result["max_concurrent_requests"] == 6
    assert result["output_throughput"] == pytest.approx(24 * 128 / result["duration"])
    assert result["p50_itl_ms"] == result["median_itl_ms"]
    assert "Successful requests:                     24" in capsys.readouterr().out


def test_result_file_has_vllms_keys(tmp_path: Path) -> None:
    with BenchServer() as server:
        serve.execute(
            flags(
                *(
                    "--base-url",
                    server.url,
                    "--num-prompts",
                    "3",
                    "--random-output-len",
                    "4",
                    "--save-detailed",
                ),
                *("--result-dir", str(tmp_path), "--result-filename", "r.json", "--metadata", "gpu=H100"),
                *("--num-warmups", "2", "--label", "mine", "--random-input-len", "9"),
            )
        )
        assert len(server.seen.bodies) == 5
    result = json.loads((tmp_path / "r.json").read_text())
    for name in ("ttft", "tpot", "itl"):
        for statistic in ("mean", "median", "std", "p99"):
            assert isinstance(result[f"{statistic}_{name}_ms"], float)
    expected = {
        "num_prompts": 3,
        "completed": 3,
        "failed": 0,
        "total_input_tokens": 27,
        "total_output_tokens": 12,
        "request_rate": "inf",
        "max_concurrency": None,
        "backend": "openai",
        "model_id": "served-model",
        "label": "mine",
        "gpu": "H100",
        "output_lens": [4, 4, 4],
        "input_lens": [9, 9, 9],
        "errors": ["", "", ""],
    }
    assert {key: result[key] for key in expected} == expected
    assert [len(gaps) for gaps in result["itls"]] == [3, 3, 3]
    for key in (
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
        "duration",
        "date",
        "ttfts",
    ):
        assert key in result


def test_the_file_is_written_even_when_nobody_reads_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with BenchServer() as server:
        items = ("--base-url", server.url, "--num-prompts", "2", "--random-output-len", "2", "--save-result")
        with pytest.raises(BrokenPipeError):
            serve.execute(flags(*items, "--result-dir", str(tmp_path), "--result-filename", "r.json"))
    assert json.loads((tmp_path / "r.json").read_text())["completed"] == 2


def test_chat_endpoint_gets_messages() -> None:
    with BenchServer(Script(slice_bytes=11)) as server:
        result = serve.execute(
            flags(
                *("--base-url", server.url, "--num-prompts", "2", "--backend", "openai-chat", "--model", "m"),
                *(
                    "--random-input-len",
                    "5",
                    "--random-output-len",
                    "3",
                    "--temperature",
                    "0.7",
                    "--top-p",
                    "0.9",
                ),
                *("--extra-body", '{"min_tokens": 3}', "--api-key", "secret", "--header", "X-Team=a"),
            )
        )
    body = server.seen.bodies[-1]
    assert body["messages"][0]["role"] == "user"
    assert len(body["messages"][0]["content"].split()) == 5
    assert (body["max_completion_tokens"], body["min_tokens"]) == (3, 3)
    assert (body["model"], body["temperature"], body["top_p"]) == ("m", 0.7, 0.9)
    assert "Authorization: Bearer secret" in server.seen.headers[-1]
    assert "X-Team: a" in server.seen.headers[-1]
    assert server.seen.headers[-1].startswith("POST /v1/chat/completions ")
    assert result["total_output_tokens"] == 6


def test_failed_requests_are_counted_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with BenchServer(Script(fail_prompts_below=40)) as server:
        args = flags(
            *("--base-url", server.url, "--num-prompts", "20", "--random-input-len", "40", "--seed", "5"),
            *("--random-output-len", "2", "--random-range-ratio", "0.5", "--first-token-id", "3"),
        )
        trial = serve.samples_of(args, 1, args.seed + 1)[0]
        expected = sum(sample.prompt_len < 40 for sample in serve.samples_of(args, 20, args.seed))
        assert trial.prompt_len >= 40
        assert 0 < expected < 20
        assert serve.main(args) == 1
    captured = capsys.readouterr()
    assert f"Failed requests:                         {expected}" in captured.out
    assert f"{expected} failed: HTTP 400" in captured.err


def test_a_wrong_server_is_one_error_before_the_load() -> None:
    with BenchServer(Script(status=404, error="no such model")) as server:
        with pytest.raises(OctavoError, match=r"trial request .* failed: HTTP 404.*no such model"):
            serve.execute(flags("--base-url", server.url, "--num-prompts", "50"))
        assert len(server.seen.bodies) == 1
    with pytest.raises(OctavoError, match="Cannot list the models"):
        serve.execute(flags("--base-url", "http://127.0.0.1:9"))


def test_open_loop_sends_at_the_planned_times(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = serve.asyncio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(serve.asyncio, "sleep", note)
    samples = [Sample([5], 1, 1)] * 8
    with BenchServer() as server:
        target = serve.Target(server.url, model="m")
        traffic = serve.Traffic(request_rate=0.01, burstiness=1.0, seed=3)
        run = serve.run_loop(serve.send_all(target, samples, traffic))
    planned = serve.arrival_times(8, 0.01, 1.0, 3)
    assert [answer.success for answer in run.answers] == [True] * 8
    # The scripted sleep returns at once, so each wait is (almost) the whole planned time.
    assert waits == pytest.approx(planned, abs=5.0)
    assert planned[-1] == pytest.approx(800.0)


@pytest.mark.parametrize(
    "items",
    [
        ("--backend", "grpc"),
        ("--model", "m", "--num-prompts", "0"),
        ("--model", "m", "--extra-body", "[]"),
        ("--model", "m", "--header", "novalue"),
        ("--model", "m", "--dataset-name", "sharegpt"),
        ("--metric-percentiles", "x"),
    ],
)
def test_bad_flags_are_usage_errors(items: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        serve.execute(flags(*items))


def test_through_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "hello", "output_tokens": 2}\n')
    with BenchServer() as server:
        host, port = server.url.removeprefix("http://").split(":")
        items = ["bench", "serve", "--host", host, "--port", port, "--dataset-name", "custom"]
        assert main([*items, "--dataset-path", str(path), "--num_prompts", "4"]) == 0
        assert [body["prompt"] for body in server.seen.bodies] == ["hello"] * 5
    assert "Total generated tokens:                  8" in capsys.readouterr().out


def compare_flags(*items: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_compare_arguments(parser)
    return parser.parse_args(list(items))


def test_compare_takes_turns_and_divides() -> None:
    order: list[tuple[str, int, tuple[int, ...]]] = []

    def once(target: serve.Target, samples: list[Sample], traffic: serve.Traffic, warmups: Any) -> serve.Run:
        order.append((target.base_url, len(samples), tuple(samples[0].prompt)))  # type: ignore[arg-type]
        seconds = 1.0 if target.base_url == "a" else 2.0 + 0.5 * (len(order) > 6)
        answers = [Answer(0.0, True, "", 0.1, 0.2, [0.1], sample.output_len, 1) for sample in samples]
        return serve.Run(answers, seconds, 0.0)

    args = compare_flags("a", "b", "--rounds", "2", "--peak-concurrency", "16", "--requests-per-client", "2")
    targets = [serve.Target("a"), serve.Target("b")]
    rounds = compare.compare(targets, ["a", "b"], args, once)
    assert [name for name, _, _ in order] == ["a", "b", "b", "a"] * 3
    assert [count for _, count, _ in order] == [2] * 4 + [16] * 4 + [32] * 4
    # Both servers get the same prompts in a round, and no prompt comes twice on one server.
    assert [order[i][2] for i in range(0, 12, 2)] == [order[i][2] for i in range(1, 12, 2)]
    assert len({prompt for _, _, prompt in order}) == 6
    table = compare.rows(rounds, ["a", "b"], 16)
    assert [row.name for row in table] == ["1 user", "8 users", "peak (16 users)"]
    assert [row.ratio for row in table] == pytest.approx([2.0, 2.25, 2.5])
    assert (table[1].lowest, table[1].highest) == pytest.approx((2.0, 2.5))
    assert table[0].throughput == pytest.approx((256.0, 128.0))
    assert "2.00x" in compare.render(table, ["a", "b"])


def test_compare_two_real_servers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    with BenchServer() as one, BenchServer() as two:
        items = [
            "--rounds",
            "1",
            "--peak-concurrency",
            "9",
            "--requests-per-client",
            "1",
            "--output-len",
            "3",
        ]
        assert main(["bench", "compare", one.url, two.url, *items, "--output-json", str(out)]) == 0
        # Rows of 1, 8 and 9 clients, each after as many warm-ups.
        assert [len(server.seen.bodies) for server in (one, two)] == [36, 36]
        assert one.seen.bodies[-1]["ignore_eos"] is True
    assert "8 users" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["rounds"]) == 6


def test_compare_refuses_failures() -> None:
    with BenchServer(Script(hang_up_after=1)) as bad:
        target = serve.Target(bad.url, model="m")
        with pytest.raises(OctavoError, match=r"2 requests to .* failed: connection closed"):
            compare.measured(target, [Sample([1], 1, 3)] * 2, serve.Traffic(), [])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU times from /proc")
def test_the_front_is_measured_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "front", "--streams", "4", "--answer", "12", "--rounds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 4 * 2 * 12
    assert found["server_us_per_token"] >= 0 and found["client_us_per_token"] > 0

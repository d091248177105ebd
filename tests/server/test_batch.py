"""``run-batch``: every line gets an answer or an error, once, whatever kills the run."""

from __future__ import annotations

import asyncio
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from server_fake import FakeEngine, make_app, says

from octavo.api.server.batch import Batch, Progress, finished_ids
from octavo.api.server.local import call
from octavo.errors import UsageError
from octavo.protocol.control import ModelFacts


def line(id: str, **changes: Any) -> str:
    body = {"model": "fake", "prompt": id, "max_tokens": 4}
    return json.dumps({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body, **changes})


def run(
    path: Path, concurrency: int = 4, engine: FakeEngine | None = None
) -> tuple[Progress, dict[Any, Any]]:
    app = make_app(engine or FakeEngine(rule=says("abcdef", step=1)))
    batch = Batch(path / "in.jsonl", path / "out.jsonl", concurrency)
    progress = asyncio.run(batch.run(partial(call, app), lambda progress: None))
    return progress, read(path)


def read(path: Path) -> dict[Any, Any]:
    made = [json.loads(text) for text in (path / "out.jsonl").read_text().splitlines()]
    assert len({one["id"] for one in made}) == len(made)
    return {one["custom_id"]: one for one in made}


def test_every_line_is_answered(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    lines = [line(f"r{i}") for i in range(20)]
    lines += [
        line("chat", url="/v1/chat/completions", body=chat),
        "",
        line("tokens", url="/tokenize", body={"prompt": "ab"}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    progress, found = run(tmp_path)
    assert (progress.total, progress.answered, progress.failed, progress.skipped) == (22, 22, 0, 0)
    first = found["r3"]["response"]
    assert first["status_code"] == 200 and first["body"]["choices"][0]["text"] == "abcd"
    assert found["r3"]["error"] is None and found["r3"]["id"].startswith("batch_req_")
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["content"] == "abc"
    assert found["tokens"]["response"]["body"]["count"] == 2


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_no_more_at_a_time_than_allowed(tmp_path: Path, concurrency: int) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(line(f"r{i}") for i in range(20)))
    engine, most = FakeEngine(rule=says("abcdef", step=1)), 0
    step = engine.step

    def watch() -> None:
        nonlocal most
        most = max(most, len(engine.running))
        step()

    engine.step = watch  # type: ignore[method-assign]
    run(tmp_path, concurrency, engine)
    assert most == min(concurrency, 20)


def test_wrong_lines_are_errors_of_their_own(tmp_path: Path) -> None:
    lines = [
        "{",
        line("ok"),
        line("ok"),
        line("get", method="GET"),
        line("stream", body={"prompt": "x", "stream": True}),
        line("nowhere", url="/v1/nowhere"),
        line("bad", body={"prompt": "x", "n": 0}),
        line("model", body={"prompt": "x", "model": "other"}),
        json.dumps({"custom_id": "", "url": "/v1/completions", "body": {}}),
        json.dumps([1]),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    progress, found = run(tmp_path)
    assert progress.answered == 1 and progress.failed == len(lines) - 1
    assert "POST" in found["get"]["error"]["message"] and "Line 4" in found["get"]["error"]["message"]
    assert "stream" in found["stream"]["error"]["message"]
    assert found["nowhere"]["response"]["status_code"] == 404
    assert found["bad"]["response"]["status_code"] == 400
    assert found["bad"]["response"]["body"]["error"]["param"] == "n"
    assert found["model"]["response"]["status_code"] == 404
    texts = (tmp_path / "out.jsonl").read_text()
    assert "Line 1:" in texts and "Line 3: custom_id 'ok' is there twice" in texts


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_goes_on(tmp_path: Path, seed: int) -> None:
    """Kill after a random number of answers, cut the file at a random byte of its last line, go on."""
    rng = random.Random(seed)
    ids = [f"r{i}" for i in range(30)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(line, ids)))
    out = tmp_path / "out.jsonl"
    answered: list[str] = []
    for _ in range(3):
        app = make_app(FakeEngine(rule=says("abcdef", step=1)))
        batch, stop_after = Batch(tmp_path / "in.jsonl", out, 4), rng.randint(1, 8)

        async def killed(batch: Batch = batch, app: Any = app, stop_after: int = stop_after) -> None:
            def tell(progress: Progress) -> None:
                if progress.answered >= stop_after:
                    raise KeyboardInterrupt

            await batch.run(partial(call, app), tell)

        with pytest.raises(KeyboardInterrupt):
            asyncio.run(killed())
        if rng.random() < 0.7:
            data = out.read_bytes()
            last = data.rstrip(b"\n").rfind(b"\n") + 1
            out.write_bytes(data[: rng.randint(last, len(data) - 1)])
        before = out.read_bytes()
        answered = sorted(finished_ids(out))
        assert before.startswith(out.read_bytes())
    progress, found = run(tmp_path)
    assert progress.skipped == len(answered) and progress.skipped + progress.answered == 30
    assert sorted(found) == sorted(ids)
    assert all(one["response"]["status_code"] == 200 for one in found.values())
    again, _ = run(tmp_path)
    assert again.skipped == 30 and again.answered == 0


def test_a_foreign_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(line("a"))
    (tmp_path / "out.jsonl").write_text("my diary\n")
    with pytest.raises(UsageError, match="line 1"):
        run(tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "my diary\n"


def test_a_missing_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--input-file"):
        run(tmp_path)


def test_embeddings_in_a_batch(tmp_path: Path) -> None:
    lines = [line(f"e{i}", url="/v1/embeddings", body={"input": f"text {i}"}) for i in range(5)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    facts = ModelFacts(can_generate=False, can_pool=True, pooling="mean", normalize=True, hidden_size=8)
    progress, found = run(tmp_path, engine=FakeEngine(facts=facts))
    assert progress.answered == 5, found
    assert len(found["e3"]["response"]["body"]["data"][0]["embedding"]) > 1

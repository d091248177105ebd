"""``octavo run-batch`` as a user starts it: killed in the middle, started again, every request answered once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli_serve import CONFIG, ENGINE, TEMPLATE

COUNT = 30


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    body = {"prompt": "abc", "max_tokens": 10, "ignore_eos": True}
    lines = [
        json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body})
        for i in range(COUNT)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    return [
        sys.executable,
        "-m",
        "octavo",
        "run-batch",
        str(folder),
        *files,
        *ENGINE,
        "--max-concurrent",
        "2",
    ]


def test_killed_and_started_again(tmp_path: Path, command: list[str]) -> None:
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not out.exists() or out.read_bytes().count(b"\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = out.read_bytes().count(b"\n")
    assert 3 <= before < COUNT
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{COUNT - before} answered, 0 with errors, {before} were there before" in done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(one["custom_id"] for one in found) == sorted(f"r{i}" for i in range(COUNT))
    assert all(one["response"]["body"]["usage"]["completion_tokens"] == 10 for one in found)
    assert done.stdout == ""


def test_one_file_for_both_is_refused(tmp_path: Path, command: list[str]) -> None:
    command[command.index("-o") + 1] = str(tmp_path / "in.jsonl")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and "same file" in done.stderr

"""The command line: flags from the options, help without torch, one sentence for every error."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from octavo.api.server.options import ServerOptions
from octavo.cli import COMMANDS, chat, dispatch, main, overview, remote, run, talk
from octavo.cli.flags import Parser, add_engine_options, add_options, collect, collect_engine
from octavo.cli.progress import Reporter
from octavo.config import EngineOptions
from octavo.errors import ModelNotFoundError, OctavoError, UsageError
from octavo.protocol.control import EngineInfo

HEAVY = (
    "torch",
    "numpy",
    "numba",
    "starlette",
    "uvicorn",
    "tokenizers",
    "rich",
    "zmq",
    "jinja2",
    "transformers",
)


def python(*items: str, stdin: int | None = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *items], check=False, capture_output=True, text=True, stdin=stdin, timeout=60
    )


def engine_flags(*items: str) -> EngineOptions:
    parser = Parser(prog="test", allow_abbrev=False)
    add_engine_options(parser)
    return collect_engine(parser.parse(items))


def test_every_help_loads_nothing_heavy() -> None:
    """All --help texts in one process: no module of the list may be loaded by then."""
    own = [name for name, command in COMMANDS.items() if not command.passes_rest]
    code = (
        "import sys\nfrom octavo.cli import main\n"
        f"for name in {own!r} + ['']:\n"
        "    if main([*name.split(), '--help']): sys.exit('failed: ' + name)\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    for name in own:
        assert f"usage: octavo {name}" in result.stdout


def test_import_cost_is_a_handful_of_modules() -> None:
    """The number of modules is what makes --help fast; it does not depend on the machine."""
    result = python("-X", "importtime", "-c", "from octavo.cli import main; main(['serve', '--help'])")
    assert result.returncode == 0
    assert result.stderr.count("import time:") < 260
    assert not re.search(r"\|\s+(torch|numpy)\n", result.stderr)


def test_flags_are_the_option_fields() -> None:
    parser = Parser(prog="test")
    add_engine_options(parser)
    add_options(parser, ServerOptions, "server")
    help_text = parser.format_help()
    for group in [*EngineOptions.groups().values(), ServerOptions]:
        for name in typing.get_type_hints(group):
            assert f"--{name.replace('_', '-')}" in help_text


def test_defaults_live_in_the_dataclasses() -> None:
    assert engine_flags() == EngineOptions()
    parser = Parser(prog="test")
    add_options(parser, ServerOptions)
    assert collect(parser.parse([]), ServerOptions) == ServerOptions()


def test_values_have_the_types_of_their_fields() -> None:
    options = engine_flags(
        *("--model", "m", "--max-model-len", "8k", "--gpu-memory-utilization", "0.5", "--max-num-seqs", "7"),
        *("--no-enable-prefix-caching", "--enforce-eager", "--overlap", "--dtype", "bfloat16"),
        *("-tp", "4", "-pp", "2", "-dp", "3", "--enable-expert-parallel"),
    )
    parallel = options.parallel
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.ranks) == (4, 2, 8)
    assert parallel.data_parallel_size == 3 and parallel.enable_expert_parallel
    assert options.model.model == "m"
    assert options.model.max_model_len == "8k"
    assert options.cache.gpu_memory_utilization == 0.5
    assert options.scheduler.max_num_seqs == 7
    assert options.cache.enable_prefix_caching is False
    assert options.device.enforce_eager is True
    assert options.scheduler.overlap is True
    assert options.model.dtype == "bfloat16"


def test_underscores_and_repeated_flags() -> None:
    assert engine_flags("--max_num_seqs=3", "--model", "a_b").scheduler.max_num_seqs == 3
    assert engine_flags("--model", "a_b").model.model == "a_b"
    parser = Parser(prog="test")
    add_options(parser, ServerOptions)
    args = parser.parse(["--api-key", "one", "--api-key", "two"])
    assert collect(args, ServerOptions).api_key == ("one", "two")


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["serve", "--max-modl-len", "8"], 2, "Unknown flag --max-modl-len. Did you mean --max-model-len?"),
        (["serve", "--port", "x"], 2, "invalid int value: 'x'"),
        (["serve", "--dtype", "int3"], 2, "invalid choice: 'int3'"),
        (["serve", "--trust-remote-code"], 2, "never runs code from a model repository"),
        (["serve", "a", "b"], 2, "Unexpected argument 'b'"),
        (["serve", "a", "--model", "b"], 2, "Two models were named"),
        (["srve"], 2, "Did you mean octavo serve?"),
        (["bench", "srve"], 2, "Did you mean octavo bench serve?"),
        (["pull"], 2, "No model was named"),
        (["chat"], 2, "No model was named"),
        (["chat", "m", "--url", "http://127.0.0.1:9"], 2, "Give one of them"),
        (["chat", "--url", "ftp://x"], 2, "not an http address"),
        (["chat", "--url", "http://127.0.0.1:9", "-q", "x"], 1, "Cannot reach http://127.0.0.1:9"),
        (["bench", "offline"], 2, "No model was named"),
        (["pull", "smollm2:134m"], 1, "Did you mean smollm2:135m"),
    ],
)
def test_errors_are_one_sentence(
    argv: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("octavo: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "no-such-model", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_bugs_and_interrupts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> None:
        def fail(arguments: list[str]) -> int:
            raise error

        monkeypatch.setattr("octavo.cli.dispatch", fail)

    raising(KeyboardInterrupt())
    assert main(["serve"]) == 130
    raising(ZeroDivisionError("oops"))
    assert main(["serve"]) == 1
    assert "internal error: ZeroDivisionError: oops (a bug; --debug shows where)" in capsys.readouterr().err
    raising(ModelNotFoundError("No model.", "Try another."))
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "octavo: No model. Try another.\n"


def test_overview_version_and_nested_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["--version"]) == 0
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^octavo \d+\.\d+\.\d+$", out, re.MULTILINE)
    assert "bench compare" in overview("bench ")
    assert "  chat" not in overview("bench ")
    assert set(COMMANDS) >= {
        "serve",
        "run",
        "chat",
        "complete",
        "pull",
        "doctor",
        "bench serve",
        "bench step",
    }


def test_module_entry_points() -> None:
    for module in ("octavo", "octavo.entrypoints.openai.api_server"):
        result = python("-m", module, "--help")
        assert result.returncode == 0, result.stderr
        assert "usage: octavo" in result.stdout
    result = python("-m", "octavo.entrypoints.openai.api_server", "--model", "no-such-model", "--port", "0")
    assert result.returncode == 1
    assert "No model 'no-such-model'" in result.stderr


def test_closed_output_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "octavo", "pull", "--list"],
        check=False,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writer)
    assert b"Traceback" not in process.stderr
    assert b"Exception" not in process.stderr


class Scripted:
    """A ``talk.Source`` that answers with the words it is given and remembers what it was asked."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.asked: list[Any] = []
        self.closed = False

    def chat(self, messages: Any, answer: talk.Answer) -> Any:
        return self._say([dict(message) for message in messages], answer)

    def complete(self, prompt: str, answer: talk.Answer) -> Any:
        return self._say(prompt, answer)

    def _say(self, asked: Any, answer: talk.Answer) -> Any:
        self.asked.append(asked)
        for word in self.words:
            if word == "^C":
                raise KeyboardInterrupt
            if word == "fail":
                raise OctavoError("It broke.")
            answer.num_tokens += 1
            yield word
        answer.finish_reason = "stop"

    def close(self) -> None:
        self.closed = True


def use(monkeypatch: pytest.MonkeyPatch, source: Scripted) -> None:
    for module in ("run", "chat", "complete"):
        monkeypatch.setattr(f"octavo.cli.{module}.open_source", lambda args: source)


def test_run_asks_through_the_template(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Scripted("Hel", "", "lo")
    use(monkeypatch, source)
    monkeypatch.setattr(run, "read_piped", lambda: "from a pipe")
    assert main(["run", "m", "Say", "hello", "--system-prompt", "Be brief.", "--verbose"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello\n"
    assert "3 tokens" in captured.err
    assert "finish: stop" in captured.err
    assert source.asked == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello\n\nfrom a pipe"}]
    ]
    assert source.closed
    assert main(["run", "m", "--raw", "once"]) == 0
    assert source.asked[-1] == "once\n\nfrom a pipe"


def test_run_interrupted_keeps_what_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Scripted("half", "^C")
    use(monkeypatch, source)
    assert main(["run", "m", "x"]) == 130
    assert capsys.readouterr().out == "half\n"
    assert source.closed


def test_run_reads_a_pipe_but_not_dev_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text(" text \n")
    with path.open() as handle:
        monkeypatch.setattr(sys, "stdin", handle)
        assert run.read_piped() == "text"
    with open(os.devnull) as handle:
        monkeypatch.setattr(sys, "stdin", handle)
        assert run.read_piped() == ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("no descriptor"))
    assert run.read_piped() == ""


def test_run_without_a_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "read_piped", lambda: "")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["run", "m"]) == 2
    assert "There is no prompt" in capsys.readouterr().err


def test_chat_keeps_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Scripted("answer")
    use(monkeypatch, source)
    lines = "one\n\n/help\n/nonsense\ntwo\n/clear\nthree\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", "m", "--system-prompt", "S"]) == 0
    system = {"role": "system", "content": "S"}
    ask = [{"role": "user", "content": text} for text in ("one", "two", "three")]
    reply = {"role": "assistant", "content": "answer"}
    assert source.asked == [[system, ask[0]], [system, ask[0], reply, ask[1]], [system, ask[2]]]
    out = capsys.readouterr().out
    assert out.count("answer\n") == 3
    assert "Unknown command /nonsense." in out
    assert "Ctrl-C stops an answer." in out


def test_chat_survives_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = Scripted("fail")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert chat.converse(source, None, False) == 0
    assert capsys.readouterr().err == "octavo: It broke.\n" * 2
    assert source.asked == [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]


def test_complete_line_by_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = Scripted("x")
    use(monkeypatch, source)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\nb\n"))
    assert main(["complete", "m"]) == 0
    assert main(["complete", "m", "-q", "c"]) == 0
    assert source.asked == ["a", "b", "c"]
    assert capsys.readouterr().out == "x\n" * 3


def test_talking_to_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    from bench_server import BenchServer, Script

    with BenchServer(Script(slice_bytes=5)) as server:
        items = ["--url", f"{server.url}/v1", "--max-tokens", "3", "--temperature", "0.5", "--api-key", "k"]
        assert main(["chat", *items, "-q", "hi", "--verbose"]) == 0
        body = server.seen.bodies[-1]
        assert body["messages"] == [{"role": "user", "content": "hi"}]
        assert (body["model"], body["temperature"], body["stream"]) == ("served-model", 0.5, True)
        assert "Authorization: Bearer k" in server.seen.headers[-1]
        assert main(["complete", *items, "-q", "hi", "--model-name", "other"]) == 0
        assert (server.seen.bodies[-1]["prompt"], server.seen.bodies[-1]["model"]) == ("hi", "other")
    captured = capsys.readouterr()
    assert captured.out == "t0 ét1 ét2 é\n" * 2
    assert "7 prompt tokens" in captured.err
    assert "finish: length" in captured.err


def test_a_servers_refusal_is_shown() -> None:
    from bench_server import BenchServer, Script

    with BenchServer(Script(status=401, error="The key is wrong.")) as server:
        source = talk.RemoteSource(remote.RemoteServer(server.url), "m", {})
        with pytest.raises(OctavoError, match="answered 401: The key is wrong"):
            list(source.complete("x", talk.Answer()))


def test_talking_to_a_server_loads_no_torch() -> None:
    code = (
        "import sys\nfrom octavo.cli import main\nmain(['chat', '--url', 'http://127.0.0.1:9', '-q', 'x'])\n"
        "sys.exit('loaded' if 'torch' in sys.modules or 'numpy' in sys.modules else 0)"
    )
    assert python("-c", code).returncode == 0


def test_progress_draws_on_terminals_and_lists_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, log = Terminal(), io.StringIO()
    for stream in (screen, log):
        reporter = Reporter(stream)
        reporter("download", 0, 98_000_000)
        reporter("download", 98_000_000, 98_000_000)
        reporter("verify", 0, 0)
        reporter.close()
    assert log.getvalue() == "download ...\nverify ...\n"
    assert "100%  98.0 / 98.0 MB" in screen.getvalue()
    assert screen.getvalue().endswith("\n")
    quiet = io.StringIO()
    Reporter(quiet, quiet=True)("download", 0, 1)
    assert quiet.getvalue() == ""


def test_timing_line() -> None:
    answer = talk.Answer("x", 10, 21, "stop", 0.5, 2.5)
    line = talk.timing(answer, 1.25)
    assert line == (
        "ready in 1.25 s; 10 prompt tokens, first text after 0.500 s; 21 tokens in 2.50 s (10.0 tokens/s); finish: stop"
    )


def test_serve_prints_its_timeline() -> None:
    from octavo.cli.serving import timeline

    info = EngineInfo(
        model="m",
        architecture="llama",
        vocab_size=10,
        max_model_len=8192,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        page_size=16,
        num_pages=100,
        dtype="float32",
        device="cpu",
        timeline_s={"weights": 1.0, "cache": 0.25},
    )
    text = timeline(info, 2.0)
    assert "Ready in 2.00 s: weights 1.00 s, cache 0.25 s, rest 0.75 s." in text
    assert "context 8192, 100 pages of 16 tokens" in text


def test_parser_leaves_argparse_types_alone() -> None:
    parser = Parser(prog="p")
    parser.add_argument("word", nargs="*")
    parser.short_usage()
    assert parser.usage == "p [WORD ...] [flags]"
    assert isinstance(parser, argparse.ArgumentParser)
    with pytest.raises(UsageError, match="See p --help"):
        parser.parse(["--nope-at-all"])
    with pytest.raises(UsageError):
        dispatch(["nothing-like-it"])

"""The commands: name, help, arguments, and where the work is. Importing this loads nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from octavo.api.server.options import ServerOptions
from octavo.bench import arguments as bench
from octavo.cli.flags import Parser, add_engine_options, add_options


@dataclass(frozen=True)
class Command:
    """One command; ``target`` is ``module:function``, imported when it runs, called with the parsed arguments."""

    help: str
    target: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    passes_rest: bool = False  # the target parses its own arguments


def _model(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "model_tag",
        metavar="MODEL",
        nargs=None if required else "?",
        help="Catalogue name (smollm2:135m), folder, GGUF file or hub id.",
    )


def _sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (defaults: the model's own)")
    group.add_argument("--temperature", type=float, help="0 always takes the most likely token.")
    group.add_argument("--top-p", type=float, help="Smallest set of tokens with this probability in all.")
    group.add_argument("--top-k", type=int, help="The k most likely tokens only.")
    group.add_argument("--min-p", type=float, help="Tokens at least this likely relative to the best.")
    group.add_argument("--repetition-penalty", type=float, help="Above 1 discourages tokens already seen.")
    group.add_argument("--presence-penalty", type=float, help="Above 0 discourages tokens already written.")
    group.add_argument("--frequency-penalty", type=float, help="The same, by how often.")
    group.add_argument("--max-tokens", type=int, help="Longest answer in tokens (default: what fits).")
    group.add_argument("--stop", action="append", help="Text that ends the answer; repeat for several.")


def _remote(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running server")
    group.add_argument("--url", help="Talk to this server (like http://127.0.0.1:8000/v1), load no model.")
    group.add_argument("--model-name", help="Model to ask that server for (default: the first it lists).")
    group.add_argument("--api-key", help="Its key.")


def _serve(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    add_options(parser, ServerOptions, "server")
    add_engine_options(parser)


def _run(parser: argparse.ArgumentParser) -> None:
    _model(parser, required=True)
    parser.add_argument(
        "prompt", nargs="*", default=[], help="What to ask; piped input is added. Without any: chat."
    )
    parser.add_argument("--system-prompt", help="Instruction before the conversation.")
    parser.add_argument("--raw", action="store_true", help="Continue the text as it is: no chat template.")
    parser.add_argument("--verbose", action="store_true", help="Print timings to standard error.")
    _sampling(parser)
    add_engine_options(parser, skip=("model",))


def _chat(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--system-prompt", help="Instruction before the conversation.")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="Send one message, print the answer, leave.")
    parser.add_argument("--verbose", action="store_true", help="Print timings to standard error.")
    _remote(parser)
    _sampling(parser)
    add_engine_options(parser, skip=("model",))


def _complete(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("-q", "--quick", metavar="TEXT", help="Complete this text, print it, leave.")
    parser.add_argument("--verbose", action="store_true", help="Print timings to standard error.")
    _remote(parser)
    _sampling(parser)
    add_engine_options(parser, skip=("model",))


def _pull(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--list", action="store_true", help="List the catalogue.")
    parser.add_argument("--revision", help="Hub revision (branch, tag or commit).")
    parser.add_argument("--download-dir", metavar="FOLDER", help="Where to keep it.")


def _run_batch(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="Requests, one a line.")
    parser.add_argument(
        "-o", "--output-file", required=True, metavar="FILE", help="Answers; what is there already is kept."
    )
    parser.add_argument("--max-concurrent", type=int, default=256, help="Requests under way at a time.")
    add_engine_options(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--gpu",
        action="append",
        metavar="NAME",
        help="Card to plan for, like h100 or rtx4090; repeat for several.",
    )
    group.add_argument(
        "--gpu-memory-gib", type=float, metavar="GIB", help="A card with that much memory instead."
    )
    group.add_argument(
        "--table", action="store_true", help="Common model sizes and the card that each needs."
    )
    group.add_argument("--json", action="store_true", help="Machine-readable output.")
    add_engine_options(parser, skip=("model",))


def _doctor(parser: argparse.ArgumentParser) -> None:
    _examine(parser)
    parser.add_argument(
        "--measure",
        action="store_true",
        help="Time kernels of other packages (FlashAttention 3) beside ours on this GPU, and use those that are right and "
        "faster from the next start on.",
    )


def _examine(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--json", action="store_true", help="Machine-readable output.")
    add_engine_options(parser, skip=("model",))


def _bench_offline(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    bench.add_offline_arguments(parser)
    bench.add_load_arguments(parser)
    add_engine_options(parser, skip=("seed",))


def _bench_soak(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    bench.add_soak_arguments(parser)
    add_engine_options(parser, skip=("model",))


def _bench_cpu(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    bench.add_cpu_arguments(parser)
    add_engine_options(parser)


def _bench_fidelity(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    bench.add_fidelity_arguments(parser)
    add_engine_options(parser)


def _nothing(parser: argparse.ArgumentParser) -> None:
    """The target has its own parser."""


COMMANDS = {
    "serve": Command("Serve a model over HTTP (OpenAI's API).", "octavo.cli.serve:run", _serve),
    "run": Command("Ask a model one thing; the answer streams to the terminal.", "octavo.cli.run:run", _run),
    "chat": Command("Converse with a model or with a running server.", "octavo.cli.chat:run", _chat),
    "complete": Command(
        "Continue text with a model or a running server.", "octavo.cli.complete:run", _complete
    ),
    "run-batch": Command(
        "Answer a file of requests (OpenAI's batch format); resumes where it was stopped.",
        "octavo.cli.run_batch:run",
        _run_batch,
    ),
    "pull": Command("Fetch a model into the cache.", "octavo.cli.pull:run", _pull),
    "plan": Command("Will it fit? Memory and concurrency before a download.", "octavo.cli.plan:run", _plan),
    "doctor": Command("Show device, versions, caches and chosen kernels.", "octavo.cli.doctor:run", _doctor),
    "doctor model": Command(
        "Check a model's files, names, template and tool format.", "octavo.cli.doctor_model:run", _examine
    ),
    "bench serve": Command(
        "Load a running server and measure it.", "octavo.bench.serve:main", bench.add_serve_arguments
    ),
    "bench offline": Command(
        "Throughput or latency of a model in this process.", "octavo.cli.bench:offline", _bench_offline
    ),
    "bench soak": Command(
        "Minutes of unlike requests in a cache that is too small; watches memory and pages.",
        "octavo.cli.soak:run",
        _bench_soak,
    ),
    "bench step": Command(
        "Cost of scheduling alone, without a model.", "octavo.bench.step:main", _nothing, passes_rest=True
    ),
    "bench quality": Command(
        "How far quantization moves a model's predictions.",
        "octavo.bench.quality:main",
        _nothing,
        passes_rest=True,
    ),
    "bench fairness": Command(
        "A quiet tenant beside a flood, by queue policy, on a simulated clock.",
        "octavo.bench.fairness:main",
        _nothing,
        passes_rest=True,
    ),
    "bench front": Command(
        "CPU time of the API side a token, without a model.",
        "octavo.bench.front:main",
        _nothing,
        passes_rest=True,
    ),
    "bench gpu": Command(
        "What the runner reaches on this GPU, beside its ceilings.",
        "octavo.bench.gpu:main",
        _nothing,
        passes_rest=True,
    ),
    "bench cpu": Command(
        "Where the time of the compiled CPU path goes, kernel by kernel.", "octavo.cli.bench:cpu", _bench_cpu
    ),
    "bench fidelity": Command(
        "How near the compiled CPU path is to float32.", "octavo.cli.bench:fidelity", _bench_fidelity
    ),
    "bench table": Command(
        "Proofs and every row of the one-GPU table, beside the peer's.",
        "octavo.bench.table:main",
        _nothing,
        passes_rest=True,
    ),
    "bench compare": Command(
        "Two running servers on the same load, in turns.",
        "octavo.bench.compare:main",
        bench.add_compare_arguments,
    ),
}


def parser_of(name: str) -> Parser:
    """The parser of a command that does not parse its own arguments."""
    command = COMMANDS[name]
    parser = Parser(prog=f"octavo {name}", description=command.help, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    command.add_arguments(parser)
    parser.short_usage()
    return parser

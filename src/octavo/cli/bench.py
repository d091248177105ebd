"""``octavo bench offline``: loads the model, then measures (``bench/offline.py``)."""

from __future__ import annotations

import argparse
from importlib import import_module

from octavo.bench import offline as bench
from octavo.cli.flags import engine_options
from octavo.cli.progress import Reporter
from octavo.errors import UsageError
from octavo.llm import LLM


def offline(args: argparse.Namespace) -> int:
    """Measure throughput or latency of a model in this process."""
    if not (args.model_tag or getattr(args, "model", None)):
        raise UsageError("No model was named.", "Name one, like smollm2:135m.")
    reporter = Reporter()
    try:
        llm = LLM(engine_options(args), progress=reporter)
    finally:
        reporter.close()
    with llm:
        return bench.run(args, llm)


def cpu(args: argparse.Namespace) -> int:
    """Time every kernel of the compiled CPU path in its steps."""
    return _measure("octavo.bench.cpu_kernels", args)


def fidelity(args: argparse.Namespace) -> int:
    """Compare the compiled CPU path with float32."""
    return _measure("octavo.bench.fidelity", args)


def _measure(module: str, args: argparse.Namespace) -> int:
    if not (args.model_tag or getattr(args, "model", None)):
        raise UsageError("No model was named.", "Name one, like smollm2:135m.")
    args.device = "cpu"
    result: int = import_module(module).main(args, engine_options(args))
    return result

"""``octavo run-batch``: a file of requests through the routes of the server, without a server."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from functools import partial
from pathlib import Path

from octavo import host
from octavo.api.server.app import build_app
from octavo.api.server.batch import Batch, Progress
from octavo.api.server.local import call
from octavo.api.server.options import ServerSettings
from octavo.cli.flags import engine_options
from octavo.cli.progress import Reporter
from octavo.config import EngineOptions
from octavo.errors import EngineDeadError, UsageError

INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    """Answer every line; the exit status is 0 when all lines have an answer or an error, 1 when the engine died."""
    options = engine_options(args)
    if args.max_concurrent < 1:
        raise UsageError(f"--max-concurrent must be at least 1, got {args.max_concurrent}.")
    source, target = Path(args.input_file), Path(args.output_file)
    if source.exists() and target.exists() and source.samefile(target):
        raise UsageError("--input-file and --output-file are the same file.", "Choose another output.")
    batch = Batch(source, target, args.max_concurrent)
    began = time.perf_counter()
    reporter = Reporter()
    try:
        progress = asyncio.run(_answer(batch, options, reporter))
    except KeyboardInterrupt:
        print(
            f"Stopped at {batch.progress.done} of {batch.progress.total}; the same command goes on.",
            file=sys.stderr,
        )
        return INTERRUPTED
    finally:
        reporter.close()
    seconds = time.perf_counter() - began
    print(
        f"{progress.answered} answered, {progress.failed} with errors, {progress.skipped} were there before; "
        f"{seconds:.1f} s.",
        file=sys.stderr,
    )
    return 0


async def _answer(batch: Batch, options: EngineOptions, reporter: Reporter) -> Progress:
    files = host.open_files(options, reporter)
    client = host.connect(options, files, progress=reporter)
    try:
        frontend = host.build_frontend(options, files, client)
        app = build_app(frontend, client, ServerSettings((frontend.model_name,)))

        def tell(progress: Progress) -> None:
            if not client.alive:
                raise EngineDeadError(
                    "The engine has stopped.", "Its messages above say why; the same command goes on."
                )
            reporter("Requests", progress.done, progress.total)

        return await batch.run(partial(call, app), tell)
    finally:
        await client.close()

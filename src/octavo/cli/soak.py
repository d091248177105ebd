"""``octavo bench soak``: an engine's process under the load of ``bench/soak.py``."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path

from octavo import host
from octavo.bench import soak as soaking
from octavo.cli.flags import engine_options
from octavo.cli.progress import Reporter
from octavo.config import EngineOptions
from octavo.engine.client.base import EngineClient
from octavo.engine.client.socket import SocketClient
from octavo.errors import UsageError


def run(args: argparse.Namespace) -> int:
    """Load the engine's process for some minutes; status 1 where anything was wrong."""
    if not (args.model_tag or getattr(args, "model", None)):
        raise UsageError("No model was named.", "Name one, like smollm2:135m.")
    if args.duration <= 0 or args.concurrency < 1:
        raise UsageError("--duration must be above 0 and --concurrency at least 1.")
    options = engine_options(args)
    mix = soaking.Mix(args.concurrency, args.longest_prompt, args.longest_answer, seed=args.load_seed)
    options = with_small_cache(options, mix)
    reporter = Reporter()
    try:
        client = host.connect(options, host.open_files(options, reporter), progress=reporter)
    finally:
        reporter.close()
    if mix.longest_prompt + mix.longest_answer > client.info.max_model_len:
        asyncio.run(client.close())
        raise UsageError(
            f"--longest-prompt and --longest-answer exceed the context of {client.info.max_model_len} tokens."
        )
    report = asyncio.run(_soaked(client, mix, args.duration))
    print(soaking.summary(report))
    if args.output_json:
        Path(args.output_json).write_text(
            json.dumps(soaking.as_json(report), indent=1) + "\n", encoding="utf-8"
        )
    return 1 if report.problems else 0


async def _soaked(client: EngineClient, mix: soaking.Mix, duration_s: float) -> soaking.Report:
    pid = client.pid if isinstance(client, SocketClient) else None
    try:
        return await soaking.Soak(
            client, mix, duration_s, soaking.watcher(pid), lambda line: print(line, flush=True)
        ).run()
    finally:
        await client.close()


def with_small_cache(options: EngineOptions, mix: soaking.Mix) -> EngineOptions:
    """Pages for about half of what the clients would like to hold at once, where nobody has set their number."""
    if options.cache.num_gpu_blocks_override is not None:
        return options
    page = options.cache.block_size or 16
    # The mean of a log-uniform length up to n is n / ln n.
    mean = sum(n / max(1.0, math.log(n)) for n in (mix.longest_prompt, mix.longest_answer))
    most = mix.longest_prompt + mix.longest_answer
    pages = int(max(2 * most, mix.concurrency * mean / 2) / page) + 1
    return replace(options, cache=replace(options.cache, num_gpu_blocks_override=pages))

"""``octavo serve MODEL``: engine, front end and HTTP server, with a timeline of the start."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from starlette.types import ASGIApp

from octavo import host
from octavo.api.server.app import build_app
from octavo.api.server.options import ServerOptions, ServerSettings
from octavo.api.server.serve import run_server
from octavo.cli.flags import collect
from octavo.cli.progress import Reporter
from octavo.cli.talk import engine_options
from octavo.config import GIB
from octavo.engine.client.base import EngineClient
from octavo.host.nodes import follow
from octavo.protocol.control import EngineInfo


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; the exit status is 0 after a drain and 1 when the engine has died."""
    began = time.perf_counter()
    options = engine_options(args).for_people()
    server = collect(args, ServerOptions)
    level = server.uvicorn_log_level.upper()
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if options.parallel.node_rank > 0:
        return follow(options)
    reporter = Reporter()
    facts: list[EngineInfo] = []

    async def start() -> tuple[ASGIApp, EngineClient]:
        files = host.open_files(options, reporter)
        tokenizer = host.tokenizer_ahead(options, files)
        client = host.connect(options, files, progress=reporter)
        facts.append(client.info)
        frontend = host.build_frontend(options, files, client, tokenizer)
        settings = ServerSettings.of(server, (frontend.model_name,))
        return build_app(frontend, client, settings), client

    def ready(url: str) -> None:
        reporter.close()
        print(timeline(facts[0], time.perf_counter() - began), file=sys.stderr)
        print(f"Serving {facts[0].model} at {url}", flush=True)

    try:
        return run_server(start, server, on_ready=ready)
    finally:
        reporter.close()


def timeline(info: EngineInfo, total_s: float) -> str:
    """What the start spent its time on, and what was decided."""
    parts = [f"{name} {seconds:.2f} s" for name, seconds in info.timeline_s.items()]
    parts.append(f"rest {max(0.0, total_s - sum(info.timeline_s.values())):.2f} s")
    memory = [
        f"{name} {measured / GIB:.2f} GiB (planned {planned / GIB:.2f})"
        for name, (planned, measured) in info.memory_bytes.items()
    ]
    return (
        f"Ready in {total_s:.2f} s: {', '.join(parts)}.\n"
        f"{info.architecture} on {info.device}, {info.dtype}; context {info.max_model_len}, "
        f"{info.num_pages} pages of {info.page_size} tokens, at most {info.max_num_seqs} sequences and "
        f"{info.max_num_batched_tokens} tokens a step."
        + (f"\nMemory: {', '.join(memory)}." if memory else "")
    )

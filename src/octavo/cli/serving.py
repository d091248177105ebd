"""The rest of ``octavo serve``: the model's files, the engine, tokenizer and templates, further front processes, HTTP."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial

from starlette.types import ASGIApp

from octavo.api.server.app import build_app
from octavo.api.server.options import ServerOptions, ServerSettings
from octavo.api.server.serve import run_server
from octavo.cli.aside import aside, stoppable
from octavo.cli.commands import parser_of
from octavo.cli.flags import collect, engine_options
from octavo.cli.progress import Reporter
from octavo.config import GIB, EngineOptions, num_fronts
from octavo.device.platform.machine import gpu_in_sight, usable_cores
from octavo.engine.client.base import EngineClient
from octavo.engine.client.channel import Channel
from octavo.engine.client.renewed import RenewedClient
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.host.ahead import read_weights_ahead
from octavo.host.front import build_frontend, connect, tokenizer_ahead
from octavo.host.fronts import Fronts
from octavo.host.opening import open_files
from octavo.protocol.control import EngineInfo


def run(
    options: EngineOptions,
    server: ServerOptions,
    listener: socket.socket,
    channel: Channel | None,
    began: float,
) -> int:
    """Serve on ``listener`` with the engine of ``channel``, which imports meanwhile; ``began`` is when all this began."""
    reporter = Reporter()
    cancel = threading.Event()
    report = stoppable(reporter, cancel)
    fronts = Fronts(options, server)
    facts: list[EngineInfo] = []

    async def start() -> tuple[ASGIApp, EngineClient]:
        files = await aside(partial(open_files, options, report), cancel)
        read_weights_ahead(files)
        tokenizer = tokenizer_ahead(options, files)
        count = decide_fronts(options, server, files)
        if count > 1:
            await fronts.begin(count - 1, listener)
        made = (
            [] if channel is None else [channel]
        )  # for the first engine; others take its place when it has died

        def make(cancel: threading.Event) -> EngineClient:
            first = made.pop() if made else None
            return connect(options, files, progress=report, channel=first, cancel=cancel)

        client = await aside(partial(RenewedClient, make, cancel), cancel)
        facts.append(client.info)
        fronts.engines_ready(client)
        frontend = await aside(partial(build_frontend, options, files, client, tokenizer), cancel)
        settings = ServerSettings.of(server, (frontend.model_name,))
        return build_app(frontend, client, settings, fronts.desk), client

    def ready(url: str) -> None:
        reporter.close()
        print(timeline(facts[0], time.perf_counter() - began), file=sys.stderr)
        print(f"Serving {facts[0].model} at {url}", flush=True)

    try:
        return run_server(start, server, on_ready=ready, listener=listener, siblings=fronts)
    finally:
        reporter.close()


def open_from_flags(argv: Sequence[str]) -> tuple[ASGIApp, EngineClient]:
    """The application and its engine, ready, from the command line's words; what concerns the listening socket is the
    caller's."""
    args = parser_of("serve").parse(argv)
    server: ServerOptions = collect(args, ServerOptions)
    server.check()
    if (server.api_server_count or 1) > 1:
        raise UsageError(
            "An application is one process; --api-server-count is for octavo serve.", "Leave it out."
        )
    options, reporter = engine_options(args).for_people(), Reporter()
    files = open_files(options, reporter)
    tokenizer = tokenizer_ahead(options, files)
    client = RenewedClient(lambda cancel: connect(options, files, progress=reporter, cancel=cancel))
    frontend = build_frontend(options, files, client, tokenizer)
    settings = ServerSettings.of(server, (frontend.model_name,))
    return build_app(frontend, client, settings), client


def decide_fronts(options: EngineOptions, server: ServerOptions, files: ModelFiles) -> int:
    """How many front processes; ``UsageError`` where the system cannot share a port between them."""
    device = options.device.device
    count = num_fronts(
        server.api_server_count,
        on_gpu=device == "cuda" or (device == "auto" and gpu_in_sight()),
        cores=usable_cores(),
        weights_bytes=sum(tensor.nbytes for tensor in files.tensors.values()),
        copies=options.parallel.data_parallel_size,
    )
    if count == 1 or sys.platform != "win32":
        return count
    if server.api_server_count is None:
        return 1
    raise UsageError("--api-server-count needs unix sockets, which this system lacks.", "Leave it out.")


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

"""``octavo serve MODEL``: binds the address and starts the engine's process before it imports the server itself."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from importlib import import_module

from octavo.api.server.listen import bind, check
from octavo.api.server.options import ServerOptions
from octavo.cli.flags import collect, engine_options
from octavo.cli.interrupt import uninterrupted
from octavo.host.launch import start_engine
from octavo.host.torchrun import as_machine

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; the exit status is 0 after a drain and 1 when the engine has died."""
    began = time.perf_counter()
    options = as_machine(engine_options(args).for_people(), os.environ)
    server: ServerOptions = collect(args, ServerOptions)
    logging.basicConfig(level=server.uvicorn_log_level.upper(), format=FORMAT, stream=sys.stderr)
    if options.parallel.node_rank > 0:
        status: int = import_module("octavo.host.nodes").follow(options)
        return status
    check(server)
    with contextlib.closing(bind(server, share=server.api_server_count != 1)) as listener:
        channel = None
        try:
            with uninterrupted():
                # While the engine's process imports what it needs, so does this one. Several engines are started
                # together, later, each with its devices.
                if options.parallel.data_parallel_size == 1:
                    channel = start_engine(options)
                serving = import_module("octavo.cli.serving")
            status = serving.run(options, server, listener, channel, began)
        finally:
            if channel is not None:
                channel.stop(0)
    return status

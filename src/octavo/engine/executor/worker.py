"""One worker process: builds a runner, does what the frames say, ends with its parent.

``python -m octavo.engine.executor.worker FD``: FD is an inherited socket; the first frame names the runner's factory.
A failure is reported once and ends the process: ranks that compute together cannot go on without one of them.
"""

from __future__ import annotations

import importlib
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from octavo.engine.executor.base import Runner
from octavo.engine.executor.frames import (
    Build,
    Collect,
    Forward,
    FromWorker,
    Hello,
    Result,
    Sample,
    Stop,
    ToWorker,
    frame,
    pack_layout,
    read_frame,
)
from octavo.engine.process import Failed, live_with_parent
from octavo.errors import OctavoError

log = logging.getLogger("octavo.engine")

# factory(arguments, rank, num_workers) -> Runner
Factory = Callable[[dict[str, Any], int, int], Runner]


def run_worker(connection: socket.socket) -> int:
    """Serve one executor until it says stop; returns the exit status."""
    decode = msgspec.msgpack.Decoder(ToWorker).decode
    encode = msgspec.msgpack.Encoder().encode
    stream = connection.makefile("rb")

    def send(message: FromWorker) -> None:
        connection.sendall(frame(encode(message)))

    runner = None
    try:
        build = decode(read_frame(stream))
        if not isinstance(build, Build):
            raise OctavoError(f"The first frame was {type(build).__name__}, not Build.")
        runner = load_factory(build.factory)(
            msgspec.json.decode(build.arguments), build.rank, build.num_workers
        )
        send(Hello(pack_layout(runner.layout), runner.num_pages, runner.num_slots))
        while True:
            message = decode(read_frame(stream))
            if isinstance(message, Forward):
                runner.forward(message.plan)
            elif isinstance(message, Sample):
                runner.sample(message.masks)
            elif isinstance(message, Collect):
                result = runner.collect()
                if build.rank == 0:  # every rank draws the same tokens; one of them tells
                    send(Result(result))
            elif isinstance(message, Stop):
                return 0
    except EOFError:
        return 1  # the executor is gone
    except Exception as error:
        if not isinstance(error, OctavoError):
            log.exception("The worker failed.")
        send(Failed.of(error))
        return 1
    finally:
        if runner is not None:
            runner.close()


def load_factory(name: str) -> Factory:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    factory: Factory | None = getattr(importlib.import_module(module), function, None)
    if factory is None:
        raise OctavoError(f"{name!r} names no runner factory.")
    return factory


if __name__ == "__main__":
    live_with_parent()
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        status = run_worker(parent)
    raise SystemExit(status)

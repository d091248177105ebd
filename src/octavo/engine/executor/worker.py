"""One worker process: builds a runner, does what the ring says, ends with its parent.

``python -m octavo.engine.executor.worker SOCKET MEMORY FOLDER``: two inherited descriptors, and a folder that is removed
when nobody is left who could. The first frame on the socket names the
runner's factory; commands then come through the ring, and the socket carries answers, errors and wake-ups.
A failure is reported once and ends the process: ranks that compute together cannot go on without one of them.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import time
from typing import NoReturn

import msgspec

from octavo.engine.executor.base import Factory, Runner, Seat
from octavo.engine.executor.frames import (
    Build,
    Collect,
    Forward,
    FromWorker,
    Hello,
    Progress,
    Result,
    Sample,
    Stop,
    ToWorker,
    Unbuffered,
    frame,
    pack_layout,
    read_frame,
)
from octavo.engine.executor.pulse import Pulse
from octavo.engine.executor.ring import RingReader
from octavo.engine.process import Failed, live_with_parent
from octavo.errors import OctavoError

log = logging.getLogger("octavo.engine")

REPORT_S = 0.1  # least time between two reports of the same phase


class Home:
    """The worker's end of its socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._encode = msgspec.msgpack.Encoder().encode
        self._told = ("", 0.0)

    def send(self, message: FromWorker) -> None:
        """Tell the executor."""
        self._connection.sendall(frame(self._encode(message)))

    def report(self, phase: str, done: int, total: int) -> None:
        """Tell how far the start is, not too often."""
        now = time.monotonic()
        if phase != self._told[0] or done >= total or now - self._told[1] > REPORT_S:
            self._told = (phase, now)
            self.send(Progress(phase, done, total))


def run_worker(connection: socket.socket, memory: int, folder: str) -> int:
    """Serve one executor until it says stop; returns the exit status."""
    decode = msgspec.msgpack.Decoder(ToWorker).decode
    home = Home(connection)
    runner = None
    try:
        build = decode(read_frame(Unbuffered(connection)))  # what follows are wake-ups, for the ring's reader
        if not isinstance(build, Build):
            raise OctavoError(f"The first frame was {type(build).__name__}, not Build.")
        Pulse(memory, build.index)
        seat = Seat(build.rank, build.num_ranks, build.local_index, build.num_local, folder, home.report)
        started = load_factory(build.factory)(msgspec.json.decode(build.arguments), seat)
        runner = started.runner
        ring = RingReader(memory, build.num_workers, build.index, connection, build.spin_s)
        home.send(Hello(pack_layout(runner.layout), runner.num_pages, runner.num_slots, started.facts))
        while True:
            message = decode(read_frame(ring))
            if isinstance(message, Stop):
                runner.close()
                return 0
            result = obey(runner, message)
            if result is not None and build.rank == 0:  # every rank has the same tokens; one of them tells
                home.send(result)
    except EOFError:
        return 1  # the executor is gone
    except Exception as error:
        if not isinstance(error, OctavoError):
            log.exception("The worker failed.")
        home.send(Failed.of(error))
        return 1


def obey(runner: Runner, message: ToWorker) -> Result | None:
    """Carry out one command."""
    if isinstance(message, Forward):
        runner.forward(message.plan)
    elif isinstance(message, Sample):
        runner.sample(message.masks)
    elif isinstance(message, Collect):
        return Result(runner.collect())
    return None


def load_factory(name: str) -> Factory:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    factory: Factory | None = getattr(importlib.import_module(module), function, None)
    if factory is None:
        raise OctavoError(f"{name!r} names no runner factory.")
    return factory


def main(connection: int, memory: int, folder: str) -> NoReturn:
    """The whole life of a worker's process."""
    live_with_parent(folder)
    with socket.socket(fileno=connection) as parent:
        status = run_worker(parent, memory, folder)
        sys.stdout.flush()
        sys.stderr.flush()
        # Other ranks may be gone: whoever took leave of them in order could wait for ever.
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

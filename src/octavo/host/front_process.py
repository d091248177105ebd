"""A further front process of a server: ``python -m octavo.host.front_process FOLDER FRONT DESCRIPTOR``.

It gets its options over the wire (they hold keys, which no process list may show), makes its own tokenizer and
application, and serves on the listening socket that it has inherited.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import Any

import msgspec

from octavo.api.server.app import build_app
from octavo.api.server.fronts import messages
from octavo.api.server.fronts.borrowed import Borrowed
from octavo.api.server.fronts.wire import Wire
from octavo.api.server.options import ServerOptions, ServerSettings
from octavo.api.server.serve import loop_factory, serve
from octavo.engine.process import live_with_parent
from octavo.host.front import build_frontend, tokenizer_ahead
from octavo.host.fronts import join
from octavo.host.launch import decode_options
from octavo.host.opening import open_files
from octavo.protocol.control import FRONT_SHIFT

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


async def run(folder: str, front: int, listener: socket.socket) -> int:
    """Serve until told to stop; returns the exit status."""
    wire = Wire(*await asyncio.open_unix_connection(f"{folder}/desk"))
    reading = asyncio.create_task(wire.run())
    begin = msgspec.msgpack.decode(await wire.ask(messages.Hello(front)), type=messages.Begin)
    options = decode_options(begin.engine)
    server = msgspec.msgpack.decode(begin.server, type=ServerOptions)
    logging.basicConfig(level=server.uvicorn_log_level.upper(), format=FORMAT, stream=sys.stderr)
    files = open_files(options)
    tokenizer = tokenizer_ahead(options, files)
    folders = msgspec.msgpack.decode(await wire.ask(messages.WhereEngines()), type=list[str])
    client, lost = join(folders, front)
    frontend = build_frontend(options, files, client, tokenizer, first_id=(front << FRONT_SHIFT) + 1)
    settings = ServerSettings.of(server, (frontend.model_name,))
    borrowed = Borrowed(wire, settings.response_limits)

    async def answer(message: messages.Message) -> Any:
        if isinstance(message, messages.EngineLost):
            lost(message.reason)
            return None
        return await borrowed.answer(message)

    wire.handler = answer
    app = build_app(frontend, client, settings, borrowed)

    def ready(url: str) -> None:
        wire.tell(messages.Serving())

    try:
        return await serve(app, client, server, listener, on_ready=ready, first=False)
    finally:
        await client.close()
        reading.cancel()


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    folder, front, descriptor = arguments[0], int(arguments[1]), int(arguments[2])
    live_with_parent(folder)
    with (
        socket.socket(fileno=descriptor) as listener,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        return runner.run(run(folder, front, listener))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs the application on uvicorn: binds before the model loads, drains on SIGTERM, fails when the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG

from octavo.api.server.limits import limited_protocol
from octavo.api.server.listen import bind, check, url
from octavo.api.server.options import ServerOptions
from octavo.engine.client.base import EngineClient
from octavo.engine.client.renewed import RenewedClient
from octavo.errors import OctavoError

log = logging.getLogger("octavo.server")

BACKLOG = 2048
WATCH_SECONDS = 0.25
LAST_WORDS_SECONDS = 1.0  # for replies that say why a request was cut off
DEAD_ENGINE_SECONDS = 5.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")

SIGNALS = (signal.SIGTERM, signal.SIGINT)

Start = Callable[[], Awaitable[tuple[ASGIApp, EngineClient]]]


class Siblings(Protocol):
    """The server's further front processes, as the first one sees them."""

    @property
    def alive(self) -> bool:
        """Whether all run, or will again."""

    @property
    def ready(self) -> bool:
        """Whether all take requests."""

    def stop(self, force: bool = False) -> None:
        """Let them drain; with ``force`` no longer."""

    def engine_lost(self) -> None:
        """The engine has ended: their open requests end with an error."""

    def engine_renewed(self, client: EngineClient) -> None:
        """Another has taken its place."""

    async def ended(self) -> None:
        """Wait until they have, and end what does not."""


def run_server(
    start: Start,
    options: ServerOptions,
    *,
    on_ready: Callable[[str], None] | None = None,
    listener: socket.socket | None = None,
    siblings: Siblings | None = None,
) -> int:
    """Serve until a signal or the engine's death; returns the exit status (0 after a signal, 1 after a death).

    The address is bound first, so that a port in use is reported (``UsageError``) before minutes of loading. ``start``
    then builds the engine and the application on the event loop they will live on. ``on_ready`` gets the URL when
    requests are accepted; by default one line is printed. The engine is closed at the end. ``listener`` is a socket
    that is bound already.
    """
    if listener is None:
        check(options)
        listener = bind(options)
    with contextlib.closing(listener), asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_run(start, options, listener, on_ready or _announce, siblings))


async def _run(
    start: Start,
    options: ServerOptions,
    listener: socket.socket,
    on_ready: Callable[[str], None],
    siblings: Siblings | None,
) -> int:
    try:
        app, client = await start()
        try:
            if options.is_open and options.uds is None and options.host not in LOOPBACK:
                log.warning(
                    "There is no --api-key: whoever reaches %s can use this server.", url(options, listener)
                )
            return await serve(app, client, options, listener, on_ready=on_ready, siblings=siblings)
        finally:
            if siblings is not None:
                siblings.stop()
                await siblings.ended()
            await client.close()
    finally:
        if siblings is not None:  # also where the start failed
            siblings.stop()
            await siblings.ended()


async def serve(
    app: ASGIApp,
    client: EngineClient,
    options: ServerOptions,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
    siblings: Siblings | None = None,
    first: bool = True,
) -> int:
    """Serve ``app`` on a bound socket until a signal, ``stop`` or the engine's death; returns the exit status.

    Signals are handled when this runs in the main thread; elsewhere ``stop`` is the way to end it. With ``siblings`` the
    server is ready when they are, and stops them with itself. Only the ``first`` process of a server hears Ctrl-C and
    removes its unix socket.
    """
    server = _Server(_config(app, options), SIGNALS if first else SIGNALS[:1], siblings)

    def ready() -> None:
        if on_ready is not None:
            on_ready(url(options, listener))

    watcher = asyncio.ensure_future(
        _watch(server, client, stop, ready, options.max_engine_restarts, siblings)
    )
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        if options.uds is not None and first:
            Path(options.uds).unlink(missing_ok=True)
    return server.status


class _Server(uvicorn.Server):
    """uvicorn's server with our exit status: its own raises the signal again after a clean stop."""

    status = 0

    def __init__(
        self, config: uvicorn.Config, signals: Sequence[signal.Signals], siblings: Siblings | None
    ) -> None:
        super().__init__(config)
        self.signals = signals
        self.siblings = siblings

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in self.signals:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in self.signals:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Drain; the second call stops waiting for what still runs."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.siblings is not None:
            self.siblings.stop(self.force_exit)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # What outlived the drain has been cancelled; let it tell its clients so and free its pages.
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS_SECONDS)


async def _watch(
    server: _Server,
    client: EngineClient,
    stop: asyncio.Event | None,
    on_ready: Callable[[], None],
    restarts: int,
    siblings: Siblings | None,
) -> None:
    while not server.started or (siblings is not None and siblings.alive and not siblings.ready):
        await asyncio.sleep(0.01)
    if siblings is None or siblings.alive:
        on_ready()
    done = 0
    while True:
        while client.alive and (siblings is None or siblings.alive):
            if stop is not None and stop.is_set():
                server.stop()
                return
            await asyncio.sleep(WATCH_SECONDS)
        if server.should_exit:
            return
        if client.alive:
            log.error("Front processes keep ending; the server ends.")
            break
        if siblings is not None:
            siblings.engine_lost()
        if done >= restarts or not isinstance(client, RenewedClient) or not await _renewed(client):
            log.error("The engine has stopped; the server ends.")
            break
        done += 1
        log.warning("The engine has been started anew (%d of %d times).", done, restarts)
        if siblings is not None:
            siblings.engine_renewed(client)
    server.status = 1
    server.config.timeout_graceful_shutdown = int(DEAD_ENGINE_SECONDS)
    server.stop()


async def _renewed(client: RenewedClient) -> bool:
    """Whether an engine that died could be started anew."""
    log.error("The engine has died; it is started anew.")
    try:
        await client.renew()
    except OctavoError as error:
        log.error("It cannot be started: %s", error)
        return False
    except Exception:
        log.exception("It cannot be started.")
        return False
    return True


def _config(app: ASGIApp, options: ServerOptions) -> uvicorn.Config:
    timeout: Any = options.shutdown_timeout  # any number of seconds works, uvicorn only declares int
    return uvicorn.Config(
        app,
        http=limited_protocol(options.max_header_bytes),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=_log_config(),
        log_level=options.uvicorn_log_level,
        access_log=not options.disable_uvicorn_access_log,
        proxy_headers=False,
        server_header=False,
        root_path=options.root_path.rstrip("/"),
        backlog=BACKLOG,
        timeout_keep_alive=options.timeout_keep_alive,
        timeout_graceful_shutdown=timeout,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE,
    )


def _log_config() -> dict[str, Any]:
    """uvicorn's own, with the access log on standard error: standard output belongs to the ready line."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


def _announce(address: str) -> None:
    print(f"Octavo is ready at {address}", flush=True)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory

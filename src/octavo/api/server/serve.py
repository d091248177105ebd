"""Runs the application on uvicorn: binds before the model loads, drains on SIGTERM, fails when the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import logging
import signal
import socket
import ssl
import stat
import threading
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG

from octavo.api.server.limits import limited_protocol
from octavo.api.server.options import ServerOptions
from octavo.engine.client.base import EngineClient
from octavo.errors import UsageError

log = logging.getLogger("octavo.server")

BACKLOG = 2048
WATCH_SECONDS = 0.25
LAST_WORDS_SECONDS = 1.0  # for replies that say why a request was cut off
DEAD_ENGINE_SECONDS = 5.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Start = Callable[[], Awaitable[tuple[ASGIApp, EngineClient]]]


def run_server(start: Start, options: ServerOptions, *, on_ready: Callable[[str], None] | None = None) -> int:
    """Serve until a signal or the engine's death; returns the exit status (0 after a signal, 1 after a death).

    The address is bound first, so that a port in use is reported (``UsageError``) before minutes of loading. ``start``
    then builds the engine and the application on the event loop they will live on. ``on_ready`` gets the URL when
    requests are accepted; by default one line is printed. The engine is closed at the end.
    """
    options.check()
    options.keys()
    options.key_entries()
    check_tls(options)
    with (
        contextlib.closing(bind(options)) as listener,
        asyncio.Runner(loop_factory=_loop_factory()) as runner,
    ):
        return runner.run(_run(start, options, listener, on_ready or _announce))


async def _run(
    start: Start, options: ServerOptions, listener: socket.socket, on_ready: Callable[[str], None]
) -> int:
    app, client = await start()
    try:
        return await serve(app, client, options, listener, on_ready=on_ready)
    finally:
        await client.close()


async def serve(
    app: ASGIApp,
    client: EngineClient,
    options: ServerOptions,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> int:
    """Serve ``app`` on a bound socket until a signal, ``stop`` or the engine's death; returns the exit status.

    Signals are handled when this runs in the main thread; elsewhere ``stop`` is the way to end it.
    """
    server = _Server(_config(app, options))
    if options.is_open and options.uds is None and options.host not in LOOPBACK:
        log.warning("There is no --api-key: whoever reaches %s can use this server.", url(options, listener))

    def ready() -> None:
        if on_ready is not None:
            on_ready(url(options, listener))

    watcher = asyncio.ensure_future(_watch(server, client, stop, ready))
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)
    return server.status


def bind(options: ServerOptions) -> socket.socket:
    """The listening address, reserved; ``UsageError`` in one sentence where that is impossible."""
    if options.uds is not None:
        return _bind_unix(options.uds)
    try:
        family, _, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise UsageError(f"--host {options.host} is not an address of this machine.") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        where = f"{options.host}:{options.port}"
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"The address {where} is in use by another program.", "Stop it, or choose another --port."
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UsageError(
                f"This user may not listen on {where}.", "Choose a --port from 1024 on."
            ) from None
        raise UsageError(
            f"{where} cannot be listened on: {error.strerror}.", "Choose another --host."
        ) from None
    return listener


def check_tls(options: ServerOptions) -> None:
    """``UsageError`` for certificate files that cannot be used; without this they would fail after the loading."""
    if options.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password is never asked for: a server that waits at a prompt looks like one that hangs.
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, password=lambda: b"")
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"--ssl-certfile {options.ssl_certfile} with --ssl-keyfile {options.ssl_keyfile} is not usable: {error}.",
            "Give a certificate and its unencrypted private key as PEM files.",
        ) from None
    if options.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(options.ssl_ca_certs)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"--ssl-ca-certs {options.ssl_ca_certs} is not usable: {error}.") from None


def url(options: ServerOptions, listener: socket.socket) -> str:
    """Where clients find the API."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{port}{options.root_path}/v1"


class _Server(uvicorn.Server):
    """uvicorn's server with our exit status: its own raises the signal again after a clean stop."""

    status = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Drain; the second call stops waiting for what still runs."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # What outlived the drain has been cancelled; let it tell its clients so and free its pages.
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS_SECONDS)


async def _watch(
    server: _Server, client: EngineClient, stop: asyncio.Event | None, on_ready: Callable[[], None]
) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    on_ready()
    while client.alive:
        if stop is not None and stop.is_set():
            server.stop()
            return
        await asyncio.sleep(WATCH_SECONDS)
    if not server.should_exit:
        log.error("The engine has stopped; the server ends.")
        server.status = 1
        server.config.timeout_graceful_shutdown = int(DEAD_ENGINE_SECONDS)
        server.should_exit = True


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


def _bind_unix(path: str) -> socket.socket:
    file = Path(path)
    if file.exists() and not stat.S_ISSOCK(file.stat().st_mode):
        raise UsageError(f"--uds {path} exists and is not a socket.", "Choose another path.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if file.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise UsageError(f"--uds {path} is in use by another program.", "Choose another path.")
            file.unlink()  # left behind by a process that was killed
        listener.bind(path)
    except UsageError:
        listener.close()
        raise
    except OSError as error:
        listener.close()
        raise UsageError(f"--uds {path} cannot be listened on: {error.strerror or error}.") from None
    return listener


def _announce(address: str) -> None:
    print(f"Octavo is ready at {address}", flush=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory

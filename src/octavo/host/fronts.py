"""Further front processes of a server: started, watched, started again where they end (``front_process`` is one of them).

    the first process: HTTP, supervisor, desk ──> engine(s)
      └─ process K: HTTP ── wire to the desk, sockets of its own to the engine(s); a listening socket on the same port

The first one holds every listening socket, so that connections wait while a process is replaced. A process that ends takes
its open requests with it; when they end again and again, the server does.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable

import msgspec

from octavo.api.server.fronts.desk import Desk
from octavo.api.server.fronts.messages import Begin
from octavo.api.server.listen import bind_beside
from octavo.api.server.options import ServerOptions, ServerSettings
from octavo.config import EngineOptions
from octavo.engine.client.base import EngineClient
from octavo.engine.client.renewed import RenewedClient
from octavo.engine.client.replicas import ReplicaClient
from octavo.engine.client.socket import SocketClient
from octavo.errors import OctavoError
from octavo.host.launch import encode_options
from octavo.protocol.control import DropFront

log = logging.getLogger("octavo.server")

MAX_RESTARTS, RESTART_SECONDS = 3, 60.0  # more of them in that time end the server
END_SECONDS = 5.0  # beyond --shutdown-timeout
COMMAND = (sys.executable, "-m", "octavo.host.front_process")


class Fronts:
    """Implements ``Siblings``; made before anything is started."""

    def __init__(self, options: EngineOptions, server: ServerOptions) -> None:
        self._options, self._server = options, server
        self._folder: str | None = None
        self._client: EngineClient | None = None
        self._listeners: list[socket.socket] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._serving: set[int] = set()
        self._last_front = 0
        self._restarts: deque[float] = deque(maxlen=MAX_RESTARTS + 1)
        self._lost: set[int] = set()  # processes that end because the engine did
        self._stopping = self._failed = False
        self.desk: Desk | None = None

    async def begin(self, count: int, listener: socket.socket) -> None:
        """Start ``count`` processes beside this one; they get ready while the engine does."""
        folder = self._folder = tempfile.mkdtemp(prefix="octavo-")  # mode 0700
        begin = Begin(encode_options(self._options), msgspec.msgpack.encode(self._server))
        settings = ServerSettings.of(self._server, ())
        desk = self.desk = Desk(settings.response_limits, begin)
        desk.on_serving = self._serving.add
        await desk.open(f"{folder}/desk")
        for _ in range(count):
            beside = bind_beside(listener, self._server)
            self._listeners.append(beside)
            self._tasks.append(asyncio.create_task(self._keep(beside)))

    def engines_ready(self, client: EngineClient) -> None:
        """The other processes may join the engine."""
        self._client = client
        if self.desk is not None:
            self.desk.engines_ready(folders_of(client))

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [process.pid for process in self._processes.values()]

    @property
    def alive(self) -> bool:
        """See ``Siblings``."""
        return not self._failed

    @property
    def ready(self) -> bool:
        """See ``Siblings``."""
        return len(self._serving) >= len(self._listeners)

    def stop(self, force: bool = False) -> None:
        """See ``Siblings``."""
        if self._stopping and not force:
            return
        self._stopping = True
        for listener in self._listeners:
            listener.close()  # else connections would wait here for nobody
        for process in self._processes.values():
            if process.returncode is None:
                process.terminate()

    def engine_lost(self) -> None:
        """See ``Siblings``; they end, and those that take their place wait for another engine."""
        if self.desk is not None:
            self._lost |= set(self._processes)
            self.desk.engine_lost("The engine has stopped.")

    def engine_renewed(self, client: EngineClient) -> None:
        """See ``Siblings``."""
        self.engines_ready(client)

    async def ended(self) -> None:
        """See ``Siblings``."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._server.shutdown_timeout + END_SECONDS)
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.desk is not None:
            await self.desk.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _keep(self, listener: socket.socket) -> None:
        """One process after the other for a listening socket."""
        while not self._stopping:
            self._last_front += 1
            front = self._last_front
            status = await self._run(front, listener)
            if self._stopping:
                return
            if front in self._lost:
                self._lost.discard(front)
                self._serving.discard(front)
                continue
            self._restarts.append(time.monotonic())
            often = len(self._restarts) > MAX_RESTARTS
            if front not in self._serving or (
                often and self._restarts[-1] - self._restarts[0] < RESTART_SECONDS
            ):
                log.error("A front process has ended with status %d.", status)
                self._failed = True
                return
            self._serving.discard(front)
            log.error("A front process has ended with status %d; another takes its place.", status)
            await self._drop(front)

    async def _run(self, front: int, listener: socket.socket) -> int:
        descriptor = listener.fileno()
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            str(self._folder),
            str(front),
            str(descriptor),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(descriptor,),
        )
        self._processes[front] = process
        if self._stopping:
            process.terminate()
        try:
            return await process.wait()
        finally:
            del self._processes[front]

    async def _drop(self, front: int) -> None:
        """Its requests compute for nobody."""
        if self._client is not None:
            try:
                await self._client.control(DropFront(front))
            except OctavoError as error:
                log.debug("The engine could not be told: %s", error)


def folders_of(client: EngineClient) -> list[str]:
    """Where the engines behind a client are found."""
    if isinstance(client, RenewedClient):
        client = client.current
    clients = client.clients if isinstance(client, ReplicaClient) else [client]
    return [one.folder for one in clients if isinstance(one, SocketClient)]


def join(folders: list[str], front: int) -> tuple[EngineClient, Callable[[str], None]]:
    """A further process's client of the engines, and what to call when they are lost."""
    clients = [SocketClient.join(folder, front) for folder in folders]

    def lost(reason: str) -> None:
        for client in clients:
            client.lost(reason)

    return (clients[0] if len(clients) == 1 else ReplicaClient(clients)), lost

"""The engine in a thread of this process.

event loop thread              inbox                   engine thread
submit / abort / control  ──  callables, in order  ──>  core.submit ...  core.step
sinks  <── call_soon_threadsafe(all deltas of a step), once a step ──
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue

from octavo.engine.cache.pool import PoolError
from octavo.engine.client.base import Sink
from octavo.engine.client.sinks import Sinks, refusal
from octavo.engine.core import EngineCore
from octavo.errors import EngineDeadError, OctavoError
from octavo.protocol.control import Control, ControlReply, EngineInfo, Shutdown
from octavo.protocol.generate import FinishReason, GenerateRequest

log = logging.getLogger("octavo.engine")

WATCH_S = 1.0


class InProcessClient:
    """Implements ``EngineClient`` over a core that from now on only this client's thread touches."""

    def __init__(self, core: EngineCore) -> None:
        self.info: EngineInfo = core.info
        self.alive = True
        self._core = core
        self._sinks = Sinks(core.info)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """See ``EngineClient.submit``."""
        self._loop = asyncio.get_running_loop()
        self._sinks.add(request, sink)
        self._inbox.put(partial(self._submit, request))

    def abort(self, ids: list[int]) -> None:
        """See ``EngineClient.abort``."""
        open_ids = self._sinks.remove(ids)
        if open_ids:
            self._inbox.put(partial(self._core.abort, open_ids))

    async def control(self, command: Control) -> ControlReply:
        """See ``EngineClient.control``."""
        if not self.alive:
            raise EngineDeadError(self._sinks.reason_dead or "The engine has stopped.")
        loop = self._loop = asyncio.get_running_loop()
        answer: asyncio.Future[ControlReply] = loop.create_future()
        self._inbox.put(partial(self._control, command, loop, answer))
        while not answer.done():
            # The thread may die with the question in its inbox.
            await asyncio.wait([answer], timeout=0.5)
            if not self.alive and not answer.done():
                raise EngineDeadError(self._sinks.reason_dead or "The engine has stopped.")
        return answer.result()

    async def close(self) -> None:
        """Stop the engine; requests still open end with finish_reason "abort"."""
        self._loop = asyncio.get_running_loop()
        self._inbox.put(partial(self._ask_core, Shutdown()))
        await self._loop.run_in_executor(None, self._thread.join)
        self.alive = False
        self._sinks.end_all("abort", "The engine was closed.")

    # -- engine thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        core = self._core
        reason: FinishReason = "abort"
        message = "The engine was shut down."
        try:
            while not core.stopping or core.has_work:
                self._drain(block=not core.has_work)
                if core.has_work:
                    deltas = core.step()
                    if deltas:
                        self._on_loop(partial(self._sinks.deliver, deltas))
        except Exception as error:
            log.exception("The engine failed.")
            reason, message = "error", f"The engine failed: {error}"
        self.alive = False
        try:
            core.close()
        except Exception:
            log.exception("Closing the engine failed.")
        self._on_loop(partial(self._sinks.end_all, reason, message))

    def _drain(self, block: bool) -> None:
        """Run what the event loop asked for; an idle engine sleeps here, and looks after its workers."""
        try:
            if block:
                self._inbox.get(timeout=WATCH_S)()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            if block:
                self._core.executor.watch()

    def _on_loop(self, call: Callable[[], None]) -> None:
        if self._loop is None:
            call()  # nobody has submitted yet, so nobody else touches the sinks
            return
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            self._core.stopping = True

    def _submit(self, request: GenerateRequest) -> None:
        try:
            self._core.submit(request)
        except OctavoError as error:
            self._on_loop(partial(self._sinks.deliver, [refusal(request.id, error)]))

    def _ask_core(self, command: Control) -> None:
        self._core.control(command)

    def _control(
        self, command: Control, loop: asyncio.AbstractEventLoop, answer: asyncio.Future[ControlReply]
    ) -> None:
        try:
            reply = self._core.control(command)
        except (OctavoError, PoolError) as error:
            loop.call_soon_threadsafe(_settle, answer, None, error)
        else:
            loop.call_soon_threadsafe(_settle, answer, reply, None)


def _settle(answer: asyncio.Future[ControlReply], reply: ControlReply, error: Exception | None) -> None:
    """Give the answer unless whoever asked has gone."""
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(reply)

"""Long work of a start beside the event loop, so that Ctrl-C ends it at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from octavo.errors import EngineDeadError

T = TypeVar("T")
GRACE_SECONDS = 0.7  # for the work to notice and clean up

Progress = Callable[[str, int, int], None]


async def aside(work: Callable[[], T], cancel: threading.Event) -> T:
    """What ``work`` returns or raises, done in a thread; when this is cancelled, ``cancel`` is set and the work left."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        try:
            made = (work(), None)
        except BaseException as error:  # noqa: BLE001  (raised where the result is awaited)
            made = (None, error)  # type: ignore[assignment]
        try:
            loop.call_soon_threadsafe(settle, *made)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    threading.Thread(target=run, name="octavo-start", daemon=True).start()
    try:
        return await asyncio.shield(result)
    except asyncio.CancelledError:
        cancel.set()
        await asyncio.wait([result], timeout=GRACE_SECONDS)
        if result.done():
            result.exception()  # seen: it is that of the cancelling
        raise


def stoppable(report: Progress, cancel: threading.Event) -> Progress:
    """``report``, which ends the work that calls it once ``cancel`` is set."""

    def told(phase: str, done: int, total: int) -> None:
        if cancel.is_set():
            raise EngineDeadError("The start was cancelled.")
        report(phase, done, total)

    return told

"""Ranks of this folder's tests, forked from a process that has imported torch already: most of a start is that import.

(Workers of engines in processes of their own, and of other machines, start as users' do.)
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any


def child(connection: Any, memory: Any, stdin: Any, folder: str, environment: dict[str, str]) -> None:
    """In the new process: what ``python -m octavo.engine.executor.worker`` does."""
    from octavo.engine.executor import worker

    os.environ.clear()
    os.environ.update(environment)
    os.dup2(stdin.detach(), 0)
    worker.main(connection.detach(), memory.detach(), folder)


def rank(main: Callable[..., None], argument: Any, environment: dict[str, str]) -> None:
    """In the new process: a script's ``main``."""
    os.environ.clear()
    os.environ.update(environment)
    main(argument)


class Forked:
    """What is used of a ``Popen``."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["octavo.engine.executor.worker", "octavo.host.worker"])
        self._process: ForkServerProcess = context.Process(target=target, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


class ForkedWorker(Forked):
    """In place of ``crew.start_process``."""

    def __init__(self, connection: int, memory: int, folder: str, environment: Mapping[str, str]) -> None:
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "wb")
        super().__init__(child, DupFd(connection), DupFd(memory), DupFd(read), folder, dict(environment))
        os.close(read)

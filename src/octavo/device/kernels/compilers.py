"""Many processes that compile Triton kernels, on a machine whose GPU they never touch.

    noting(note)           launches do nothing but tell which kernel they would have been
    Compilers.compile      a process compiles it and leaves the machine code in Triton's cache on disk

Whoever launches the same kernel afterwards, in whatever process, finds it there. Triton itself compiles on the first
launch, one kernel after the other: half a minute for a model.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from select import select
from typing import Any, NoReturn

import msgspec
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from octavo.device.kernels.keys import helpers_first

WARP = 32
NICE = 5
SILENCE_S = 60.0  # no kernel takes so long: a process has died with its work
MOST_BYTES = 1 << 18
DONE, FAILED = b"1", b"0"


class Kernel(msgspec.Struct, frozen=True):
    """A kernel for arguments of certain types and alignments; ``data`` is Triton's own description of these."""

    module: str
    name: str
    data: str


class Absent(DriverBase):
    """Triton's view of a GPU that is not there, or not to be touched."""

    def __init__(self, arch: int) -> None:
        """``arch``: compute capability times ten."""
        self.arch = arch
        self.launcher_cls = _launcher()

    @classmethod
    def is_active(cls) -> bool:
        """Only where it is chosen."""
        return False

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.arch, WARP)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing runs on it."""
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_active_torch_device(self) -> Any:
        """Nobody may allocate on it."""
        raise RuntimeError("no device is to be touched")

    def get_benchmarker(self) -> Any:
        """Nothing can be timed."""
        raise RuntimeError("no device is to be touched")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """For launchers, which are compiled by the class of the real driver."""
        raise RuntimeError("no device is to be touched")


def _launcher() -> Any:
    """The class that compiles, on some versions, a small C program for each signature."""
    return getattr(import_module("triton.backends.nvidia.driver"), "CudaLauncher", None)


@contextmanager
def noting(note: Callable[[Kernel], None]) -> Iterator[None]:
    """Within it a launch that would compile calls ``note``, once for each kernel, and does nothing."""
    seen: set[Kernel] = set()

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = Kernel(fn.module, fn.jit_function.fn.__qualname__, compile["specialization_data"])
        if kernel not in seen:
            seen.add(kernel)
            note(kernel)
        return True  # "compiled already": Triton then returns without a launch

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


class Compilers:
    """``size`` processes forked from this one, which must have no threads and no context on a GPU."""

    def __init__(self, arch: int, size: int, live: Callable[[], None]) -> None:
        """``live`` is called first in each process: it sees to it that none outlives whom it works for."""
        if "nvidia" not in backends:
            raise RuntimeError("this Triton does not compile for NVIDIA GPUs")
        triton.runtime.driver.set_active(Absent(arch))
        helpers_first()
        # Whole messages; each goes to one of those who wait at the other end, and it ends for all when ours is closed.
        self.jobs, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.begun = 0
        self.waiting: deque[bytes] = deque()
        self.processes: list[int] = []
        for _ in range(size):
            process = os.fork()
            if process == 0:
                self.jobs.close()
                _work(theirs, live)
            self.processes.append(process)
        theirs.close()
        self.jobs.setblocking(False)

    def compile(self, kernel: Kernel) -> None:
        """Begin."""
        self.begun += 1
        self.waiting.append(msgspec.json.encode(kernel))
        self._send()

    def _send(self) -> None:
        """As many as there is room for: who finds the kernels shall not wait for those who compile them."""
        while self.waiting:
            try:
                self.jobs.send(self.waiting[0])
            except OSError:  # full, or nobody is left: ``results`` will see
                return
            self.waiting.popleft()

    def results(self) -> Iterator[bool]:
        """Whether each of those begun could be compiled, as they end; fewer where all processes have died or one hangs."""
        for _ in range(self.begun):
            self._send()
            ready, _, _ = select([self.jobs], [], [], SILENCE_S)
            try:
                told = self.jobs.recv(16) if ready else b""
            except ConnectionError:
                return
            if not told:
                return
            yield told == DONE

    def close(self) -> None:
        """End the processes."""
        self.jobs.close()
        for process in self.processes:
            os.waitpid(process, 0)


def _work(jobs: socket.socket, live: Callable[[], None]) -> NoReturn:
    """One of the processes: whoever reads what this program prints must not wait for it too, and whoever finds work for it
    goes first."""
    status = 1
    try:
        live()
        os.nice(NICE)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        while job := jobs.recv(MOST_BYTES):
            jobs.send(DONE if build(msgspec.json.decode(job, type=Kernel)) else FAILED)
        status = 0
    finally:
        os._exit(status)  # what else this process was in the middle of belongs to the other one


def build(kernel: Kernel) -> bool:
    """Compile for the active driver's target, and what launches it; what fails here is said where it is launched."""
    try:
        made = getattr(import_module(kernel.module), kernel.name).preload(kernel.data)
        launcher = triton.runtime.driver.active.launcher_cls
        if launcher is not None:
            launcher(made.src, made.metadata)
    except Exception:  # noqa: BLE001  an optimization of the start must not become its failure
        return False
    return True

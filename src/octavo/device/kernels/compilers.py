"""Many processes that compile Triton kernels, on a machine whose GPU they never touch.

    noting(found)                   launches do nothing but tell which kernel they would have been
    Compilers(arch).compile(kernel)      a process compiles it and leaves the machine code in Triton's cache on disk

Whoever launches the same kernel afterwards, in whatever process, finds it there. Triton itself compiles on the first
launch, one kernel after the other: half a minute for a model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from octavo.device.kernels.keys import helpers_first

WARP = 32
NICE = 5


@dataclass(frozen=True)
class Kernel:
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
    """``size`` processes forked from this one, which must not have a context on a GPU."""

    def __init__(self, arch: int, size: int, live: Callable[[], None]) -> None:
        """``live`` is called first in each process: it sees to it that none outlives whom it works for."""
        if "nvidia" not in backends:
            raise RuntimeError("this Triton does not compile for NVIDIA GPUs")
        triton.runtime.driver.set_active(Absent(arch))
        helpers_first()
        self.pool = ProcessPoolExecutor(size, get_context("fork"), initializer=_enter, initargs=(live,))
        self.pool.submit(int).result()  # fork them all now, before this process has threads of its own

    def compile(self, kernel: Kernel) -> Future[bool]:
        """Begin; the result says whether it could."""
        return self.pool.submit(build, kernel)

    def close(self) -> None:
        """End the processes."""
        self.pool.shutdown(cancel_futures=True)


def _enter(live: Callable[[], None]) -> None:
    """One of the processes begins: whoever reads what this program prints must not wait for it too, and whoever finds
    work for it goes first."""
    live()
    os.nice(NICE)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.close(silence)


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

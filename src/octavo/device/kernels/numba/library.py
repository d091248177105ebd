"""The compiled kernels by name: built once for a kind of processor, kept on disk, loaded by address.

A kernel is ``void(int64 args, int64 thread, int64 threads)``. The cache folder's name holds the processor, the Numba
version and a hash of the kernels' sources, so a stale kernel cannot be loaded; Numba writes each entry to a temporary
file and renames it, so a killed warm-up leaves whole entries only.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import llvmlite.binding as llvm
import numba
from numba import types

HERE = Path(__file__).parent
SIGNATURE = types.void(types.int64, types.int64, types.int64)
OPTIONS = {"cache": True, "error_model": "numpy"}
ROOM = "octavo.device.kernels.numba."
FOLDER = re.compile(r"[a-z0-9_.+-]+-[0-9a-f]{16}")  # what ``cache_key`` makes
KEPT = 3

# Kernel name -> (module, function).
KERNELS = {
    **{
        f"linear_{name}": ("linear", f"linear_{name}")
        for name in ("zero4", "min4", "zero5", "min5", "zero8", "super4", "super5", "super6", "split8")
    },
    **{f"dense_{name}": ("dense", f"dense_{name}") for name in ("f32", "f16", "bf16")},
    "embed": ("rows", "embed"),
    "norm": ("rows", "norm"),
    "add_norm": ("rows", "add_norm"),
    "gate": ("rows", "gate"),
    "rope_store": ("rope", "rope_store"),
    "attend": ("attention", "attend"),
    "combine": ("attention", "combine"),
    "pack_blocks": ("packing", "pack_blocks"),
    "scan": ("scan", "scan"),
    "refine": ("scan", "refine"),
    "draw": ("draw", "draw"),
    "probe_read": ("probe", "probe_read"),
    "probe_dot": ("probe", "probe_dot"),
}


def cache_key() -> str:
    """Names the processor, the compiler and the kernels' sources."""
    digest = hashlib.sha256()
    for source in sorted(HERE.glob("*.py")):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    features = ",".join(sorted(name for name, on in llvm.get_host_cpu_features().items() if on))
    digest.update(f"{numba.__version__} {llvm.llvm_version_info} {features}".encode())
    return f"{llvm.get_host_cpu_name()}-{digest.hexdigest()[:16]}"


def default_cache() -> Path:
    """The user's cache folder for kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "octavo" / "kernels"


def prune(base: Path, current: Path) -> None:
    """Remove all but the newest kernel folders: each new version of the sources leaves one behind."""
    found = [path for path in base.iterdir() if FOLDER.fullmatch(path.name) and path != current]
    found.sort(key=lambda path: path.stat().st_mtime)
    for path in found[: max(0, len(found) - KEPT)]:
        shutil.rmtree(path, ignore_errors=True)


class KernelLibrary:
    """Compiles on demand and remembers; keep it alive as long as any address is in use.

    ``cache``: folder for compiled code (default: the user's cache folder).
    """

    def __init__(self, cache: Path | None = None) -> None:
        self.folder = self._open(cache or default_cache())
        self.compiled = {}
        self.compile_s = 0.0

    def _open(self, base: Path) -> Path:
        """This processor's folder; one that lasts as long as the library where ``base`` cannot be written."""
        folder = base / cache_key()
        try:
            known = folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError:
            temporary = tempfile.mkdtemp(prefix="octavo-kernels-")
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
            return Path(temporary)
        if not known:
            prune(base, folder)
        return folder

    def address(self, name: str) -> int:
        """Entry point of a kernel; compiles or loads it the first time."""
        if name not in self.compiled:
            module, function = KERNELS[name]
            body = getattr(importlib.import_module(ROOM + module), function)
            self.compiled[name] = self._build(lambda: numba.cfunc(SIGNATURE, nopython=True, **OPTIONS)(body))
        return self.compiled[name].address

    def execute(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """The two compiled functions of ``team``: (run, work); both release the interpreter lock."""
        if "team" not in self.compiled:
            self.compiled["team"] = self._build(self._build_team)
        return self.compiled["team"]

    def _build_team(self):
        team = importlib.import_module(ROOM + "team")
        options = {**OPTIONS, "nogil": True}
        return (
            numba.njit(team.RUN_SIGNATURE, **options)(team.run),
            numba.njit(team.WORK_SIGNATURE, **options)(team.work),
        )

    def _build(self, make):
        before, start = numba.config.CACHE_DIR, time.perf_counter()
        numba.config.CACHE_DIR = str(self.folder)  # read by Numba when a function is decorated
        try:
            return make()
        finally:
            numba.config.CACHE_DIR = before
            self.compile_s += time.perf_counter() - start

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which kernels are not on disk yet (``team`` among them where its two functions are not)."""
        stored = {path.name.split("-")[0] for path in self.folder.rglob("*.nbi")}
        found = [name for name in names if ".".join(KERNELS[name]) not in stored]
        return found if {"team.run", "team.work"} <= stored else [*found, "team"]

    def warm(
        self, names: Iterable[str] | None = None, progress: Callable[[int, int], None] | None = None
    ) -> float:
        """Compile the named kernels (default: all); ``progress(done, total)``. Returns the seconds it took."""
        names = list(KERNELS) if names is None else list(names)
        start = self.compile_s
        for done, name in enumerate(names):
            if progress:
                progress(done, len(names) + 1)
            self.address(name)
        self.execute()
        if progress:
            progress(len(names) + 1, len(names) + 1)
        return self.compile_s - start

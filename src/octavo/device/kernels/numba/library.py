"""The compiled kernels by name: built once for a kind of processor, kept on disk, loaded by address.

A kernel is ``void(int64 args, int64 thread, int64 threads)``. The cache folder's name holds the processor, the compiler's
version and a hash of the kernels' sources, so a stale kernel cannot be loaded; each object file is written to a temporary
name and renamed, so a killed warm-up leaves whole files only. Loading needs LLVM's linker alone: the compiler is imported
where a kernel is missing.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import llvmlite.binding as llvm

HERE = Path(__file__).parent
FOLDER = re.compile(r"[a-z0-9_.+-]+-[0-9a-f]{16}")  # what ``cache_key`` makes
KEPT = 3

# Kernel name -> (module, function).
KERNELS = {
    **{
        f"linear_{name}": ("linear", f"linear_{name}")
        for name in (
            "zero4",
            "min4",
            "zero5",
            "min5",
            "zero8",
            "super2",
            "super3",
            "super4",
            "super5",
            "super6",
            "table4",
            "supertable4",
            "split8",
        )
    },
    **{f"dense_{name}": ("dense", f"dense_{name}") for name in ("f32", "f16", "bf16")},
    "embed": ("rows", "embed"),
    "norm": ("rows", "norm"),
    "add_norm": ("rows", "add_norm"),
    "gate": ("rows", "gate"),
    "whole_norm": ("rope", "whole_norm"),
    "rope_store": ("rope", "rope_store"),
    "attend": ("attention", "attend"),
    "combine": ("attention", "combine"),
    "pack_blocks": ("packing", "pack_blocks"),
    "scan": ("scan", "scan"),
    "refine": ("scan", "refine"),
    **{name: ("mixture", name) for name in ("route", "deal", "gather", "experts", "merge")},
    "draw": ("draw", "draw"),
    "probe_read": ("probe", "probe_read"),
    "probe_dot": ("probe", "probe_dot"),
}
ARGUMENTS = 3
# What drives them; these are called from Python. Function of ``team`` -> number of arguments.
TEAM = {"run": 5, "work": 3}


def cache_key() -> str:
    """Names the processor, the compiler and the kernels' sources."""
    digest = hashlib.sha256()
    for source in sorted(HERE.glob("*.py")):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    features = ",".join(sorted(name for name, on in llvm.get_host_cpu_features().items() if on))
    digest.update(f"{compiler_version()} {llvm.llvm_version_info} {features}".encode())
    return f"{llvm.get_host_cpu_name()}-{digest.hexdigest()[:16]}"


def compiler_version() -> str:
    """What Numba's folder says about its version; importing Numba to ask takes a third of a second."""
    found = importlib.util.find_spec("numba")
    if found is None or found.origin is None:
        return ""
    try:
        return (Path(found.origin).parent / "_version.py").read_text()
    except OSError:
        return found.origin


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
        self.addresses: dict[str, int] = {}
        self.compile_s = 0.0
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)

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
        return self._address(name, *KERNELS[name], ARGUMENTS)

    def execute(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """The two compiled functions of ``team``: (run, work); both release the interpreter lock."""
        found = []
        for function, arguments in TEAM.items():
            kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)
            found.append(kind(self._address(f"team_{function}", "team", function, arguments)))
        return found[0], found[1]

    def _address(self, name: str, module: str, function: str, arguments: int) -> int:
        if name not in self.addresses:
            start, symbol = time.perf_counter(), f"octavo_{name}"
            path = self._path(name)
            if not path.exists():
                build = import_module("octavo.device.kernels.numba.build")
                store(path, build.compile_object(symbol, module, function, arguments))
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(path.read_bytes()))
            self._engine.finalize_object()
            self.addresses[name] = self._engine.get_function_address(symbol)
            self.compile_s += time.perf_counter() - start
        return self.addresses[name]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.o"

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which kernels are not on disk yet (``team`` among them where its two functions are not)."""
        found = [name for name in names if not self._path(name).exists()]
        whole = all(self._path(f"team_{function}").exists() for function in TEAM)
        return found if whole else [*found, "team"]

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


def store(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(temporary, path)

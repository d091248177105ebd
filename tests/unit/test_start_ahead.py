"""What a start does beside its imports: weights read ahead, the GPU's context, merges that were found before."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.api.text import merge_cache
from octavo.api.text.merge_cache import Merges, kept_merges
from octavo.config import EngineOptions
from octavo.files.gguf import GGUFFile
from octavo.files.gguf_write import write_gguf
from octavo.host import ahead
from octavo.host.ahead import open_gpu_ahead, read_weights_ahead
from octavo.host.launch import likely_backend


def test_weights_are_read_ahead_where_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama"}, {})
    files = GGUFFile(tmp_path / "a.gguf")
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        ahead.os, "posix_fadvise", lambda _, start, size, advice: asked.append((start, size, advice))
    )
    thread = read_weights_ahead(files)
    assert thread is not None
    thread.join(5)
    assert asked == [(0, ahead.WINDOW_BYTES, ahead.os.POSIX_FADV_WILLNEED)]
    monkeypatch.setattr(ahead, "available_bytes", lambda: (1, 1 << 30))
    assert read_weights_ahead(files) is None


class Driver:
    """``libcuda`` as far as it is called."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return self.status

        return call


def test_the_gpus_context_is_opened_beside_the_imports() -> None:
    good, bad = Driver(0), Driver(100)
    for driver in (good, bad):
        open_gpu_ahead(lambda name, driver=driver: driver).join(5)
    assert good.calls == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert bad.calls == ["cuInit"]

    def missing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    open_gpu_ahead(missing).join(5)


def test_what_the_engine_imports_ahead() -> None:
    assert likely_backend(EngineOptions.of(device="cuda")) == "cuda"
    assert likely_backend(EngineOptions.of(device="cpu")) == "compiled"
    assert likely_backend(EngineOptions.of(device="cpu", cpu_backend="torch")) == "torch"
    assert likely_backend(EngineOptions.of(device="cpu", tensor_parallel_size=2)) == ""


def test_merges_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(merge_cache, "LARGE", 4)
    tokens, types = ["a", "b", "ab", "ba", "aba"], [1] * 5
    merges: Merges = [("a", "b"), ("ab", "a")]
    times = []

    def find() -> Merges:
        times.append(1)
        return merges

    def ask(scores: list[float]) -> Merges:
        return kept_merges(tokens, scores, types, find, {token: i for i, token in enumerate(tokens)})

    assert ask([0.0] * 5) == ask([0.0] * 5) == merges
    assert len(times) == 1
    assert ask([1.0] * 5) == merges  # another vocabulary
    assert len(times) == 2
    for path in merge_cache.cache_folder().iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert ask([0.0] * 5) == merges  # a damaged file is no file
    assert len(times) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert ask([0.0] * 5) == merges  # nor is a folder that cannot be written

"""A first start: the torch path answers, the kernels are compiled beside it, the compiled path takes over."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cpu_models import BASE, random_files, spec_of

from octavo import host
from octavo.config import EngineOptions
from octavo.device.kernels.numba.library import KernelLibrary
from octavo.engine.core import EngineCore
from octavo.host import standby
from octavo.protocol.control import CheckPool
from octavo.protocol.generate import GenerateRequest, SamplingParams


def ask(core: EngineCore, key: int, count: int) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    core.submit(GenerateRequest(id=key, prompt_token_ids=list(range(3, 23)), sampling=sampling))
    out: list[int] = []
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason in (None, "length"), delta
            out += delta.tokens
        core.control(CheckPool())
    return out


def open_core(monkeypatch: pytest.MonkeyPatch, cache: Path) -> EngineCore:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    files = random_files(spec_of("llama"))
    files.config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **BASE}
    options = EngineOptions.of(
        model="tiny", device="cpu", max_model_len="64", num_gpu_blocks_override=8, max_num_seqs=2, threads=1,
        kernel_warm_up="background",
    )  # fmt: skip
    return host.build_core(options, files)


def test_the_compiled_path_takes_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    core = open_core(monkeypatch, tmp_path)
    try:
        assert core.relief is not None and "target" not in core.info.kernels
        first = ask(core, 1, 10)
        assert len(first) == 10
        deadline = time.monotonic() + 240
        while core.relief is not None and time.monotonic() < deadline:
            ask(core, 2, 2)
            time.sleep(0.2)
        assert core.relief is None and "target" in core.info.kernels
        assert len(ask(core, 3, 10)) == 10
    finally:
        core.close()
    again = open_core(monkeypatch, tmp_path)  # everything is compiled: no detour
    assert again.relief is None and "target" in again.info.kernels
    again.close()


def test_closing_while_kernels_compile_leaves_a_usable_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    core = open_core(monkeypatch, tmp_path)
    relief = core.relief
    assert isinstance(relief, standby.CompiledRelief)
    ask(core, 1, 2)
    core.close()
    assert relief._child.poll() is not None and not relief._thread.is_alive()
    library = KernelLibrary()
    library.warm(["norm"])
    assert library.missing(["norm"]) == [] and library.address("norm")

"""The parts of the GPU benchmarks that need no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

pytest.importorskip("triton")
from octavo.bench import gpu_attention, gpu_profile, gpu_vector


@dataclass
class Entry:
    key: str
    count: int
    self_device_time_total: float


def test_a_profile_is_of_one_step() -> None:
    found = gpu_profile.kernels(
        [Entry("norm", 40, 80.0), Entry("gemm", 20, 4000.0), Entry("host", 9, 0.0)], 10
    )
    assert [(kernel.name, kernel.calls, kernel.us) for kernel in found] == [("gemm", 2, 400), ("norm", 4, 8)]
    text = gpu_profile.table("decode x1", 500.0, found, 1)
    assert text.splitlines()[0] == "decode x1: 500 us a step, 408 us in 6 kernels, 92 us between them"
    assert "400.0 us  80.0%" in text and "8.0 us in 1 others" in text


@pytest.mark.parametrize("module", [gpu_profile, gpu_attention, gpu_vector])
def test_without_a_gpu_they_say_so(
    module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert module.main([]) == 2  # type: ignore[attr-defined]
    assert "no CUDA device" in capsys.readouterr().err

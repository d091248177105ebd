"""--quantization on CPUs: who runs the model, what is refused, and what the weights become."""

from __future__ import annotations

from typing import Any

import pytest
from cpu_models import BASE, MemoryFiles, random_files, spec_of

from octavo.config import EngineOptions
from octavo.errors import UsageError
from octavo.host import compiled_engine
from octavo.host.built import Timeline, quiet
from octavo.host.choose import choose_backend
from octavo.model.arch import ArchConfig
from octavo.model.read_arch import from_hf
from octavo.runner.cpu.runner import CPURunner


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> tuple[MemoryFiles, ArchConfig]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return random_files(spec_of("llama"), "BF16"), from_hf({"model_type": "llama", **BASE})


def options(**values: Any) -> EngineOptions:
    return EngineOptions.of(model="tiny", max_model_len="64", num_gpu_blocks_override=8, threads=1, **values)


@pytest.mark.parametrize(("asked", "kernel", "nbytes"), [("q8_0", "zero8", 34), ("q4_0", "zero4", 18)])
def test_plain_weights_become_blocks(
    asked: str, kernel: str, nbytes: int, model: tuple[MemoryFiles, ArchConfig]
) -> None:
    files, arch = model
    assert choose_backend(options(quantization=asked), files, arch) == "compiled"
    sizes = {}
    for name in (None, asked):
        built = compiled_engine.build(options(quantization=name), files, arch, Timeline.start(), quiet)
        assert isinstance(built.runner, CPURunner)
        sizes[name] = built.runner.lowered.weight_bytes
        kernels = built.kernels["kernels"]
        built.runner.close()
    assert f"linear_{kernel}" in kernels and "dense" not in kernels
    # The head of 90 rows is padded to six panels either way.
    assert sizes[asked] == sizes[None] * nbytes / 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "cuda"}, "runs on a GPU"),
        ({"cpu_backend": "torch"}, "ask for another"),
        ({"dtype": "float32"}, "ask for another"),
        ({"tensor_parallel_size": 2}, "several ranks"),
    ],
)
def test_where_no_kernel_knows_the_format_it_is_refused(
    values: dict[str, Any], message: str, model: tuple[MemoryFiles, ArchConfig]
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_backend(options(quantization="q8_0", **values), *model)


def test_a_quantized_file_is_not_quantized_again(model: tuple[MemoryFiles, ArchConfig]) -> None:
    files = random_files(spec_of("llama"), "Q8_0", gguf=True)
    with pytest.raises(UsageError, match="nothing to do"):
        choose_backend(options(quantization="q4_0"), files, model[1])
    odd = random_files(spec_of("llama", hidden_size=48), "F32")
    with pytest.raises(UsageError, match="multiple of 32"):
        choose_backend(
            options(quantization="q4_0"), odd, from_hf({"model_type": "llama", **BASE, "hidden_size": 48})
        )

"""Plan against measured on a GPU: within 5 % over the families and the two presets."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import BASE
from test_engine import FAMILIES as FIRST
from test_families import FAMILIES as MORE

from octavo import host
from octavo.config import EngineOptions
from octavo.device.ops.bind import Binder
from octavo.device.platform.gpus import GIB, GPU
from octavo.device.platform.select import open_platform
from octavo.engine.cache.layout import plan_layout
from octavo.files.dummy import PRESETS, open_dummy
from octavo.host.plan import Planner
from octavo.model import footprint
from octavo.model.describe import cache_specs, describe
from octavo.model.network import Network
from octavo.model.read_arch import read_arch
from octavo.runner.pages import PageMemory

pytestmark = pytest.mark.gpu

BLOCK = 512  # what the allocator rounds a tensor up to


@pytest.mark.parametrize("family", [*FIRST, *MORE])
def test_weights_and_cache_of_every_family(family: str, tmp_path: Path) -> None:
    import transformers

    name, extra = {**FIRST, **MORE}[family]
    config_name = f"{name}TextConfig" if name in ("Gemma3", "Llama4") else f"{name}Config"
    wide = {"hidden_size": 512, "intermediate_size": 768, "vocab_size": 4096}
    if "mamba_n_heads" in extra:
        extra = {**extra, "mamba_n_heads": 16}  # of 64, twice the hidden size
    getattr(transformers, config_name)(**{**BASE, **wide, **extra}).save_pretrained(tmp_path)
    spec = describe(read_arch(open_dummy(tmp_path)))
    platform = open_platform("cuda")
    gc.collect()  # what the tests before left behind
    before = torch.cuda.memory_allocated()
    network = Network(
        spec,
        dtype=torch.bfloat16,
        device=platform.device,
        binder=Binder(),
        op_spec=platform.op_spec(torch.bfloat16),
        max_position=512,
    )
    weights = torch.cuda.memory_allocated()
    count = len(network.items())
    planned = footprint.weight_bytes(spec, footprint.DENSE, 2) + footprint.position_bytes(spec, 512)
    assert planned == pytest.approx(weights - before, rel=0.05, abs=BLOCK * count)
    layout = plan_layout(cache_specs(spec, 16, 2))
    pages = PageMemory(layout, 512, platform.device)
    measured = torch.cuda.memory_allocated() - weights
    assert 512 * layout.pool_page_bytes == pytest.approx(measured, rel=0.05)
    del network, pages


@pytest.mark.alone
@pytest.mark.parametrize(
    ("preset", "quantization"), [("qwen3-0.6b", None), ("llama-3.1-8b", None), ("llama-3.1-8b", "fp8")]
)
def test_presets(preset: str, quantization: str | None) -> None:
    chosen: dict[str, Any] = {"model": preset, "load_format": "dummy", "quantization": quantization}
    options = EngineOptions.of(**chosen)
    core = host.build_core(options, host.open_files(options))
    use = core.info.memory_bytes
    core.close()
    print(preset, quantization, {k: tuple(round(n / GIB, 3) for n in v) for k, v in use.items()})
    planned, measured = (sum(part[i] for part in use.values()) for i in (0, 1))
    assert use["weights"][0] == pytest.approx(use["weights"][1], rel=0.05)
    assert use["cache"][0] == pytest.approx(use["cache"][1], rel=0.05)
    assert planned == pytest.approx(measured, rel=0.05)
    # And what octavo plan says of such a card, whose context it must guess.
    properties = torch.cuda.get_device_properties(0)
    card = GPU("this", properties.total_memory / GIB, properties.major * 10 + properties.minor)
    planner = Planner(options, open_dummy(preset))
    case = planner.case(card, planner.schemes[0], 1)
    assert case.cache_bytes == pytest.approx(use["cache"][1], rel=0.05)


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded() -> None:
    from octavo.errors import OutOfMemoryError

    assert "llama-2-70b" in PRESETS
    options = EngineOptions.of(model="llama-2-70b", load_format="dummy", gpu_memory_utilization=0.5)
    before = torch.cuda.memory_allocated()
    with pytest.raises(OutOfMemoryError, match="for its weights"):
        host.build_core(options, host.open_files(options))
    assert torch.cuda.memory_allocated() - before < 64 << 20

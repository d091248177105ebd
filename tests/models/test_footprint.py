"""Bytes predicted from blocks equal the bytes that the network and its cache allocate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import PAGE
from test_parity import BASE, FOREIGN, ROWS, transformers

from octavo.device.ops.bind import Binder, OpSpec
from octavo.engine.cache.layout import plan_layout
from octavo.files.dummy import PRESETS, open_dummy
from octavo.model import footprint
from octavo.model.blocks import DecoderSpec, MoE
from octavo.model.describe import cache_specs, describe
from octavo.model.layers.build import Ranks
from octavo.model.network import Network
from octavo.model.quantization.fp8 import choose_format
from octavo.model.read_arch import from_hf, read_arch
from octavo.model.shard import shard
from octavo.runner.pages import PageMemory

MAX_POSITION = 128


def spec_of(name: str, folder: Path) -> DecoderSpec:
    """The blocks of a row of the parity table, from its configuration alone."""
    family, extra = ROWS[name]
    base = {key: value for key, value in BASE.items() if key not in FOREIGN.get(family, ())}
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config_class(**{**base, **extra}).save_pretrained(folder)
    return describe(read_arch(open_dummy(folder)))


def build(spec: DecoderSpec, dtype: torch.dtype, quantization: str | None = None, ranks: int = 1) -> Network:
    op_spec = OpSpec("cpu", str(dtype).removeprefix("torch."))
    nobody = Ranks(0, ranks, lambda x: x, lambda x: x)
    return Network(
        shard(spec, ranks),
        dtype=dtype,
        device=torch.device("cpu"),
        binder=Binder(),
        op_spec=op_spec,
        max_position=MAX_POSITION,
        ranks=nobody,
        weight_format=choose_format(quantization, spec, op_spec),
    )


def allocated(network: Network) -> tuple[int, int]:
    """(weights, rotary tables): bytes of every distinct storage that the network's objects hold."""
    weights: dict[int, int] = {}
    tables: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any, name: str) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            kept = tables if name == "cos_sin" else weights
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item, name)
        elif type(value).__module__.startswith("octavo.model") and hasattr(value, "__dict__"):
            for key, item in vars(value).items():
                visit(item, key)

    visit(network, "")
    return sum(weights.values()), sum(tables.values())


@pytest.mark.parametrize("name", ROWS)
def test_weights_are_exact(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        weights, tables = allocated(build(spec, dtype))
        assert footprint.weight_bytes(spec, footprint.DENSE, dtype.itemsize) == weights
        assert footprint.rope_bytes(spec, MAX_POSITION) == tables
    weights, _ = allocated(build(spec, torch.bfloat16, ranks=2))
    assert footprint.weight_bytes(shard(spec, 2), footprint.DENSE, 2) == weights
    if not any(isinstance(layer.mlp, MoE) for layer in spec.layers):
        weights, _ = allocated(build(spec, torch.bfloat16, "fp8"))
        assert footprint.weight_bytes(spec, footprint.FP8, 2) == weights


@pytest.mark.parametrize("name", ROWS)
def test_cache_is_exact(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, tmp_path)
    layout = plan_layout(cache_specs(spec, PAGE, 2))
    memory = PageMemory(layout, 8, spec, torch.bfloat16, torch.device("cpu"))
    assert sum(tensor.nbytes for tensor in memory.tensors) == 8 * layout.pool_page_bytes


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2_moe", "gpt2", "gpt_oss"])
def test_parameters_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        )
    count = sum(parameter.numel() for parameter in set(model.parameters()))
    assert footprint.num_parameters(spec) == count


def test_llama_70b_has_the_published_size() -> None:
    spec = describe(from_hf(PRESETS["llama-3.1-8b"]))
    assert footprint.num_parameters(spec) == 8_030_261_248

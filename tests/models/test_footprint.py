"""Bytes predicted from blocks equal the bytes that the network and its cache allocate."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import PAGE
from test_parity import BASE, FOREIGN, ROWS, TEXT, to_gguf, transformers
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.device.ops.bind import Binder, OpSpec
from octavo.engine.cache.layout import plan_layout
from octavo.files.dtypes import BLOCK_TYPES
from octavo.files.dummy import PRESETS, open_dummy
from octavo.files.gguf_write import StoredTensor, write_gguf
from octavo.files.resolve import open_model
from octavo.host.plan import held_scheme
from octavo.model import footprint
from octavo.model.batch import Batch, GroupTables
from octavo.model.blocks import DecoderSpec, MoE
from octavo.model.describe import cache_specs, describe
from octavo.model.layers import latent
from octavo.model.layers.build import Ranks
from octavo.model.network import Network
from octavo.model.quantization.choose import choose_format
from octavo.model.quantization.gguf import LAYOUTS
from octavo.model.read_arch import from_hf, read_arch
from octavo.model.shard import shard
from octavo.model.stage import cut
from octavo.runner.pages import PageMemory

MAX_POSITION = 128
WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2}


def spec_of(name: str, folder: Path) -> DecoderSpec:
    """The blocks of a row of the parity table, from its configuration alone."""
    family, extra = ROWS[name]
    base = {key: value for key, value in BASE.items() if key not in FOREIGN.get(family, ())}
    config_class = getattr(transformers, f"{family}TextConfig" if family in TEXT else f"{family}Config")
    config_class(**{**base, **extra}).save_pretrained(folder)
    return describe(read_arch(open_dummy(folder)))


def build(
    spec: DecoderSpec,
    dtype: torch.dtype,
    quantization: str | None = None,
    ranks: int = 1,
    binder: Binder | None = None,
    local: DecoderSpec | None = None,
) -> Network:
    op_spec = OpSpec("cpu", str(dtype).removeprefix("torch."))
    nobody = Ranks(0, ranks, lambda x: x, lambda x: x)
    return Network(
        local or shard(spec, ranks),
        dtype=dtype,
        device=torch.device("cpu"),
        binder=binder or Binder(),
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
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            return  # shapes of stacks that are held packed
        if isinstance(value, torch.Tensor):
            kept = tables if name in ("cos_sin", "temperatures") else weights
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item, name)
        elif type(value).__module__.startswith(("octavo.model", "octavo.device.ops")) and hasattr(
            value, "__dict__"
        ):
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
        assert footprint.position_bytes(spec, MAX_POSITION) == tables
    weights, _ = allocated(build(spec, torch.bfloat16, ranks=2))
    assert footprint.weight_bytes(shard(spec, 2), footprint.DENSE, 2) == weights


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith(("gpt_oss", "llama4"))])
def test_quantized_weights_are_exact(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, tmp_path)
    for scheme in (footprint.FP8, footprint.INT8, footprint.INT4):
        weights, _ = allocated(build(spec, torch.bfloat16, scheme.name))
        assert footprint.weight_bytes(spec, scheme, 2) == weights, scheme.name


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_blocks_that_are_kept(tied: bool, tmp_path: Path) -> None:
    import gguf

    config = transformers.LlamaConfig(
        **{
            **BASE,
            **WIDE,
            "head_dim": 32,
            "vocab_size": 512,
            "intermediate_size": 768,
            "tie_word_embeddings": tied,
        }
    )
    to_gguf(transformers.LlamaForCausalLM(config), "llama", tmp_path / "plain.gguf")
    plain = open_model(str(tmp_path / "plain.gguf"))
    tensors: dict[str, Any] = {}
    for name, info in plain.tensors.items():
        tensors[name] = plain.read(name).view(np.float32).reshape(info.shape)
        if len(info.shape) > 1:
            kind = "Q4_0" if "ffn" in name else "Q8_0"
            raw = gguf.quantize(tensors[name], gguf.GGMLQuantizationType[kind])
            tensors[name] = StoredTensor(kind, info.shape, raw.reshape(-1).view(np.uint8))
    write_gguf(tmp_path / "packed.gguf", plain.config, tensors)
    files = open_model(str(tmp_path / "packed.gguf"))
    spec = describe(read_arch(files))
    op_spec = OpSpec("cpu", "bfloat16")
    network = Network(
        spec,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        binder=Binder(),
        op_spec=op_spec,
        max_position=MAX_POSITION,
        weight_format=choose_format("gguf", spec, op_spec, files),
    )
    scheme = held_scheme(files, spec)
    assert scheme is not None
    assert footprint.weight_bytes(spec, scheme, 2) == pytest.approx(allocated(network)[0], rel=0.05)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss", "qwen2_moe", "deepseek_v4"])
def test_stages_and_experts_apart_are_exact(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, tmp_path)
    for stage in range(2):
        part = cut(spec, stage, 2)
        weights, _ = allocated(build(part, torch.bfloat16))
        assert footprint.weight_bytes(part, footprint.DENSE, 2) == weights
    if any(isinstance(layer.mlp, MoE) for layer in spec.layers):
        apart = shard(spec, 2, expert_parallel=True)
        weights, _ = allocated(build(spec, torch.bfloat16, ranks=2, local=apart))
        assert footprint.weight_bytes(apart, footprint.DENSE, 2) == weights


@pytest.mark.parametrize("name", ROWS)
def test_cache_is_exact(name: str, tmp_path: Path) -> None:
    spec = spec_of(name, tmp_path)
    layout = plan_layout(cache_specs(spec, PAGE, 2))
    memory = PageMemory(layout, 8, torch.device("cpu"))
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


def test_the_workspace_of_latent_layers_is_that_of_the_layers() -> None:
    assert footprint.LATENT_WORK_BYTES == latent.WORK_BYTES


def test_blocks_that_are_kept_are_those_with_kernels() -> None:
    assert set(LAYOUTS) == BLOCK_TYPES


def test_published_sizes() -> None:
    for name, count in (("llama-3.1-8b", 8_030_261_248), ("llama-2-70b", 68_976_648_192)):
        assert footprint.num_parameters(describe(from_hf(PRESETS[name]))) == count


class Live(TorchDispatchMode):
    """The most bytes of tensors that Python code held at a time since ``reset``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, list[int]] = {}  # storage -> [tensors, bytes]
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return out

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        entry = self.counts.setdefault(storage.data_ptr(), [0, storage.nbytes()])
        self.now += entry[1] if entry[0] == 0 else 0
        entry[0] += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._release, storage.data_ptr())

    def _release(self, key: int) -> None:
        entry = self.counts[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.counts[key]


class KernelBinder(Binder):
    """Ops that allocate what their GPU kernels do, which is their result alone."""

    def bind(self, op: Any, spec: OpSpec) -> Any:
        if op.name == "rope_store":
            return lambda qkv, *rest: qkv.new_empty((qkv.shape[0], rest[7], rest[5].shape[4]))
        if op.name == "add_rms_norm":
            return lambda x, residual, weight, eps: torch.empty_like(x)
        if op.name == "act_mul":
            return lambda x, activation: x.new_empty((x.shape[0], x.shape[1] // 2))
        if op.name == "gated_linear":  # many tokens: the product, then the activation

            def gated(x: torch.Tensor, weight: torch.Tensor, activation: str) -> torch.Tensor:
                wide = x.new_empty((x.shape[0], weight.shape[0]))
                return wide.new_empty((x.shape[0], weight.shape[0] // 2))

            return gated
        if op.name in ("paged_attention", "rms_norm"):
            return lambda x, *rest: torch.empty_like(x)
        return op.reference


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "olmo2", "gpt_neox", "starcoder2"])
def test_step_buffers_are_those_of_the_layers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, extra = ROWS[name]
    monkeypatch.setitem(
        ROWS, name, (family, {**extra, **{k: v for k, v in WIDE.items() if k not in FOREIGN.get(family, ())}})
    )
    spec = spec_of(name, tmp_path)
    network = build(spec, torch.bfloat16, binder=KernelBinder())
    layout = plan_layout(cache_specs(spec, PAGE, 2))
    memory = PageMemory(layout, 2, torch.device("cpu"))
    network.bind_cache(memory.places)
    tokens = 64
    index = torch.zeros(tokens, dtype=torch.int64)
    tables = [GroupTables(index.view(1, -1).int(), index) for _ in layout.groups]
    batch = Batch(index, index, index[:2].int(), index[:1].int(), tables, index[:1], tokens, tokens)
    with torch.inference_mode(), Live() as live:
        network.forward(batch)
    assert footprint.forward_bytes(spec, tokens, 2) == pytest.approx(live.peak, rel=0.08)

"""--quantization fp8: loading is exact for every source, the model stays near the unquantized one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Driver
from test_load import rewrite
from test_parity import oracle, prompts, to_gguf
from test_shard import Group

from octavo import host
from octavo.config import EngineOptions
from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.ops.fp8 import FP8, quantize_rows
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.files.dummy import open_dummy
from octavo.files.gguf import GGUFFile
from octavo.files.gguf_write import StoredTensor, write_gguf
from octavo.files.resolve import open_model
from octavo.host.choose import choose_backend
from octavo.model.describe import describe
from octavo.model.layers import load
from octavo.model.layers.build import ALONE, Ranks
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.norm import NormLayer
from octavo.model.network import Network
from octavo.model.quantization import fp8
from octavo.model.quantization.choose import choose_format
from octavo.model.quantization.dense import DENSE, DenseWeight
from octavo.model.quantization.fp8 import Fp8Weight
from octavo.model.read_arch import read_arch


def projections(network: Network) -> Iterator[LinearLayer]:
    for layer in network.layers:
        for part in (layer.attention, layer.mlp):
            yield from (value for value in vars(part).values() if isinstance(value, LinearLayer))


def check_loaded(files: ModelFiles, ranks: Ranks = ALONE) -> int:
    """Every projection is, to the bit, what the unquantized model's rows quantize to; returns how many there are."""
    plain = Driver(files, ranks=ranks).network
    network = Driver(files, ranks=ranks, quantization="fp8").network
    count = 0
    for ours, theirs in zip(projections(network), projections(plain), strict=True):
        assert isinstance(ours.weight, Fp8Weight) and isinstance(theirs.weight, DenseWeight)
        matrix, scale = quantize_rows(theirs.weight.matrix)
        assert ours.weight.matrix.dtype == FP8
        assert torch.equal(ours.weight.matrix.float(), matrix.float())
        assert torch.equal(ours.weight.scale, scale)
        if ours.bias is not None and theirs.bias is not None:
            assert torch.equal(ours.bias, theirs.bias)
        count += 1
    assert torch.equal(network.embedding, plain.embedding)
    if network.head is not None and plain.head is not None:
        assert isinstance(network.head.weight, DenseWeight) and isinstance(plain.head.weight, DenseWeight)
        assert torch.equal(network.head.weight.matrix, plain.head.weight.matrix)
    return count


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Quantize some rows at a time, and record how many values."""
    monkeypatch.setattr(load, "QUANTIZE_ELEMENTS", 1000)
    sizes: list[int] = []

    def recording(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(values.numel())
        return quantize_rows(values)

    monkeypatch.setattr(fp8, "quantize_rows", recording)
    return sizes


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_loading(name: str, tmp_path: Path, few_rows: list[int]) -> None:
    """Fused, transposed and sliced sources; biases."""
    oracle(name, tmp_path)
    assert check_loaded(open_model(str(tmp_path))) == 4 * 3
    assert max(few_rows) <= 1000 and len(few_rows) > 4 * 3


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["llama-bias", "phi3"])
def test_loading_a_rank(name: str, rank: int, tmp_path: Path) -> None:
    oracle(name, tmp_path)
    assert check_loaded(open_model(str(tmp_path)), Group(2).ranks()[rank]) == 4 * 3


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_loading_gguf(kind: str, tmp_path: Path, few_rows: list[int]) -> None:
    """Decoded and quantized again, some rows at a time."""
    import gguf

    to_gguf(oracle("llama", tmp_path / "hf"), "llama", tmp_path / "plain.gguf")
    plain = GGUFFile(tmp_path / "plain.gguf", "plain")
    number = gguf.GGMLQuantizationType[kind]
    tensors: dict[str, Any] = {}
    for key, info in plain.tensors.items():
        values = plain.read(key).view(np.float32).reshape(info.shape).copy()
        tensors[key] = values
        if len(info.shape) == 2:
            raw = np.ascontiguousarray(gguf.quants.quantize(values, number)).view(np.uint8).reshape(-1)
            tensors[key] = StoredTensor(kind, info.shape, raw)
    write_gguf(tmp_path / "model.gguf", dict(plain.config), tensors)
    assert check_loaded(open_model(str(tmp_path / "model.gguf"))) == 4 * 3
    assert max(few_rows) <= 1000


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_logits_stay_near(name: str, tmp_path: Path) -> None:
    """Against bfloat16 weights as they are: relative error, correlation, and the same likeliest token where the
    unquantized model is not torn between two."""
    oracle(name, tmp_path)

    def scale(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            key: value * 0.6 if value.dim() == 2 and "embed" not in key else value
            for key, value in found.items()
        }

    rewrite(tmp_path, scale)
    files = open_model(str(tmp_path))
    plain = Driver(files, dtype=torch.bfloat16)
    ours = Driver(files, dtype=torch.bfloat16, quantization="fp8")
    agreed = sure = 0
    for ids in [*prompts(1), *prompts(2)]:
        a, b = (driver.step([driver.row()], [ids])[0] for driver in (ours, plain))
        error = ((a - b).norm() / b.norm()).item()
        # 0.037 from each product, more or less independent, over the layers (seven in Gemma's row)
        assert 0.002 < error < 0.15, error
        top = b.topk(2, dim=-1).values
        clear = top[:, 0] - top[:, 1] > 0.25 * b.std(dim=-1)
        sure += int(clear.sum())
        agreed += int((a.argmax(-1) == b.argmax(-1))[clear].sum())
    assert sure > 30 and agreed >= 0.95 * sure, (agreed, sure)


def test_random_weights() -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    files = open_dummy(config)
    spec = describe(read_arch(files))
    options: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "binder": Binder(),
        "max_position": 64,
    }
    op_spec = OpSpec("cpu", "bfloat16")
    network = Network(spec, op_spec=op_spec, weight_format=choose_format("fp8", spec, op_spec), **options)
    network.load(files)
    weights = [layer.weight for layer in projections(network)]
    for weight in weights:
        assert isinstance(weight, Fp8Weight)
        values = weight.matrix.float() * weight.scale[:, None]
        assert abs(values.std().item() * weight.matrix.shape[1] ** 0.5 - 1) < 0.02
        assert (weight.matrix.float().abs().amax(1) == 448).all()
    counts = network.matrix_elements()
    assert counts[FP8] == sum(layer.weight.matrix.numel() for layer in projections(network))  # type: ignore[attr-defined]
    assert counts[torch.bfloat16] == network.embedding.numel()  # tied: it is the head
    assert network.matrix_bytes() == counts[FP8] + 2 * counts[torch.bfloat16]


def test_what_is_refused(tmp_path: Path) -> None:
    oracle("qwen3_moe", tmp_path / "moe")
    oracle("llama", tmp_path / "dense")
    moe, dense = (describe(read_arch(open_model(str(tmp_path / name)))) for name in ("moe", "dense"))
    new, old = OpSpec("cuda", "bfloat16", 90), OpSpec("cuda", "bfloat16", 86)
    assert choose_format(None, moe, old) is DENSE
    assert choose_format("fp8", dense, new) is not DENSE
    with pytest.raises(UsageError, match=r"8\.9 or later.*has 8\.6"):
        choose_format("fp8", dense, old)
    assert choose_format("fp8", moe, new) is not DENSE
    with pytest.raises(UsageError, match="int3"):
        choose_format("int3", dense, new)


def test_the_option_reaches_the_model(tmp_path: Path) -> None:
    oracle("llama", tmp_path)
    options = EngineOptions.of(model=str(tmp_path), quantization="fp8", device="cpu")
    files = open_model(str(tmp_path))
    assert choose_backend(options, files, read_arch(files)) == "torch"
    built = host.build_runner(options, files)
    assert built.kernels["linear_fp8"] == "reference x12"
    assert built.kernels["linear"] == "reference x2"  # the head, and what a tied embedding would use


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen3", "gemma2", "phi3", "gpt2", "cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joined_layers_compute_what_the_parts_do(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms and activations that quantize for the product behind them, and apply the scales of the one before: equal
    to the bit to each part alone."""
    oracle(name, tmp_path)
    files = open_model(str(tmp_path))
    joined = Driver(files, dtype=dtype, quantization="fp8")
    apart = Driver(files, dtype=dtype, quantization="fp8")
    quantizing = leaving = 0
    for layer in joined.network.layers:
        norms = [norm for norm in (layer.input_norm, layer.pre_mlp_norm) if isinstance(norm, NormLayer)]
        quantizing += sum(norm.next is not None for norm in norms)
        leaving += bool(layer.attention.leaves_scales) + bool(getattr(layer.mlp, "leaves_scales", False))
    for layer in apart.network.layers:
        for norm in (layer.input_norm, layer.pre_mlp_norm):
            if isinstance(norm, NormLayer):
                norm.next = None
        layer.attention.leaves_scales = False
        layer.mlp.leaves_scales = False
        layer.mlp.act_mul_fp8 = None
    if name in ("llama", "qwen3", "phi3"):
        assert (quantizing, leaving) == (6, 6)
    elif name != "llama-bias":  # norms after the branches, parallel branches, norms of another kind
        assert leaving == 0
    rows = [joined.row(), joined.row()], [apart.row(), apart.row()]
    for tokens in ([[1, 2, 3], [4]], [[5], [6, 7, 8, 9]], [[3], [3]]):
        for ours, theirs in zip(joined.step(rows[0], tokens), apart.step(rows[1], tokens), strict=True):
            assert torch.equal(ours, theirs)

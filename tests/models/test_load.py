"""Loading: names of multimodal checkpoints, stored types, quantized GGUF, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Driver
from safetensors.torch import load_file, save_file
from test_parity import close, expected, oracle, prompts, to_gguf

from octavo.device.ops.bind import Binder, OpSpec
from octavo.errors import ModelFileError
from octavo.files.dummy import open_dummy
from octavo.files.gguf import GGUFFile
from octavo.files.gguf_write import StoredTensor, write_gguf
from octavo.files.resolve import open_model
from octavo.model.describe import describe
from octavo.model.network import Network
from octavo.model.quantization.decode import dequantize
from octavo.model.read_arch import read_arch


def rewrite(folder: Path, change: Any) -> None:
    """Save the folder's tensors again as ``change`` makes them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model.", 1),
    ],
    ids=["old", "new"],
)
@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_multimodal_names(name: str, rename: Any, tmp_path: Path) -> None:
    """Both spellings of a language model inside a larger checkpoint; the vision tower is left alone."""
    model, ids = oracle(name, tmp_path), prompts(1)[0]
    rewrite(
        tmp_path,
        lambda found: (
            {rename(key): value for key, value in found.items()} | {"vision_tower.x": torch.ones(2)}
        ),
    )
    driver = Driver(open_model(str(tmp_path)))
    close(driver.step([driver.row()], [ids])[0], expected(model, ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_half_types(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights are widened exactly; Gemma's 1 + w is added in float32."""
    model, ids = oracle("gemma3_text", tmp_path), prompts(1)[0]
    rewrite(tmp_path, lambda found: {key: value.to(dtype) for key, value in found.items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    driver = Driver(open_model(str(tmp_path)))
    close(driver.step([driver.row()], [ids])[0], expected(model, ids))


def test_stored_type_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    oracle("llama", tmp_path)
    odd = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda found: {**found, odd: found[odd].to(torch.float8_e4m3fn)})
    with pytest.raises(ModelFileError, match=r"layers.1.mlp.up_proj.weight is stored as F8_E4M3"):
        Driver(open_model(str(tmp_path)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16"])
@pytest.mark.parametrize(("name", "architecture"), [("llama", "llama"), ("gemma3_text", "gemma3")])
def test_quantized_gguf(name: str, architecture: str, kind: str, tmp_path: Path) -> None:
    """The logits equal those of the same file with every block decoded beforehand."""
    import gguf

    to_gguf(oracle(name, tmp_path / "hf"), architecture, tmp_path / "plain.gguf")
    plain = GGUFFile(tmp_path / "plain.gguf", "plain")
    number = gguf.GGMLQuantizationType[kind]
    packed: dict[str, Any] = {}
    decoded: dict[str, Any] = {}
    for key, info in plain.tensors.items():
        values = plain.read(key).view(np.float32).reshape(info.shape).copy()
        if len(info.shape) == 2:
            raw = np.ascontiguousarray(gguf.quants.quantize(values, number)).view(np.uint8).reshape(-1)
            packed[key] = StoredTensor(kind, info.shape, raw)
            decoded[key] = gguf.quants.dequantize(raw.reshape(info.shape[0], -1), number).astype(np.float32)
            decoded[key] = decoded[key].reshape(info.shape)
        else:
            packed[key] = decoded[key] = values
    ids, got = prompts(2)[0], []
    for tensors, file in ((packed, "packed.gguf"), (decoded, "decoded.gguf")):
        write_gguf(tmp_path / file, dict(plain.config), tensors)
        driver = Driver(open_model(str(tmp_path / file)))
        got.append(driver.step([driver.row()], [ids])[0])
    assert torch.equal(got[0], got[1])
    original = Driver(open_model(str(tmp_path / "plain.gguf")))
    assert not torch.equal(got[0], original.step([original.row()], [ids])[0])


def test_decoding_is_exact_in_pieces() -> None:
    """Tensors larger than one piece are decoded piece by piece into the same values."""
    values = np.random.default_rng(0).standard_normal((520, 4096)).astype(np.float32)
    out = torch.empty(520, 4096)
    dequantize(values.reshape(-1).view(np.uint8), "F32", (520, 4096), out=out)
    assert np.array_equal(out.numpy(), values)


def test_random_weights_are_seeded_and_sane(tmp_path: Path) -> None:
    oracle("qwen2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    files = open_dummy(tmp_path, "dummy")
    drivers = [Driver(files), Driver(files)]
    ids = prompts(1)[0]
    first, second = (driver.step([driver.row()], [ids])[0] for driver in drivers)
    assert torch.equal(first, second)
    assert torch.isfinite(first).all() and 0.1 < first.std() < 10


def test_bfloat16_stays_near(tmp_path: Path) -> None:
    """The run type rounds activations; the logits move by about a percent of their spread."""
    model, ids = oracle("gemma3_text", tmp_path), prompts(1)[0]
    driver = Driver(open_model(str(tmp_path)), dtype=torch.bfloat16)
    got, want = driver.step([driver.row()], [ids])[0], expected(model, ids)
    assert got.dtype == torch.bfloat16
    assert 1e-4 < (got.float() - want).abs().mean() < 0.03 * want.std()


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    oracle("llama", tmp_path)
    files = open_model(str(tmp_path))
    network = Network(
        describe(read_arch(files)), dtype=torch.float32, device=torch.device("cpu"), binder=Binder(),
        op_spec=OpSpec("cpu", "float32"), max_position=64,
    )  # fmt: skip
    seen: list[tuple[int, int]] = []
    report = network.load(files, lambda done, total: seen.append((done, total)))
    assert report.num_tensors == len(files.tensors) == len(seen)
    assert seen[-1] == (report.num_bytes, report.num_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def mxfp4_model(folder: Path, name: str = "gpt_oss") -> tuple[Any, dict[str, torch.Tensor]]:
    """gpt-oss as published: the oracle's experts replaced by what the blocks stand for, written out by hand."""
    model = oracle(name, folder)
    path = folder / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(1)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat((table, -table))
    for i, layer in enumerate(model.model.layers):
        for kind in ("gate_up_proj", "down_proj"):
            experts, inputs, rows = getattr(layer.mlp.experts, kind).shape
            codes = torch.randint(0, 16, (experts, rows, inputs // 32, 32), generator=generator)
            scales = torch.randint(121, 126, (experts, rows, inputs // 32), generator=generator)
            wide = (table[codes] * 2.0 ** (scales.unsqueeze(-1) - 127.0)).view(experts, rows, inputs)
            getattr(layer.mlp.experts, kind).data.copy_(wide.transpose(1, 2))
            prefix = f"model.layers.{i}.mlp.experts.{kind}"
            del tensors[prefix]
            tensors[f"{prefix}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
            tensors[f"{prefix}_scales"] = scales.to(torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return model, tensors


def test_mxfp4_experts_are_decoded(tmp_path: Path) -> None:
    model, tensors = mxfp4_model(tmp_path)
    path = tmp_path / "model.safetensors"
    driver, ids = Driver(open_model(str(tmp_path))), prompts(6)[0]
    close(driver.step([driver.row()], [ids])[0], expected(model, ids))
    broken = tensors.pop("model.layers.1.mlp.experts.down_proj_scales")
    save_file({**tensors, "model.layers.1.mlp.experts.down_proj_scales": broken[:, :-1].contiguous()}, path)
    with pytest.raises(ModelFileError, match=r"layers.1.mlp.experts.down_proj_blocks .* not MXFP4"):
        Driver(open_model(str(tmp_path)))

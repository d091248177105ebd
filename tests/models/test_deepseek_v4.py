"""DeepSeek V4 beside the parity table: published names, configurations as published, what is refused, stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Driver
from safetensors.torch import load_file, save_file
from test_parity import BASE, ROWS, close, expected, prompts, transformers
from torch import Tensor
from written import write_random

from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.ops.packed import unpack
from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.files.dummy import open_dummy
from octavo.files.resolve import open_model
from octavo.host.plan import held_scheme
from octavo.model.describe import describe
from octavo.model.footprint import num_parameters
from octavo.model.network import Network, Pipe
from octavo.model.quantization.fp8 import DeepseekBlockFp8Weight
from octavo.model.quantization.whole import whole
from octavo.model.read_arch import from_hf, read_arch
from octavo.model.stage import cut

CONFIG: dict[str, Any] = {
    **{key: value for key, value in BASE.items() if key != "intermediate_size"},
    **ROWS["deepseek_v4"][1],
    "model_type": "deepseek_v4",
}
FLASH = {"model_type": "deepseek_v4", "num_hidden_layers": 6, "vocab_size": 1000, "hidden_size": 4096,
         "num_attention_heads": 64}  # fmt: skip


def published(name: str) -> str:
    """A name as DeepSeek's own files have it."""
    name = name.removeprefix("model.")
    return name.replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")


def test_published_names_and_written_weights_are_those_of_the_reference(tmp_path: Path) -> None:
    write_random(CONFIG, tmp_path, 0.15)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = prompts(6)[2]
    wanted = expected(model, ids)
    path = tmp_path / "model.safetensors"
    tensors = {published(name): value for name, value in load_file(path).items()}
    assert {"embed.weight", "hc_head_fn", "layers.2.attn.indexer.wq_b.weight"} <= set(tensors)
    tensors["mtp.0.norm.weight"] = torch.ones(64)  # of drafting layers, which are not used
    save_file(tensors, path, metadata={"format": "pt"})
    driver = Driver(open_model(str(tmp_path)))
    close(driver.step([driver.row()], [ids])[0], wanted)


def test_kernels_of_a_gpu_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of this model alone in Triton's interpreter: prompts, chunks and decodes together."""
    small = {"num_hidden_layers": 2, "layer_types": CONFIG["layer_types"][1:], "index_topk": 2}
    files = open_model(str(write_random({**CONFIG, **small}, tmp_path, 0.15)))
    attention = pytest.importorskip("octavo.device.kernels.triton.compressed_attention")
    monkeypatch.setattr(attention, "RANGES", ())
    others = ("linear", "gated_linear", "experts", "route", "rms_norm", "add_rms_norm", "act_mul")
    others += ("index_scores", "index_choose", "hyper_logits")
    binder = Binder(forced=dict.fromkeys(others, "none"))
    drivers = Driver(files), Driver(files, op_spec=OpSpec("cuda", "float32", 86), binder=binder)
    chosen = {op for op, names in binder.explain().items() if "triton" in names}
    assert {"head_store", "compress", "compressed_attention", "hyper_enter", "rotate_pairs"} < chosen
    ids, other = prompts(6)[0], prompts(6)[2]
    found = []
    for driver in drivers:
        rows = [driver.row(), driver.row()]
        logits = driver.step(rows[:1], [other[:3]])
        logits += driver.step(rows, [other[3:4], ids[:9]])
        logits += driver.step(rows, [other[4:5], ids[9:14]])
        found.append(torch.cat(logits))
    close(*found)


def test_experts_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    path = write_random(CONFIG, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.ffn.gate.tid2eid"][5, 1] = 8
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"tid2eid must name 3 of 8 experts"):
        Driver(open_model(str(tmp_path)))


WIDE = {
    "hidden_size": 128,
    "q_lora_rank": 128,
    "head_dim": 64,
    "o_lora_rank": 64,
    "moe_intermediate_size": 128,
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def exponents(largest: Tensor, most: float) -> Tensor:
    """The powers of two that bring values of that size within ``most``, as they are stored."""
    return torch.exp2(torch.ceil(torch.log2(largest / most))).to(torch.float8_e8m0fnu)


def blocks(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp8 codes, exponents of blocks of 128 x 128, and what both stand for."""
    rows, inputs = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -rows % 128)).view(-1, 128, inputs // 128, 128)
    scale = exponents(padded.abs().amax((1, 3)), 448.0)
    spread = scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    codes = (matrix / spread).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * spread


def fours(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit codes, two in a byte, exponents of 32 inputs, and what both stand for."""
    groups = matrix.unflatten(1, (-1, 32))
    scale = exponents(groups.abs().amax(2), 6.0)
    sized = groups / scale.float().unsqueeze(2)
    near = (sized.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    codes = (near + 8 * (sized < 0)).to(torch.uint8).flatten(1)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    return packed, scale, (E2M1[near] * sized.sign() * scale.float().unsqueeze(2)).flatten(1)


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_published_codes_are_read(experts: str, tmp_path: Path) -> None:
    """fp8 blocks whose scales are exponents, experts of fp8 or of 4 bits: what is loaded is what they stand for."""
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    plain = write_random({**CONFIG, **WIDE}, tmp_path / "plain", 0.1)
    config = {**CONFIG, **WIDE, "quantization_config": quantization, "expert_dtype": experts}
    stored = write_random(config, tmp_path / "stored")
    tensors, codes = load_file(plain / "model.safetensors"), {}
    for name, value in list(tensors.items()):
        routed, last = ".ffn.experts." in name, name.split(".")[-2]
        if (
            routed
            or last in ("wq_a", "wq_b", "wo_a", "wo_b")
            or "shared_experts" in name
            or name.endswith("attn.wkv.weight")
        ):
            matrix, scale, tensors[name] = (fours if routed and experts == "fp4" else blocks)(value)
            codes[name], codes[name.removesuffix("weight") + "scale"] = matrix, scale
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file({**tensors, **codes}, stored / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = Driver(open_model(str(stored))), Driver(open_model(str(plain)))
    for mine, other in zip(ours.network.layers, theirs.network.layers):
        for part in ("down", "query", "output"):
            found, wanted = (getattr(layer.attention, part).weight for layer in (mine, other))
            assert isinstance(found, DeepseekBlockFp8Weight)
            assert torch.equal(whole(found), whole(wanted))
        assert torch.equal(mine.attention.grouped.matrix, other.attention.grouped.matrix)
        for found, wanted in zip(mine.mlp.experts.matrices(), other.mlp.experts.matrices()):
            assert torch.equal(unpack(found), wanted.flatten(0, 1))
    ids = prompts(6)[0]
    found, wanted = (driver.step([driver.row()], [ids])[0] for driver in (ours, theirs))
    assert (found - wanted).norm() < 0.1 * wanted.norm()  # what multiplies fp8 is rounded to it


def test_the_published_size(tmp_path: Path) -> None:
    """V4-Flash has 284 billion parameters, most of which take 4 bits and their exponents."""
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**FLASH, "num_hidden_layers": 43, "vocab_size": 129280, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps({**config, "expert_dtype": "fp4"}))
    files = open_dummy(tmp_path)
    spec = describe(read_arch(files))
    assert num_parameters(spec) == pytest.approx(284e9, rel=0.005)
    scheme = held_scheme(files, spec)
    assert scheme is not None and 4.5 < scheme.bits < 4.7


def test_layers_are_read_in_every_spelling() -> None:
    kinds = from_hf({**FLASH, "compress_ratios": [0, 0, 4, 128, 4, 128, 4]}).layer_types
    assert [kind.partition("_")[0] for kind in kinds] == ["sliding"] * 2 + ["compressed", "heavily"] * 2
    kinds = from_hf(FLASH).layer_types
    assert [kind.partition("_")[0] for kind in kinds] == ["heavily"] * 3 + [
        "compressed",
        "heavily",
        "compressed",
    ]
    first, *_, last = describe(from_hf(FLASH)).layers
    assert first.mlp.router.table is not None and last.mlp.router.table is None  # type: ignore[union-attr]
    assert (first.attention.rope.dim, first.attention.head_dim) == (64, 512)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compress_ratios": [3] * 6}, "compress_ratios"),
        ({"o_groups": 7}, "o_groups 7"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"mlp_layer_types": ["moe"]}, "mlp_layer_types"),
        ({"compress_rates": {"heavily_compressed_attention": 0}}, "compression rate"),
        ({"index_head_dim": 32}, "index_head_dim"),
    ],
    ids=str,
)
def test_what_cannot_run_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises((ModelFileError, UnsupportedModelError), match=named):
        describe(from_hf({**FLASH, **changes}))


def test_two_stages_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All residual streams go from stage to stage; only the last joins them."""
    files = open_model(str(write_random(CONFIG, tmp_path, 0.15)))
    ids = prompts(6)[0]
    whole = Driver(files)
    wanted = whole.step([whole.row()], [ids])[0]
    sent: list[Tensor] = []
    pipes = [Pipe(send=sent.append), Pipe(receive=lambda buffer: buffer.copy_(sent.pop()))]
    for stage, pipe in enumerate(pipes):
        driver = Driver(files)
        network = Network(
            cut(describe(from_hf(CONFIG)), stage, 2),
            dtype=torch.float32,
            device=driver.device,
            binder=driver.binder,
            op_spec=driver.op_spec,
            max_position=512,
            pipe=pipe,
        )
        network.load(files)
        mine = range(network.spec.first_layer, network.spec.first_layer + len(network.layers))
        network.bind_cache({i: place for i, place in driver.memory.places.items() if i in mine})
        monkeypatch.setattr(driver, "network", network)
        if stage == 0:
            monkeypatch.setattr(network, "logits", lambda hidden: hidden)
        found = driver.step([driver.row()], [ids])[0]
    assert not sent
    close(found, wanted)

"""Architectures that Octavo has no family for run by transformers' modules over our pages: logits equal its own within
1e-4 in whole prefills, token by token, and in chunks of mixed rows; and what cannot work says why."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import NUM_PAGES, PAGE, Driver
from test_parity import BASE, close, expected, prompts

from octavo import host
from octavo.config import EngineOptions, ModelOptions
from octavo.device.ops.bind import Binder, OpSpec
from octavo.device.platform.gpus import find_gpu
from octavo.engine.cache.layout import plan_layout
from octavo.engine.core import EngineCore
from octavo.errors import ModelFileError, UnsupportedModelError, UsageError
from octavo.files.base import ModelFiles
from octavo.files.dummy import open_dummy
from octavo.files.resolve import open_model
from octavo.host.implementation import architecture
from octavo.host.plan import Planner
from octavo.model.describe import cache_specs, describe, supported
from octavo.model.fallback.describe import transformers_arch
from octavo.model.fallback.network import TransformersNetwork
from octavo.protocol.control import CheckPool
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.runner.measure import graph_bytes, run_largest_step
from octavo.runner.pages import PageMemory

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96}
LAYER_KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "persimmon": ("Persimmon", {}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_bigcode": ("GPTBigCode", GPT),
    "exaone4": ("Exaone4", {"sliding_window": 8, "layer_types": LAYER_KINDS}),
    "helium": ("Helium", {"head_dim": 16}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "dots1": ("Dots1", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2,
                        "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "phimoe": ("Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # stored under older names
}  # fmt: skip


class FallbackDriver(Driver):
    """The same by-hand driving of a transformers model."""

    def __init__(self, files: ModelFiles, seed: int = 0) -> None:
        arch = transformers_arch(files)
        spec = describe(arch)
        self.network = TransformersNetwork(
            arch,
            files,
            dtype=torch.float32,
            device=torch.device("cpu"),
            binder=Binder(),
            op_spec=OpSpec("cpu", "float32"),
        )
        self.network.load(files)
        self.layout = plan_layout(cache_specs(spec, PAGE, 4))
        self.memory = PageMemory(self.layout, NUM_PAGES, torch.device("cpu"))
        self.network.bind_cache(self.memory.places)
        self.free = list(range(1, NUM_PAGES))
        random.Random(seed).shuffle(self.free)


def oracle(name: str, folder: Path) -> Any:
    family, extra = ROWS[name]
    torch.manual_seed(5)
    base = BASE if "n_embd" not in extra else {k: v for k, v in BASE.items() if k.endswith(("size", "id"))}
    for key in ("hidden_size", "intermediate_size") if "n_embd" in extra else ():
        base.pop(key, None)
    config = getattr(transformers, f"{family}Config")(**{**base, **extra})
    model = (
        getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ROWS)
def test_logits(name: str, tmp_path: Path) -> None:
    model = oracle(name, tmp_path)
    driver = FallbackDriver(open_model(str(tmp_path)))
    rng = random.Random(7)
    sequences = prompts(3)
    wanted = [expected(model, ids) for ids in sequences]
    assert wanted[0].std() > 0.1
    close(driver.step([driver.row()], [sequences[0]])[0], wanted[0])
    one = driver.row()
    close(torch.cat([driver.step([one], [[token]])[0] for token in sequences[0]]), wanted[0])
    rows = [driver.row() for _ in sequences]
    pieces: list[list[torch.Tensor]] = [[] for _ in rows]
    while any(row.computed < len(ids) for row, ids in zip(rows, sequences)):
        active = [i for i, row in enumerate(rows) if row.computed < len(sequences[i])]
        chunks = [sequences[i][rows[i].computed :][: rng.randint(1, 9)] for i in active]
        for i, logits in zip(active, driver.step([rows[i] for i in active], chunks)):
            pieces[i].append(logits)
    for found, theirs in zip(pieces, wanted):
        close(torch.cat(found), theirs)


def core(folder: Path, **options: Any) -> EngineCore:
    chosen = EngineOptions.of(
        **{
            "model": str(folder),
            "device": "cpu",
            "threads": 1,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            **options,
        }
    )
    return host.build_core(chosen, host.open_files(chosen))


@pytest.mark.parametrize("name", ["stablelm", "exaone4", "gpt_bigcode"])  # exaone4: windows
def test_the_engine_answers_as_transformers_does(name: str, tmp_path: Path) -> None:
    """Several sequences, prompts longer than a step, fewer pages than all of them want."""
    model = oracle(name, tmp_path)
    engine = core(
        tmp_path, num_gpu_blocks_override=30, block_size=4, max_model_len="64", model_impl="transformers"
    )
    sequences = [ids * 2 if len(ids) == 1 else ids for ids in prompts(3)]
    got: dict[int, list[int]] = {key: [] for key in range(len(sequences))}
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    for key, ids in enumerate(sequences):
        engine.submit(GenerateRequest(id=key, prompt_token_ids=ids, sampling=sampling))
    while engine.has_work:
        for delta in engine.step():
            got[delta.id] += delta.tokens
    engine.control(CheckPool())
    assert engine.info.architecture == f"{name} (transformers {transformers.__version__})"
    engine.close()
    for key, ids in enumerate(sequences):
        for token in got[key]:
            assert token == int(expected(model, ids)[-1].argmax())
            ids = [*ids, token]


def test_octavo_goes_first_and_may_be_passed_over(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).save_pretrained(tmp_path)
    files = open_model(str(tmp_path))
    assert architecture(ModelOptions(), files).implementation == "octavo"
    theirs = architecture(ModelOptions(model_impl="transformers"), files)
    assert theirs.label == f"llama (transformers {transformers.__version__})"
    with pytest.raises(UsageError, match="--quantization fp8 does not cover"):
        architecture(ModelOptions(model_impl="transformers", quantization="fp8"), files)


def test_both_implementations_agree(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE))
    model.save_pretrained(tmp_path)
    ids = prompts(4)[0]
    ours, theirs = Driver(open_model(str(tmp_path))), FallbackDriver(open_model(str(tmp_path)))
    close(theirs.step([theirs.row()], [ids])[0], ours.step([ours.row()], [ids])[0])
    assert theirs.network.matrix_elements() == ours.network.matrix_elements()
    assert theirs.network.embedding.shape == ours.network.embedding.shape


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({"model_type": "t5"}, "an encoder and a decoder"),
    "mamba": ({"model_type": "mamba", "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}, "layers of type linear"),
    "bloom": ({"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4}, "takes no positions"),
    "longrope": (
        {**BASE, "model_type": "helium", "head_dim": 16, "rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "changes with the length",
    ),
    "nothing": ({"model_type": "never_heard_of"}, "does not know the architecture 'never_heard_of'"),
    "quantized": (
        {**BASE, "model_type": "stablelm", "quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantized",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_says_why(name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        transformers_arch(open_dummy(config))
    with pytest.raises(UnsupportedModelError) as caught:
        architecture(ModelOptions(), open_dummy(config))
    assert "transformers cannot run it either" in str(caught.value)


def test_unknown_architecture_names_the_nearest_and_the_command() -> None:
    files = open_dummy({**BASE, "model_type": "qwen33"})
    with pytest.raises(UnsupportedModelError) as caught:
        architecture(ModelOptions(model_impl="octavo"), files)
    assert "Nearest supported: qwen3" in str(caught.value)
    assert "pip install 'octavo[hf]'" in str(caught.value) and "--model-impl transformers" in str(
        caught.value
    )


def test_a_plan_of_a_model_that_transformers_computes(tmp_path: Path) -> None:
    model = oracle("stablelm", tmp_path)
    planner = Planner(EngineOptions.of(model=str(tmp_path)), open_model(str(tmp_path)))
    card = find_gpu("l4")
    case = planner.case(card, planner.schemes[0], 1)
    assert case.parts is not None and not case.problem
    assert (
        case.parts.weights == 4 * sum(parameter.numel() for parameter in model.parameters()) // 2
    )  # bfloat16
    assert "run on one card" in planner.case(card, planner.schemes[0], 2).problem


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    oracle("stablelm", tmp_path)
    with pytest.raises(UsageError, match="transformers computes run on one device"):
        core(tmp_path, tensor_parallel_size=2)


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    oracle("stablelm", tmp_path)
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('executed')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = prompts(4)[0]
    driver = FallbackDriver(open_model(str(tmp_path)))
    assert driver.step([driver.row()], [ids])[0].isfinite().all()


def test_weights_are_read_strictly(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    oracle("stablelm", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.extra.weight"] = tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelFileError) as caught:
        FallbackDriver(open_model(str(tmp_path)))
    assert "missing: model.layers.1.mlp.down_proj.weight" in caught.value.cause
    assert "model.layers.0.mlp.extra.weight" in caught.value.cause


def test_most_rows_are_no_family_of_octavo() -> None:
    assert len(set(ROWS) - set(supported())) >= 6


def test_the_largest_step_and_recordings_run(tmp_path: Path) -> None:
    """What a start on a GPU measures: everything asked for at once, padded batches."""
    oracle("exaone4", tmp_path)
    engine = core(tmp_path, model_impl="transformers", max_model_len="64", max_num_batched_tokens=64)
    runner: Any = engine.executor.forward.__self__
    run_largest_step(runner, 64)
    assert graph_bytes(runner, 64) == 0  # a CPU keeps none, but every kernel has run over the padding
    engine.close()


def test_random_weights_run(tmp_path: Path) -> None:
    oracle("stablelm", tmp_path)
    engine = core(tmp_path, load_format="dummy", max_model_len="64")
    engine.submit(
        GenerateRequest(id=1, prompt_token_ids=[5, 6], sampling=SamplingParams(max_tokens=3, ignore_eos=True))
    )
    runner: Any = engine.executor.forward.__self__
    elements = runner.network.matrix_elements()[torch.float32]
    assert runner.network.matrix_bytes() == 4 * elements > 4 * 3 * 64 * 64
    tokens = []
    while engine.has_work:
        tokens += [token for delta in engine.step() for token in delta.tokens]
    engine.close()
    assert len(tokens) == 3

"""octavo doctor model: a sound model passes, and every defect is named with exit status 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_helpers import bpe_metadata, smollm_backend
from tokenizers import AddedToken

from octavo.cli import main
from octavo.files.gguf_write import write_gguf
from octavo.host.inspect import runs, spans

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN, INNER, LAYERS, VOCAB = 64, 96, 7, 640
CONFIG: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}


def weights() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        base = f"model.layers.{i}."
        norms = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        shapes |= {base + norm: (HIDDEN,) for norm in norms}
        shapes |= {f"{base}self_attn.{name}_norm": (16,) for name in "qk"}
        shapes |= {
            f"{base}self_attn.{name}_proj": (size, HIDDEN) for name, size in (("q", 64), ("k", 32), ("v", 32))
        }
        shapes[base + "self_attn.o_proj"] = (HIDDEN, 64)
        shapes |= {f"{base}mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[base + "mlp.down_proj"] = (HIDDEN, INNER)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def write(folder: Path, **changes: Any) -> Path:
    """A sound little model; ``changes`` break it."""
    from safetensors.numpy import save_file

    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes.get("config", {})}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": changes.get("eos", 2)}))
    backend = smollm_backend()
    if changes.get("extra_tokens"):
        backend.add_tokens([AddedToken(f"<extra{i}>") for i in range(300)])
    backend.save(str(folder / "tokenizer.json"))
    named = {"eos_token": changes["eos_name"]} if "eos_name" in changes else {}
    template = {"chat_template": changes.get("template", CHATML)}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **template}))
    shapes = weights()
    for name in changes.get("without", ()):
        del shapes[name]
    shapes |= changes.get("also", {})
    save_file(
        {name: np.zeros(shape, np.float16) for name, shape in shapes.items()},
        str(folder / "model.safetensors"),
    )
    return folder


def report(
    capsys: pytest.CaptureFixture[str], path: Path | str, *flags: str
) -> tuple[int, dict[str, dict[str, str]]]:
    status = main(["doctor", "model", str(path), "--json", *flags])
    rows = json.loads(capsys.readouterr().out)
    return status, {row["subject"]: row for row in rows}


def test_a_sound_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = report(capsys, write(tmp_path), "--device", "cpu")
    assert status == 0, found
    text = {subject: row["text"] for subject, row in found.items()}
    assert text["architecture"].startswith("gemma3_text, 0.000258 billion parameters, 256 positions")
    window, full = "Attention window 8 + GatedMLP", "Attention + GatedMLP"
    assert text["layers"] == f"5 x {window}, 1 x {full}, 1 x {window}"
    assert text["cache group 0"].startswith("window 8: 1 layers (0); 128 bytes a token")
    assert text["tensors"] == f"{len(weights())} of {len(weights())} are used, 0 known to be of no use"
    assert text["end of sequence"] == "2 '<|im_end|>'"
    assert text["tool calls"] == "hermes (the template's own): a call comes back as it was written"
    assert "paged_attention: reference x7" in text["kernels"] or "compiled" in text["kernels"]
    assert main(["doctor", "model", str(tmp_path), "--device", "cpu"]) == 0
    assert "Nothing is wrong." in capsys.readouterr().out


DEFECTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "missing tensor": (
        {"without": ["model.layers.3.mlp.up_proj.weight"]},
        "tensors",
        "1 tensors are missing: model.layers.3.mlp.up_proj.weight",
    ),
    "unused tensor": ({"also": {"model.layers.3.gate.weight": (4, 4)}}, "tensors", "1 tensors are not used"),
    "wrong shape": (
        {"also": {"model.norm.weight": (32,)}},
        "tensors",
        "has shape [32], but the configuration asks [64]",
    ),
    "no end": ({"eos": []}, "end of sequence", "answers stop only at their length"),
    "many tokens": ({"extra_tokens": True}, "tokenizer", "tokens, but the model has 640 rows"),
    "turn does not end": ({"eos": 0}, "turns", "'<|im_end|>' follows an answer, but is no end of sequence"),
    "template is no program": (
        {"template": "{% for m in messages %}"},
        "tokenizer",
        "The chat template is not valid",
    ),
    "template fails": ({"template": "{{ messages[0].content.nothing() }}"}, "chat template", "failed"),
    "answers are dropped": (
        {"template": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"},
        "turns",
        "drops what the assistant said",
    ),
    "unknown": ({"config": {"model_type": "gemma9"}}, "architecture", "Nearest supported: gemma"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_named(defect: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, subject, message = DEFECTS[defect]
    status, found = report(capsys, write(tmp_path, **changes), "--device", "cpu", "--model-impl", "octavo")
    assert status == 1
    assert found[subject]["level"] == "wrong" and message in found[subject]["text"], found


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = report(capsys, tmp_path / "nowhere")
    assert status == 1 and "No model" in found["files"]["text"]
    assert main(["doctor", "model"]) == 2
    assert "No model was named" in capsys.readouterr().err


def test_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = bpe_metadata(smollm_backend(), "smollm")
    size = len(metadata["tokenizer.ggml.tokens"])
    keys = {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 2, "attention.head_count_kv": 2,
    }  # fmt: skip
    metadata |= {"general.architecture": "llama", **{f"llama.{key}": value for key, value in keys.items()}}
    shapes = {
        "token_embd": (size, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    write_gguf(
        tmp_path / "m.gguf", metadata, {f"{n}.weight": np.ones(s, np.float32) for n, s in shapes.items()}
    )
    status, found = report(capsys, tmp_path / "m.gguf", "--device", "cpu")
    assert status == 0, found
    assert found["chat template"]["level"] == "note"


@pytest.mark.parametrize(
    ("function", "given", "text"),
    [
        (spans, [0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"),
        (spans, [], ""),
        (runs, ["a", "a", "b", "a"], "2 x a, 1 x b, 1 x a"),
    ],
)
def test_short_forms(function: Callable[[Any], str], given: Any, text: str) -> None:
    assert function(given) == text

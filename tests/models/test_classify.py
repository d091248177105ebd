"""Classification heads of encoders through the whole engine: equal to transformers' logits within 1e-4, pairs too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_pooling import BASE, core_of, texts

from octavo.engine.core import EngineCore
from octavo.errors import ModelFileError, RequestError, UnsupportedModelError, UsageError
from octavo.model.classes import class_activation, classes
from octavo.protocol.generate import GenerateRequest, Pooling, SamplingParams

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

ONE = SamplingParams(max_tokens=1)


def saved(folder: Path, family: str, **config: Any) -> Any:
    torch.manual_seed(3)
    made = getattr(transformers, f"{family}Config")(**BASE, type_vocab_size=2, **config)
    model = getattr(transformers, f"{family}ForSequenceClassification")(made).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    return model


def run(core: EngineCore, asked: list[tuple[list[int], Pooling, int]]) -> list[np.ndarray]:
    for i, (ids, pooling, second_at) in enumerate(asked):
        core.submit(
            GenerateRequest(id=i, prompt_token_ids=ids, sampling=ONE, pooling=pooling, second_at=second_at)
        )
    found: dict[int, np.ndarray] = {}
    while core.has_work:
        for delta in core.step():
            assert delta.embedding is not None, delta.error
            found[delta.id] = np.frombuffer(delta.embedding, "<f4")
        core.check()
    return [found[i] for i in range(len(asked))]


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta"])
def test_heads_beside_vectors(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family, id2label={0: "no", 1: "maybe", 2: "yes"})
    core = core_of(tmp_path, max_num_batched_tokens=64, max_num_seqs=8)
    facts = core.info.facts
    assert facts.labels == ("no", "maybe", "yes") and facts.activation == "softmax"
    asked: list[tuple[list[int], Pooling, int]] = []
    for i, ids in enumerate(texts(16, 60, 4)):
        pair_at = len(ids) // 2 if i % 3 else 0
        asked.append((ids, ("cls", "classify", "tokens", "classify")[i % 4], pair_at))
    for (ids, pooling, second_at), made in zip(asked, run(core, asked)):
        types = torch.tensor([[int(bool(second_at) and at >= second_at) for at in range(len(ids))]])
        with torch.no_grad():
            known = model(torch.tensor([ids]), token_type_ids=types, output_hidden_states=True)
        hidden = known.hidden_states[-1][0]
        expected = {"classify": known.logits[0], "cls": hidden[0], "tokens": hidden.flatten()}[pooling]
        np.testing.assert_allclose(made, expected.numpy(), atol=1e-4)
    with pytest.raises(RequestError, match="second_at"):
        run(core, [([5, 6], "classify", 2)])


@pytest.mark.parametrize("overlap", [False, True])
def test_the_head_of_a_decoder(overlap: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    size = {**BASE, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    config = transformers.Qwen3Config(**size, id2label={0: "fits"}, label2id={"fits": 0})
    model = transformers.Qwen3ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    core = core_of(tmp_path, overlap=overlap, max_num_batched_tokens=24, max_num_seqs=4, block_size=8)
    facts = core.info.facts
    assert (facts.labels, facts.activation, facts.can_generate) == (("fits",), "sigmoid", False)
    found = texts(8, 60, 4)
    asked: list[tuple[list[int], Pooling, int]] = [
        (ids, "classify" if i % 3 else "last", 0) for i, ids in enumerate(found)
    ]
    for _ in range(2):  # the second time prefixes are cached
        for (ids, pooling, _), made in zip(asked, run(core, asked)):
            with torch.no_grad():
                known = model(torch.tensor([ids]), output_hidden_states=True)
            expected = known.logits[0] if pooling == "classify" else known.hidden_states[-1][0, -1]
            np.testing.assert_allclose(made, expected.numpy(), atol=1e-4)
    with pytest.raises(UsageError, match="classes"):
        core_of(tmp_path, runner="generate")


def test_a_model_without_a_head_says_so(tmp_path: Path) -> None:
    made = transformers.BertModel(transformers.BertConfig(**BASE), add_pooling_layer=False)
    made.save_pretrained(tmp_path)
    core = core_of(tmp_path)
    assert core.info.facts.labels == ()
    with pytest.raises(RequestError, match="no classification head"):
        run(core, [([5, 6], "classify", 0)])


HEAD: dict[str, Any] = {"architectures": ["BertForSequenceClassification"]}


def test_labels_and_activations() -> None:
    assert classes({"architectures": ["BertModel"], "id2label": {"0": "x"}}) == ()
    assert classes(HEAD) == ("LABEL_0", "LABEL_1")
    assert classes({**HEAD, "id2label": {"0": "x"}}) == ("x",)
    assert class_activation(HEAD, 1) == "sigmoid" and class_activation(HEAD, 3) == "softmax"
    assert class_activation({"problem_type": "multi_label_classification"}, 3) == "sigmoid"
    identity = "torch.nn.modules.linear.Identity"
    assert class_activation({"sbert_ce_default_activation_function": identity}, 1) == "identity"
    assert class_activation({"sentence_transformers": {"activation_fn": identity}}, 1) == "identity"
    with pytest.raises(UnsupportedModelError, match="'system'"):
        class_activation({"sbert_ce_default_activation_function": "os.system"}, 1)
    with pytest.raises(ModelFileError, match="num_labels"):
        classes({**HEAD, "num_labels": 2**40})

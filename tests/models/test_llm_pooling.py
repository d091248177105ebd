"""``LLM.embed``, ``classify``, ``encode`` and ``score`` on tiny real models, against transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from octavo import LLM, PoolingParams
from octavo.errors import RequestError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

WORDS = [f"w{i}" for i in range(100)]
SIZE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
TEXTS = ["w1 w2 w3", "w9", "w4 w1 w1 w7 w8"]


def tokenizer_in(folder: Path) -> None:
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, **{word: 4 + i for i, word in enumerate(WORDS)}}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"sep_token": "[SEP]", "cls_token": "[CLS]"}))


def saved(folder: Path, num_labels: int) -> Any:
    torch.manual_seed(num_labels)
    config = transformers.BertConfig(**SIZE, num_labels=num_labels)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    tokenizer_in(folder)
    return model


def ids(text: str) -> list[int]:
    return [1, *(4 + int(word[1:]) for word in text.split()), 2]


def logits(model: Any, first: str, second: str | None = None) -> np.ndarray:
    a, b = ids(first), ids(second)[1:] if second is not None else []
    with torch.no_grad():
        types = torch.tensor([[0] * len(a) + [1] * len(b)])
        return np.asarray(model(torch.tensor([a + b]), token_type_ids=types).logits[0])


def load(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), device="cpu", dtype="float32", max_num_seqs=2, **options)


def test_a_classifier(tmp_path: Path) -> None:
    model = saved(tmp_path, 3)
    with load(tmp_path, max_queue_len=1) as llm:  # more texts than its queue holds
        for text, found in zip(TEXTS, llm.classify(TEXTS)):
            expected = torch.softmax(torch.tensor(logits(model, text)), -1).numpy()
            np.testing.assert_allclose(found.outputs.probs, expected, atol=1e-4)
            assert found.outputs.num_classes == 3 and found.prompt_token_ids == ids(text)
        raw = PoolingParams(use_activation=False)
        (one,) = llm.encode({"prompt_token_ids": ids(TEXTS[0])}, raw)
        np.testing.assert_allclose(one.outputs.data, logits(model, TEXTS[0]), atol=1e-4)
        assert len(llm.encode(TEXTS[0], pooling_task="embed")[0].outputs.data) == 32
        with pytest.raises(RequestError, match="3 classes"):
            llm.score("w1", "w2")
        with pytest.raises(RequestError, match="pooling_task"):
            llm.encode("w1", pooling_task="token_embed")  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"prompts\[1\]"):
            llm.classify(["w1", " ".join(WORDS[:60])])
        cut = llm.classify(" ".join(WORDS[:60]), pooling_params=PoolingParams(truncate_prompt_tokens=-1))
        assert len(cut[0].prompt_token_ids) == 40 and cut[0].prompt_token_ids[-1] == 2
        with pytest.raises(RequestError, match="generates no text"):
            llm.generate("w1")
        assert not llm.client.busy and llm.classify([]) == []


def test_a_cross_encoder(tmp_path: Path) -> None:
    model = saved(tmp_path, 1)
    with load(tmp_path) as llm:
        found = [one.outputs.score for one in llm.score("w1 w2", TEXTS)]
        expected = [1 / (1 + np.exp(-logits(model, "w1 w2", text)[0])) for text in TEXTS]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        raw = llm.score(TEXTS, TEXTS, pooling_params=PoolingParams(use_activation=False))
        np.testing.assert_allclose(
            [one.outputs.score for one in raw], [logits(model, t, t)[0] for t in TEXTS], atol=1e-4
        )
        with pytest.raises(RequestError, match="make no pairs"):
            llm.score(["w1", "w2"], TEXTS)


def test_vectors_and_their_cosines(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = transformers.BertModel(transformers.BertConfig(**SIZE), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    tokenizer_in(tmp_path)
    with torch.no_grad():
        hidden = [np.asarray(model(torch.tensor([ids(text)])).last_hidden_state[0, 0]) for text in TEXTS]
    units = [vector / np.linalg.norm(vector) for vector in hidden]
    with load(tmp_path) as llm:
        for found, expected in zip(llm.embed(TEXTS), units):
            np.testing.assert_allclose(found.outputs.embedding, expected, atol=1e-4)
        (plain,) = llm.embed(TEXTS[0], pooling_params=PoolingParams(use_activation=False, dimensions=8))
        np.testing.assert_allclose(plain.outputs.embedding, hidden[0][:8], atol=1e-4)
        assert plain.outputs.hidden_size == 8
        scores = [one.outputs.score for one in llm.score(TEXTS[0], TEXTS)]
        np.testing.assert_allclose(scores, [units[0] @ unit for unit in units], atol=1e-4)
        with pytest.raises(RequestError, match="no classification head"):
            llm.classify("w1")

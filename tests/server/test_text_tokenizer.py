"""Tokenizers from tokenizer.json and from GGUF metadata against independent statements of what they must do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from server_fake import make_tokenizer
from text_helpers import (
    CORPUS,
    UNUSED,
    Files,
    bpe_metadata,
    smollm_backend,
    smollm_tokenizer,
    spm_metadata,
    spm_reference,
    spm_tokenizer,
    trained_bpe,
)
from tokenizers import AddedToken, decoders, pre_tokenizers, processors

from octavo.api.text.gguf_tokenizer import build_from_gguf
from octavo.api.text.pretokenizers import TABLE, pre_tokenizer_row
from octavo.api.text.tokenizer import Tokenizer, load_tokenizer
from octavo.errors import ModelFileError

TEXTS = st.text(
    st.one_of(st.sampled_from("abehlotx 01239\n\t▁<>'.,é漢字😀٣²"), st.characters(exclude_categories=["Cs"])),
    max_size=40,
)
SMOLLM_REFERENCE = smollm_backend()
SMOLLM = smollm_tokenizer()
SPM = spm_tokenizer()
SPM_SPACE = spm_tokenizer(add_space_prefix=True)


@settings(deadline=None, max_examples=150)
@given(TEXTS)
@example("".join(CORPUS))
@example("a\n\n\n 1 22 ²x")
def test_byte_level_bpe_equals_the_models_own_pipeline(text: str) -> None:
    assert SMOLLM.encode(text) == SMOLLM_REFERENCE.encode(text).ids
    assert SMOLLM.decode(SMOLLM.encode(text), skip_special_tokens=False) == text


@settings(deadline=None, max_examples=150)
@given(TEXTS)
@example("  hello   the \n\n\nababab")
@example("▁▁ x ▁the")
@example("aaaa hello,漢字")
def test_sentencepiece_equals_the_literal_algorithm(text: str) -> None:
    ids = SPM.encode(text)
    assert ids == [2, *spm_reference(spm_metadata(), text)]
    assert SPM.decode(ids) == text.replace("▁", " ")


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_the_space_before_a_text_is_added_and_taken_away(text: str) -> None:
    """At the start of the text and after every special token, as Llama 2's tokenizer does it."""
    text = re.sub(r"[ \n<▁]+", " ", text)  # symbols would split the text
    ids = SPM_SPACE.encode(text)
    assert SPM_SPACE.decode(ids) == text
    assert ids[0] == 2
    again = SPM_SPACE.encode("<bos>" + text, add_special_tokens=False)
    assert again == ids
    if text.startswith("hello") and text[5:6] in ("", " ", ","):
        assert SPM_SPACE.token_text(ids[1]) == " hello"


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 599)))
def test_decode_equals_the_librarys_where_the_bytes_are_text(ids: list[int]) -> None:
    theirs = SMOLLM.backend.decode(ids)
    if "�" not in theirs:
        assert SMOLLM.decode(ids) == theirs


def test_special_tokens_are_found_in_text_and_skipped_on_the_way_back() -> None:
    ids = SMOLLM.encode("<|im_start|>user\nhi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert SMOLLM.decode(ids) == "user\nhi"
    assert SMOLLM.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>"
    assert SMOLLM.bos_token_id == 1
    assert SMOLLM.eos_token_ids == (0, 2)  # <|endoftext|> ends an answer too
    assert SMOLLM.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert SPM.eos_token_ids == (1, 4)  # eos and <end_of_turn>
    assert SMOLLM.id_of("<|im_end|>") == 2
    assert SMOLLM.id_of("no such token") is None
    assert SMOLLM.token_bytes(10**6) == b"" == SMOLLM.token_bytes(-1)
    assert SMOLLM.encode_batch(["hi", "", "the"]) == [SMOLLM.encode(text) for text in ("hi", "", "the")]


def test_bos_and_eos_flags() -> None:
    metadata = bpe_metadata(SMOLLM_REFERENCE, "smollm")
    plain = Tokenizer(build_from_gguf(metadata)).encode("hi")
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    both = Tokenizer(build_from_gguf({**metadata, **flags}))
    assert both.encode("hi") == [1, *plain, 2]
    assert both.encode("hi", add_special_tokens=False) == plain
    no_bos = Tokenizer(build_from_gguf(spm_metadata(**{"tokenizer.ggml.add_bos_token": False})))
    assert no_bos.encode("hello") == SPM.encode("hello")[1:]
    assert pre_tokenizer_row("llama-bpe").add_bos
    assert not pre_tokenizer_row("qwen2").add_bos


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's  12 ab!\n\n x", ["it", "'s", "Ġ", "Ġ12", "Ġab", "!", "ĊĊ", "Ġx"]),
        ("smollm", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "IT'S 12345!\n\nx", ["IT", "'S", "Ġ", "123", "45", "!ĊĊ", "x"]),
        ("qwen2", "v 12!\n\n\tx  y", ["v", "Ġ", "1", "2", "!ĊĊ", "ĉx", "Ġ", "Ġy"]),
        ("tekken", "CamelCase 12/", ["Camel", "Case", "Ġ", "1", "2", "/"]),
        ("gpt-4o", "CamelCase's 1234", ["Camel", "Case's", "Ġ", "123", "4"]),
        ("deepseek-v3", "1234 ab+c (x", ["123", "4", "Ġab", "+c", "Ġ(", "x"]),
    ],
)
def test_pre_tokenizers_cut_as_published(pre: str, text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in TABLE[pre].pre_tokenizer().pre_tokenize_str(text)] == pieces


def test_every_row_loses_nothing() -> None:
    text = "".join(CORPUS) + " ²½ ﬁ\r\n\r\n \t end  "
    backend = trained_bpe(pre_tokenizers.ByteLevel(False))
    for pre, row in TABLE.items():
        tokenizer = Tokenizer(build_from_gguf(bpe_metadata(backend, pre)))
        assert tokenizer.decode(tokenizer.encode(text)) == text, pre
        assert row.nfc or tokenizer.encode("e\u0301", False) != tokenizer.encode("é", False)


def test_composed_characters_where_the_model_composes() -> None:
    tokenizer = Tokenizer(build_from_gguf(bpe_metadata(SMOLLM_REFERENCE, "qwen2")))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_whole_words_need_no_merges() -> None:
    metadata = bpe_metadata(SMOLLM_REFERENCE, "llama-bpe")
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:1]
    the = metadata["tokenizer.ggml.tokens"].index("Ġthe")
    assert Tokenizer(build_from_gguf(metadata)).encode(" the", False) == [the]
    assert Tokenizer(build_from_gguf({**metadata, "tokenizer.ggml.pre": "qwen2"})).encode(" the") != [the]


BAD_METADATA = [
    ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert'"),
    ({"tokenizer.ggml.pre": "never-heard-of"}, "never-heard-of"),
    ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
    ({"tokenizer.ggml.merges": ["nospace"]}, "'nospace'"),
    ({"tokenizer.ggml.merges": ["zzzz yyyy"]}, "do not fit"),
    ({"tokenizer.ggml.eos_token_id": 10**9}, "eos_token_id is 1000000000"),
    ({"tokenizer.ggml.bos_token_id": "x"}, "bos_token_id"),
]


@pytest.mark.parametrize(("change", "says"), BAD_METADATA, ids=[says for _, says in BAD_METADATA])
def test_bad_metadata_is_one_clear_error(change: dict[str, Any], says: str) -> None:
    metadata = {**bpe_metadata(SMOLLM_REFERENCE, "smollm"), **change}
    with pytest.raises(ModelFileError, match=says):
        load_tokenizer(Files("gguf", metadata))


def test_sentencepiece_needs_scores() -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.scores"):
        build_from_gguf(spm_metadata(**{"tokenizer.ggml.scores": [0.0]}))


def test_generation_config_names_more_ends() -> None:
    files = Files("gguf", spm_metadata(), generation_config={"eos_token_id": [1, 3, 10**9]})
    assert load_tokenizer(files).eos_token_ids == (1, 3, 4)


def test_equal_entries_encode_as_the_first() -> None:
    metadata = bpe_metadata(SMOLLM_REFERENCE, "smollm")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "Ġthe"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], UNUSED]
    assert Tokenizer(build_from_gguf(metadata)).encode(" the") == SMOLLM.encode(" the")


def write_folder(path: Path, config: dict[str, Any] | None = None) -> Path:
    backend = smollm_backend()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.enable_truncation(4)
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_folder(tmp_path: Path) -> None:
    size = SMOLLM.vocab_size
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "added_tokens_decoder": {
            str(size): {"content": "<tool>", "special": False, "lstrip": False, "normalized": False},
            str(size + 1): {"content": "<|extra|>", "special": True},
            "0": {"content": "<|endoftext|>", "special": True},
        },
    }
    write_folder(tmp_path, config)
    files = Files("safetensors", {"eos_token_id": 2}, tmp_path, generation_config={"eos_token_id": [2, 0]})
    tokenizer = load_tokenizer(files)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (0, 2)
    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    text = "a long text that would be cut to four tokens<tool>x<|extra|>"
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert {size, size + 1} <= set(ids)
    assert tokenizer.decode(ids) == text.removesuffix("<|extra|>")
    assert tokenizer.vocab_size == size + 2
    by_file = load_tokenizer(Files("gguf", {}), str(tmp_path / "tokenizer.json"))
    assert by_file.encode(text) == ids


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        load_tokenizer(Files("safetensors", {}, tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"only a tokenizer\.model"):
        load_tokenizer(Files("safetensors", {}, tmp_path))
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(ModelFileError, match="not a readable tokenizer"):
        load_tokenizer(Files("safetensors", {}, tmp_path))
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match="JSON object"):
        load_tokenizer(Files("safetensors", {}, tmp_path))


def test_a_decoder_that_cannot_go_token_by_token_is_refused(tmp_path: Path) -> None:
    backend = smollm_backend()
    backend.decoder = decoders.CTC()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelFileError, match="'CTC'"):
        load_tokenizer(Files("safetensors", {}, tmp_path))


def test_metaspace_tokenizers(tmp_path: Path) -> None:
    """Newer Llama 2 exports write the space mark with Metaspace instead of a normalizer."""
    backend = SPM_SPACE.backend.__class__.from_str(SPM_SPACE.backend.to_str())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(Files("safetensors", {}, tmp_path))
    ids = tokenizer.encode("hello the 😀")
    assert tokenizer.decode(ids) == "hello the 😀"
    assert [tokenizer.token_text(i) for i in ids[1:3]] == [" hello", " the"]


def test_added_tokens_are_literal_text(tmp_path: Path) -> None:
    """A character of the byte alphabet inside an added token stands for itself."""
    backend = smollm_backend()
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<réponse>", special=False, normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(Files("safetensors", {}, tmp_path))
    assert tokenizer.decode(tokenizer.encode("a<réponse>é")) == "a<réponse>é"


@pytest.mark.parametrize("size", [1000, 256, 100])
def test_dummy_models_speak_bytes(size: int) -> None:
    tokenizer = load_tokenizer(
        Files("dummy", {"vocab_size": size, "eos_token_id": [5, 10**6], "bos_token_id": 1})
    )
    assert tokenizer.vocab_size == size
    assert tokenizer.eos_token_ids == (5,)
    assert tokenizer.encode("AB\n") == [65, 66, 10]
    text = "naïve 😀"
    ids = tokenizer.encode(text)
    assert max(ids) < size
    if size >= 256:
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert all(tokenizer.token_bytes(i) for i in range(size))
    if size > 256:
        assert tokenizer.decode([72, 300, 301]) == "H t300 t301"


def test_dummy_models_need_a_vocabulary_size() -> None:
    with pytest.raises(ModelFileError, match="vocab_size"):
        load_tokenizer(Files("dummy", {}))
    assert load_tokenizer(Files("dummy", {"text_config": {"vocab_size": 300}})).vocab_size == 300
    assert load_tokenizer(Files("dummy", {"llama.vocab_size": 300})).vocab_size == 300


def test_tokens_with_a_text_in_them() -> None:
    tokenizer = make_tokenizer()
    for text in ("a", "think>", "</think>", "é", "\0", "<think></think>", "x\0y"):
        part = text.encode()
        known = {i for i in range(tokenizer.vocab_size) if part in tokenizer.token_bytes(i)}
        assert tokenizer.tokens_with(text) == known, text
    for n in range(100):
        tokenizer.tokens_with(f"{n}")
    assert len(tokenizer._with) <= 32

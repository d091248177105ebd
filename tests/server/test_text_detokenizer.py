"""Text in pieces equals the text in one piece, and no piece shows half a character."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import Files, smollm_tokenizer, spm_tokenizer

from octavo.api.text.detokenizer import Detokenizer
from octavo.api.text.tokenizer import Tokenizer, load_tokenizer

TOKENIZERS = {
    "byte-level": smollm_tokenizer(),
    "sentencepiece": spm_tokenizer(),
    "sentencepiece with a space": spm_tokenizer(add_space_prefix=True),
    "bytes": load_tokenizer(Files("dummy", {"vocab_size": 300})),
}
KINDS = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    return [ids[a:b] for a, b in pairwise(places)]


@KINDS
@settings(deadline=None, max_examples=120)
@given(
    ids=st.lists(st.integers(-1, 620), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=12),
    skip=st.booleans(),
)
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(tokenizer, skip)
    text = "".join(detokenizer.push(piece) for piece in split(ids, cuts)) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip)


@KINDS
@settings(deadline=None, max_examples=80)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="�▁"), max_size=30))
def test_no_half_characters(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer.strip_start:
        text = re.sub(r"[ \n<]+", " ", text)  # a space follows every symbol there
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
    seen = ""
    for token in tokenizer.encode(text):
        seen += detokenizer.push([token])
        assert text.startswith(seen)
    assert seen == text
    assert detokenizer.flush() == ""


def test_what_never_ends_is_shown_at_the_end() -> None:
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([0xF0, 0x9F, 0x98]) == ""
    assert detokenizer.flush() == "�"


def test_an_answer_completes_the_prompts_last_character() -> None:
    tokenizer = TOKENIZERS["bytes"]
    first, rest = list("😀".encode())[:2], list("😀".encode())[2:]
    detokenizer = Detokenizer(tokenizer, prompt_ids=[65, *first])
    assert detokenizer.push(rest) == "😀"
    assert Detokenizer(tokenizer, prompt_ids=[65]).push([66]) == "B"


def test_an_answer_keeps_the_space_between_it_and_the_prompt() -> None:
    tokenizer = TOKENIZERS["sentencepiece with a space"]
    ids = tokenizer.encode("hello the", add_special_tokens=False)
    assert [tokenizer.token_text(i) for i in ids] == [" hello", " the"]
    assert Detokenizer(tokenizer, prompt_ids=ids[:1]).push(ids[1:]) == " the"
    assert Detokenizer(tokenizer).push(ids) == "hello the"

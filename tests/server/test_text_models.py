"""The demo models' own files: tokens equal to independent readings of them, and the chat prompt that they were trained on."""

from __future__ import annotations

import random

import pytest
from text_helpers import spm_reference
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.api.chat.request import ChatPrompt, ChatRequest
from octavo.api.text.detokenizer import Detokenizer
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer, load_tokenizer
from octavo.files.resolve import open_model

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("default")]  # transformers' warnings are not ours

TEXTS = [
    "Hello world",
    "  two spaces, then\n\n\na\tb\t\t\tc   d    e ",
    "日本語のテスト 漢字 한국어 مرحبا Привет",
    "😀👨‍👩‍👧 naïve e\u0301 🏳️‍🌈🇩🇪 \u200b\u00a0 \uff21\uff22 ﬁ",
    "def f(x):\n    return x**2  # it's we'LL I'm\r\n\r\n",
    "<|im_start|>user\nhi<|im_end|>\n<start_of_turn>user\nhi<end_of_turn>\n<bos><eos><unused5>",
    "<b>bold</b> <table></table> <0x41> ▁under ▁▁x \x00\x01",
    "a" * 300,
]


def mixed_texts(alphabet: str) -> list[str]:
    shuffled = random.Random(0)
    return ["".join(shuffled.choices(alphabet, k=40)) for _ in range(100)]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = Detokenizer(tokenizer)
    return "".join([stream.push([i]) for i in ids]) + stream.flush()


def test_smollm2_tokens_equal_transformers() -> None:
    files = open_model("smollm2:135m")
    tokenizer = load_tokenizer(files)
    theirs = AutoTokenizer.from_pretrained(files.path.parent, gguf_file=files.path.name)
    assert tokenizer.encode("Hello world") == [19556, 905]
    # No digits: transformers' GGUF conversion leaves out the split at digits that SmolLM2's own tokenizer has.
    for text in TEXTS + mixed_texts("abc XYZ\n\t.,'é漢😀▁<>|"):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert tokenizer.encode("a 42") == [81, 216, 36, 34]  # digits stand alone, the space before them too


def test_gemma3_tokens_equal_the_literal_algorithm() -> None:
    files = open_model("gemma3:270m")
    tokenizer = load_tokenizer(files)
    assert tokenizer.encode("Hello world") == [2, 9259, 1902]
    text = "\x00".join([*TEXTS, "x" + " " * 40 + "y", *mixed_texts("abc XYZ 0123\n\t.,'é漢😀▁<>|")[:20]])
    ids = tokenizer.encode(text)
    assert ids == [2, *spm_reference(files.config, text)]
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text.replace("▁", " ")
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert set(tokenizer.eos_token_ids) >= {1, 106}


def test_smollm2_chat_prompt() -> None:
    files = open_model("smollm2:135m")
    tokenizer = load_tokenizer(files)
    assert {0, 2} <= set(tokenizer.eos_token_ids)
    template = ChatTemplate(files.chat_template, tokenizer.special_tokens)
    messages = [{"role": "user", "content": "What is <b>?"}, {"role": "assistant", "content": "x"}]
    request = ChatRequest(messages=messages)
    expected, _ = render_jinja_template(
        [messages], chat_template=files.chat_template, add_generation_prompt=True, **tokenizer.special_tokens
    )
    prompt = ChatPrompt(tokenizer, template)
    assert prompt.render(request) == expected[0]
    ids = prompt.token_ids(request)
    assert ids[0] == tokenizer.id_of("<|im_start|>")
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected[0]

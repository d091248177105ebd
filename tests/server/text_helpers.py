"""Small tokenizers and a scripted engine for the tests of the front half."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from octavo.api.text.gguf_tokenizer import build_from_gguf
from octavo.api.text.pieces import byte_level_alphabet
from octavo.api.text.tokenizer import Tokenizer
from octavo.engine.client.base import Sink
from octavo.errors import EngineDeadError, QueueFullError
from octavo.files.base import TensorInfo
from octavo.protocol.control import Control, ControlReply, EngineInfo
from octavo.protocol.generate import GenerateRequest, TokenDelta

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's a test, isn't it? We'll see, they're here.",
    "def main(argv):\n    return sum(int(x) for x in argv[1:])  # 1234567890\n\n\n",
    "Größe, naïve café, señor, Привет мир, 日本語の漢字, 한국어, 😀😀 🎉\n",
    "    indented\n\ttabbed   spaces  and  more   words words words the the the",
] * 4

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class Files:
    """What a tokenizer needs of ``ModelFiles``."""

    format: str
    config: Mapping[str, Any]
    path: Path = Path(".")
    name: str = "test"
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    def read(self, name: str) -> NDArray[np.uint8]:
        raise KeyError(name)

    def close(self) -> None:
        pass


def trained_bpe(pre_tokenizer: pre_tokenizers.PreTokenizer, vocab_size: int = 600) -> Backend:
    """A byte-level BPE with specials <|endoftext|> <|im_start|> <|im_end|>, cut by ``pre_tokenizer``."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(byte_level_alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def bpe_metadata(backend: Backend, pre: str, **extra: Any) -> dict[str, Any]:
    """The GGUF metadata of a trained byte-level BPE."""
    model = json.loads(backend.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **extra,
    }


def smollm_backend() -> Backend:
    """The pipeline of SmolLM2's own tokenizer.json: single digits, then GPT-2's cut."""
    return trained_bpe(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
    )


def smollm_tokenizer() -> Tokenizer:
    """A small tokenizer of SmolLM2's kind."""
    return Tokenizer(build_from_gguf(bpe_metadata(smollm_backend(), "smollm")))


def spm_metadata(add_space_prefix: bool = False, **extra: Any) -> dict[str, Any]:
    """A small SentencePiece vocabulary of Gemma's layout: specials, symbols, bytes, merged pieces, characters."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"]
    symbols = ["\n", "\n\n", "  ", "   ", "<b>"]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    pieces = [
        "▁t",
        "he",
        "▁the",
        "in",
        "er",
        "▁a",
        "an",
        "ab",
        "aba",
        "bab",
        "abab",
        "ba",
        "▁▁",
        "▁x",
        "hell",
        "ll",
    ]
    pieces += ["el", "hel", "lo", "hello", "▁hello", "漢字", "▁漢", "x▁", "t▁", "aa", "aaa"]
    characters = list("▁abcdehilnorstx,.!漢字é")
    tokens = specials + symbols + byte_tokens + pieces + characters
    if not add_space_prefix:
        tokens.remove("▁▁")
        pieces.remove("▁▁")
    merged = len(pieces) + len(characters)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1000.0] * 10 + [0.0] * 256 + [-float(i) for i in range(merged)],
        "tokenizer.ggml.token_type": [CONTROL] * 3
        + [UNKNOWN, CONTROL]
        + [USER_DEFINED] * 5
        + [BYTE] * 256
        + [NORMAL] * merged,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
        **extra,
    }


def spm_tokenizer(add_space_prefix: bool = False) -> Tokenizer:
    """A small tokenizer of Gemma's kind (or Llama 2's, with the space)."""
    return Tokenizer(build_from_gguf(spm_metadata(add_space_prefix)))


def spm_reference(metadata: Mapping[str, Any], text: str) -> list[int]:
    """SentencePiece's BPE, literally: symbols first, then join the best-scoring adjacent pair until none is left."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    kinds = (UNKNOWN, CONTROL, USER_DEFINED)
    symbols = {tokens[i].replace(" ", "▁"): i for i, kind in enumerate(types) if kind in kinds}
    pieces = {tokens[i]: i for i, kind in enumerate(types) if kind == NORMAL}
    byte_ids = {int(tokens[i][3:5], 16): i for i, kind in enumerate(types) if kind == BYTE}
    ids: list[int] = []
    for part in _cut_symbols(text.replace(" ", "▁"), symbols):
        if part in symbols:
            ids.append(symbols[part])
            continue
        chars = list(part)
        while True:
            pairs = [
                (-scores[pieces[a + b]], i) for i, (a, b) in enumerate(pairwise(chars)) if a + b in pieces
            ]
            if not pairs:
                break
            _, i = min(pairs)
            chars[i : i + 2] = [chars[i] + chars[i + 1]]
        for char in chars:
            ids += [pieces[char]] if char in pieces else [byte_ids[byte] for byte in char.encode()]
    return ids


def _cut_symbols(text: str, symbols: Mapping[str, int]) -> list[str]:
    """Leftmost, longest symbols of ``text`` and what lies between them."""
    longest = max(map(len, symbols))
    parts, start, i = [], 0, 0
    while i < len(text):
        found = next((text[i : i + n] for n in range(longest, 0, -1) if text[i : i + n] in symbols), None)
        if found is None:
            i += 1
            continue
        if start < i:
            parts.append(text[start:i])
        parts.append(found)
        i = start = i + len(found)
    if start < len(text):
        parts.append(text[start:])
    return parts


class ScriptedClient:
    """An engine whose deltas the test sends by hand; it keeps what it was asked."""

    def __init__(self, vocab_size: int, max_model_len: int = 64, max_requests: int = 100) -> None:
        self.info = EngineInfo(
            model="test",
            architecture="test",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            page_size=16,
            num_pages=64,
            dtype="float32",
            device="cpu",
        )
        self.alive = True
        self.max_requests = max_requests
        self.requests: list[GenerateRequest] = []
        self.sinks: dict[int, Sink] = {}
        self.aborted: list[int] = []

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        if not self.alive:
            raise EngineDeadError("The engine has stopped.")
        if len(self.sinks) >= self.max_requests:
            raise QueueFullError("The queue is full.")
        self.requests.append(request)
        self.sinks[request.id] = sink

    def abort(self, ids: list[int]) -> None:
        self.aborted += ids
        for i in ids:
            self.sinks.pop(i, None)

    async def control(self, command: Control) -> ControlReply:
        return self.info

    async def close(self) -> None:
        self.alive = False

    def send(self, which: int, tokens: list[int], finish: str | None = None, **more: Any) -> None:
        """A delta for the request that was submitted as number ``which``."""
        request_id = self.requests[which].id
        sink = self.sinks[request_id]
        if finish is not None:
            del self.sinks[request_id]
        sink(TokenDelta(id=request_id, tokens=tokens, finish_reason=finish, **more))  # type: ignore[arg-type]

    def die(self) -> None:
        """Every open request gets the last delta that the client promises."""
        self.alive = False
        for request_id, sink in list(self.sinks.items()):
            sink(TokenDelta(id=request_id, tokens=[], finish_reason="error", error="The engine died."))
        self.sinks.clear()

"""Build a tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama", Gemma included).

Source: the GGUF specification (tokenizer.ggml.*). Token types: 1 normal, 2 unknown, 3 control, 4 user defined,
5 unused, 6 byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from octavo.api.text.merge_cache import kept_merges
from octavo.api.text.pieces import SPACE_MARK
from octavo.api.text.pretokenizers import pre_tokenizer_row
from octavo.errors import ModelFileError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Control tokens that end an answer in the chat formats in use; files name only one of them as eos.
END_OF_TURN = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<turn|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot|>",
        "<|return|>",
        "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001  (the model's own spelling)
    }
)


@dataclass(frozen=True)
class BuiltTokenizer:
    """A ``tokenizers`` object and the ids that its file names."""

    backend: Tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    named_tokens: dict[str, str]  # bos_token, eos_token, ... as templates know them


def build_from_gguf(metadata: Mapping[str, Any]) -> BuiltTokenizer:
    """Build from ``tokenizer.ggml.*``; ``ModelFileError`` names the key that is missing, malformed or unsupported."""
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = _types(metadata, len(tokens))
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens, types)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(metadata, tokens, types), True
    else:
        raise ModelFileError(
            f"The GGUF file's tokenizer.ggml.model {kind!r} is not supported (supported: gpt2, llama).",
            "Use --tokenizer with the original model's folder or tokenizer.json.",
        )
    special = [
        AddedToken(tokens[i], special=True, normalized=False)
        for i, token_type in enumerate(types)
        if token_type in (CONTROL, UNKNOWN) and tokens[i]
    ]
    # User-defined symbols are cut out first, the longest at each place, and never merged further. SentencePiece looks for
    # them where spaces are already written as its mark; a space put before the text would become part of the symbol.
    normalized = kind == "llama" and not _adds_space(metadata)
    literal = [
        AddedToken(tokens[i], special=False, normalized=normalized)
        for i, token_type in enumerate(types)
        if token_type == USER_DEFINED and tokens[i]
    ]
    backend.add_special_tokens(special)
    backend.add_tokens(literal)
    named = _named(metadata, tokens)
    _add_ends(backend, metadata, named, add_bos)
    eos = {named[key][0] for key in ("eos_token", "eot_token", "eom_token") if key in named}
    eos |= {
        i for i, token in enumerate(tokens) if token in END_OF_TURN and types[i] in (CONTROL, USER_DEFINED)
    }
    return BuiltTokenizer(
        backend=backend,
        bos_token_id=named["bos_token"][0] if "bos_token" in named else None,
        eos_token_ids=tuple(sorted(eos)),
        named_tokens={key: text for key, (_, text) in named.items()},
    )


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    row = pre_tokenizer_row(name)
    merges = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space:
            raise ModelFileError(
                f"The GGUF file's tokenizer.ggml.merges holds {merge!r}, which is not a pair."
            )
        merges.append((left, right))
    try:
        model = BPE(_vocabulary(tokens), merges, ignore_merges=row.whole_words)
    except Exception as error:  # noqa: BLE001  (the library raises no narrower one)
        raise ModelFileError(f"The GGUF file's merges do not fit its vocabulary: {error}.") from None
    backend = Tokenizer(model)
    normalizer = row.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = row.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend, row.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, Sequence) or len(scores) != len(tokens):
        raise ModelFileError(
            "The GGUF file's tokenizer.ggml.scores is missing or not as long as its vocabulary."
        )
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == UNKNOWN), None)
    if unknown is None and isinstance(unk_id := metadata.get("tokenizer.ggml.unknown_token_id"), int):
        unknown = tokens[unk_id] if 0 <= unk_id < len(tokens) else None
    vocabulary = _vocabulary(tokens)
    try:
        model = BPE(
            vocabulary,
            kept_merges(
                tokens, scores, types, partial(sentencepiece_merges, tokens, scores, types), vocabulary
            ),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # noqa: BLE001  (the library raises no narrower one)
        raise ModelFileError(f"The GGUF file's vocabulary is not usable: {error}.") from None
    backend = Tokenizer(model)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    parts: list[decoders.Decoder] = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if _adds_space(metadata):
        spaces.insert(0, normalizers.Prepend(SPACE_MARK))
        parts.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(parts)
    return backend


def _adds_space(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("tokenizer.ggml.add_space_prefix", True))


def sentencepiece_merges(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merge list that joins what SentencePiece's BPE joins: the adjacent pair whose union scores highest.

    Every way to cut a vocabulary entry into two entries is a merge; merges are ordered by the score of the union.
    """
    usable = {tokens[i]: i for i, kind in enumerate(types) if kind in (NORMAL, UNUSED)}
    order = sorted((i for i in usable.values() if len(tokens[i]) > 1), key=lambda i: -scores[i])
    merges: list[tuple[str, str]] = []
    for i in (
        order
    ):  # a quarter of a million entries in Gemma's vocabulary: look up little, sort only where needed
        token, start = tokens[i], len(merges)
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in usable:
                right = token[cut:]
                if right in usable:
                    merges.append((left, right))
        if len(merges) > start + 1:
            merges[start:] = sorted(merges[start:], key=lambda pair: (usable[pair[0]], usable[pair[1]]))
    return merges


def _add_ends(
    backend: Tokenizer, metadata: Mapping[str, Any], named: dict[str, tuple[int, str]], add_bos: bool
) -> None:
    template, specials = ["$A"], []
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in named:
        template.insert(0, named["bos_token"][1])
        specials.append(named["bos_token"][::-1])
    if metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in named:
        template.append(named["eos_token"][1])
        specials.append(named["eos_token"][::-1])
    if specials:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=list(dict(specials).items())
        )


def _named(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, tuple[int, str]]:
    """bos_token -> (id, text) and so on, for the ids that the file gives."""
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unknown": "unk", "padding": "pad"}
    named = {}
    for key, short in keys.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise ModelFileError(
                f"The GGUF file's tokenizer.ggml.{key}_token_id is {token_id}, outside its {len(tokens)} tokens."
            )
        named[f"{short}_token"] = (token_id, tokens[token_id])
    return named


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocabulary.setdefault(token, i)  # of equal texts the first id is the one that encodes
    return vocabulary


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    value = list(value) if isinstance(value, Sequence) else value
    if not isinstance(value, list) or not value or set(map(type, value)) != {str}:
        raise ModelFileError(f"The GGUF file's {key} is missing or not a list of strings.")
    return value


def _types(metadata: Mapping[str, Any], count: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * count
    if len(types) != count:
        raise ModelFileError(
            f"The GGUF file's tokenizer.ggml.token_type has {len(types)} entries for {count} tokens."
        )
    return list(types)

"""The table of ``tokenizer.ggml.pre``: how each byte-level BPE vocabulary wants its text cut before merging.

A GGUF file names the cut instead of describing it. The expressions are the ones published in each model's own
tokenizer.json. A name that is not here is refused: a wrong cut gives wrong tokens without any error.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from octavo.errors import ModelFileError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
TEKKEN = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _TAIL,
)
DIGITS = r"\p{N}"


@dataclass(frozen=True)
class PreTokenizer:
    """One row: expressions applied one after the other, and what else differs between the families.

    ``whole_words``: a word that is in the vocabulary is one token, whatever the merges say.
    ``add_bos``: the default where the file does not say.
    """

    expressions: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The cuts, then the byte-level alphabet."""
        cuts: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in self.expressions
        ]
        return pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def normalizer(self) -> normalizers.Normalizer | None:
        """NFC where the model's own tokenizer composes characters first."""
        return normalizers.NFC() if self.nfc else None


_GPT2 = PreTokenizer((GPT2,))
_DIGITS = PreTokenizer((DIGITS, GPT2))
_LLAMA3 = PreTokenizer((LLAMA3,), whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer((QWEN2,), nfc=True)

TABLE: dict[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "mpt": PreTokenizer((GPT2,), nfc=True),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "command-r": PreTokenizer((DIGITS, GPT2), nfc=True, add_bos=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": PreTokenizer((LLAMA3,)),
    "smaug-bpe": PreTokenizer((LLAMA3,)),
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
    "deepseek-r1-qwen": PreTokenizer((QWEN2,), add_bos=True),
    "tekken": PreTokenizer((TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o": PreTokenizer((GPT4O,)),
    "llama4": PreTokenizer((GPT4O,), add_bos=True),
    "deepseek-v3": PreTokenizer(DEEPSEEK_V3, add_bos=True),
}


def pre_tokenizer_row(name: str) -> PreTokenizer:
    """The row for ``tokenizer.ggml.pre``; ``ModelFileError`` where the name is unknown."""
    row = TABLE.get(name)
    if row is None:
        raise ModelFileError(
            f"The GGUF file's tokenizer.ggml.pre {name!r} is not known to Octavo (known: {', '.join(sorted(TABLE))}).",
            "Use --tokenizer with the original model's folder or tokenizer.json.",
        )
    return row

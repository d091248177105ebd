"""What an encoder is made of, as plain descriptions: shapes and checkpoint names. No torch, no memory.

x = norm(token + position + type)     then each layer:     x = norm(x + attention(x));  x = norm(x + mlp(x))
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.model.blocks import Embedding, Linear, Norm, PlainMLP


@dataclass(frozen=True)
class EncoderLayer:
    """Attention over the whole text, both ways, and an MLP; each branch is normed together with its input."""

    qkv: Linear
    output: Linear
    attention_norm: Norm
    mlp: PlainMLP
    mlp_norm: Norm


@dataclass(frozen=True)
class Classifier:
    """A head over the first token: numbers = out(tanh(dense(x))), one a label."""

    dense: Linear
    out: Linear


@dataclass(frozen=True)
class EncoderSpec:
    """A whole encoder. The first token has the position ``first_position``; a text has at most ``max_length`` tokens.

    The other names mean what they mean in ``DecoderSpec``.
    """

    embedding: Embedding
    positions: Embedding
    types: Embedding
    norm: Norm
    layers: tuple[EncoderLayer, ...]
    num_heads: int
    max_length: int
    first_position: int = 0
    hf_layer_prefix: str = ""
    bare_prefix: str = ""
    ignored: tuple[str, ...] = ()
    ignored_prefixes: tuple[str, ...] = ()
    head: None = None
    classifier: Classifier | None = None

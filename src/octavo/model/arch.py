"""The numbers of an architecture, read from config.json or from GGUF metadata into one shape. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.model.blocks import Activation


@dataclass(frozen=True)
class ArchConfig:
    """What every decoder has; ``raw`` keeps the source for what only one family knows.

    ``model_type`` is Hugging Face's and names the file in ``families/``. ``rope`` maps a layer type
    ("full_attention", "sliding_attention") to its rope parameters (rope_type, rope_theta, factor, ...).
    ``layer_types`` has one entry a layer. ``sliding_window`` 0 = none. ``quantized`` is True where matrices are
    stored in blocks or with scales. ``from_gguf`` says which name table and conventions the weights follow.
    ``implementation`` says whose modules compute it: "octavo", or transformers and its version, which then counted
    ``num_parameters``.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    layer_types: tuple[str, ...]
    rope: Mapping[str, Mapping[str, Any]]
    sliding_window: int = 0
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    query_scale: float | None = None  # query_pre_attn_scalar; attention scale is its power -1/2
    dtype: str = "bfloat16"
    quantized: bool = False
    from_gguf: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    implementation: str = "octavo"
    num_parameters: int = 0
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """The architecture, and whose modules compute it where they are not ours."""
        return (
            self.model_type
            if self.implementation == "octavo"
            else f"{self.model_type} ({self.implementation})"
        )

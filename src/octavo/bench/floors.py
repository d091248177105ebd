"""What a card cannot beat: bytes over its copy bandwidth, operations over its matrix rate, for whole steps and loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """Rates measured in the same run: bytes/s of a copy (read and written), FLOP/s of large bf16 and fp8 products."""

    copy: float
    bf16: float
    fp8: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What one dense decoder must read and compute; weights of the layers take one byte with ``fp8``, else two."""

    layer_elements: int
    head_elements: int
    kv_bytes: int  # a token, all layers
    pair_flops: int  # a visible pair of query and key, all layers and heads
    fp8: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], fp8: bool = False) -> Costs:
        """From a config.json of Llama's shape."""
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
        dim = int(config.get("head_dim") or hidden // heads)
        one = hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden
        one += 3 * hidden * int(config["intermediate_size"])
        return cls(
            layers * one,
            hidden * int(config["vocab_size"]),
            layers * 2 * kv_heads * dim * 2,
            layers * 4 * heads * dim,
            fp8,
        )

    def step_s(self, rows: int, context: float, ceilings: Ceilings) -> float:
        """Seconds of a decode step of ``rows`` sequences that see ``context`` tokens each."""
        weights = self.layer_elements * (1 if self.fp8 else 2) + 2 * self.head_elements
        moved = (weights + rows * context * self.kv_bytes) / ceilings.copy
        return max(moved, rows * self._product_s(ceilings, self.head_elements))

    def prefill_s(self, tokens: int, cached: int, ceilings: Ceilings) -> float:
        """Seconds of computing ``tokens`` prompt tokens of one sequence behind ``cached`` ones, one row drawn."""
        pairs = tokens * cached + tokens * (tokens + 1) / 2
        return (
            tokens * self._product_s(ceilings, 0)
            + (2 * self.head_elements + pairs * self.pair_flops) / ceilings.bf16
        )

    def load_s(
        self, rows: int, prompt: int, cached: int, answer: int, ceilings: Ceilings, *, waves: float = 1.0
    ) -> float:
        """Seconds of ``waves`` times ``rows`` requests of these lengths (tokens), all of a wave decoding together."""
        decode = answer * self.step_s(rows, cached + prompt + answer / 2, ceilings)
        return waves * (rows * self.prefill_s(prompt, cached, ceilings) + decode)

    def _product_s(self, ceilings: Ceilings, head_elements: int) -> float:
        rate = ceilings.fp8 if self.fp8 and ceilings.fp8 else ceilings.bf16
        return 2 * self.layer_elements / rate + 2 * head_elements / ceilings.bf16

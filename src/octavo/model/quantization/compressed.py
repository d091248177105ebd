"""compressed-tensors' "pack-quantized" (llm-compressor's W4A16 and W8A16).

weight_packed [N, K bits / 32]: signed codes + 2^(bits - 1), from the lowest bits on; weight_scale [N, groups];
weight_zero_point [N bits / 32, groups] packed the same along outputs; weight_g_idx [K]; weight_shape [2].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.device.ops.packed import Layout, ScaleKind
from octavo.model.layers.load import Source
from octavo.model.quantization.describe import Scheme
from octavo.model.quantization.packed import Rows, choose_width, order_of, shaped, unpack_bits, zero_fields


@dataclass(frozen=True)
class CompressedCodes:
    """See ``Codes``."""

    scheme: Scheme
    half: torch.dtype

    def layout(self, inputs: int) -> Layout:
        """See ``Codes``."""
        scheme, bits = self.scheme, self.scheme.bits
        width = choose_width(scheme.group, inputs, bits)
        scales: ScaleKind = "pair" if scheme.symmetric else "zero"
        return Layout(bits, 0, width, scheme.group, scales=scales, offset=1 << (bits - 1), half=self.half)

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """See ``Codes``."""
        return (
            Source("weight_packed", f"{hf}.weight_packed"),
            Source("weight_scale", f"{hf}.weight_scale"),
            Source("weight_zero_point", f"{hf}.weight_zero_point", not self.scheme.symmetric),
            Source("weight_g_idx", f"{hf}.weight_g_idx", required=False),
            Source("weight_shape", f"{hf}.weight_shape", required=False),
        )

    def order(self, stored: Mapping[str, Tensor], inputs: int) -> Tensor | None:
        """See ``Codes``."""
        return order_of(stored.get("weight_g_idx"), self.scheme.group, inputs)

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """See ``Codes``."""
        bits, group = self.scheme.bits, self.scheme.group
        groups = -(-inputs // group) if group else 1
        words = shaped(stored, "weight_packed", -1, -(-inputs * bits // 32), kind=torch.int32)
        outputs = words.shape[0]
        scale = shaped(stored, "weight_scale", outputs, groups)[rows].to(self.half)
        codes = unpack_bits(words[rows], bits, inputs)
        if self.scheme.symmetric:
            return Rows(codes, scale)
        packed = shaped(stored, "weight_zero_point", -(-outputs * bits // 32), groups, kind=torch.int32)
        zeros = unpack_bits(packed.t(), bits, outputs)[:, rows].t()
        return Rows(codes, zero_fields(scale, zeros))

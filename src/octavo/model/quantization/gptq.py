"""GPTQ as AutoGPTQ and GPTQModel pack it (Frantar et al. 2022), of 2, 3, 4 and 8 bits.

qweight [K bits / 32, N]: the codes of an output lie one after the other from the lowest bits on; qzeros [groups,
N bits / 32] the same along outputs, one too low in the packing "gptq", as they are in "gptq_v2"; scales [groups, N];
g_idx [K]: the group of each input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.device.ops.packed import Layout, ScaleKind
from octavo.errors import ModelFileError
from octavo.model.layers.load import Source
from octavo.model.quantization.describe import Scheme
from octavo.model.quantization.packed import Rows, choose_width, order_of, shaped, unpack_bits, zero_fields


@dataclass(frozen=True)
class GptqCodes:
    """See ``Codes``."""

    scheme: Scheme
    half: torch.dtype

    def layout(self, inputs: int) -> Layout:
        """See ``Codes``."""
        scheme, bits = self.scheme, self.scheme.stored_bits
        width = choose_width(scheme.group, inputs, bits)
        scales: ScaleKind = "pair" if scheme.symmetric else "zero"
        return Layout(
            bits, 0, width, scheme.group, scales=scales, offset=1 << (scheme.bits - 1), half=self.half
        )

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """See ``Codes``; a bias of zeros stands in files of models that have none."""
        return (
            Source("qweight", f"{hf}.qweight"),
            Source("qzeros", f"{hf}.qzeros"),
            Source("scales", f"{hf}.scales"),
            Source("g_idx", f"{hf}.g_idx", required=False),
        )

    def order(self, stored: Mapping[str, Tensor], inputs: int) -> Tensor | None:
        """See ``Codes``."""
        return order_of(stored.get("g_idx"), self.scheme.group, inputs)

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """See ``Codes``."""
        bits, group = self.scheme.bits, self.scheme.group
        groups = -(-inputs // group) if group else 1
        words = shaped(stored, "qweight", inputs * bits // 32, -1, kind=torch.int32)
        outputs = words.shape[1]
        scale = shaped(stored, "scales", groups, outputs)[:, rows].t().to(self.half)
        packed = shaped(stored, "qzeros", groups, outputs * bits // 32, kind=torch.int32)
        codes = unpack_bits(words[:, rows].t(), bits, inputs)
        zeros = unpack_bits(packed, bits, outputs)[:, rows].t().to(torch.int16)
        if self.scheme.source == "gptq":
            zeros = zeros + 1
        if not self.scheme.symmetric:
            return Rows(codes, zero_fields(scale, zeros))
        if not (zeros == 1 << (bits - 1)).all():
            raise ModelFileError(
                "A GPTQ matrix has zero points, although its configuration says sym.",
                'Set "sym": false in its quantization_config.',
            )
        return Rows(codes, scale)

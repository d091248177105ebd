"""AWQ as AutoAWQ packs it ("gemm"): qweight [K, N / 8], qzeros [groups, N / 8], scales [groups, N] (Lin et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.device.ops.packed import Layout
from octavo.model.layers.load import Source
from octavo.model.quantization.describe import Scheme
from octavo.model.quantization.packed import Rows, choose_width, shaped, zero_fields

# Column c of eight is the nibble NIBBLES[c] of a word: columns 0 2 4 6 1 3 5 7 from the lowest bits on.
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqCodes:
    """See ``Codes``."""

    scheme: Scheme
    half: torch.dtype

    def layout(self, inputs: int) -> Layout:
        """See ``Codes``; without zero points they are all 8."""
        group = self.scheme.group
        return Layout(4, 0, choose_width(group, inputs), group, scales="zero", half=self.half)

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """See ``Codes``."""
        required = not self.scheme.symmetric
        return (
            Source("qweight", f"{hf}.qweight"),
            Source("qzeros", f"{hf}.qzeros", required),
            Source("scales", f"{hf}.scales"),
        )

    def order(self, stored: Mapping[str, Tensor], inputs: int) -> Tensor | None:
        """See ``Codes``."""
        return None

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """See ``Codes``."""
        groups = inputs // self.scheme.group if self.scheme.group else 1
        words = shaped(stored, "qweight", inputs, -1, kind=torch.int32)
        outputs = words.shape[1] * 8
        scale = shaped(stored, "scales", groups, outputs)[:, rows].t().to(self.half)
        shift = torch.tensor(NIBBLES, device=rows.device)[rows % 8] * 4
        codes = ((words[:, rows // 8] >> shift) & 15).t().to(torch.uint8)
        if "qzeros" not in stored:
            return Rows(codes, zero_fields(scale, torch.full_like(scale, 8)))
        zeros = shaped(stored, "qzeros", groups, outputs // 8, kind=torch.int32)
        return Rows(codes, zero_fields(scale, ((zeros[:, rows // 8] >> shift) & 15).t()))

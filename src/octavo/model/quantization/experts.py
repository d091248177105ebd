"""Stacks of experts whose files hold bytes: fp8 and int8 weights beside 16-bit activations, as codes of ``ops.packed``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.device.ops.fp8 import FP8, quantize_rows
from octavo.device.ops.int8 import quantize_rows_int8
from octavo.device.ops.packed import Layout
from octavo.model.layers.load import Source
from octavo.model.quantization.describe import Scheme
from octavo.model.quantization.packed import LoadedPackedWeight, Rows, shaped

if TYPE_CHECKING:
    from octavo.model.layers.build import Build

BLOCK = 128
FP8_ROWS = Layout(8, 0, 32, 0, code="e4m3", scales="float")
INT8_ROWS = Layout(8, 0, 32, 0, scales="float", offset=128)


def signed_codes(matrix: Tensor) -> Tensor:
    """int8 as codes from 0 to 255."""
    return (matrix.to(torch.int16) + 128).to(torch.uint8)


@dataclass(frozen=True)
class ByteCodes:
    """fp8 or int8 with a scale a matrix, an output, or (fp8) a block of 128 x 128. See ``Codes``."""

    scheme: Scheme

    def layout(self, inputs: int) -> Layout:
        """See ``Codes``."""
        if self.scheme.kind == "int8":
            return INT8_ROWS
        return Layout(8, 0, 32, self.scheme.group, code="e4m3", scales="float")

    def sources(self, hf: str, gguf: str) -> tuple[Source, ...]:
        """See ``Codes``."""
        names = {"fp8": "weight_scale_inv", "deepseek_v4": "scale"} if self.scheme.group else {}
        return (
            Source("weight", f"{hf}.weight"),
            Source("scale", f"{hf}.{names.get(self.scheme.source, 'weight_scale')}"),
            Source("input_scale", f"{hf}.input_scale", required=False),
        )

    def order(self, stored: Mapping[str, Tensor], inputs: int) -> Tensor | None:
        """See ``Codes``."""
        return None

    def read(self, stored: Mapping[str, Tensor], rows: Tensor, inputs: int) -> Rows:
        """See ``Codes``."""
        if self.scheme.kind == "int8":
            codes = signed_codes(shaped(stored, "weight", -1, inputs, kind=torch.int8)[rows])
        else:
            codes = shaped(stored, "weight", -1, inputs, kind=FP8).view(torch.uint8)[rows]
        if self.scheme.group:
            blocks = -(-stored["weight"].shape[0] // BLOCK), -(-inputs // BLOCK)
            return Rows(codes, shaped(stored, "scale", *blocks).float()[rows // BLOCK])
        scale = stored["scale"].float().reshape(-1)
        if scale.numel() == 1:
            return Rows(codes, scale.expand(len(rows)).unsqueeze(1).contiguous())
        return Rows(codes, shaped({"scale": scale}, "scale", stored["weight"].shape[0])[rows].unsqueeze(1))


class Fp8Stack(LoadedPackedWeight):
    """fp8, the largest value of each row exact."""

    def __init__(self, out_features: int, in_features: int, build: Build) -> None:
        super().__init__(FP8_ROWS, out_features, in_features, build, stack=True)

    def quantize(self, values: Tensor) -> Rows:
        """See ``LoadedPackedWeight``."""
        matrix, scale = quantize_rows(values)
        return Rows(matrix.view(torch.uint8), scale.unsqueeze(1))


class Int8Stack(LoadedPackedWeight):
    """int8."""

    def __init__(self, out_features: int, in_features: int, build: Build) -> None:
        super().__init__(INT8_ROWS, out_features, in_features, build, stack=True)

    def quantize(self, values: Tensor) -> Rows:
        """See ``LoadedPackedWeight``."""
        matrix, scale = quantize_rows_int8(values)
        return Rows(signed_codes(matrix), scale.unsqueeze(1))

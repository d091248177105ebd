"""Matrices of 8-bit whole numbers: quantized while they are loaded, or stored so (compressed-tensors' "int-quantized")."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.int8 import LINEAR_INT8, quantize_rows_int8
from octavo.model.quantization.bytes import ByteWeight, StoredByteWeight


class Int8Weight(ByteWeight):
    """See ``ByteWeight``."""

    kind = torch.int8
    op = LINEAR_INT8

    def quantize(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ByteWeight``."""
        return quantize_rows_int8(values)


class StoredInt8Weight(StoredByteWeight, Int8Weight):
    """See ``StoredByteWeight``."""

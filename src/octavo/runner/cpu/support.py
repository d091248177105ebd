"""Can the compiled CPU path run this model? The host asks before it chooses between it and the torch path."""

from __future__ import annotations

import sys

from octavo.device.kernels.numba import formats
from octavo.files.base import ModelFiles
from octavo.model.blocks import DecoderSpec, Layer, Linear


def supports(spec: DecoderSpec, files: ModelFiles) -> str | None:
    """None where the model can run, else the reason why not (one sentence)."""
    if sys.byteorder != "little":
        return "The compiled kernels need a little-endian processor."
    if files.format == "dummy":
        return "Dummy weights run on the reference path only."
    for index, layer in enumerate(spec.layers):
        reason = _layer(layer)
        if reason:
            return f"Layer {index}: {reason}"
    if spec.embedding.hidden % 32:
        return f"The hidden size {spec.embedding.hidden} is not a multiple of 32."
    known = formats.BY_DTYPE.keys() | formats.DENSE_CODES.keys()
    for info in files.tensors.values():
        if info.dtype not in known:
            return f"Tensor {info.name} has type {info.dtype}, for which there is no compiled kernel."
    return None


def _layer(layer: Layer) -> str | None:
    attention = layer.attention
    if attention.head_dim % 16:
        return f"the head size {attention.head_dim} is not a multiple of 16."
    if attention.num_heads % attention.num_kv_heads:
        return f"{attention.num_heads} heads cannot share {attention.num_kv_heads} kv heads."
    for linear in (attention.qkv, attention.output, layer.mlp.gate_up, layer.mlp.down):
        reason = _linear(linear)
        if reason:
            return reason
    return None


def _linear(linear: Linear) -> str | None:
    if linear.in_features % 32:
        return f"the input size {linear.in_features} is not a multiple of 32."
    for part in linear.parts:
        if part.out_features % formats.ROWS:
            return f"{part.hf} has {part.out_features} rows, not a multiple of {formats.ROWS}."
    return None

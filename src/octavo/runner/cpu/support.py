"""Can the compiled CPU path run this model? The host asks before it chooses between it and the torch path."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from octavo.device.kernels.numba import formats
from octavo.device.kernels.numba.shared import ACTIVATIONS, MAX_HEAD
from octavo.files.base import ModelFiles
from octavo.model.blocks import (
    Attention,
    DecoderSpec,
    Embedding,
    Experts,
    GatedMLP,
    Layer,
    Linear,
    MoE,
    Norm,
    Part,
    Rope,
    Router,
)
from octavo.runner.cpu.program import attention_of, norms_whole
from octavo.runner.cpu.weights import expert_names, head_names, kernel_of, stored_as

# The fields of the blocks that the lowering reads. Any other field must have its default, so that a block which learns
# something new is refused here until the lowering learns it too.
KNOWN: dict[type, set[str]] = {
    DecoderSpec: {
        "embedding", "layers", "norm", "head", "logit_softcap", "logit_scale", "hf_layer_prefix", "gguf_layer_prefix",
        "ignored",
    },
    Embedding: {"hf", "gguf", "vocab_size", "hidden", "scale"},
    Layer: {
        "input_norm", "attention", "pre_mlp_norm", "mlp", "post_attention_norm", "post_mlp_norm", "residual_scale",
    },
    Attention: {
        "qkv", "output", "num_heads", "num_kv_heads", "head_dim", "scale", "rope", "window", "softcap", "q_norm", "k_norm",
    },
    GatedMLP: {"gate_up", "down", "intermediate", "activation"},
    MoE: {"router", "experts", "activation", "shared", "shared_gate"},
    Router: {"linear", "top_k", "scoring", "renormalize", "scale"},
    Experts: {"hf", "num", "hidden", "intermediate", "hf_each", "gguf_each"},
    Linear: {"in_features", "parts", "bias", "shard"},
    Part: {"hf", "gguf", "out_features", "heads", "copies", "start", "total", "hf_heads", "rotated"},
    Norm: {"hf", "gguf", "size", "eps", "offset"},
    Rope: {"dim", "inv_freq", "scale", "short", "original"},
}  # fmt: skip


def supports(spec: DecoderSpec, files: ModelFiles) -> str | None:
    """None where the model can run, else the reason why not (one sentence)."""
    if sys.byteorder != "little":
        return "The compiled kernels need a little-endian processor."
    if files.format == "dummy":
        return "Dummy weights run on the reference path only."
    reason = _unknown(spec)
    if reason:
        return f"The model has {reason}, which has no compiled kernel."
    for index, layer in enumerate(spec.layers):
        reason = _layer(layer) or _experts(layer, index, spec, files)
        if reason:
            return f"Layer {index}: {reason}"
    if spec.embedding.hidden % 32:
        return f"The hidden size {spec.embedding.hidden} is not a multiple of 32."
    known = formats.BY_DTYPE.keys() | formats.DENSE_CODES.keys()
    for info in files.tensors.values():
        if info.dtype not in known:
            return f"Tensor {info.name} has type {info.dtype}, for which there is no compiled kernel."
    return None


def _unknown(block: Any) -> str | None:
    """What of a block, or of the blocks inside it, the lowering does not know; None where it knows all."""
    if isinstance(block, tuple):
        return next((found for found in map(_unknown, block) if found), None)
    if not dataclasses.is_dataclass(block):
        return None
    kind = type(block)
    if kind not in KNOWN:
        return f"a {kind.__name__}"
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if field.name not in KNOWN[kind]:
            if value != field.default:
                return f"{kind.__name__}.{field.name} = {value!r}"
            continue
        found = _unknown(value)
        if found:
            return found
    return None


MIXTURE = ("route", "deal", "gather", "experts", "merge")
QUANTIZATIONS = ("Q4_0", "Q4_1", "Q8_0")
ALWAYS = ("pack_blocks", "embed", "norm", "gate", "rope_store", "attend", "combine", "draw")


def kernels_for(spec: DecoderSpec, files: ModelFiles, quantization: str | None = None) -> list[str]:
    """Names of the kernels a model needs, for ``KernelLibrary.warm``."""
    heads, names = head_names(spec, files), set[str]()
    routers = router_names(spec, files)
    for info in files.tensors.values():
        if info.name in routers:
            names.add(kernel_of(info.dtype))
        elif len(info.shape) > 1:
            splits = info.name in heads
            tied = splits and spec.head is None
            stored = stored_as(info.dtype, quantization and ("Q8_0" if tied else quantization))
            names.add(kernel_of(stored, splits))
    if "linear_split8" in names:
        names |= {"scan", "refine"}
    if any(layer.post_attention_norm or layer.post_mlp_norm for layer in spec.layers):
        names.add("add_norm")
    if routers:
        names |= set(MIXTURE)
    if any(norms_whole(attention_of(layer)) for layer in spec.layers):
        names.add("whole_norm")
    return sorted(names) + list(ALWAYS)


def router_names(spec: DecoderSpec, files: ModelFiles) -> set[str]:
    """The tensors that choose and weigh experts: they stay as they are."""
    gguf, found = files.format == "gguf", set[str]()
    for index, layer in enumerate(spec.layers):
        if isinstance(layer.mlp, MoE):
            prefix = (spec.gguf_layer_prefix if gguf else spec.hf_layer_prefix).format(index)
            for linear in (layer.mlp.router.linear, layer.mlp.shared_gate):
                parts = linear.parts if linear is not None else ()
                found |= {prefix + (part.gguf if gguf else part.hf) + ".weight" for part in parts}
    return found


def _layer(layer: Layer) -> str | None:
    attention = layer.attention
    if not isinstance(attention, Attention):
        return f"a {type(attention).__name__} has no compiled kernel."
    if layer.input_norm is None or layer.pre_mlp_norm is None or not isinstance(layer.mlp, GatedMLP | MoE):
        return "a branch without its norm or gate has no compiled kernel."
    whole = norms_whole(attention) and not any(part.heads or part.hf_heads for part in attention.qkv.parts)
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None and norm.size != attention.head_dim and not whole:
            return f"a q or k norm over {norm.size} values, not over a head, has no compiled kernel."
    if attention.head_dim % 16 or attention.head_dim > MAX_HEAD:
        return f"the head size {attention.head_dim} is not a multiple of 16 up to {MAX_HEAD}."
    if attention.num_heads % attention.num_kv_heads:
        return f"{attention.num_heads} heads cannot share {attention.num_kv_heads} kv heads."
    mlp = layer.mlp.shared if isinstance(layer.mlp, MoE) else layer.mlp
    for linear in (attention.qkv, attention.output, *((mlp.gate_up, mlp.down) if mlp else ())):
        reason = _linear(linear)
        if reason:
            return reason
    return None


def _experts(layer: Layer, index: int, spec: DecoderSpec, files: ModelFiles) -> str | None:
    if not isinstance(layer.mlp, MoE):
        return None
    block, gguf = layer.mlp.experts, files.format == "gguf"
    if layer.mlp.activation not in ACTIVATIONS or layer.post_mlp_norm is not None:
        return f"experts with {layer.mlp.activation}, or with a norm behind them, have no compiled kernel."
    if block.intermediate % 32:
        return f"the experts' size {block.intermediate} is not a multiple of 32."
    prefix = (spec.gguf_layer_prefix if gguf else spec.hf_layer_prefix).format(index)
    for names in expert_names(block, gguf, prefix):
        missing = [name for name in names if name not in files.tensors]
        if missing:
            return f"its experts are stored in another way: there is no {missing[0]}."
    return None


def _linear(linear: Linear) -> str | None:
    if linear.in_features % 32:
        return f"the input size {linear.in_features} is not a multiple of 32."
    for part in linear.parts:
        if part.out_features % formats.ROWS:
            return f"{part.hf} has {part.out_features} rows, not a multiple of {formats.ROWS}."
    return None

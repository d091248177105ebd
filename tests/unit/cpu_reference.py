"""A decoder in plain numpy, float64, from the same descriptions: what the compiled CPU path is compared with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.files.base import ModelFiles
from octavo.model.blocks import DecoderSpec, FeedForward, Layer, Linear, MoE, Norm, Part

Array = NDArray[Any]


def dequantize(dtype: str, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> Array:
    """Raw tensor bytes as numbers, by the ``gguf`` package."""
    import gguf

    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype in ("F32", "F16"):
        return raw.view(np.float32 if dtype == "F32" else np.float16).reshape(shape)
    kind = gguf.GGMLQuantizationType[dtype]
    return gguf.quants.dequantize(raw.reshape(math.prod(shape[:-1]), -1), kind).reshape(shape)


class Reference:
    """``logits(token_ids)`` of one whole sequence [T, V]; weights are widened once, activations never rounded."""

    def __init__(
        self, spec: DecoderSpec, files: ModelFiles, dtype: Any = np.float64, max_position: int = 1024
    ) -> None:
        self.spec, self.files, self.dtype, self.max_position = spec, files, dtype, max_position
        self.gguf = files.format == "gguf"
        self.memo: dict[str, Array] = {}

    def tensor(self, name: str) -> Array:
        if name not in self.memo:
            info = self.files.tensors[name]
            self.memo[name] = dequantize(info.dtype, self.files.read(name), info.shape).astype(self.dtype)
        return self.memo[name]

    def name(self, block: Any, prefix: str = "") -> str:
        return prefix + (block.gguf if self.gguf else block.hf)

    def part(self, part: Part, prefix: str, suffix: str) -> Array:
        values = self.tensor(self.name(part, prefix) + suffix)[part.start :][: part.out_features]
        heads = part.heads if self.gguf else part.hf_heads
        if heads:
            rows = values.reshape(heads, part.out_features // heads, -1).copy()
            size = part.rotated or rows.shape[1]
            halves = rows[:, :size].reshape(heads, size // 2, 2, -1)
            rows[:, :size] = halves.swapaxes(1, 2).reshape(heads, size, -1)
            values = rows.reshape(values.shape)
        return values

    def linear(self, linear: Linear, prefix: str, x: Array) -> Array:
        outs = []
        for part in linear.parts:
            y = x @ self.part(part, prefix, ".weight").T
            outs.append(y + self.part(part, prefix, ".bias") if linear.bias else y)
        return np.concatenate(outs, axis=-1)

    def norm(self, norm: Norm | None, prefix: str, x: Array) -> Array:
        if norm is None:
            return x
        weight = self.tensor(self.name(norm, prefix) + ".weight")
        weight = weight if self.gguf else weight + norm.offset
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps) * weight

    def attention(self, layer: Layer, prefix: str, x: Array) -> Array:
        a, count = layer.attention, len(x)
        qkv = self.linear(a.qkv, prefix, x).reshape(count, a.num_heads + 2 * a.num_kv_heads, a.head_dim)
        q, k, v = np.split(qkv, [a.num_heads, a.num_heads + a.num_kv_heads], axis=1)
        q, k = (
            self.norm(norm, prefix, x.reshape(count, -1, norm.size)).reshape(x.shape) if norm else x
            for norm, x in ((a.q_norm, q), (a.k_norm, k))
        )
        if a.rope:
            angles = np.arange(count)[:, None] * np.array(a.rope.frequencies(self.max_position))
            cos, sin = np.cos(angles)[:, None] * a.rope.scale, np.sin(angles)[:, None] * a.rope.scale
            q, k = rotate(q, cos, sin, a.rope.dim), rotate(k, cos, sin, a.rope.dim)
        group = a.num_heads // a.num_kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("thd,khd->htk", q, k) * a.scale
        if a.softcap:
            scores = a.softcap * np.tanh(scores / a.softcap)
        at = np.arange(count)
        hidden = at[None] > at[:, None]
        if a.window:
            hidden |= at[None] <= at[:, None] - a.window
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self.linear(a.output, prefix, np.einsum("htk,khd->thd", weights, v).reshape(count, -1))

    def mlp(self, block: FeedForward, prefix: str, x: Array) -> Array:
        if isinstance(block, MoE):
            return self.mixture(block, prefix, x)
        gate, up = np.split(self.linear(block.gate_up, prefix, x), 2, axis=-1)
        return self.linear(block.down, prefix, activate(block.activation, gate) * up)

    def expert(self, block: MoE, prefix: str, index: int, x: Array) -> Array:
        """One expert, its matrices as the file holds them: one each, or stacked."""
        found = []
        for name, each in zip(block.experts.gguf_each, block.experts.hf_each):
            if self.gguf:
                found.append(self.tensor(f"{prefix}{name}.weight")[index])
            else:
                found.append(self.tensor(f"{prefix}{block.experts.hf}.{index}.{each}.weight"))
        gate, up, down = found
        return (activate(block.activation, x @ gate.T) * (x @ up.T)) @ down.T

    def mixture(self, block: MoE, prefix: str, x: Array) -> Array:
        scores = self.linear(block.router.linear, prefix, x)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        for m, row in enumerate(scores):
            chosen = np.argsort(-row, kind="stable")[: block.router.top_k]
            weights = row[chosen] / row[chosen].sum() if block.router.renormalize else row[chosen]
            for index, weight in zip(chosen, weights):
                out[m] += block.router.scale * weight * self.expert(block, prefix, int(index), x[m])
        if block.shared is not None:
            shared = self.mlp(block.shared, prefix, x)
            if block.shared_gate is not None:
                shared = shared / (1 + np.exp(-self.linear(block.shared_gate, prefix, x)))
            out += shared
        return out

    def hidden(self, token_ids: list[int]) -> Array:
        spec = self.spec
        table = self.tensor(self.name(spec.embedding) + ".weight")
        x = table[token_ids] * spec.embedding.scale
        prefixes = spec.gguf_layer_prefix if self.gguf else spec.hf_layer_prefix
        for index, layer in enumerate(spec.layers):
            prefix = prefixes.format(index)
            y = self.attention(layer, prefix, self.norm(layer.input_norm, prefix, x))
            x = x + layer.residual_scale * self.norm(layer.post_attention_norm, prefix, y)
            y = self.mlp(layer.mlp, prefix, self.norm(layer.pre_mlp_norm, prefix, x))
            x = x + layer.residual_scale * self.norm(layer.post_mlp_norm, prefix, y)
        return self.norm(spec.norm, "", x)

    def logits(self, token_ids: list[int]) -> Array:
        spec, x = self.spec, self.hidden(token_ids)
        if spec.head is None:
            out = x @ self.tensor(self.name(spec.embedding) + ".weight").T
        else:
            out = self.linear(spec.head, "", x)
        out = out * spec.logit_scale
        return spec.logit_softcap * np.tanh(out / spec.logit_softcap) if spec.logit_softcap else out


def rotate(x: Array, cos: Array, sin: Array, dim: int) -> Array:
    first, second = x[..., : dim // 2], x[..., dim // 2 : dim]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., dim:]], axis=-1)


def activate(kind: str, x: Array) -> Array:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

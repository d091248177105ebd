"""How many bytes a model takes on a device, from its blocks alone: no weights, no device, no torch.

Weights and cache are exact (tests compare them with what is allocated); a step's buffers are an estimate of the peak
that ``host.torch_engine`` measures:

    forward   residual | branch | inputs and outputs of the branch being computed | its inner buffers     x tokens
    sampling  logits | their copy for log probabilities | log probabilities | penalties' counts             x rows
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from octavo.engine.cache.spec import ceil_div
from octavo.model.blocks import (
    Attention,
    CompressedAttention,
    DecoderSpec,
    Embedding,
    Experts,
    FeedForward,
    GatedMLP,
    HyperConnection,
    LatentAttention,
    Layer,
    Linear,
    Mixer,
    MoE,
    Norm,
    Part,
    PlainMLP,
    Recurrent,
    Rope,
    Router,
)

Kind = Literal["matrix", "experts", "head", "run", "float32"]
FLOAT32 = 4
LARGE_ROW = 8192  # see quantization.int4
# Logits, their copy for log probabilities, the log probabilities and the penalties' counts: 4 bytes each.
SAMPLING_BYTES = 16
COUNTS_BYTES = 4
LATENT_WORK_BYTES = 512 << 20  # see layers.latent
RECORDING_BYTES = 1 << 20  # a few hundred launches


@dataclass(frozen=True)
class Held:
    """``count`` equal tensors [rows, inputs] of the network: matrices and experts are stored by the weight scheme (and
    the output head by some), the rest in the run type or in float32. A ``constant`` is in no file."""

    kind: Kind
    rows: int
    inputs: int
    count: int = 1
    constant: bool = False

    @property
    def elements(self) -> int:
        """Values in all of them."""
        return self.rows * self.inputs * self.count


@dataclass(frozen=True)
class Scheme:
    """How a projection's weights are stored: ``bits`` each (0 = in the run type), and ``scale_bytes`` beside every ``group``
    inputs (``large_group`` in rows of 8192 on) and ``outer_bytes`` beside every 256 where groups divide a row, else the larger
    of both beside a whole row.
    Experts, and with ``packed`` everything, take whole runs of ``device.ops.packed``. ``head``: the output head is stored so
    too."""

    name: str
    bits: float = 0
    scale_bytes: int = 0
    group: int = 0
    large_group: int = 0
    outer_bytes: int = 0
    packed: bool = False
    head: bool = False

    def nbytes(self, held: Held, element_bytes: int) -> int:
        """Bytes of tensors of the network with run type elements of so many bytes."""
        if held.kind == "float32":
            return held.elements * FLOAT32
        if not self.bits or held.kind == "run" or (held.kind == "head" and not self.head):
            return held.elements * element_bytes
        inputs = held.inputs
        if self.scale_bytes and (self.packed or held.kind == "experts"):
            inputs += -inputs % self._run(inputs)
        scales = max(self.scale_bytes, self.outer_bytes)
        group = self.large_group if held.inputs >= LARGE_ROW else self.group
        if group and held.inputs % group == 0:
            scales = ceil_div(inputs, group) * self.scale_bytes + ceil_div(inputs, 256) * self.outer_bytes
        return (math.ceil(inputs * self.bits / 8) + scales) * held.rows * held.count

    def _run(self, inputs: int) -> int:
        """Inputs that are packed together: 32 words' worth, or 16 where 4-bit codes are padded less by it."""
        wide = int(32 * 32 / self.bits)
        return wide // 2 if self.packed and -inputs % (wide // 2) < -inputs % wide else wide


DENSE = Scheme("dense")
FP8 = Scheme("fp8", bits=8, scale_bytes=4)  # a float32 scale an output channel
INT8 = Scheme("int8", bits=8, scale_bytes=4)
INT4 = Scheme(  # two levels of scales and minimums
    "int4", bits=4, scale_bytes=2, group=32, large_group=128, outer_bytes=4, packed=True
)


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device besides the cache. ``tables`` are rotary tables and page tables, ``step`` the most that a
    step holds, ``graphs`` what recorded steps keep."""

    num_parameters: int
    weights: int
    tables: int
    step: int
    graphs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.tables + self.step + self.graphs


def held_by(block: Any) -> Iterator[Held]:
    """Every tensor that a block keeps; blocks without a rule of their own are the sum of their fields."""
    if isinstance(block, Linear):
        yield from _linear(block, "matrix")
    elif isinstance(block, Norm):
        kind: Kind = "float32" if block.kind == "rms" else "run"
        yield Held(kind, 1, block.size, 2 if block.bias else 1)
    elif isinstance(block, Embedding):
        yield Held("run", block.vocab_size, block.hidden)
    elif isinstance(block, Part):  # of a bare tensor: attention sinks
        yield Held("float32", 1, block.out_features)
    elif isinstance(block, Recurrent):
        yield from _recurrent(block)
    elif isinstance(block, LatentAttention):
        yield from held_by((block.down, block.query_norm, block.query, block.latent_norm, block.output))
        if block.indexer is not None:
            yield from held_by((block.indexer.query, block.indexer.key, block.indexer.key_norm))
            yield from _linear(block.indexer.weights, "run")
        yield from _linear(block.up, "run")  # by heads, in the run type whatever the scheme
    elif isinstance(block, CompressedAttention):
        yield from _compressed(block)
    elif isinstance(block, HyperConnection):
        n = block.streams
        outputs, scales = (n, 1) if block.end else ((2 + n) * n, 3)
        yield Held("float32", outputs, n * block.hidden + 1)
        yield Held("float32", 1, scales)
    elif isinstance(block, Router):
        wide = block.scoring in ("sigmoid", "sqrt_softplus")
        yield from _linear(block.linear, "float32" if wide else "run")
        if block.table is not None:  # in int32
            yield Held("float32", block.table.out_features, block.top_k)
        if block.correction:
            yield Held("float32", 1, block.linear.out_features)
    elif isinstance(block, Experts):
        yield Held("experts", 2 * block.intermediate, block.hidden, block.num)
        yield Held("experts", block.hidden, block.intermediate, block.num)
        if block.bias:
            yield Held("run", block.num, 2 * block.intermediate + block.hidden)
        if block.total:  # where each expert is, in int64
            yield Held("float32", 2, block.total, constant=True)
    elif isinstance(block, DecoderSpec):
        yield from _decoder(block)
    elif isinstance(block, tuple):
        for item in block:
            yield from held_by(item)
    elif dataclasses.is_dataclass(block) and not isinstance(block, Rope):
        for field in dataclasses.fields(block):
            value = getattr(block, field.name)
            if field.name == "shared_gate" and isinstance(value, Linear):
                yield from _linear(value, "run")
            else:
                yield from held_by(value)
        if isinstance(block, Attention) and block.unit_norm:
            yield Held("float32", 1, block.head_dim, constant=True)


def _linear(block: Linear, kind: Kind) -> Iterator[Held]:
    yield Held(kind, block.out_features, block.in_features)
    if block.bias:
        yield Held("float32" if kind == "float32" else "run", 1, block.out_features)


def _recurrent(block: Recurrent) -> Iterator[Held]:
    """Projections as they are stored everywhere; what is exponentiated, and the convolution, in float32."""
    yield from _linear(block.project, "matrix")
    yield from _linear(block.small, "run")
    yield from _linear(block.output, "matrix")
    yield Held("float32", _channels(block), block.conv_width + (1 if block.conv_bias else 0))
    yield from held_by((block.dt_bias, block.a_log, block.skip))
    yield Held("float32", 1, block.norm.size)


def _compressed(block: CompressedAttention) -> Iterator[Held]:
    """What is multiplied by groups, or decides much, in the run type whatever the scheme."""
    yield from held_by((block.down, block.query_norm, block.query, block.key_norm, block.output, block.sinks))
    yield from _linear(block.grouped, "run")
    for compressor in block.compressors():
        yield from _linear(compressor.project, "run")
        yield Held("float32", compressor.rate, compressor.width)
        yield from held_by(compressor.norm)
    if block.indexer is not None:
        yield from held_by(block.indexer.query)
        yield from _linear(block.indexer.weights, "run")


def _channels(block: Recurrent) -> int:
    """Inputs of the convolution: q, k and v."""
    return 2 * block.num_key_heads * block.key_dim + block.num_heads * block.value_dim


def _decoder(spec: DecoderSpec) -> Iterator[Held]:
    """A stage of a pipeline has the ends of the model that are its own; a tied embedding is both."""
    if spec.is_first or (spec.is_last and spec.head is None):
        yield from held_by(spec.embedding)
    if spec.is_first:
        yield from held_by(spec.positions)
    yield from held_by(spec.layers)
    yield from held_by(spec.norm)
    if spec.is_last:
        yield from held_by(spec.streams)
    if spec.head is not None:
        yield from _linear(spec.head, "head")


def num_parameters(spec: DecoderSpec) -> int:
    """Values in all tensors; of the whole model where ``spec`` is not sharded."""
    return sum(held.elements for held in held_by(spec) if not held.constant)


def weight_bytes(spec: DecoderSpec, scheme: Scheme, element_bytes: int) -> int:
    """What ``Network`` allocates for its parameters, to the byte."""
    return sum(scheme.nbytes(held, element_bytes) for held in held_by(spec))


def position_bytes(spec: DecoderSpec, max_position: int) -> int:
    """Tables by position: cos and sin of every different rope, temperatures of the layers that have them."""
    ropes = sum(2 * len(rope.inv_freq) for rope in set(_ropes(spec.layers)))
    warm = sum(getattr(layer.attention, "temperature", None) is not None for layer in spec.layers)
    return (ropes + warm) * max_position * FLOAT32


def work_bytes(spec: DecoderSpec) -> int:
    """What a GPU keeps for all latent layers together to turn latents into keys and values."""
    latent = any(isinstance(layer.attention, LatentAttention) for layer in spec.layers)
    return LATENT_WORK_BYTES if latent else 0


def _ropes(block: Any) -> Iterator[Rope]:
    if isinstance(block, Rope):
        yield block
    elif isinstance(block, tuple):
        for item in block:
            yield from _ropes(item)
    elif dataclasses.is_dataclass(block):
        for field in dataclasses.fields(block):
            yield from _ropes(getattr(block, field.name))


def step_bytes(spec: DecoderSpec, tokens: int, rows: int, element_bytes: int) -> int:
    """The most that a step of so many tokens holds, ``rows`` of which sample with penalties and log probabilities."""
    vocabulary = spec.embedding.vocab_size
    counts = rows * vocabulary * COUNTS_BYTES
    forward = forward_bytes(spec, tokens, element_bytes) + counts
    hidden = (
        tokens * spec.embedding.hidden * element_bytes
    )  # of the prompt, whose log probabilities are asked too
    return max(forward, rows * vocabulary * SAMPLING_BYTES + hidden)


def forward_bytes(spec: DecoderSpec, tokens: int, element_bytes: int) -> int:
    """The most that the layers hold at a time."""
    hidden = spec.embedding.hidden
    return tokens * element_bytes * max((_widest(layer, hidden) for layer in set(spec.layers)), default=0)


def graph_bytes(spec: DecoderSpec, tokens: int, rows: int, recordings: int, element_bytes: int) -> int:
    """What so many recordings keep: the buffers of the largest, of ``tokens``, and each its outputs (``rows`` of all
    together) and the driver's notes."""
    outputs = rows * spec.embedding.hidden * element_bytes
    return forward_bytes(spec, tokens, element_bytes) + outputs + recordings * RECORDING_BYTES


def _widest(layer: Layer, hidden: int) -> int:
    """Values a token: residual, the branch before, and the branch being computed with its input."""
    if layer.hyper is not None:  # all streams, which kernels change in place
        streams = layer.hyper[0].streams
        return (streams + 3) * hidden + max(_mixer_width(layer.attention), _mlp_width(layer.mlp))
    mixing = 3 * hidden + _mixer_width(layer.attention)
    # The attention's input and output live on in the layer's frame while the MLP runs; unnormed, an input is the residual.
    inputs = sum(norm is not None for norm in (layer.input_norm, layer.pre_mlp_norm))
    return max(mixing, (3 + inputs) * hidden + _mlp_width(layer.mlp))


def _mixer_width(block: Mixer) -> int:
    """The projection beside what is taken from it."""
    if isinstance(block, Recurrent):
        return block.project.out_features + _channels(block) + 2 * block.num_heads * block.value_dim
    if isinstance(block, LatentAttention):
        # Queries, once more as wide as latents, and what the heads give.
        head = block.nope_dim + block.rope_dim + block.latent_dim + block.rope_dim + block.value_dim
        return block.down.out_features + block.num_heads * head
    if isinstance(block, CompressedAttention):
        pieces = sum(each.project.out_features for each in block.compressors())
        return block.down.out_features + pieces + 3 * block.num_heads * block.head_dim
    if isinstance(block, Attention):
        gate = block.gate.out_features if block.gate is not None else 0
        return block.qkv.out_features + block.num_heads * block.head_dim + gate
    return 0


def _mlp_width(block: FeedForward) -> int:
    """Inner channels before and after the activation."""
    if isinstance(block, MoE):
        routed = block.router.top_k * (block.experts.intermediate + block.experts.hidden)
        return max(routed, block.experts.hidden + (_mlp_width(block.shared) if block.shared else 0))
    if isinstance(block, PlainMLP):
        return 2 * block.intermediate
    if isinstance(block, GatedMLP):
        return 3 * block.intermediate
    return 0

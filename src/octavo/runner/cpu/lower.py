"""From a model's description and weights to tapes: one for the layers, one for the output head.

Nothing here runs per step: buffers, argument tables and instructions are laid out once. A step fills the ``StepTables``
and executes the tapes.

    layer:  norm | qkv | rope_store | attend | combine | output (+ add_norm) | norm | gate_up | gate | down (+ add_norm)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba import formats, shared
from octavo.device.kernels.numba.shared import ACTIVATIONS, META_BYTES
from octavo.engine.cache.layout import CacheLayout
from octavo.errors import UnsupportedModelError
from octavo.model.blocks import Attention, DecoderSpec, FeedForward, GatedMLP, Layer, MoE, Norm, Rope
from octavo.runner.cpu.mixture import Mixture
from octavo.runner.cpu.program import Program, Tape, aligned, attention_of, float_bits, norms_whole
from octavo.runner.cpu.weights import Panels, WeightReader, forms

COUNTER_LINE = 8  # int64 entries between two work counters: a cache line
EXTRA_PARTS = 1024  # parts of split contexts beyond one part a token


@dataclass
class StepTables:
    """What changes from step to step; the tapes hold the addresses.

    ``counts``: tokens, head rows, then the items of each group. Tokens: ``token_ids``, ``slots`` [groups, tokens]
    (page * page size + offset), ``ropes`` (cos | sin per distinct rope), ``items`` and ``splits`` [tokens, 2]
    per group.
    Head: ``head_rows`` (which tokens). ``counters`` and ``broken`` [tokens] must be zero when a tape starts; a 1 in
    ``broken`` afterwards marks a token with keys or values that are not finite.
    """

    counts: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    ropes: dict[Rope, NDArray[np.float32]]
    items: NDArray[np.int64]
    splits: NDArray[np.int64]
    head_rows: NDArray[np.int64]
    counters: NDArray[np.int64]
    broken: NDArray[np.int64]


@dataclass(frozen=True)
class Buffers:
    """Activations of up to ``tokens`` tokens; all layers share them."""

    tokens: int
    x: NDArray[np.float32]  # the residual stream
    y: NDArray[np.float32]  # a branch's output before its post norm
    wide: NDArray[np.float32]  # qkv, gate_up
    plain: NDArray[np.float32]  # inputs of plain linears
    quants: NDArray[np.int8]  # inputs of quantized linears
    meta: NDArray[np.float32]
    queries: NDArray[np.uint16]  # bfloat16
    parts: NDArray[np.float32]  # attention output before normalization
    stats: NDArray[np.float32]
    scratch: NDArray[np.uint8]  # per thread


@dataclass(frozen=True)
class Narrow:
    """The head for few rows that need their likeliest tokens only: ``scan``, then thresholds, then ``refine``.

    ``lows`` [rows, candidates] receives lower bounds of logits, all of different tokens; ``leasts`` [rows] tells
    which logits to compute: those that may reach it. ``arguments`` are both kernels' tables.
    """

    scan: Tape
    refine: Tape
    lows: NDArray[np.float32]
    leasts: NDArray[np.float32]
    arguments: list[NDArray[np.int64]]


@dataclass(frozen=True)
class Lowered:
    """Everything a step needs. ``head_out`` is the argument table of the head's linear: OUT may be changed."""

    body: Tape
    head: Tape
    narrow: Narrow | None
    tables: StepTables
    buffers: Buffers
    head_out: list[NDArray[np.int64]]
    logits_width: int
    weight_bytes: int
    kernels: dict[str, int]


def buffers(spec: DecoderSpec, tokens: int, threads: int) -> Buffers:
    """Activation memory for ``tokens`` tokens."""
    layers = spec.layers
    hidden = spec.embedding.hidden
    attended = max(attention_of(x).output.in_features for x in layers)
    gated = [gated_size(x.mlp) for x in layers]
    inner = max(hidden, attended, *gated)
    wide = max(*(2 * size for size in gated), *(attention_of(x).qkv.out_features for x in layers))
    heads = max(attention_of(x).num_heads for x in layers)
    parts = tokens + EXTRA_PARTS
    return Buffers(
        tokens=tokens,
        x=aligned((tokens, hidden), np.float32),
        y=aligned((tokens, hidden), np.float32),
        wide=aligned((tokens, wide), np.float32),
        plain=aligned((tokens, inner), np.float32),
        quants=aligned((tokens, inner), np.int8),
        meta=aligned((tokens * inner // 32, META_BYTES // 4), np.float32),
        queries=aligned((tokens, attended), np.uint16),
        parts=aligned((parts, attended), np.float32, zero=True),  # 0 * garbage must not be NaN
        stats=aligned((parts, heads, 2), np.float32),
        scratch=aligned((threads, shared.SCRATCH_BYTES), np.uint8),
    )


def gated_size(mlp: FeedForward) -> int:
    """Channels of the gated MLP that every token visits, 0 where there is none."""
    block = mlp.shared if isinstance(mlp, MoE) else mlp
    return block.intermediate if isinstance(block, GatedMLP) else 0


def step_tables(spec: DecoderSpec, layout: CacheLayout, tokens: int, item_tokens: int) -> StepTables:
    """Empty tables for steps of up to ``tokens`` tokens."""
    groups = len(layout.groups)
    ropes = {rope for x in spec.layers if (rope := attention_of(x).rope) is not None}
    # Pieces of ``item_tokens`` queries; each row adds at most one that is not full, and splits add EXTRA_PARTS.
    items = 2 * tokens + EXTRA_PARTS + tokens // item_tokens
    return StepTables(
        counts=np.zeros(2 + groups, np.int64),
        token_ids=np.zeros(tokens, np.int64),
        slots=np.zeros((groups, tokens), np.int64),
        ropes={rope: np.zeros((tokens, rope.dim), np.float32) for rope in ropes},
        items=np.zeros((groups, items, shared.ITEM_FIELDS), np.int64),
        splits=np.zeros((groups, tokens, 2), np.int64),
        head_rows=np.zeros(tokens, np.int64),
        counters=np.zeros((len(spec.layers), COUNTER_LINE), np.int64),
        broken=np.zeros(tokens, np.int64),
    )


class Lowering:
    """Builds both tapes; see the module's drawing."""

    def __init__(
        self,
        spec: DecoderSpec,
        layout: CacheLayout,
        weights: WeightReader,
        program: Program,
        memory: Buffers,
        tables: StepTables,
        pages: NDArray[np.uint8],
        logits: NDArray[np.float32],
    ) -> None:
        self.spec = spec
        self.layout = layout
        self.weights = weights
        self.program = program
        self.memory = memory
        self.tables = tables
        self.pages = pages
        self.logits = logits
        self.no_bias = aligned(16, np.float32, zero=True)
        self.weight_bytes = 0
        self.mixture: Mixture | None = None  # made where the first is met
        program.keep += [self.no_bias, pages, logits]

    def lower(self) -> Lowered:
        """Read the weights, lay out the instructions."""
        embedding = self.weights.embedding(self.spec.embedding)
        self._embed(embedding)
        for index, layer in enumerate(self.spec.layers):
            self._attention(index, layer)
            self._mlp(index, layer)
        body = self.program.tape()
        parts = [embedding] if self.spec.head is None else self.weights.linear(self.spec.head, "")
        head_out = self._head(parts)
        self.weights.finish()
        head = self.program.tape()
        narrow = self._narrow(parts)
        tapes = [body, head] if narrow is None else [body, head, narrow.scan, narrow.refine]
        names = [fact.kernel for tape in tapes for fact in tape.facts]
        kernels = {name: names.count(name) for name in dict.fromkeys(names)}
        return Lowered(
            body=body,
            head=head,
            narrow=narrow,
            tables=self.tables,
            buffers=self.memory,
            head_out=head_out,
            logits_width=self.logits.shape[1],
            weight_bytes=self.weight_bytes,
            kernels=kernels,
        )

    # What follows appends one kernel each; argument orders are those of the kernels' docstrings.

    def count(self, index: int) -> int:
        """Address of an entry of ``StepTables.counts``."""
        return int(self.tables.counts.ctypes.data) + 8 * index

    def keep(self, array: NDArray[np.generic]) -> int:
        """Address of an array that lives as long as the program."""
        self.program.keep.append(array)
        return int(array.ctypes.data)

    def _embed(self, table: Panels) -> None:
        self.program.add(
            "embed",
            [
                self.count(0),
                self.tables.token_ids.ctypes.data,
                self.keep(table.weights),
                self.keep(table.scales),
                table.weights.shape[1],
                table.scales.shape[1],
                table.code,
                table.in_features,
                self.memory.x.ctypes.data,
                float_bits(self.spec.embedding.scale),
                0 if table.lower is None else self.keep(table.lower),
                0 if table.lower is None else table.lower.shape[1],
            ],
        )

    def norm(
        self, norm: Norm | None, prefix: str, users: list[Panels], rows: int = 0, count: int = 0
    ) -> None:
        """RMSNorm of x for the linears that read it: int8, float32, or both."""
        if norm is None:
            raise UnsupportedModelError("The compiled CPU path needs a norm before every branch.")
        plain, quants = forms(users)
        self.program.add(
            "norm",
            [
                self.count(count),
                self.memory.x.ctypes.data,
                rows,
                self.keep(self.weights.norm(norm, prefix)),
                norm.size,
                float_bits(norm.eps),
                self.memory.plain.ctypes.data if plain else 0,
                self.memory.quants.ctypes.data if quants else 0,
                self.memory.meta.ctypes.data,
            ],
        )

    def linear(
        self,
        parts: list[Panels],
        out: NDArray[np.generic],
        width: int,
        alpha: float,
        add: bool,
        count: int = 0,
    ) -> list[NDArray[np.int64]]:
        """out [tokens, width] = (or +=) alpha * (inputs x weights) + bias."""
        tables, first = [], 0
        for index, part in enumerate(parts):
            arguments = self.arguments(part, out, first, width, alpha, add, count)
            last, products = index == len(parts) - 1, part.in_features * part.out_features
            tables.append(self.program.add(part.kernel, arguments, last, part.nbytes, products))
            first += part.out_features
            self.weight_bytes += part.nbytes
        return tables

    def arguments(
        self,
        part: Panels,
        out: NDArray[np.generic],
        first: int,
        width: int,
        alpha: float,
        add: bool,
        count: int,
    ) -> list[int]:
        """The table of one part's kernel, which writes columns ``first``.. of ``out``."""
        if part.quantized:
            source = [self.memory.quants.ctypes.data, self.memory.meta.ctypes.data]
        else:
            source = [self.memory.plain.ctypes.data, part.in_features * 4]
        bias = part.bias if part.bias is not None else self.no_bias
        arguments = [
            self.count(count),
            self.keep(part.weights),
            self.keep(part.scales),
            part.in_features // 32,
            len(part.weights),
            *source,
            out.ctypes.data + 4 * first,
            width * 4,
            self.keep(bias),
            64 if part.bias is not None else 0,
            float_bits(alpha),
            int(add),
        ]
        return arguments if part.lower is None else [*arguments, self.keep(part.lower)]

    def _branch(self, parts: list[Panels], layer: Layer, post: Norm | None, prefix: str) -> None:
        """The end of a branch: its last linear, the post norm where there is one, and the residual addition."""
        hidden = self.spec.embedding.hidden
        if post is None:
            self.linear(parts, self.memory.x, hidden, layer.residual_scale, True)
            return
        self.linear(parts, self.memory.y, hidden, 1.0, False)
        self.program.add(
            "add_norm",
            [
                self.count(0),
                self.memory.y.ctypes.data,
                self.keep(self.weights.norm(post, prefix)),
                post.size,
                float_bits(post.eps),
                float_bits(layer.residual_scale),
                self.memory.x.ctypes.data,
            ],
        )

    def _attention(self, index: int, layer: Layer) -> None:
        block, prefix = attention_of(layer), self.weights.prefix(index)
        qkv = self.weights.linear(block.qkv, prefix)
        output = self.weights.linear(block.output, prefix)
        self.norm(layer.input_norm, prefix, qkv)
        self.linear(qkv, self.memory.wide, block.qkv.out_features, 1.0, False)
        group, tensor = self.layout.place(index)
        pages = self.pages.ctypes.data + tensor * self.layout.page_bytes
        self._rope_store(block, prefix, group, pages)
        self._attend(block, index, group, pages)
        plain, quants = forms(output)
        self.program.add(
            "combine",
            [
                self.count(0),
                self.memory.parts.ctypes.data,
                self.memory.stats.ctypes.data,
                block.num_heads,
                block.head_dim,
                self.tables.splits[group].ctypes.data,
                self.memory.plain.ctypes.data if plain else 0,
                self.memory.quants.ctypes.data if quants else 0,
                self.memory.meta.ctypes.data,
                self.memory.scratch.ctypes.data,
            ],
        )
        self._branch(output, layer, layer.post_attention_norm, prefix)

    def _rope_store(self, block: Attention, prefix: str, group: int, pages: int) -> None:
        rope = block.rope
        norms = [0, 0]
        for i, norm in enumerate((block.q_norm, block.k_norm)):
            if norm is not None:
                norms[i] = self.keep(self.weights.norm(norm, prefix))
        eps = block.q_norm.eps if block.q_norm else block.k_norm.eps if block.k_norm else 0.0
        if norms_whole(block):
            widths = (
                block.qkv.out_features,
                block.num_heads * block.head_dim,
                block.num_kv_heads * block.head_dim,
            )
            self.program.add(
                "whole_norm", [self.count(0), self.memory.wide.ctypes.data, *widths, *norms, float_bits(eps)]
            )
            norms = [0, 0]
        self.program.add(
            "rope_store",
            [
                self.count(0),
                self.memory.wide.ctypes.data,
                block.num_heads,
                block.num_kv_heads,
                block.head_dim,
                *norms,
                float_bits(eps),
                self.tables.ropes[rope].ctypes.data if rope else 0,
                rope.dim if rope else 0,
                self.tables.slots[group].ctypes.data,
                pages,
                self.layout.pool_page_bytes,
                self.layout.groups[group].spec.page_size,
                self.memory.queries.ctypes.data,
                self.tables.broken.ctypes.data,
            ],
        )

    def _attend(self, block: Attention, index: int, group: int, pages: int) -> None:
        self.program.add(
            "attend",
            [
                self.count(2 + group),
                self.tables.items[group].ctypes.data,
                block.num_heads,
                block.num_kv_heads,
                block.head_dim,
                self.memory.queries.ctypes.data,
                pages,
                self.layout.pool_page_bytes,
                self.layout.groups[group].spec.page_size,
                float_bits(block.scale),
                float_bits(block.softcap),
                block.window,
                self.memory.parts.ctypes.data,
                self.memory.stats.ctypes.data,
                self.memory.scratch.ctypes.data,
                self.tables.counters[index].ctypes.data,
            ],
        )

    def _mlp(self, index: int, layer: Layer) -> None:
        block, prefix = layer.mlp, self.weights.prefix(index)
        if isinstance(block, MoE):
            self.mixture = self.mixture or Mixture(self)
            self.mixture.lower(block, layer, prefix)
            return
        if not isinstance(block, GatedMLP):
            raise UnsupportedModelError("The compiled CPU path needs gated MLPs.")
        gate_up = self.weights.linear(block.gate_up, prefix)
        down = self.weights.linear(block.down, prefix)
        self.norm(layer.pre_mlp_norm, prefix, gate_up)
        self.linear(gate_up, self.memory.wide, 2 * block.intermediate, 1.0, False)
        self.gate(block, down)
        self._branch(down, layer, layer.post_mlp_norm, prefix)

    def gate(self, block: GatedMLP, down: list[Panels]) -> None:
        """act(gate) * up of ``wide`` for the linears ``down``."""
        plain, quants = forms(down)
        self.program.add(
            "gate",
            [
                self.count(0),
                self.memory.wide.ctypes.data,
                block.intermediate,
                ACTIVATIONS[block.activation],
                self.memory.plain.ctypes.data if plain else 0,
                self.memory.quants.ctypes.data if quants else 0,
                self.memory.meta.ctypes.data,
            ],
        )

    def _head(self, parts: list[Panels]) -> list[NDArray[np.int64]]:
        self.norm(self.spec.norm, "", parts, rows=self.tables.head_rows.ctypes.data, count=1)
        return self.linear(parts, self.logits, self.logits.shape[1], self.spec.logit_scale, False, count=1)

    def _narrow(self, parts: list[Panels]) -> Narrow | None:
        """The two tapes for a head in two planes whose products are the logits themselves."""
        spec, head = self.spec, parts[0]
        if len(parts) > 1 or head.lower is None or head.bias is not None:
            return None
        if spec.logit_scale != 1 or spec.logit_softcap:
            return None
        blocks = head.in_features // 32
        spreads = aligned((self.memory.scratch.shape[0] * shared.MOST_ROWS, blocks), np.float32)
        segments = -(-len(head.weights) // shared.SCAN_SEGMENT)
        lows = aligned((shared.MOST_ROWS, segments * formats.ROWS), np.float32)
        leasts = aligned(shared.MOST_ROWS, np.float32)
        extra = [self.keep(spreads), self.keep(lows), spec.embedding.vocab_size, self.keep(leasts)]
        self.norm(spec.norm, "", parts, rows=self.tables.head_rows.ctypes.data, count=1)
        arguments = [*self.arguments(head, self.logits, 0, self.logits.shape[1], 1.0, False, 1), *extra]
        upper = head.weights.nbytes + head.scales.nbytes
        scan = self.program.add(
            "scan", arguments, nbytes=upper, products=head.in_features * head.out_features
        )
        first = self.program.tape()
        refine = self.program.add("refine", arguments)
        return Narrow(first, self.program.tape(), lows, leasts, [scan, refine])

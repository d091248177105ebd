"""Lowers mixtures of experts to kernels (see ``device.kernels.numba.mixture``); all layers share one set of buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba import formats, shared
from octavo.errors import UnsupportedModelError
from octavo.model.blocks import GatedMLP, Layer, MoE
from octavo.runner.cpu.program import aligned, float_bits
from octavo.runner.cpu.weights import Panels, forms

if TYPE_CHECKING:
    from octavo.runner.cpu.lower import Lowering


class Mixture:
    """A visit is one (token, chosen expert); rows of the ``visit`` buffers are sorted by expert."""

    def __init__(self, base: Lowering) -> None:
        self.base = base
        blocks = [layer.mlp for layer in base.spec.layers if isinstance(layer.mlp, MoE)]
        tokens, hidden = base.memory.tokens, base.spec.embedding.hidden
        visits = tokens * max(block.router.top_k for block in blocks)
        num = max(block.experts.num for block in blocks)
        inner = max(block.experts.intermediate for block in blocks)
        wide = max(hidden, inner)
        self.logits = self._new((tokens, -(-num // formats.ROWS) * formats.ROWS), np.float32)
        self.gates = self._new((tokens, formats.ROWS), np.float32)
        self.chosen, self.place, self.source = (self._new((visits,), np.int64) for _ in range(3))
        self.shares = self._new((visits,), np.float32)
        self.offsets, self.active, self.scratch = (self._new((num + 1,), np.int64) for _ in range(3))
        self.visits = self._new((1,), np.int64)
        self.plain = self._new((visits, wide), np.float32)
        self.quants = self._new((visits, wide), np.int8)
        self.meta = self._new((visits * wide // 32, shared.META_BYTES // 4), np.float32)
        self.gate_up = self._new((visits, 2 * inner), np.float32)
        self.out = self._new((visits, hidden), np.float32)
        threads = base.memory.scratch.shape[0]
        self.tables = self._new((threads, shared.VISITOR_BYTES), np.uint8)

    def _new(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[np.generic]:
        array: NDArray[np.generic] = aligned(shape, dtype)
        self.base.program.keep.append(array)
        return array

    def lower(self, block: MoE, layer: Layer, prefix: str) -> None:
        """The whole branch of a layer."""
        base, memory, weights = self.base, self.base.memory, self.base.weights
        if layer.post_mlp_norm is not None:
            raise UnsupportedModelError("The compiled CPU path has no norm behind a mixture of experts.")
        hidden = base.spec.embedding.hidden
        router = weights.linear(block.router.linear, prefix, quantize=False)
        gate, up, down = weights.experts(block.experts, prefix)
        common = None if block.shared is None else weights.linear(block.shared.gate_up, prefix)
        weigh = [] if block.shared_gate is None else weights.linear(block.shared_gate, prefix, quantize=False)
        base.norm(layer.pre_mlp_norm, prefix, [*router, gate, up, *(common or []), *weigh])
        base.linear(router, self.logits, self.logits.shape[1], 1.0, False)
        if weigh:
            base.linear(weigh, self.gates, formats.ROWS, 1.0, False)
        self._choose(block, [gate, up])
        if block.shared is not None and common is not None:
            self._shared(block.shared, common, prefix)
        inner = block.experts.intermediate
        self._multiply(gate, block.experts.num, self.gate_up, 0, 2 * inner, barrier=False)
        self._multiply(up, block.experts.num, self.gate_up, inner, 2 * inner)
        plain, quants = forms([down])
        base.program.add(
            "gate",
            [
                self.visits.ctypes.data,
                self.gate_up.ctypes.data,
                inner,
                shared.ACTIVATIONS[block.activation],
                self.plain.ctypes.data if plain else 0,
                self.quants.ctypes.data if quants else 0,
                self.meta.ctypes.data,
            ],
        )
        self._multiply(down, block.experts.num, self.out, 0, hidden)
        base.program.add(
            "merge",
            [
                base.count(0),
                self.out.ctypes.data,
                hidden,
                self.place.ctypes.data,
                self.shares.ctypes.data,
                block.router.top_k,
                float_bits(layer.residual_scale),
                memory.x.ctypes.data,
                0 if block.shared is None else memory.y.ctypes.data,
                self.gates.ctypes.data if weigh else 0,
                4 * formats.ROWS,
            ],
        )

    def _choose(self, block: MoE, users: list[Panels]) -> None:
        """Experts of each token, their visits in order, and the visitors' inputs for the linears ``users``."""
        base, memory, router = self.base, self.base.memory, block.router
        num, top_k, hidden = block.experts.num, router.top_k, base.spec.embedding.hidden
        base.program.add(
            "route",
            [
                base.count(0),
                self.logits.ctypes.data,
                self.logits.shape[1] * 4,
                num,
                top_k,
                shared.SCORINGS[router.scoring],
                int(router.renormalize),
                float_bits(router.scale),
                self.chosen.ctypes.data,
                self.shares.ctypes.data,
            ],
        )
        lists = (self.chosen, self.place, self.source, self.offsets, self.active, self.visits, self.scratch)
        base.program.add("deal", [base.count(0), top_k, num, *(x.ctypes.data for x in lists)])
        plain, quants = forms(users)
        rows: list[tuple[bool, NDArray[np.generic], NDArray[np.generic], int]] = [
            (plain, memory.plain, self.plain, hidden * 4),
            (quants, memory.quants, self.quants, hidden),
            (quants, memory.meta, self.meta, hidden // 32 * shared.META_BYTES),
        ]
        copies = [
            entry
            for wanted, source, target, size in rows
            for entry in (source.ctypes.data if wanted else 0, target.ctypes.data, size)
        ]
        base.program.add("gather", [self.visits.ctypes.data, self.source.ctypes.data, *copies])

    def _shared(self, block: GatedMLP, gate_up: list[Panels], prefix: str) -> None:
        """The expert that every token visits, into ``y``."""
        base = self.base
        down = base.weights.linear(block.down, prefix)
        base.linear(gate_up, base.memory.wide, 2 * block.intermediate, 1.0, False)
        base.gate(block, down)
        base.linear(down, base.memory.y, base.spec.embedding.hidden, 1.0, False)

    def _multiply(
        self,
        part: Panels,
        num: int,
        out: NDArray[np.generic],
        first: int,
        width: int,
        barrier: bool = True,
    ) -> None:
        """Columns ``first``.. of ``out`` [visits, width] = the visitors' inputs x their experts' ``part``."""
        base, panels = self.base, len(part.weights) // num
        table = base.arguments(part, out, first, width, 1.0, False, 0)
        table[shared.PANELS] = panels
        source = self.quants if part.quantized else self.plain
        table[shared.QUANTS] = source.ctypes.data
        if part.quantized:
            table[shared.META] = self.meta.ctypes.data
        share = max(1, num // 8)  # of the weights: about what one token reads
        base.program.add(
            "experts",
            [
                base.program.library.address(part.kernel),
                base.keep(np.array(table, np.int64)),
                len(table),
                self.active.ctypes.data,
                self.offsets.ctypes.data,
                panels * part.weights.shape[1],
                panels * part.scales.shape[1],
                int(part.quantized),
                self.tables.ctypes.data,
            ],
            barrier,
            part.nbytes // share,
        )

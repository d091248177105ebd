"""Mixture of experts: router, stacked experts, shared expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from octavo.device.ops.moe import EXPERTS, EXPERTS_PACKED, ROUTE, shares_of
from octavo.errors import ModelFileError
from octavo.model.blocks import Experts, MoE, Part, Router
from octavo.model.layers.build import Build
from octavo.model.layers.experts import ExpertWeights
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import LoadItem, Source, StoredMatrix
from octavo.model.layers.mlp import GatedMLPLayer
from octavo.model.layers.packed_experts import PackedExpertWeights
from octavo.model.quantization.dense import DENSE


class MoELayer:
    """Under tensor parallelism every rank holds a slice of each expert, or some experts whole (expert parallelism);
    what they give is summed once."""

    def __init__(self, block: MoE, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.router = RouterLayer(block.router, build, hf_prefix, gguf_prefix)
        self.experts, self.compute = make_experts(block.experts, build, hf_prefix, gguf_prefix)
        self.gate_up, self.down = self.experts.matrices()
        self.first = build.ranks.rank == 0
        self.local_ids = self.experts.local_ids(build.device)
        self.reduce = build.ranks.reduce if build.ranks.size > 1 else None
        self.shared = (
            GatedMLPLayer(block.shared, build, hf_prefix, gguf_prefix) if block.shared is not None else None
        )
        self.shared_gate = (
            LinearLayer(block.shared_gate, replace(build, weight_format=DENSE), hf_prefix, gguf_prefix)
            if block.shared_gate is not None
            else None
        )

    def __call__(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """[T, E] from [T, E]; routers that go by token ids [T] need them."""
        block, weights = self.block, self.experts
        ids, shares = self.router(x, token_ids)
        if self.local_ids is not None:
            ids = self.local_ids[ids]
        seen = x
        if block.weigh_input:
            seen, shares = (x * shares).to(x.dtype), torch.ones_like(shares)
        out: Tensor = self.compute(
            seen,
            ids,
            shares,
            self.gate_up,
            self.down,
            block.activation,
            block.alpha,
            block.limit,
            weights.gate_up_bias,
            weights.down_bias if self.first or self.local_ids is not None else None,  # once, not once a rank
            self.local_ids is not None,
        )
        if self.reduce is not None:
            out = self.reduce(out)
        if self.shared is None:
            return out
        shared: Tensor = self.shared(x)
        return out + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared)

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        parts = (self.router, self.experts, self.shared, self.shared_gate)
        return [item for part in parts if part is not None for item in part.items()]


class RouterLayer:
    """Sigmoid routers are computed in float32, as their models were trained."""

    def __init__(self, block: Router, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.block = block
        self.dtype = torch.float32 if block.scoring in ("sigmoid", "sqrt_softplus") else build.dtype
        # A few rows that decide much: not worth quantizing.
        plain = replace(build, dtype=self.dtype, weight_format=DENSE)
        self.linear = LinearLayer(block.linear, plain, hf_prefix, gguf_prefix)
        self.correction = (
            build.empty(block.linear.out_features, dtype=torch.float32) if block.correction else None
        )
        self.names = (hf_prefix + block.correction, gguf_prefix + block.gguf_correction)
        self.route = build.binder.bind(ROUTE, build.spec)
        self.table = None
        if block.table is not None:
            self.table = TokenTable(block.table, block, build, hf_prefix, gguf_prefix)

    def __call__(self, x: Tensor, token_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        block = self.block
        if self.table is not None:
            if token_ids is None:
                raise ValueError("experts by token id need the ids")
            ids = self.table.experts[token_ids].long()
            return ids, shares_of(
                self.linear(x.to(self.dtype)), ids, block.scoring, block.renormalize, block.scale
            )
        found: tuple[Tensor, Tensor] = self.route(
            self.linear(x.to(self.dtype)),
            block.top_k,
            block.scoring,
            block.renormalize,
            block.scale,
            block.groups,
            block.top_groups,
            self.correction,
            block.group_best,
        )
        return found

    def items(self) -> list[LoadItem]:
        """What the loader must fill."""
        found = self.linear.items()
        if self.correction is not None:
            found.append(LoadItem(*self.names, self.correction))
        return found + (self.table.items() if self.table is not None else [])


class TokenTable:
    """The experts [vocabulary, top_k] that each token id visits."""

    def __init__(self, part: Part, block: Router, build: Build, hf_prefix: str, gguf_prefix: str) -> None:
        self.num = block.linear.out_features
        self.experts = build.empty(part.out_features, block.top_k, dtype=torch.int32)
        self.name = hf_prefix + part.hf

    def items(self) -> list[LoadItem]:
        """What the loader must fill: whole numbers, which random models draw from all experts."""
        source = Source("experts", self.name)
        return [
            StoredMatrix(
                self.name, "", self.experts, sources=(source,), take=self._take, randomize=self._randomize
            )
        ]

    def _take(self, stored: Mapping[str, Tensor]) -> None:
        given = stored["experts"]
        if given.shape != self.experts.shape or given.min() < 0 or given.max() >= self.num:
            raise ModelFileError(
                f"Tensor {self.name} must name {self.experts.shape[1]} of {self.num} experts for each of "
                f"{self.experts.shape[0]} token ids."
            )
        self.experts.copy_(given)

    def _randomize(self, generator: torch.Generator) -> None:
        drawn = torch.rand((len(self.experts), self.num), device=self.experts.device, generator=generator)
        self.experts.copy_(drawn.topk(self.experts.shape[1], dim=1).indices)


def make_experts(
    block: Experts, build: Build, hf_prefix: str, gguf_prefix: str
) -> tuple[ExpertWeights, Callable[..., Tensor]]:
    """The matrices as the weight format stores them, and the op that multiplies them."""
    stacks = build.weight_format.allocate_experts(block, build, hf_prefix, gguf_prefix)
    if stacks is None:
        return ExpertWeights(block, build, hf_prefix, gguf_prefix), build.binder.bind(EXPERTS, build.spec)
    packed = PackedExpertWeights(block, build, hf_prefix, gguf_prefix, *stacks)
    return packed, build.binder.bind(EXPERTS_PACKED, build.spec)

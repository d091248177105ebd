"""Mixture of experts: router, stacked experts, shared expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from octavo.device.ops.moe import EXPERTS, EXPERTS_PACKED, ROUTE
from octavo.model.blocks import Experts, MoE, Router
from octavo.model.layers.build import Build
from octavo.model.layers.experts import ExpertWeights
from octavo.model.layers.linear import LinearLayer
from octavo.model.layers.load import LoadItem
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

    def __call__(self, x: Tensor) -> Tensor:
        block, weights = self.block, self.experts
        ids, shares = self.router(x)
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
        self.dtype = torch.float32 if block.scoring == "sigmoid" else build.dtype
        # A few rows that decide much: not worth quantizing.
        plain = replace(build, dtype=self.dtype, weight_format=DENSE)
        self.linear = LinearLayer(block.linear, plain, hf_prefix, gguf_prefix)
        self.correction = (
            build.empty(block.linear.out_features, dtype=torch.float32) if block.correction else None
        )
        self.names = (hf_prefix + block.correction, gguf_prefix + block.gguf_correction)
        self.route = build.binder.bind(ROUTE, build.spec)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block = self.block
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
        return found


def make_experts(
    block: Experts, build: Build, hf_prefix: str, gguf_prefix: str
) -> tuple[ExpertWeights, Callable[..., Tensor]]:
    """The matrices as the weight format stores them, and the op that multiplies them."""
    stacks = build.weight_format.allocate_experts(block, build, hf_prefix, gguf_prefix)
    if stacks is None:
        return ExpertWeights(block, build, hf_prefix, gguf_prefix), build.binder.bind(EXPERTS, build.spec)
    packed = PackedExpertWeights(block, build, hf_prefix, gguf_prefix, *stacks)
    return packed, build.binder.bind(EXPERTS_PACKED, build.spec)

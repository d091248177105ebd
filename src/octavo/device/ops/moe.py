"""Mixture of experts: which experts a token visits, and what they give (Shazeer et al. 2017; Fedus et al. 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows
from octavo.device.ops.packed import Packed, rows_of, unpack


def route(
    logits: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    correction: Tensor | None = None,
    group_best: int = 2,
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights: logits [T, E] -> ids [T, top_k] int64, weights [T, top_k] float32.

    ``scoring``: "softmax" over all experts, "sigmoid" or "sqrt_softplus" of each, or "softmax_top_k": over the
    chosen logits. For the choice
    alone, ``correction`` [E] is added and experts outside the ``top_groups`` best of ``groups`` equal groups (by the sum
    of their ``group_best`` best scores, 1 or 2 of them) are left out (DeepSeek-AI 2024). ``renormalize``: weights sum to 1 before ``scale``.
    """
    wide = logits.float()
    scores = scored(wide, scoring)
    choice = scores if correction is None else scores + correction
    if groups > 1:
        grouped = choice.view(choice.shape[0], groups, -1)
        best = grouped.topk(min(group_best, grouped.shape[2]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(
            1, best.topk(top_groups, dim=-1).indices, True
        )
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if scoring == "softmax_top_k":
        weights = torch.softmax(weights, -1)
    elif renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def scored(logits: Tensor, scoring: str) -> Tensor:
    """The scores of all experts for logits [T, E] float32."""
    if scoring == "softmax":
        return torch.softmax(logits, -1)
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    return F.softplus(logits).sqrt() if scoring == "sqrt_softplus" else logits


def shares_of(logits: Tensor, ids: Tensor, scoring: str, renormalize: bool, scale: float) -> Tensor:
    """The weights [T, top_k] float32 of experts that were chosen otherwise; see ``route``."""
    weights = scored(logits.float(), scoring).gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale


def gated(gate_up: Tensor, activation: str, alpha: float = 1.0, limit: float = 0.0) -> Tensor:
    """act(gate) * up of [T, 2 I] -> [T, I]; "swiglu_clamped" is gate * sigmoid(alpha gate) * (up + 1), both clamped:
    gate to at most ``limit``, up to +-``limit``; so are those of "silu" where ``limit`` > 0."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    if activation == "silu":
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    alpha: float = 1.0,
    limit: float = 0.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    partial: bool = False,
) -> Tensor:
    """Sum over k of weights[t, k] * expert ids[t, k] of x[t].

    x [T, H]; ids [T, K] int64, weights [T, K] float32; gate_up [E, 2 I, H] (gate rows first), down [E, H, I]; biases
    [E, 2 I] and [E, H]. With ``partial`` ids may be E: an expert that is not here and gives nothing. Returns [T, H] in
    x's type.
    """
    tokens, top_k = ids.shape
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    out = (x.new_zeros if partial else x.new_empty)((tokens * top_k, x.shape[1]))
    start = 0
    for expert, count in enumerate(counts[: gate_up.shape[0]]):
        if count == 0:
            continue
        rows = order[start : start + count]
        first_bias = gate_up_bias[expert] if gate_up_bias is not None else None
        last_bias = down_bias[expert] if down_bias is not None else None
        inner = gated(F.linear(x[rows // top_k], gate_up[expert], first_bias), activation, alpha, limit)
        out[rows] = F.linear(inner, down[expert], last_bias)
        start += count
    return (out.view(tokens, top_k, -1).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def experts_packed(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Packed,
    down: Packed,
    activation: str,
    alpha: float = 1.0,
    limit: float = 0.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    partial: bool = False,
) -> Tensor:
    """``experts`` over packed codes: the rows of all experts one after the other, gate_up [E * 2 I, H], down [E * H, I]."""
    num = down.outputs // gate_up.inputs
    used = sorted(expert for expert in set(ids.flatten().tolist()) if expert < num)
    place = torch.full((num + 1,), len(used), device=ids.device)
    place[torch.tensor(used, dtype=torch.long, device=ids.device)] = torch.arange(
        len(used), device=ids.device
    )

    def matrices(stack: Packed) -> Tensor:
        size = stack.outputs // num
        return torch.stack([unpack(rows_of(stack, slice(i * size, (i + 1) * size))) for i in used])

    def biases(stack: Tensor | None) -> Tensor | None:
        return None if stack is None else stack[used].float()

    if not used:
        return torch.zeros_like(x)
    return experts(
        x.float(), place[ids], weights, matrices(gate_up), matrices(down), activation, alpha, limit,
        biases(gate_up_bias), biases(down_bias), True,
    ).to(x.dtype)  # fmt: skip


ROUTE = Op("route", route, triton_rows("moe:route"))
EXPERTS = Op("experts", experts, triton_rows("moe:GroupedExperts", factory=True))
EXPERTS_PACKED = Op(
    "experts_packed",
    experts_packed,
    triton_rows("moe_packed:GroupedPackedExperts", "GroupedPackedExpertsHopper", factory=True),
)

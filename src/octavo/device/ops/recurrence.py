"""Recurrent layers: a short causal convolution and a linear recurrence over a matrix state a head.

    S_t = exp(g_t) S_{t-1} + k_t d_t^T        S [Dk, Dv] a head, float32        y_t = S_t^T q_t

    delta (Gated DeltaNet, Yang et al. 2024)   d_t = beta_t (v_t - (exp(g_t) S_{t-1})^T k_t),  beta = sigmoid(b)
                                               q and k have length 1, q is scaled by Dk^-1/2
    ssd (Mamba-2, Dao and Gu 2024)             d_t = dt_t v_t,  y_t += skip v_t

with dt_t = softplus(a_t + dt_bias) and g_t = -exp(a_log) dt_t in both. Rows of a step go on from the state that the
page of their last computed token holds, and leave theirs in the page of their last token of this step:

    page k-1 |.........S|  page k |...S       start = end of page k-1: read there, write here; else both are one page
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows


@dataclass
class StateRows:
    """Where R rows of a step find their states: ``page_table`` [R, W] int32, ``slot_mapping`` [T] (page * page_size +
    offset; -1 = padding, which changes nothing), ``query_start`` [R + 1], ``kv_lens`` [R] int32 on the device,
    ``max_query`` a host bound of tokens a row, ``page_size`` in tokens. No row crosses the end of a page."""

    page_table: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    kv_lens: Tensor
    max_query: int
    page_size: int

    def on_host(self) -> list[tuple[int, int, int, int]]:
        """(first token, end, page to read or -1, page to write) of every row that computes something."""
        starts, lengths = self.query_start.tolist(), self.kv_lens.tolist()
        rows = []
        for row, (begin, end, length) in enumerate(zip(starts, starts[1:], lengths)):
            if end > begin and self.slot_mapping[end - 1] >= 0:
                before = length - (end - begin)
                source = int(self.page_table[row, (before - 1) // self.page_size]) if before else -1
                rows.append((begin, end, source, int(self.slot_mapping[end - 1]) // self.page_size))
        return rows


@dataclass(frozen=True)
class Heads:
    """``num_keys`` heads of q and k of ``key_dim`` values, each for as many of the ``num`` heads of v of ``value_dim``."""

    num_keys: int
    num: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Values of q, k and v of one token."""
        return 2 * self.num_keys * self.key_dim + self.num * self.value_dim


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, pages: Tensor, rows: StateRows) -> Tensor:
    """silu(convolution of each channel with its last W - 1 inputs and itself) for x [T, C], weight [C, W].

    ``pages`` [N, W - 1, C] keep the last inputs, oldest first. Returns [T, C]; padding tokens give zeros.
    """
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for begin, end, source, target in rows.on_host():
        before = pages[source] if source >= 0 else torch.zeros_like(pages[target])
        inputs = torch.cat((before, x[begin:end]))
        mixed = F.conv1d(inputs.T.float(), weight.float().unsqueeze(1), None, groups=weight.shape[0]).T
        out[begin:end] = F.silu(mixed if bias is None else mixed + bias.float()).to(x.dtype)
        pages[target] = inputs[inputs.shape[0] - pages.shape[1] :]
    return out


def linear_recurrence(
    qkv: Tensor,
    a: Tensor,
    b: Tensor | None,
    a_log: Tensor,
    dt_bias: Tensor,
    skip: Tensor | None,
    states: Tensor,
    rows: StateRows,
    heads: Heads,
) -> Tensor:
    """y [T, num * Dv] in qkv's type, for qkv [T, channels] (q, then k, then v), a and b [T, num].

    ``b`` given means the delta rule, None the state space form (whose ``skip`` [num] may be None). ``states``
    [N, num, Dk, Dv] float32. a_log, dt_bias [num] float32. Padding tokens give zeros.
    """
    size = heads.num_keys * heads.key_dim
    parts = torch.split(qkv.float(), [size, size, heads.num * heads.value_dim], dim=1)
    shared = heads.num // heads.num_keys
    q, k = (part.view(-1, heads.num_keys, heads.key_dim).repeat_interleave(shared, 1) for part in parts[:2])
    v = parts[2].view(-1, heads.num, heads.value_dim)
    if b is not None:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q = q * heads.key_dim**-0.5
    dt = F.softplus(a.float() + dt_bias)
    keep = torch.exp(-torch.exp(a_log) * dt)
    out = torch.zeros_like(v)
    for begin, end, source, target in rows.on_host():
        state = states[source].clone() if source >= 0 else torch.zeros_like(states[target])
        for t in range(begin, end):
            state *= keep[t, :, None, None]
            if b is None:
                new = dt[t, :, None] * v[t]
            else:
                new = torch.sigmoid(b[t].float())[:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state += k[t].unsqueeze(2) * new.unsqueeze(1)
            out[t] = torch.einsum("hkv,hk->hv", state, q[t])
            if skip is not None:
                out[t] += skip[:, None] * v[t]
        states[target] = state
    return out.view(out.shape[0], -1).to(qkv.dtype)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float, run: int, gate_first: bool) -> Tensor:
    """RMSNorm over runs of ``run`` values of y [T, N], times silu(gate) [T, N] before or after it.

    ``weight`` is that of each run or of all N values; computed in float32, result in y's type.
    """
    wide, gates = y.float(), F.silu(gate.float())
    runs = (wide * gates if gate_first else wide).view(y.shape[0], -1, run)
    normed = runs * torch.rsqrt((runs * runs).mean(-1, keepdim=True) + eps) * weight.view(-1, run)
    out = normed.view(y.shape)
    return (out if gate_first else out * gates).to(y.dtype)


CAUSAL_CONV = Op("causal_conv", causal_conv, triton_rows("recurrence:causal_conv"))
LINEAR_RECURRENCE = Op("linear_recurrence", linear_recurrence, triton_rows("recurrence:linear_recurrence"))
GATED_NORM = Op("gated_norm", gated_norm, triton_rows("recurrence:gated_norm"))

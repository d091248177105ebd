"""Hyper-connections: several residual streams, which each branch reads and writes by weights of its own.

(Zhu et al. 2024; Xie et al. 2026, whose mixing matrices are doubly stochastic.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows


def hyper_logits(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """[T, K] float32: fn [K, N E] (float32) of all streams [T, N, E] over their common root mean square."""
    flat = streams.flatten(1).float()
    return F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def hyper_enter(
    streams: Tensor, logits: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What a branch reads [T, E], and how its answer is written: weights [T, N + N N] float32.

    streams [T, N, E]; logits [T, (2 + N) N]; base [(2 + N) N] and scale [3] float32. The first N logits weigh the streams
    (sigmoid + eps); the next N are how much of the answer each stream gets (2 sigmoid); the matrix [N, N] behind them says
    how much of stream i goes on as stream j: its softmax + eps, columns then rows summing to 1 after ``iterations`` turns.
    """
    n = streams.shape[1]
    sizes = [n, n, n * n]
    read, write, mix = (
        part * scale[i] + own
        for i, (part, own) in enumerate(zip(torch.split(logits, sizes, dim=-1), torch.split(base, sizes)))
    )
    matrix = torch.softmax(mix.reshape(-1, n, n), dim=-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    entered = torch.einsum("tn,tne->te", torch.sigmoid(read) + eps, streams.float()).to(streams.dtype)
    return entered, torch.cat((2 * torch.sigmoid(write), matrix.flatten(-2)), dim=-1)


def hyper_leave(streams: Tensor, answer: Tensor, weights: Tensor) -> None:
    """Mix streams [T, N, E] in place and add a branch's answer [T, E]; ``weights`` are those of ``hyper_enter``."""
    n = streams.shape[1]
    matrix = weights[:, n:].view(-1, n, n)
    mixed = torch.einsum("tij,tie->tje", matrix, streams.float())
    streams.copy_(mixed + weights[:, :n].unsqueeze(-1) * answer.float().unsqueeze(1))


def hyper_end(streams: Tensor, logits: Tensor, base: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The weighted sum of streams [T, N, E]: [T, E], in their type; logits [T, N], base [N], scale [1]."""
    weights = torch.sigmoid(logits * scale + base) + eps
    return torch.einsum("tn,tne->te", weights, streams.float()).to(streams.dtype)


HYPER_LOGITS = Op("hyper_logits", hyper_logits, triton_rows("hyper:hyper_logits"))
HYPER_ENTER = Op("hyper_enter", hyper_enter, triton_rows("hyper:hyper_enter"))
HYPER_LEAVE = Op("hyper_leave", hyper_leave, triton_rows("hyper:hyper_leave"))
HYPER_END = Op("hyper_end", hyper_end)

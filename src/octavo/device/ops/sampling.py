"""From logits to tokens: penalties, filters, the draw and log probabilities; none of them sorts on the GPU.

The draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): argmax(logit / temperature + noise) is a
sample of the softmax. The noise of a token is a hash of (seed, position, token id) and nothing else, so a request
draws the same tokens alone, in any batch, after preemption, and on any device up to the rounding of floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.device.ops.bind import Op, triton_rows

IN_PROMPT = 1 << 30  # bit of a token count: the token occurs in the prompt
COUNT_MASK = IN_PROMPT - 1  # the bits below: how many times it was generated
WEYL = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive token ids
MIX_A, MIX_B = 0x7FEB352D, 0x846CA68B  # multipliers of a 32-bit mixer with low bias (Wellons 2018)
TWO_POW_MINUS_32 = 2.0**-32


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely token of each row of logits [S, V]: [S] int64, the lowest id among equals; and ``nan_rows``, in one pass.

    Where a row holds a NaN its token is any.
    """
    return torch.argmax(logits, dim=-1), nan_rows(logits)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token a row, drawn from softmax(logits / temperature) after the filters; greedy where temperature is 0.

    logits [S, V] float32 | bfloat16 | float16, unchanged; temperature, top_p, min_p [S] float32; top_k [S] int32;
    seeds, positions [S] int64. A filter keeps what is at least as likely as its threshold, so equals stay together:
    min_p keeps p >= min_p * max(p) (off at 0); then top_k the k most likely (off at <= 0); then top_p the fewest
    most likely of the rest whose renormalized mass reaches top_p (off at >= 1). Returns [S] int64.
    """
    wide = logits.float()
    z = wide / torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    keep = z >= _threshold(z, top_k, top_p, min_p).unsqueeze(1)
    scores = torch.where(keep, z + gumbel(seeds, positions, z.shape[1]), float("-inf"))
    return torch.where(temperature > 0, torch.argmax(scores, dim=-1), torch.argmax(wide, dim=-1))


def _threshold(z: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Least scaled logit [S] that all three filters keep; -inf where nothing is filtered."""
    vocab = z.shape[1]
    best = z.amax(dim=-1)
    least = torch.where(min_p > 0, best + torch.log(min_p.clamp(min=1e-30, max=1.0)), float("-inf"))
    filtered = ((top_k > 0) & (top_k < vocab)) | (top_p < 1)
    rows = torch.nonzero(filtered).flatten()  # the reference sorts, but only rows that filter by rank or mass
    if rows.numel() == 0:
        return least
    ordered = torch.sort(z[rows], dim=-1, descending=True).values
    k = top_k[rows].long()
    k = torch.where((k > 0) & (k < vocab), k, vocab)
    floor = torch.maximum(least[rows], ordered.gather(1, k.unsqueeze(1) - 1).squeeze(1))
    weights = torch.exp(ordered - best[rows].unsqueeze(1)) * (ordered >= floor.unsqueeze(1))
    mass = weights.cumsum(dim=-1)
    enough = mass >= (top_p[rows] * mass[:, -1]).unsqueeze(1)
    first = torch.argmax(
        enough.to(torch.int8), dim=-1, keepdim=True
    )  # fewest tokens whose mass reaches top_p
    nucleus = torch.where(top_p[rows] < 1, ordered.gather(1, first).squeeze(1), float("-inf"))
    return least.index_put((rows,), torch.maximum(floor, nucleus))


def gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Gumbel noise [S, V] float32 for (seed, position, token id); seeds, positions [S] int64."""
    ids = torch.arange(vocab, device=seeds.device, dtype=torch.int32).unsqueeze(0) * _signed(WEYL)
    first = _mix(_mix(_word(seeds)) ^ _word(positions))
    second = _mix(_mix(_word(seeds >> 32) ^ _signed(WEYL)) ^ _word(positions >> 32) ^ first)
    bits = _mix(_mix(ids ^ first.unsqueeze(1)) + second.unsqueeze(1))
    uniform = ((bits.long() & 0xFFFFFFFF).float() + 0.5) * TWO_POW_MINUS_32
    # -log(1 - u), by its series where 1 - u would round: the winner of the draw has a small u.
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.33333334))
    exponential = torch.where(uniform < 0.004, series, -torch.log((1.0 - uniform).clamp(min=3e-8)))
    return -torch.log(exponential)


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _word(x: Tensor) -> Tensor:
    """The low 32 bits of int64 as int32."""
    low = x & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that flips each output bit about half the time; int32, wraps."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(MIX_A)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(MIX_B)
    return x ^ ((x >> 16) & 0xFFFF)


def penalize(
    logits: Tensor, counts: Tensor, rows: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> None:
    """Apply repetition, frequency and presence penalties to logits [S, V] in place, in that order.

    counts [C, V] int32: bit 30 = the token occurs in the prompt, lower bits = times generated; rows [S] int32: the
    row of ``counts`` of each row of logits, -1 = none; presence, frequency, repetition [S] float32. Repetition
    divides positive and multiplies negative logits of every token seen; the others count generated tokens only.
    """
    chosen = torch.nonzero(rows >= 0).flatten()
    if chosen.numel() == 0:
        return
    seen = counts[rows[chosen].long()]
    generated = (seen & COUNT_MASK).float()
    factor = torch.where(seen != 0, repetition[chosen].float().unsqueeze(1), 1.0)
    x = logits[chosen].float()
    x = torch.where(x > 0, x / factor, x * factor)
    x = x - frequency[chosen].float().unsqueeze(1) * generated
    x = x - presence[chosen].float().unsqueeze(1) * (generated > 0)
    logits[chosen] = x.to(logits.dtype)


def count_tokens(counts: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """counts[row, token] += 1 in place; counts [C, V] int32, rows [S] int32 (-1 = none), tokens [S] int64."""
    keep = rows >= 0
    where = (rows[keep].long(), tokens[keep])
    counts.index_put_(where, torch.ones_like(where[0], dtype=counts.dtype), accumulate=True)


def logprobs_of(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability [S] float32 and rank [S] int64 (1 = most likely) of tokens [S] under logits [S, V]."""
    wide = logits.float()
    chosen = wide.gather(1, tokens.unsqueeze(1))
    ranks = (wide > chosen).sum(dim=-1) + 1
    return chosen.squeeze(1) - torch.logsumexp(wide, dim=-1), ranks


def nan_rows(logits: Tensor) -> Tensor:
    """Whether a row of logits [S, V] holds a NaN: [S] bool."""
    return logits.isnan().any(dim=-1)


def mask_logits(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Forbid tokens in place: logits[rows[i], t] = -inf where bit t % 32 of words[i, t // 32] is 0.

    logits [S, V], rows [n] int64, words [n, ceil(V / 32)] int32.
    """
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    allowed = ((words.unsqueeze(-1) >> shifts) & 1).view(len(rows), -1)[:, : logits.shape[1]].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))


GREEDY = Op("greedy", greedy, triton_rows("logits:greedy"))
SAMPLE = Op("sample", sample, triton_rows("draw:sample", "sample_hopper"))
PENALIZE = Op("penalize", penalize, triton_rows("logits:penalize"))
COUNT_TOKENS = Op("count_tokens", count_tokens, triton_rows("logits:count_tokens"))
LOGPROBS_OF = Op("logprobs_of", logprobs_of, triton_rows("logits:logprobs_of"))
NAN_ROWS = Op("nan_rows", nan_rows, triton_rows("logits:nan_rows"))
MASK_LOGITS = Op("mask_logits", mask_logits, triton_rows("logits:mask_logits"))

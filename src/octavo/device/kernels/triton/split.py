"""The end of a product whose inputs were split over programs: whichever finishes last adds all sums, in one order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(
    acc, out, sums, counters, bias, m, n, M, N, stride_out, split, SPLITS, SPLIT: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Write acc [BLOCK_N, BLOCK_M] for outputs n and tokens m as rows of out, plus the bias.

    With SPLIT, acc goes to sums [SPLITS, M, N] first; programs learn who is last from counters, one for each pair of the
    first two program numbers, which are zero between launches.
    """
    inside = (n < N)[:, None] & (m < M)[None, :]
    last = True
    if SPLIT:
        at = m.to(tl.int64)[None, :] * N + n[:, None]
        size = M.to(tl.int64) * N
        tl.store(sums + split * size + at, acc, mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them announces it
        counter = counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(counter, 0)
            acc = tl.zeros_like(acc)
            for part in range(SPLITS):
                acc += tl.load(sums + part * size + at, mask=inside, other=0.0, cache_modifier=".cg")
    if last:
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        place = m.to(tl.int64)[None, :] * stride_out + n[:, None]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)

"""Which instructions the compiled CPU kernels may use, decided once from what the processor reports.

Only two things differ between processors: how four bytes are multiplied and summed into an int32 lane (``dot``), and
whether pairs of bfloat16 are multiplied natively (``bf16``). All other code is generic vectors of 16 lanes, which
LLVM splits into whatever registers there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Target:
    """One kind of processor, as far as the kernels care.

    ``dot``: vnni (u8 x s8, 512 bit), maddubs (AVX2), sdot (NEON) or portable. ``bf16``: native bfloat16 pair product.
    ``half``: native float16 conversion. ``tiles``: token counts of the matrix tiles, largest first; the largest is
    what the vector registers hold.
    """

    name: str
    dot: str
    bf16: bool
    half: bool
    tiles: tuple[int, ...]

    @property
    def signed_bytes(self) -> bool:
        """True where ``dot`` of 8-bit weights already subtracts their offset of 128."""
        return self.dot in ("maddubs", "sdot")


PORTABLE = Target("portable", "portable", False, False, (2, 1))
AVX2 = Target("avx2", "maddubs", False, True, (2, 1))
NEON = Target("neon", "sdot", False, True, (4, 2, 1))
AVX512 = Target("avx512-vnni", "vnni", False, True, (8, 4, 2, 1))
AVX512_BF16 = Target("avx512-vnni-bf16", "vnni", True, True, (8, 4, 2, 1))


def choose_target(features: frozenset[str]) -> Target:
    """The best target for a set of LLVM feature names (like "avx2", "avx512vnni", "dotprod")."""
    if {"avx512vnni", "avx512bw", "avx512vl"} <= features:
        return AVX512_BF16 if "avx512bf16" in features else AVX512
    if {"avx2", "fma", "f16c"} <= features:
        return AVX2
    if {"neon", "dotprod"} <= features:
        return NEON
    return PORTABLE


def host_features() -> frozenset[str]:
    """LLVM feature names that this processor and operating system support."""
    return frozenset(name for name, on in llvm.get_host_cpu_features().items() if on)

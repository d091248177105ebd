"""Storage types of model files: how many bytes a tensor of each type takes. Plain tables, no arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """A GGUF storage type: ``block`` elements along the innermost dimension take ``nbytes`` bytes."""

    name: str
    block: int
    nbytes: int


# Type number in the file to type. Sizes follow the GGUF block layouts: a 32-block has an fp16 scale (and minimum),
# a 256-block has packed 6-bit or 8-bit sub-scales beside them.
GGUF_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 2 + 16),
    3: BlockType("Q4_1", 32, 2 + 2 + 16),
    6: BlockType("Q5_0", 32, 2 + 4 + 16),
    7: BlockType("Q5_1", 32, 2 + 2 + 4 + 16),
    8: BlockType("Q8_0", 32, 2 + 32),
    10: BlockType("Q2_K", 256, 16 + 64 + 2 + 2),
    11: BlockType("Q3_K", 256, 32 + 64 + 12 + 2),
    12: BlockType("Q4_K", 256, 2 + 2 + 12 + 128),
    13: BlockType("Q5_K", 256, 2 + 2 + 12 + 32 + 128),
    14: BlockType("Q6_K", 256, 128 + 64 + 16 + 2),
    20: BlockType("IQ4_NL", 32, 2 + 16),
    23: BlockType("IQ4_XS", 256, 2 + 2 + 4 + 128),
    30: BlockType("BF16", 1, 2),
    39: BlockType("MXFP4", 32, 1 + 16),  # a power of two as its exponent
}
GGUF_TYPES_BY_NAME: dict[str, tuple[int, BlockType]] = {t.name: (n, t) for n, t in GGUF_TYPES.items()}
BLOCK_TYPES = frozenset(
    kind.name for kind in GGUF_TYPES.values() if kind.block > 1
)  # on GPUs they stay as they are

# Types that exist and that we do not read: their names, for the message only.
UNSUPPORTED_GGUF_TYPES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}

# safetensors type to BITS an element (the 4- and 6-bit floats are packed).
SAFETENSORS_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

"""Compiles kernels for real GPUs on a machine without one; run as a script, because an interpreted kernel cannot.

Prints one JSON line a kernel: its name, the architecture, and the bytes of shared memory it needs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from octavo.device.kernels.triton import (
    attention,
    compressed,
    compressed_attention,
    fragments,
    hyper,
    latent,
    latent_prefill,
    packed,
    sparse,
)
from octavo.device.ops.packed import Layout

HALF, FLOAT, INT, LONG, NUMBER = "*bf16", "*fp32", "*i32", "*i64", "fp32"
TYPES = {
    "sums": FLOAT, "stats": FLOAT, "weight": FLOAT, "cos_sin": FLOAT, "weights": FLOAT, "scores": FLOAT, "eps": NUMBER,
    "scale": NUMBER, "softcap": NUMBER, "positions": LONG, "slot_mapping": LONG, "slots": LONG, "chosen": LONG,
    "page_table": INT, "query_start": INT, "kv_lens": INT, "rows": INT, "seen": INT, "counts": INT, "begins": INT,
    "first_query": INT, "first_key": INT, "counters": INT, "kv_scales": FLOAT,
}  # fmt: skip
HALVES = {"out", "q", "pages", "kv_pages", "wide", "compressed", "latents", "heads", "key", "sinks"}
V3: dict[str, Any] = {"H": 128, "LATENT": 512, "LPAD": 512}
ROPE = {"ROPE": 64, "RPAD": 64, "PAGE": 16, "PRECISION": "tf32"}
HOPPER, AMPERE = 90, 86


def compiled(
    kernel: Any, arch: int, warps: int, stages: int, types: dict[str, str], **constants: Any
) -> None:
    """Compile to machine code and report."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = types.get(name, HALF if name in HALVES else TYPES.get(name, "i32"))
        signature[name] = "constexpr" if name in constants else kind
        if kind.startswith("*") or name.startswith("stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {place: found for place, found in attributes.items() if place not in values}
    source = ASTSource(kernel, signature, values, attributes)
    found = compile_source(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    if not found.asm.get("cubin"):
        raise RuntimeError("no machine code")
    print(json.dumps({"kernel": kernel.__name__, "arch": arch, "shared": found.metadata.shared}), flush=True)


def dense(arch: int) -> None:
    """Latent attention of DeepSeek-V3, and of GLM-4.7-Flash's wider heads."""
    large = arch >= HOPPER
    for heads, queries in ((128, 1), (16, 1)) if large else ((128, 1),):
        tiles = latent.attention_tiles(heads, queries, False, large)
        shape = {**V3, **ROPE, "H": heads, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
        compiled(latent._attention_kernel, arch, tiles.num_warps, tiles.num_stages, {}, **shape, SPLITS=2)
    compiled(latent._merge_kernel, arch, 4, 3, {}, **V3, BLOCK_M=64, BLOCK_N=32, SPLITS=2)
    compiled(
        latent._store_kernel, arch, 2, 3, {}, **V3, QUERY=192, ROPE=64, RPAD=64, PAGE=16, HEADS=latent.HEADS
    )
    compiled(latent_prefill._gather_kernel, arch, 2, 3, {}, WIDTH=576, PADDED=1024, PAGE=16)
    for nope, value in ((128, 128), (192, 256)):
        tiles = latent_prefill.prefill_tiles(nope + 64, False, large)
        shape = {
            "LATENT": 512,
            "NOPE": nope,
            "NPAD": 128 if nope == 128 else 256,
            "VALUE": value,
            "VPAD": value,
        }
        rest = {
            "ROPE": 64,
            "RPAD": 64,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "PRECISION": "tf32",
        }
        kernel = latent_prefill._prefill_kernel
        compiled(kernel, arch, tiles.num_warps, tiles.num_stages, {}, **shape, **rest)


def chosen(arch: int) -> None:
    """DeepSeek V3.2's indexer, and attention over what it chose."""
    index = {"D": 128, "DPAD": 128, "PAGE": 16}
    compiled(sparse._index_store_kernel, arch, 2, 3, {}, H=64, **index, ROPE=64, HEADS=sparse.HEADS)
    scores = {"H": 64, "HPAD": 64, "BLOCK_N": 64, "SPAN": sparse.SPAN, "PRECISION": "tf32"}
    compiled(sparse._scores_kernel, arch, 4, 2, {"out": FLOAT}, **index, **scores)
    compiled(sparse._choose_kernel, arch, 4, 3, {"out": LONG}, K=2048, PAGE=16, BLOCK=1024)
    compiled(sparse._merge_kernel, arch, 4, 3, {}, **V3, K=2048, BLOCK_N=32, SPLITS=2)
    block, warps, stages = (64, 8, 2) if arch >= HOPPER else (16, 4, 1)
    compiled(
        sparse._sparse_kernel,
        arch,
        warps,
        stages,
        {},
        **V3,
        **ROPE,
        K=2048,
        BLOCK_M=block,
        BLOCK_N=32,
        SPLITS=2,
    )
    entries(arch)


def entries(arch: int) -> None:
    """DeepSeek V4-Flash: heads of 512, entries of 4 tokens that an indexer chooses and of 128, four residual streams."""
    head, floats = {"H": 64, "D": 512, "DPAD": 512}, ("bias", "sinks", "logits", "base", "fn", "squares")
    types = dict.fromkeys(floats, FLOAT) | dict.fromkeys(
        ("x", "pieces", "entries", "streams", "answer"), HALF
    )
    types |= {"entry_table": INT, "norm_eps": NUMBER}
    block, warps, stages = (64, 8, 2) if arch >= HOPPER else (16, 4, 1)
    shape = {**head, "WINDOW": 128, "RATE": 4, "K": 512, "ENTRIES": True, "BLOCK_N": 32, "SPLITS": 2}
    rest = {"PAGE": 16, "PER_PAGE": 16, "BLOCK_M": block, "PRECISION": "tf32"}
    compiled(compressed_attention._attention_kernel, arch, warps, stages, types, **shape, **rest)
    if arch < HOPPER:  # the others need hardly any shared memory
        return
    compiled(compressed_attention._merge_kernel, arch, 4, 3, types, **shape)
    turned = {"ROPE": 64, "HEADS": compressed.HEADS}
    compiled(compressed._rotate_kernel, arch, 2, 3, types, **head, **turned, BACK=True)
    compiled(compressed._head_store_kernel, arch, 2, 3, types, **head, **turned, PAGE=16)
    compiled(compressed._piece_kernel, arch, 4, 3, types, W=2560, PAGE=4, BLOCK=compressed.BLOCK)
    made = {
        "FIRST": 0,
        "RATE": 4,
        "WIDTH": 1024,
        "D": 512,
        "DPAD": 512,
        "ROPE": 64,
        "PAGE": 16,
        "PER_PAGE": 16,
    }
    compiled(compressed._compress_kernel, arch, 4, 3, types, **made, TOKENS=4)
    sums, product = {**types, "out": FLOAT}, {"K": 24, "KPAD": 32, "SIZE": 16384, "SPLITS": 64}
    tile = {"RANGE": 256, "TOKENS": hyper.TOKENS, "INPUTS": hyper.INPUTS, "PRECISION": "tf32x3"}
    compiled(hyper._logits_kernel, arch, 4, 3, sums, **product, **tile)
    compiled(hyper._sum_kernel, arch, 4, 3, sums, **product)
    streams, types = {"N": 4, "NPAD": 4, "E": 4096, "BLOCK": hyper.BLOCK}, {**types, "scale": FLOAT}
    compiled(hyper._enter_kernel, arch, 4, 3, types, **streams, TURNS=20)
    compiled(hyper._leave_kernel, arch, 4, 3, types, **streams)


def chunks(arch: int) -> None:
    """Paged attention within chunks (Llama 4)."""
    shape = {"GROUP": 5, "PAGE": 16, "D": 128, "DPAD": 128, "BLOCK_N": 64, "WINDOW": 2, "SOFTCAP": False}
    rest = {"SINKS": False, "SCALED": True, "PRECISION": "tf32", "PDL": False}
    compiled(attention._varlen_kernel, arch, 4, 2, {}, **shape, **rest, BLOCK_M=64)
    compiled(attention._decode_kernel, arch, 2, 2, {}, **shape, **rest, GPAD=16, SPLITS=4, MERGE=True)


def codes(arch: int) -> None:
    """AWQ's codes in the order of tensor cores: few tokens without shared memory but for the last sum, and tiles."""
    large = arch >= HOPPER
    layout = Layout(4, 0, 32, 128, scales="zero")
    none: dict[str, Any] = {"high": None, "outer": None, "bias": None, "BIAS": False, "EVEN": True}
    shape = {**packed.constants(layout), **none}
    types = {**dict.fromkeys(("words", "scale"), INT), "x": HALF}
    for tokens in (1, 8):
        launch = fragments.few(tokens, 4096, 4096, layout)
        warps = {"KS": launch.teams, "WN": launch.side, "NB": launch.blocks}
        compiled(
            fragments._few_kernel, arch, launch.teams * launch.side, 3, types, **shape, **warps, PDL=large
        )
    for block in (fragments.LARGE_TILES if large else fragments.TILES)[-1:]:
        rows, warps_of, stages = fragments.tile(block, 28672, large)
        tiles = {"BLOCK_M": block, "BLOCK_N": rows, "WR": warps_of, "STAGES": stages, "SPLIT": True}
        compiled(fragments._tile_kernel, arch, warps_of, 3, types, **shape, **tiles, ASYNC=large)


if __name__ == "__main__":
    {"dense": dense, "chosen": chosen, "chunks": chunks, "codes": codes}[sys.argv[1]](int(sys.argv[2]))

"""A layer of a few tokens as a chain of kernels: the library's products against our own, and every tile in the chain.

    python -m octavo.bench.gpu_few --tokens 8,32,64 --tiles

A product alone says little here: what dependent launch saves lies between the kernels. So a whole layer is timed, inside
one CUDA graph, over the weights of several layers, which exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.bench.gpu_fp8 import products
from octavo.bench.gpu_kernels import SHAPES, Call, Shape, attention_inputs, ceilings, normal, time_us
from octavo.device.kernels.triton import activation, few, norm, rope_store
from octavo.device.kernels.triton.attention import PagedAttention
from octavo.device.kernels.triton.few import Tile

LAYERS = 8
CONTEXT = 512
EPS = 1e-5
TILES = [
    Tile(*sizes, prefetch=ahead)
    for sizes, ahead in product(
        ((64, 128, 4, 5), (64, 128, 4, 3), (64, 256, 4, 3), (64, 64, 4, 6)), (16, 512, 2048)
    )
]
Tiles = dict[str, Tile]


@dataclass
class Layer:
    """Weights of one layer and the cache it reads."""

    weights: dict[str, Tensor]
    norm: Tensor
    attention: tuple[Any, ...]


class Chain:
    """One layer after the other; ``tiles`` replaces what ``few`` would choose for a product."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        self.shape, self.tokens = shape, tokens
        self.layers = [
            Layer(
                {name: normal(n, k) * k**-0.5 for name, (n, k) in products(shape).items()},
                normal(shape.hidden),
                attention_inputs(shape, [(1, CONTEXT)] * tokens),
            )
            for _ in range(LAYERS)
        ]
        self.x, self.residual = normal(tokens, shape.hidden), normal(tokens, shape.hidden)
        self.cos_sin = torch.randn(CONTEXT, shape.head_dim, device="cuda")
        self.positions = torch.full((tokens,), CONTEXT - 1, device="cuda")
        self.slots = torch.arange(tokens, device="cuda")
        self.head_norm = normal(shape.head_dim) if shape.qk_norm else None

    def floor_bytes(self) -> float:
        """Weights once, keys and values once."""
        weights = sum(n * k for n, k in products(self.shape).values())
        return 2.0 * (weights + self.tokens * CONTEXT * 2 * self.shape.kv_heads * self.shape.head_dim)

    def us(self, ours: bool, tiles: Tiles | None = None) -> float:
        """Microseconds of a layer."""
        attend = PagedAttention(large=True, pdl=ours)
        run = partial(self._layer, ours, tiles or {}, attend)
        calls: list[Call] = [partial(run, layer) for layer in self.layers]
        return time_us(calls, 2)

    def _layer(self, ours: bool, tiles: Tiles, attend: Callable[..., Tensor], layer: Layer) -> Tensor:
        def linear(x: Tensor, name: str) -> Tensor:
            if not ours:
                return F.linear(x, layer.weights[name])
            return few.few(x, layer.weights[name], tile=tiles.get(name), pdl=True)

        shape, head = self.shape, self.head_norm
        y = norm.add_rms_norm(self.x, self.residual, layer.norm, EPS, pdl=ours)
        q = rope_store.rope_store(
            linear(y, "qkv"), head, head, EPS, self.cos_sin, self.positions, layer.attention[1], self.slots,
            shape.heads, pdl=ours,
        )  # fmt: skip
        z = linear(attend(q, *layer.attention[1:]).view(self.tokens, -1), "o")
        y = norm.add_rms_norm(z, self.residual, layer.norm, EPS, pdl=ours)
        if ours:
            weight, tile = layer.weights["gate_up"], tiles.get("gate_up")
            middle = few.gated_few(y, weight, "silu", tile=tile, pdl=True)
        else:
            middle = activation.act_mul(linear(y, "gate_up"), "silu")
        return linear(middle, "down")


def name_of(tile: Tile) -> str:
    """Like 64x128w4s5p512."""
    return f"{tile.block_n}x{tile.block_k}w{tile.num_warps}s{tile.num_stages}p{tile.prefetch}"


def tile_times(chain: Chain, name: str) -> list[tuple[float, str]]:
    """A layer's time with each tile for one product, fastest first; a tile that does not fit is left out."""
    found = []
    for tile in TILES:
        try:
            found.append((chain.us(True, {name: tile}), name_of(tile)))
        except Exception as problem:  # noqa: BLE001  more shared memory than the card has
            print(f"    {name} {name_of(tile)}: {str(problem).splitlines()[0][:80]}")
    return sorted(found)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 2 without a GPU of compute capability 9.0."""
    parser = argparse.ArgumentParser(prog="gpu_few", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default=SHAPES[0].name, choices=[shape.name for shape in SHAPES])
    parser.add_argument("--tokens", default="2,8,16,32,64", help="comma separated, up to 64")
    parser.add_argument("--tiles", action="store_true", help="every tile of every product")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        print("This needs a GPU with dependent launch (compute capability 9.0).", file=sys.stderr)
        return 2
    bandwidth, _ = ceilings()
    shape = next(shape for shape in SHAPES if shape.name == arguments.model)
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s; a layer of {shape.name}")
    for tokens in map(int, arguments.tokens.split(",")):
        chain = Chain(shape, tokens)
        library, ours = chain.us(False), chain.us(True)
        floor = chain.floor_bytes() / bandwidth * 1e6
        print(
            f"{tokens:4} tokens: library {library:.1f} us, ours {ours:.1f} us, {floor / ours:.0%} of the floor"
        )
        for name in products(shape) if arguments.tiles else ():
            times = tile_times(chain, name)
            print(f"    {name:8} " + ", ".join(f"{text} {us:.1f}" for us, text in times[:6]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

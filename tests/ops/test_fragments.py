"""Codes in the order of tensor cores: the layout, and the Triton kernels against the reference body."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from packed_cases import DEVICE, LAYOUTS, draw, normal

from octavo.device.ops.packed import in_fragments, linear_packed, pack_codes, unpack, unpack_codes

FRAGMENTS = {name: in_fragments(layout) for name, layout in LAYOUTS.items() if in_fragments(layout).fragments}
# The interpreter multiplies no bfloat16.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def test_which_layouts() -> None:
    assert {name for name in LAYOUTS if name not in FRAGMENTS} >= {"q6_k", "nvfp4"}
    assert {"awq", "group-64-narrow", "channel-8", "q4_k", "q5_k", "q8_0", "mxfp4", "nf4"} <= FRAGMENTS.keys()


@pytest.mark.parametrize("name", ["awq", "group-64-narrow", "channel-8", "q5_k"])
def test_order(name: str) -> None:
    """Another order of the same codes; the place of one, as documented."""
    layout = FRAGMENTS[name]
    weight = draw(layout, 6, 320)
    planes = draw(replace(layout, fragments=False), 6, 320)
    assert torch.equal(unpack_codes(weight), unpack_codes(planes))
    assert sorted(weight.words.unique().tolist()) != sorted(planes.words.unique().tolist())
    codes = torch.zeros((1, layout.run), dtype=torch.uint8)
    block, t, e, i = 1, 3, 1, 1
    codes[0, block * 32 + 16 + 8 * e + 2 * t + i] = 5
    words, _ = pack_codes(codes, layout)
    if layout.bits == 4:
        assert words.flatten().nonzero().tolist() == [[t * 4 + block]]
        assert int(words.flatten()[t * 4 + block]) == 5 << (4 * (2 + e) + 16 * i)
    else:
        assert int(words.flatten()[t * 4 + block * 2 + 1]) == 5 << (8 * (2 * e + i))


triton = pytest.importorskip("triton")

from octavo.device.kernels.triton import fragments as kernels
from octavo.device.kernels.triton import packed


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few warps, so that each has several parts of the inputs; one tile: the interpreter takes its time."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "TILES", (32,))
        monkeypatch.setattr(kernels, "tile", lambda *_: (64, 2, 2))
        monkeypatch.setattr(kernels, "few", lambda *_: kernels.Few(2, 1, 2))
        monkeypatch.setattr(kernels.LinearFragments, "_warm", lambda *_: None)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "tokens"), [(name, 3) for name in FRAGMENTS] + [("awq", 11), *((name, 19) for name in FRAGMENTS)]
)
def test_kernels(name: str, tokens: int) -> None:
    """Inputs over several ranges or warps, and tiles; outputs and inputs that fill none; a bias."""
    layout = FRAGMENTS[name]
    inputs = 256 if layout.scales in ("k", "bytes") else 352
    weight, bias, x = draw(layout, 40, inputs), normal(40, dtype=HALF), normal(tokens, inputs, dtype=HALF)
    linear = kernels.LinearFragments()
    expected = linear_packed(x, weight, bias)
    torch.testing.assert_close(linear(x, weight, bias), expected, atol=6e-3, rtol=4e-3)
    assert linear.counters is not None and not linear.counters.any()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("choice", [(1, 1, 2), (4, 1, 1), (2, 2, 1), (1, 4, 2)], ids=str)
def test_launches(choice: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of warps and outputs gives the same product."""
    monkeypatch.setattr(kernels, "few", lambda *_: kernels.Few(*choice))
    for name in ("awq",):
        weight, x = draw(FRAGMENTS[name], 70, 512), normal(3, 512, dtype=HALF)
        torch.testing.assert_close(
            kernels.LinearFragments()(x, weight), linear_packed(x, weight), atol=6e-3, rtol=4e-3
        )


@pytest.mark.parametrize("name", FRAGMENTS)
def test_written_out_values_are_exact(name: str) -> None:
    weight = draw(FRAGMENTS[name], 70, 512)
    expected = unpack(weight)
    found = torch.cat(
        [kernels.write_out(weight, rows, torch.float32) for rows in (slice(0, 66), slice(66, 70))]
    )
    if FRAGMENTS[name].scales in ("minimum", "k"):  # a fused multiply and add on a GPU
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_many_tokens_use_the_library(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WRITE_OUT_FROM", 3)
    monkeypatch.setattr(packed, "WRITE_OUT_ELEMENTS", 128 * 256)
    weight, bias, x = draw(FRAGMENTS["q4_k"], 200, 256), normal(200, dtype=dtype), normal(5, 256, dtype=dtype)
    weight.order = torch.randperm(256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wide = torch.zeros((5, 300), device=DEVICE, dtype=dtype)
    kernels.LinearFragments()(x, weight, bias, wide[:, 20:220])
    torch.testing.assert_close(wide[:, 20:220], linear_packed(x, weight, bias), atol=6e-3, rtol=4e-3)
    assert not wide[:, :20].any() and not wide[:, 220:].any()
    assert kernels.LinearFragments()(x[:0], weight).shape == (0, 200)


def test_launch_shapes() -> None:
    """No warp without work, and as many as keep a large GPU busy where there are outputs for them."""
    for name, kind in (("awq", "parts"), ("q4_k", "pieces"), ("q8_0", "bytes")):
        for inputs, outputs, tokens in itertools.product((1024, 11008, 28672), (1024, 28672, 128256), (1, 8)):
            launch = kernels.few(tokens, outputs, inputs, FRAGMENTS[name])
            parts = inputs // (16 * FRAGMENTS[name].places)
            warps = launch.teams * -(-outputs // (16 * launch.blocks))
            assert launch.teams <= parts and 8 <= launch.teams * launch.side <= 16
            assert warps >= kernels.ENOUGH_WARPS[kind][tokens > 1] or launch.teams in (8, 16)
            assert (
                launch.teams == 16
                or 2 * launch.teams > parts
                or warps >= kernels.ENOUGH_WARPS[kind][tokens > 1]
            )

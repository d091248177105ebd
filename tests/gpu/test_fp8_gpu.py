"""fp8 weights on a real GPU: each way right at model shapes, the same in a graph, a whole engine, no compile once warm."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from test_engine import build, checkpoint, run, some_prompts
from torch import Tensor

from octavo.device.ops import fp8
from octavo.device.ops.bind import Binder, OpSpec
from octavo.errors import UsageError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="there is no CUDA device with fp8 arithmetic here",
    ),
]
SIZES = [(6144, 4096), (4096, 14336), (3072, 1024), (18944, 3584)]


def bound() -> tuple[str, object]:
    major, minor = torch.cuda.get_device_capability()
    binder = Binder()
    function = binder.bind(fp8.LINEAR_FP8, OpSpec("cuda", "bfloat16", 10 * major + minor))
    return next(iter(binder.choices["linear_fp8"])), function


def operands(tokens: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    draw = partial(torch.randn, device="cuda", generator=generator)
    weight, scale = fp8.quantize_rows(draw(n, k) / k**0.5)
    return draw(tokens, k).bfloat16(), weight, scale, draw(n).bfloat16()


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 256, 511, 512, 2000])
def test_every_way_at_model_shapes(tokens: int, n: int, k: int) -> None:
    """One token: the product of the dequantized weight; more: the reference body, which rounds tokens too."""
    from octavo.device.kernels.triton import fp8 as kernels

    name, linear = bound()
    assert name.startswith("triton")
    x, weight, scale, bias = operands(tokens, n, k)
    for shift in (None, bias):
        actual = linear(x, weight, scale, shift)  # type: ignore[operator]
        if tokens == 1 and n < kernels.WIDE:
            expected = x.float() @ (weight.float() * scale[:, None]).T + (
                0 if shift is None else shift.float()
            )
        else:
            expected = fp8.linear_fp8(x.float(), weight, scale, None if shift is None else shift.float())
        error = ((actual.float() - expected).norm() / expected.norm()).item()
        assert actual.dtype == torch.bfloat16 and error < 6e-3, error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantized_tokens_are_equal_to_the_bit(dtype: torch.dtype) -> None:
    from octavo.device.kernels.triton import fp8 as kernels

    for tokens, size in ((5, 4096), (300, 14336), (7, 600)):
        x = (torch.randn(tokens, size, device="cuda") * 3).to(dtype)
        x[1] = 0
        actual, scale, one = kernels.quantize_rows(x)
        expected, expected_scale = fp8.quantize_rows(x)
        assert torch.equal(scale, expected_scale) and one.item() == 1.0
        assert torch.equal(actual.float(), expected.float())


@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 1500])
def test_in_a_graph(tokens: int) -> None:
    _, linear = bound()
    x, weight, scale, bias = operands(tokens, 4096, 4096)
    linear(x, weight, scale, bias)  # type: ignore[operator]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, weight, scale, bias)  # type: ignore[operator]
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = linear(x, weight, scale, bias)  # type: ignore[operator]
    assert torch.equal(out, expected)


def test_nothing_compiles_once_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **info: compiled.append(str(info.get("repr")))
    )
    _, linear = bound()
    for tokens in (1, 5, 100):
        linear(*operands(tokens, 2096, 1040))  # type: ignore[operator]
    warm = len(compiled)
    assert warm >= 3  # our own product, tokens, scales; no other test has these sizes
    generator = random.Random(0)
    for _ in range(20):
        linear(*operands(generator.choice((1, 3, 4, 17, 100, 511, 1500, 3000)), 2096, 1040))  # type: ignore[operator]
    assert compiled[warm:] == []


def test_engine(tmp_path: Path) -> None:
    """Graphs and launches give the same tokens, and the first ones are those of the reference body on a CPU.

    Random weights have flat logits, so that rounding may turn a few rows.
    """
    folder = checkpoint("llama", tmp_path)
    prompts = some_prompts(12, 60)
    options = {"dtype": "bfloat16", "quantization": "fp8"}
    expected = run(build(folder, device="cpu", **options), prompts, 4)
    recorded = run(build(folder, device="cuda", **options), prompts, 4)
    launched = run(build(folder, device="cuda", **options, enforce_eager=True), prompts, 4)
    assert sum(a[0] == b[0] for a, b in zip(recorded, expected)) >= 10, (recorded, expected)
    assert sum(a == b for a, b in zip(recorded, launched)) >= 10, (recorded, launched)


def test_old_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.device.platform.cuda import CUDAPlatform

    monkeypatch.setattr(CUDAPlatform, "capability", property(lambda self: 80))
    with pytest.raises(UsageError, match=r"8\.9 or later.*has 8\.0"):
        build(checkpoint("llama", tmp_path), device="cuda", quantization="fp8")

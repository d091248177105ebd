"""Kernels of other packages beside ours on this card (``octavo doctor --measure``): are they right, and are they faster?

Every shape is checked against the reference body before it is timed; what raises or is wrong is a finding too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from octavo.bench.gpu_kernels import SHAPES, Case, attention_case, error_of, time_us
from octavo.device.ops.attention import PAGED_ATTENTION
from octavo.device.ops.bind import Binder, Op, OpSpec, importable
from octavo.host.measured import Finding, Timing

ROTATED = 4  # sets of inputs, so that none stays in the L2 cache
STEPS: tuple[tuple[str, list[tuple[int, int]]], ...] = (  # name, rows of (new tokens, keys)
    ("prefill 512", [(512, 512)]),
    ("prefill 16 x 512", [(512, 512)] * 16),
    ("prefill 2 x 4096", [(4096, 4096)] * 2),
    ("512 of 8192", [(512, 8192)]),
    ("2 x 512 + 128 x 600", [(1, 600)] * 128 + [(512, 512)] * 2),
)
Clock = Callable[[list[Callable[[], Any]], int], float]


def attention_steps() -> list[Case]:
    """Steps with prompts at the shapes of both models of the table."""
    return [attention_case(shape, f"{shape.name} {name}", rows) for shape in SHAPES for name, rows in STEPS]


def measure(
    op: Op,
    spec: OpSpec,
    cases: Sequence[Case],
    error: Callable[[Case, Callable[..., Any]], float] = error_of,
    clock: Clock = time_us,
) -> list[Finding]:
    """A finding for each vendor's implementation of ``op`` that can be imported and fits ``spec``."""
    ours = Binder().bind(op, spec)
    findings = []
    for implementation in op.implementations:
        if (
            not implementation.vendor
            or not implementation.when(spec)
            or not importable(implementation.requires)
        ):
            continue
        finding = Finding(op.name, implementation.name, [])
        findings.append(finding)
        try:
            theirs = Binder(forced={op.name: implementation.name}).bind(op, spec)
            for case in cases:
                wrong = error(case, theirs)
                inputs = [case.make(i) for i in range(ROTATED)]
                us, ours_us = (
                    clock([partial(function, *given) for given in inputs], ROTATED)
                    for function in (theirs, ours)
                )
                finding.timings.append(Timing(case.shape, us, ours_us, wrong))
        except Exception as problem:  # noqa: BLE001  another package may fail in any way; then ours stays
            finding.problem = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0][:200]}"
    return findings


def measure_all(spec: OpSpec) -> list[Finding]:
    """Everything that other packages could do here."""
    return measure(PAGED_ATTENTION, spec, attention_steps())

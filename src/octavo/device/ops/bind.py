"""Bind once, call bare: a layer asks for an op when it is built and gets a plain function.

    norm = binder.bind(RMS_NORM, OpSpec(device="cuda", dtype="bfloat16", head_dim=0), "layers.0.input_norm")
    y = norm(x, weight, eps)          # no dispatch here

``Binder.explain`` is what ``octavo doctor`` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class OpSpec:
    """Static facts that decide whether an implementation fits. ``extra`` holds op-specific ones."""

    device: str  # cpu | cuda
    dtype: str  # of activations: float32 | float16 | bfloat16
    capability: int = 0  # CUDA compute capability x 10 (90 = Hopper)
    extra: tuple[tuple[str, Any], ...] = ()

    def get(self, key: str, default: Any = None) -> Any:
        """An entry of ``extra``."""
        return dict(self.extra).get(key, default)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: ``module:attribute``, imported only when bound.

    ``when`` returns True where it can run; ``requires`` names a third-party module that must be importable.
    With ``factory`` the target is called once for each binding and returns the function: it may own a workspace.
    A ``vendor``'s is bound only where it was measured to be right and faster than ours on this card.
    """

    name: str
    target: str
    when: Callable[[OpSpec], bool]
    requires: str | None = None
    factory: bool = False
    vendor: bool = False


def triton_rows(target: str, hopper: str | None = None, factory: bool = False) -> tuple[Implementation, ...]:
    """Rows for a Triton kernel ``module:function`` of this package, and for its Hopper form where there is one.

    That takes larger tiles or programmatic dependent launch: compute capability 9.0 and 10.x.
    """
    base = "octavo.device.kernels.triton."
    portable = Implementation("triton", base + target, lambda spec: spec.device == "cuda", "triton", factory)
    if hopper is None:
        return (portable,)
    module = target.partition(":")[0]
    return (
        Implementation("triton-hopper", f"{base}{module}:{hopper}", _is_hopper, "triton", factory),
        portable,
    )


def _is_hopper(spec: OpSpec) -> bool:
    return spec.device == "cuda" and 90 <= spec.capability < 120


@dataclass(frozen=True)
class Op:
    """Signature and semantics (``reference``) and the implementations, best first."""

    name: str
    reference: Callable[..., Any]
    implementations: tuple[Implementation, ...] = ()


@dataclass
class Binder:
    """Chooses implementations for one device and remembers why; ``forced`` maps op name to implementation name.

    ``proven`` holds (op, implementation) of the vendors' that a recorded measurement speaks for.
    """

    forced: dict[str, str] = field(default_factory=dict)
    proven: frozenset[tuple[str, str]] = frozenset()
    choices: dict[str, dict[str, int]] = field(default_factory=dict)

    def bind(self, op: Op, spec: OpSpec) -> Callable[..., Any]:
        """The first implementation that fits, or the reference body."""
        chosen, function = "reference", op.reference
        for implementation in op.implementations:
            if op.name in self.forced and self.forced[op.name] != implementation.name:
                continue
            is_forced = op.name in self.forced
            if implementation.vendor and not is_forced and (op.name, implementation.name) not in self.proven:
                continue
            if not implementation.when(spec) or not importable(implementation.requires):
                continue
            module, _, attribute = implementation.target.partition(":")
            chosen, function = implementation.name, getattr(import_module(module), attribute)
            function = function() if implementation.factory else function
            break
        count = self.choices.setdefault(op.name, {})
        count[chosen] = count.get(chosen, 0) + 1
        return function

    def explain(self) -> dict[str, str]:
        """Op name to "implementation xN" for everything bound so far."""
        return {
            op: ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))
            for op, counts in sorted(self.choices.items())
        }


def importable(module: str | None) -> bool:
    """Whether a third-party module is there; None is."""
    if module is None:
        return True
    try:
        import_module(module)
    except ImportError:
        return False
    return True

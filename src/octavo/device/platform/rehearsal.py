"""A GPU that computes nothing: its tensors have a shape, a type and a place, but no memory.

A start that is gone through on it launches the kernels that the real one will, in milliseconds and without a card.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.config import Hardware
from octavo.device.ops.bind import OpSpec
from octavo.device.platform.cpu import DTYPE_NAMES, DoneEvent


class RehearsalPlatform:
    """Implements ``Platform`` for a card of these facts, which need not be there."""

    kind = "cuda"

    def __init__(self, facts: Hardware, capability: int) -> None:
        self.device = torch.device("meta")
        self.facts = facts
        self.capability = capability

    def hardware(self) -> Hardware:
        """See ``Platform``."""
        return self.facts

    def op_spec(self, dtype: torch.dtype) -> OpSpec:
        """See ``Platform``."""
        return OpSpec("cuda", DTYPE_NAMES[dtype], self.capability)

    def free_bytes(self) -> int:
        """All of it: nothing takes memory."""
        return self.facts.total_memory_bytes

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Runs ``work``, which holds nothing."""
        work()
        return 0

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """See ``Platform``; zeros, since nothing is ever copied into it."""
        return torch.zeros(size, dtype=dtype)

    def event(self) -> DoneEvent:
        """See ``Platform``."""
        return DoneEvent()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def capture(self, work: Callable[[], None], pool: object | None) -> tuple[Callable[[], None], object]:
        """A recording of nothing: ``work`` has launched its kernels before (see ``Platform``)."""
        return _nothing, self

    def bound(self, more: int | None) -> None:
        """Nothing is held."""

    def release(self) -> None:
        """Nothing is kept."""


def _nothing() -> None:
    """The replay of such a recording."""


def without_compiler() -> None:
    """Many of torch's functions ask its compiler to leave them alone, and import it for that: seconds, for a process that
    has no use for it. Must be called before the first tensor of this device is made."""
    stub = ModuleType("torch._dynamo")
    vars(stub)["disable"] = _as_it_is
    sys.modules.setdefault("torch._dynamo", stub)
    vars(torch).setdefault("_dynamo", sys.modules["torch._dynamo"])


def _as_it_is(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
    """``torch._dynamo.disable`` where there is nothing to disable."""
    return function


class Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, what the host reads from a tensor without memory is zero."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let everything pass but what leaves the device."""
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].zero_()
        if func is aten._to_copy.default and args[0].is_meta:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type != "meta":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        return func(*args, **kwargs)

"""One name for a compiled kernel, whoever asks first.

Triton finds machine code on disk by a hash of the kernel's source, its helpers' and the constants that they use. Up to
Triton 3.6 the constants of a helper are left out while the helper has no hash of its own yet, so that the name depends on
which kernel was launched first, and another process may not find it. Here helpers get theirs first.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def helpers_first() -> None:
    """From now on in this process; nothing where there is no Triton, or one without the hook."""
    try:
        knobs = import_module("triton.knobs")
    except ImportError:
        return
    knobs.runtime.jit_cache_hook = _before_compiling


def _before_compiling(*, fn: Any, **_: Any) -> None:
    """Triton calls it before it computes the name of a kernel; None: go on."""
    name(fn.jit_function)


def name(function: Any) -> str:
    """The hash of a ``triton.jit`` function, those of the functions that it names computed before."""
    if function.hash is None:
        for called in function.fn.__code__.co_names:
            helper = function.fn.__globals__.get(called)
            if helper is not function and hasattr(type(helper), "cache_key"):
                name(helper)
    return str(function.cache_key)

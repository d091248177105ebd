"""From a kernel's source to object code for this processor: the only part of the room that runs the compiler.

Numba compiles the function; what is kept is its machine code behind a plain C signature, so that loading it needs neither
Numba nor the source.
"""

from __future__ import annotations

import importlib

import llvmlite.binding as llvm
import numba
from numba import types

ROOM = "octavo.device.kernels.numba."
OPTIONS = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def compile_object(symbol: str, module: str, function: str, arguments: int) -> bytes:
    """An object file with ``void symbol(int64, ...)`` of so many arguments, self-contained but for libm."""
    body = getattr(importlib.import_module(ROOM + module), function)
    signature = types.void(*[types.int64] * arguments)
    result = numba.njit(signature, **OPTIONS)(body).overloads[signature.args]
    code = llvm.parse_assembly(result.library.get_llvm_str())
    code.link_in(llvm.parse_assembly(entry(symbol, result.fndesc.mangled_name, arguments, code.triple)))
    for item in [*code.functions, *code.global_variables]:
        if not item.is_declaration and item.name != symbol:
            item.linkage = "internal"
    machine = llvm.Target.from_triple(code.triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if code.triple.startswith(("x86", "i686")) else "default",
        codemodel="jitdefault",
        jit=True,
    )
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(code, passes)
    return machine.emit_object(code)


def entry(symbol: str, inner: str, arguments: int, triple: str) -> str:
    """Numba's functions also take where a result and an exception go; kernels have neither."""
    names = [f"i64 %{index}" for index in range(arguments)]
    return f"""
        target triple = "{triple}"
        declare i32 @"{inner}"({", ".join(["ptr", "ptr", *["i64"] * arguments])})
        define void @{symbol}({", ".join(names)}) {{
            %result = alloca ptr
            %error = alloca ptr
            %status = call i32 @"{inner}"({", ".join(["ptr %result", "ptr %error", *names])})
            ret void
        }}
    """

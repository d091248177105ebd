"""The house stays a house: imports go down (R1), files and functions stay small (R2), no globals, no pickle (R3, R6)."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "octavo"

# Room -> rooms it may import. A room is the longest matching prefix. `errors` and `config` are free to all.
FREE = {"errors", "config"}
IMPORTS: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "protocol": set(),
    "files": {"protocol"},
    "api": {"api", "protocol", "engine.client", "files"},
    "engine": {"engine", "protocol"},
    "engine.client": {"engine", "protocol"},
    "engine.cache": {"engine.cache", "protocol"},
    "runner": {"runner", "model", "device", "protocol", "engine.cache", "engine.executor", "files"},
    "model": {"model", "device", "protocol", "engine.cache", "files"},
    "model.families": {"model"},
    "device": {"device", "protocol"},
    "device.kernels": {"device.kernels"},
    "bench": {"api", "bench", "device", "engine", "files", "host", "llm", "protocol", "runner"},
    # The composition root and what stands on it may see every floor.
    "host": {"api", "engine", "runner", "model", "device", "protocol", "files", "host"},
    "llm": {"api", "engine", "host", "protocol", "files"},
    "cli": {"api", "bench", "cli", "engine", "files", "host", "llm", "model", "protocol", "device"},
    "entrypoints": {"cli"},
    "__init__": {"llm", "protocol"},
    "__main__": {"cli"},
}
# Parts that must work without torch, checked by what they import (transitively through octavo).
TORCH_FREE = ("api", "engine", "protocol", "files", "cli", "config", "errors", "model.families", "runner.cpu")
TORCH_FREE_FILES = (
    "model/blocks.py",
    "model/arch.py",
    "model/read_arch.py",
    "model/rope.py",
    "model/shard.py",
    "model/decoder.py",
    "model/latent.py",
    "model/describe.py",
    "model/quantization/describe.py",
    "model/stage.py",
    "host/spread.py",
)

MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_ARGUMENTS, MAX_METHODS = 600, 60, 150, 12, 6


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def module(path: Path) -> str:
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def room(name: str) -> str:
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        if ".".join(parts[:size]) in IMPORTS:
            return ".".join(parts[:size])
    return "__init__"


def inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def is_interface(base: ast.expr) -> bool:
    """``typing.Protocol`` (asyncio's protocols are classes of their own)."""
    return ast.unparse(base).removeprefix("typing.").startswith("Protocol")


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    """Every octavo module named in an import, with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "octavo":
            base = node.module.removeprefix("octavo").lstrip(".")
            for alias in node.names:
                target = f"{base}.{alias.name}" if base else alias.name
                found.append((target, node.lineno))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("octavo."):
                    found.append((alias.name.removeprefix("octavo."), node.lineno))
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports_go_down(path: Path) -> None:
    here = module(path)
    allowed = IMPORTS[room(here)] | FREE | ({room(here)} - {"model.families"})
    for target, line in imported(tree_of(path)):
        if target == "__version__":
            continue
        assert any(inside(target, prefix) for prefix in allowed), (
            f"{path.relative_to(SOURCE)}:{line}: {room(here)} must not import octavo.{target}"
        )


def test_families_never_import_each_other() -> None:
    for path in (SOURCE / "model" / "families").glob("*.py"):
        for target, line in imported(tree_of(path)):
            assert not inside(target, "model.families"), f"{path.name}:{line} imports {target}"


def no_function_local_imports_of_our_own(path: Path) -> None:
    tree = tree_of(path)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            local = imported(function)
            assert not local, (
                f"{path.relative_to(SOURCE)}:{local[0][1]}: local import of octavo.{local[0][0]}"
            )


def torch_free_parts_do_not_import_torch(path: Path) -> None:
    here = module(path)
    relative = str(path.relative_to(SOURCE))
    if not (any(inside(here, part) for part in TORCH_FREE) or relative in TORCH_FREE_FILES):
        return
    for node in tree_of(path).body:  # top level only: a lazy third-party import is allowed
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in {"torch", "transformers", "triton"}, (
                f"{relative}:{node.lineno}: {name}"
            )


def sizes(path: Path) -> None:
    text = path.read_text()
    relative = path.relative_to(SOURCE)
    lines = text.count("\n")
    assert lines <= MAX_FILE, f"{relative} has {lines} lines, at most {MAX_FILE}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            is_kernel = "jit" in " ".join(ast.unparse(d) for d in node.decorator_list) or (
                "kernels" in relative.parts
            )
            limit = MAX_KERNEL if is_kernel else MAX_FUNCTION
            assert size <= limit, f"{relative}:{node.lineno} {node.name} has {size} lines, at most {limit}"
            arguments = node.args.args + node.args.kwonlyargs + node.args.posonlyargs
            if node.name == "__init__":
                count = len(arguments) - 1
                assert count <= MAX_ARGUMENTS, f"{relative}:{node.lineno} __init__ takes {count} arguments"
        if isinstance(node, ast.ClassDef) and any(is_interface(base) for base in node.bases):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            limit = 10 if node.name == "Platform" else MAX_METHODS
            assert len(methods) <= limit, f"{relative}:{node.lineno} {node.name} has {len(methods)} methods"


def no_pickle_no_eval_no_remote_code(path: Path) -> None:
    banned_modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for node in ast.walk(tree_of(path)):
        where = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            assert not banned_modules & {name.split(".")[0] for name in names}, where
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "__import__"}, f"{where}: {called}"
            for keyword in node.keywords:
                assert keyword.arg != "trust_remote_code", where
        assert not isinstance(node, ast.Assert), f"{where}: assert vanishes under -O; raise an error"


def no_module_level_mutable_state(path: Path) -> None:
    """R3: a lower-case module variable bound to a list, dict or set, or a ``global`` statement."""
    tree = tree_of(path)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path.relative_to(SOURCE)}:{node.lineno}: global"
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict | ast.Set):
            for target in node.targets:
                name = ast.unparse(target)
                if name.startswith("__"):
                    continue
                assert name.strip("_").isupper(), (
                    f"{path.relative_to(SOURCE)}:{node.lineno}: {name} is mutable state"
                )


@pytest.mark.parametrize("path", files(), ids=module)
def test_rules(path: Path) -> None:
    imports_go_down(path)
    no_function_local_imports_of_our_own(path)
    torch_free_parts_do_not_import_torch(path)
    sizes(path)
    no_pickle_no_eval_no_remote_code(path)
    no_module_level_mutable_state(path)

"""``octavo plan MODEL``: what a model takes, on which cards it fits, and the cheapest change where it does not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from octavo import host
from octavo.cli.flags import engine_options
from octavo.cli.progress import Reporter
from octavo.config import EngineOptions
from octavo.device.platform.gpus import GIB, GPU, GPUS, find_gpu
from octavo.engine.cache.spec import StateKV, label
from octavo.errors import UsageError
from octavo.files.dummy import open_dummy
from octavo.host.plan import LENGTHS, SIZES, Case, Planner, cards, layout_of
from octavo.model.footprint import DENSE, FP8, INT4, Footprint, num_parameters, weight_bytes

MISSION = (
    ("7B", "llama-2-7b"), ("13B", "llama-2-13b"), ("34B", "codellama-34b"), ("70B", "llama-2-70b"),
)  # fmt: skip
NOTHING = Footprint(0, 0, 0, 0, 0)
HEAD = (
    "card", "weights as", "cards", "weights", "step", "graphs", "tables", "cache", "context",
    *(f"x{length // 1024}k" for length in LENGTHS),
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the plan; the exit status is 1 where the model fits on none of the cards that were named."""
    if args.table:
        rows = [mission_row(label, preset) for label, preset in MISSION]
        print(json.dumps(rows, indent=2) if args.json else mission_table(rows))
        return 0
    if not args.model_tag and not hasattr(args, "model"):
        raise UsageError("No model was named.", "octavo plan --table shows common sizes.")
    gpus = chosen(args)
    options = engine_options(args)
    planner = open_planner(options)
    cases = list(planner.cases(gpus or GPUS))
    named = {gpu.name: planner.advice(gpu) for gpu in gpus}
    if args.json:
        facts = {**describe_model(planner), "cases": [record(case) for case in cases], "advice": named}
        print(json.dumps(facts, indent=2))
    else:
        print(render(planner, cases, all_sizes=bool(gpus)))
        for text in named.values():
            print(text)
    fits = any(not case.problem for case in cases)
    return 0 if fits else 1


def chosen(args: argparse.Namespace) -> list[GPU]:
    """The cards that flags name."""
    gpus = [find_gpu(name) for name in args.gpu or []]
    if args.gpu_memory_gib is not None:
        if not 0 < args.gpu_memory_gib < 1e5:
            raise UsageError(f"--gpu-memory-gib must be above 0, got {args.gpu_memory_gib}.")
        gpus.append(GPU(f"{args.gpu_memory_gib:g} GiB card", args.gpu_memory_gib))
    return gpus


def open_planner(options: EngineOptions) -> Planner:
    """The planner of the model that the options name; nothing but headers is read."""
    reporter = Reporter()
    try:
        return Planner(options, host.open_headers(options, reporter))
    finally:
        reporter.close()


def describe_model(planner: Planner) -> dict[str, Any]:
    """The model's own figures."""
    arch = planner.arch
    resolved = planner.resolved(GPUS[-1])
    layout = layout_of(planner.spec, resolved)
    groups: dict[str, dict[str, int]] = {}
    layers: dict[str, set[int]] = {}
    for group in layout.groups:
        kind = label(group.spec)
        found = groups.setdefault(kind, {"layers": 0, "bytes_per_token": 0, "state_bytes": 0})
        layers.setdefault(kind, set()).update(group.layers)  # a layer may keep two of one kind
        found["layers"] = len(layers[kind])
        if isinstance(group.spec, StateKV):
            found["state_bytes"] += len(group.layers) * group.spec.state_bytes
        else:
            found["bytes_per_token"] += len(group.layers) * group.spec.token_bytes
    return {
        "model": planner.name,
        "architecture": arch.label,
        "parameters": planner.num_parameters,
        "layers": len(planner.spec.layers),
        "max_position": arch.max_position,
        "dtype": resolved.dtype,
        "cache_groups": groups,
        "sequence_bytes": {
            str(length): layout.pages_for(length, 1) * layout.pool_page_bytes
            for length in LENGTHS
            if length <= arch.max_position
        },
    }


def record(case: Case) -> dict[str, Any]:
    """A case for JSON; bytes of one card."""
    parts = case.parts
    return {
        "gpu": case.gpu.name,
        "gpu_memory_bytes": case.gpu.memory_bytes,
        "weights_as": case.scheme,
        "tensor_parallel_size": case.size,
        "weight_bytes": parts.weights if parts else None,
        "step_bytes": parts.step if parts else None,
        "graph_bytes": parts.graphs if parts else None,
        "table_bytes": parts.tables if parts else None,
        "cache_bytes": case.cache_bytes,
        "max_context": case.max_context,
        "concurrency": {str(length): count for length, count in case.concurrency.items()},
        "problem": case.problem or None,
    }


def render(planner: Planner, cases: Sequence[Case], *, all_sizes: bool) -> str:
    """The plan as text: without ``all_sizes`` only the fewest cards of a kind on which each form fits."""
    facts = describe_model(planner)
    size = f"{facts['parameters'] / 1e9:.3g} billion parameters, {facts['layers']} layers"
    what = f"{size}, {facts['max_position']} positions, runs in {facts['dtype']}"
    lines = [f"{facts['model']}: {facts['architecture']}, {what}."]
    for kind, group in facts["cache_groups"].items():
        amount = f"{group['bytes_per_token'] / 1024:.1f} KiB a token"
        if group["state_bytes"]:
            amount = f"{group['state_bytes'] / 1024:.1f} KiB a checkpoint"
        lines.append(f"Cache, {kind}: {group['layers']} layers, {amount}.")
    if facts["sequence_bytes"]:
        sizes = [f"{int(n) // 1024}k {size / GIB:.2f} GiB" for n, size in facts["sequence_bytes"].items()]
        lines.append(f"Cache of one sequence: {', '.join(sizes)}.")
    lines += [
        "",
        "GiB on each card; xN = sequences of that length at a time; context = longest sequence.",
        "",
    ]
    kept = [case for case in (cases if all_sizes else fewest(cases)) if case.parts]
    lines += columns([HEAD, *(row(case) for case in kept)])
    problems = {
        f"{case.scheme} on {cards(case.gpu, case.size)}: {case.problem}": None
        for case in cases
        if case.problem
    }
    if all_sizes and problems:
        lines += ["", *problems]
    return "\n".join([*lines, ""])


def fewest(cases: Sequence[Case]) -> list[Case]:
    """For every card and scheme the case with the fewest cards that fits (the last one where none does)."""
    found: dict[tuple[str, str], Case] = {}
    for case in cases:
        key = (case.gpu.name, case.scheme)
        if key not in found or found[key].problem:
            found[key] = case
    return list(found.values())


def row(case: Case) -> tuple[str, ...]:
    """A line of the table."""
    parts = case.parts or NOTHING
    start = (case.gpu.name, case.scheme, str(case.size))
    sizes = [f"{n / GIB:.2f}" for n in (parts.weights, parts.step, parts.graphs, parts.tables)]
    if case.problem:
        return (*start, *sizes, "does not fit", *["-"] * (len(LENGTHS) + 1))
    many = ["-" if count is None else str(count) for count in case.concurrency.values()]
    return (*start, *sizes, f"{case.cache_bytes / GIB:.2f}", str(case.max_context), *many)


def columns(rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Rows as aligned text; the first ``left`` columns begin at the left."""
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        ).rstrip()
        for cells in rows
    ]


def mission_row(label: str, preset: str) -> dict[str, Any]:
    """Weights of a common size in every form, and the least hardware on which each serves 4k tokens."""
    planner = Planner(EngineOptions.of(model=preset), open_dummy(preset))
    forms: dict[str, Any] = {}
    for name, scheme in (("fp16", DENSE), ("fp8", FP8), ("int4", INT4)):
        fitting = (planner.case(gpu, scheme, size) for size in SIZES for gpu in GPUS)
        case = next((case for case in fitting if not case.problem), None)
        forms[name] = {
            "weight_bytes": weight_bytes(planner.spec, scheme, 2),
            "needs": cards(case.gpu, case.size) if case else None,
        }
    return {"size": label, "model": preset, "parameters": num_parameters(planner.spec), "forms": forms}


def mission_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text; decimal gigabytes, as model sizes are told."""
    names = {"fp16": "FP16", "fp8": "FP8", "int4": "INT4"}
    head = ["size", "model", "parameters"]
    for name in names.values():
        head += [f"{name} GB", "needs"]
    lines = [head]
    for found in rows:
        cells = [found["size"], found["model"], f"{found['parameters'] / 1e9:.2f} B"]
        for name in names:
            form = found["forms"][name]
            cells += [f"{form['weight_bytes'] / 1e9:.1f}", form["needs"] or "-"]
        lines.append(cells)
    return "\n".join(columns(lines))

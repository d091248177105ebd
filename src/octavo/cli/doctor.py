"""``octavo doctor [MODEL]``: what runs here, and with a model which kernels it binds."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from importlib import import_module
from typing import Any

from octavo import __version__
from octavo.cli.flags import engine_options
from octavo.cli.progress import Reporter
from octavo.device.kernels.numba.target import choose_target, host_features
from octavo.device.platform.select import open_platform
from octavo.errors import OctavoError, UsageError
from octavo.files.fetch import cache_folder
from octavo.files.resolve import is_cached, list_catalogue
from octavo.host.measured import Finding, keep
from octavo.llm import LLM
from octavo.protocol.control import CheckPool
from octavo.protocol.generate import SamplingParams

PACKAGES = ("torch", "numba", "triton", "numpy", "tokenizers", "msgspec", "starlette", "uvicorn", "pyzmq")


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status is 1 when a check failed."""
    report = {"octavo": __version__, "python": python(), "packages": packages(), "device": device(args)}
    report["cache"] = cache(args)
    if args.measure:
        report["vendors"] = vendors(args)
    if args.model_tag or hasattr(args, "model"):
        report["model"] = check_model(args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(render(report))
    return 1 if any("error" in part for part in report.values() if isinstance(part, dict)) else 0


def python() -> str:
    """Version, implementation and system."""
    return f"{platform.python_version()} ({platform.python_implementation()}) on {platform.platform()}"


def packages() -> dict[str, str]:
    """Versions of what Octavo stands on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device(args: argparse.Namespace) -> dict[str, Any]:
    """The device that ``--device`` chooses, its memory and cores."""
    try:
        hardware = open_platform(engine_options(args).device.device).hardware()
    except OctavoError as error:
        return {"error": str(error)}
    tiles = {"cpu tiles": choose_target(host_features()).name} if hardware.kind == "cpu" else {}
    return {
        "kind": hardware.kind,
        "name": hardware.name,
        "memory": f"{hardware.total_memory_bytes / 2**30:.1f} GiB",
        "cores": hardware.num_cores,
        "bfloat16": hardware.supports_bfloat16,
        **tiles,
    }


def vendors(args: argparse.Namespace) -> dict[str, Any]:
    """Time other packages' kernels beside ours, keep the result, and say what it was."""
    try:
        platform = open_platform(engine_options(args).device.device)
        if platform.kind != "cuda":
            raise UsageError("--measure compares kernels on a GPU; this is a CPU.", "Leave it out.")
        spec = platform.op_spec(import_module("torch").bfloat16)
        findings: list[Finding] = import_module("octavo.bench.vendors").measure_all(spec)
        path = keep(platform.hardware().name, findings)
    except OctavoError as error:
        return {"error": str(error)}
    return {
        "kept in": str(path),
        **{f"{found.op}: {found.implementation}": verdict(found) for found in findings},
    }


def verdict(found: Finding) -> Any:
    """A measurement in words."""
    if found.problem:
        return f"not usable: {found.problem}"
    times = {
        row.shape: f"{row.us:.1f} us, ours {row.ours_us:.1f} (error {row.error:.4f})" for row in found.timings
    }
    return {"used": "yes" if found.is_better else "no", **times}


def cache(args: argparse.Namespace) -> dict[str, Any]:
    """Where models are kept, what is there, and how much room is left."""
    wanted = getattr(args, "download_dir", None)
    folder = cache_folder(wanted)
    existing = folder
    while not existing.exists():
        existing = existing.parent
    return {
        "folder": str(folder),
        "writable": os.access(existing, os.W_OK),
        "free": f"{shutil.disk_usage(existing).free / 1e9:.1f} GB",
        "models": [entry.name for entry in list_catalogue() if is_cached(entry, wanted)],
    }


def check_model(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model, generate a few tokens, and say what was decided."""
    reporter = Reporter()
    try:
        with LLM(engine_options(args), progress=reporter) as llm:
            reporter.close()
            info = llm.info
            sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
            output = llm.generate([1, 2, 3], sampling, use_tqdm=False)[0].outputs[0]
            llm.client.core.control(CheckPool())
            return {
                "name": info.model,
                "architecture": info.architecture,
                "dtype": info.dtype,
                "context": info.max_model_len,
                "pages": f"{info.num_pages} of {info.page_size} tokens",
                "kernels": dict(info.kernels),
                "memory": {
                    part: f"{measured / 2**30:.2f} GiB, planned {planned / 2**30:.2f}"
                    for part, (planned, measured) in info.memory_bytes.items()
                },
                "start_s": {name: round(seconds, 3) for name, seconds in info.timeline_s.items()},
                "generates": f"{len(output.token_ids)} tokens ({output.finish_reason})",
            }
    except OctavoError as error:
        return {"error": str(error)}
    finally:
        reporter.close()


def render(report: dict[str, Any]) -> str:
    """The report as indented text."""
    lines: list[str] = []

    def add(name: str, value: Any, depth: int) -> None:
        pad = "  " * depth
        if isinstance(value, dict):
            lines.append(f"{pad}{name}:")
            for key, item in value.items():
                add(key, item, depth + 1)
        elif isinstance(value, list):
            lines.append(f"{pad}{name}: {', '.join(map(str, value)) or 'none'}")
        else:
            lines.append(f"{pad}{name}: {value}")

    for name, value in report.items():
        add(name, value, 0)
    return "\n".join(lines)

"""``python -m octavo.host.rehearse``: goes through a start on a card that computes nothing, and compiles what it launches.

stdin: one line, a ``Play`` as JSON; its end means that the engine is gone. stdout: lines {"done": n, "total": m}.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import msgspec

from octavo.config import EngineOptions, Hardware, resolve
from octavo.device.kernels.compilers import Compilers, noting
from octavo.device.ops.bind import Binder
from octavo.device.platform.rehearsal import Answers, RehearsalPlatform, without_compiler
from octavo.engine.process import live_with_parent
from octavo.host.built import limits_of
from octavo.host.implementation import architecture
from octavo.host.measured import proven
from octavo.host.opening import open_files
from octavo.host.place import Place
from octavo.host.plan import layout_of
from octavo.host.rehearsal import Play
from octavo.host.torch_engine import DTYPES, make_network, record_graphs, torch_runner
from octavo.model.blocks import DecoderSpec
from octavo.model.describe import describe
from octavo.model.load import fill_random, renaming
from octavo.model.quantization.choose import choose_format
from octavo.runner.measure import run_largest_step
from octavo.runner.warm import warm

PAGES = 2


def distinct(spec: DecoderSpec) -> DecoderSpec:
    """The description with one layer of each kind: equal layers launch equal kernels."""
    return replace(spec, layers=tuple(dict.fromkeys(spec.layers)))


def rehearse(options: EngineOptions, facts: Hardware, capability: int) -> None:
    """Everything that ``torch_engine.build`` launches, without results."""
    platform = RehearsalPlatform(facts, capability)
    files = open_files(options)
    arch = architecture(options.model, files)
    resolved = resolve(options, facts, limits_of(arch))
    dtype = DTYPES[resolved.dtype]
    spec = describe(arch)
    op_spec = platform.op_spec(dtype)
    binder = Binder(proven=proven(facts.name))
    weight_format = choose_format(options.model.quantization, spec, op_spec, files, renaming(files, spec))
    spec = distinct(spec)
    layout = layout_of(spec, resolved)
    with Answers():  # type: ignore[no-untyped-call]
        network = make_network(arch, files, spec, binder, op_spec, platform, resolved, weight_format, Place())
        fill_random(network.items())  # any numbers will do, and they need not be read
        runner = torch_runner(network, layout, platform, binder, Place(), resolved, PAGES)
        run_largest_step(runner, resolved.max_model_len, scored=1)
        if not options.device.enforce_eager and network.recordable:
            record_graphs(runner, resolved, lambda phase, done, total: None)
        warm(runner, resolved.max_model_len)


def compile_all(compilers: Compilers, play: Callable[[], None], tell: Callable[[int, int], None]) -> None:
    """Compile what ``play`` launches, while it goes on; ``tell`` how many of how many are done."""
    with noting(compilers.compile):
        play()
    for done, _ in enumerate(compilers.results(), 1):
        tell(done, compilers.begun)


def main() -> int:
    """Returns the exit status."""
    without_compiler()
    line = sys.stdin.buffer.readline()
    if not line:
        return 1
    play = msgspec.json.decode(line, type=Play)
    compilers = Compilers(play.capability, play.processes, live_with_parent)
    live_with_parent()

    def tell(done: int, total: int) -> None:
        print(msgspec.json.encode({"done": done, "total": total}).decode(), flush=True)

    try:
        compile_all(compilers, lambda: rehearse(play.options, play.facts, play.capability), tell)
    finally:
        compilers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

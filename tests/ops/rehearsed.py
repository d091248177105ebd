"""Which kernels a start would launch, on a machine without a GPU; run as a script, because an interpreted kernel tells nothing.

Arguments: folders with a config.json. Prints a JSON line each: kernels of the whole model, and those that a rehearsal of
one layer of each kind does not find.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import triton

from octavo.config import EngineOptions, Hardware
from octavo.device.kernels.compilers import Absent, Kernel, noting
from octavo.host import rehearse
from octavo.model.network import Network


def load(*_: object, **__: object) -> None:
    raise RuntimeError("a rehearsal reads no weights")


CARD = Hardware("cuda", "a card", 80 << 30, 16, True)


def launched(folder: str, whole: bool) -> set[Kernel]:
    options = EngineOptions()
    model = replace(options.model, model=folder, load_format="dummy", max_model_len="512")
    scheduler = replace(options.scheduler, max_num_batched_tokens=1024, max_num_seqs=64)
    found: set[Kernel] = set()
    kinds = rehearse.distinct
    if whole:
        rehearse.distinct = lambda spec: spec
    try:
        with noting(found.add):
            rehearse.rehearse(replace(options, model=model, scheduler=scheduler), CARD, 90)
    finally:
        rehearse.distinct = kinds
    return found


if __name__ == "__main__":
    triton.runtime.driver.set_active(Absent(90))
    Network.load = load  # type: ignore[method-assign, assignment]
    for folder in sys.argv[1:]:
        every = launched(folder, whole=True)
        missed = every - launched(folder, whole=False)
        print(
            json.dumps({"kernels": len(every), "missed": sorted(kernel.name for kernel in missed)}),
            flush=True,
        )

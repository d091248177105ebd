"""The offline rows of ``octavo bench table``, in a process of their own: ``python -m octavo.bench.table_offline JSON``.

The argument is an object of ``stage`` and ``rows`` (names) and ``seed``; each row's figures are printed as one line
of JSON as soon as it is done, so that a process that is cut short has still told what it knew.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from octavo.bench.load import TokenIds, random_samples
from octavo.bench.offline import throughput
from octavo.bench.table_rows import Order, Row, Stage
from octavo.config import EngineOptions
from octavo.llm import LLM


def engine_options(stage: Stage) -> EngineOptions:
    """The engine of a stage."""
    flags: dict[str, Any] = {name.replace("-", "_"): value for name, value in stage.flags.items()}
    for name in ("max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks_override"):
        if name in flags:
            flags[name] = int(flags[name])
    return EngineOptions.of(model=stage.model, load_format="dummy", quantization=stage.quantization, **flags)


def measured(llm: LLM, row: Row, seed: int, ids: TokenIds) -> dict[str, Any]:
    """One row: all its requests at once, first submission to last token."""
    load = row.load
    samples = random_samples(load.num_prompts, load.prompt, load.answer, ids=ids, seed=seed)
    figures = throughput(llm, samples)
    seconds = figures["elapsed_time"]
    value = {
        "req/s": figures["requests_per_second"],
        "prompt tok/s": load.num_prompts * load.prompt / seconds,
    }.get(row.unit, figures["output_tokens_per_second"])
    return {"row": row.name, "value": value, "seconds": seconds}


def figures(order: Order) -> Iterator[dict[str, Any]]:
    """The start, then every row."""
    began = time.perf_counter()
    ids = TokenIds(order.first_token_id, order.num_token_ids)
    with LLM(engine_options(order.stage)) as llm:
        yield {"start_s": time.perf_counter() - began, "timeline_s": llm.info.timeline_s}
        # The first steps pay for whatever is still lazy.
        throughput(llm, random_samples(8, 32, 8, ids=ids, seed=order.seed + 500_000))
        for number, row in enumerate(order.stage.rows):
            yield measured(llm, row, order.seed + number, ids)


def main(argv: list[str]) -> int:
    """Print one line of JSON a figure."""
    order = msgspec.json.decode(argv[0], type=Order)
    for figure in figures(order):
        print(json.dumps(figure), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``octavo bench quality``: how far each quantization on load moves a model's predictions.

    octavo bench quality --model smollm2:135m --formats fp8,int8,int4,kv-fp8

Every position of a text is predicted by the model as its files hold it and by the same model quantized. Printed are the
mean divergence (Kullback-Leibler, in nats) of the second from the first, its 99th percentile, and how often both think the
same token the likeliest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import host
from octavo.api.text.tokenizer import load_tokenizer
from octavo.config import EngineOptions
from octavo.engine.cache.spec import ceil_div
from octavo.errors import UsageError
from octavo.protocol.generate import SamplingParams
from octavo.protocol.plan import PageWrite, SlotInit, StepPlan
from octavo.runner.runner import TorchRunner

TEXT = """The lighthouse stood at the end of a long spit of gravel, and for most of the year nobody came near it. In autumn the
storms threw weed and broken planks across the path, and the keeper, an old woman named Ida, cleared them away every morning
before breakfast. She kept a notebook in which she wrote the direction of the wind, the height of the waves, and the names of
the ships that passed. On the third of October she wrote: wind from the north-west, seven metres, the Margarethe with coal.

A rate of change tells us how quickly one quantity responds to another. If a car covers 150 kilometres in two hours, its average
speed is 75 kilometres per hour, although it may have stood still at a crossing and hurried along the motorway afterwards. The
derivative makes this precise: we look at shorter and shorter intervals of time, and ask what the quotient approaches.

def average(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else 0.0

To make the soup, cut two onions and three carrots into small pieces and cook them slowly in butter until they are soft. Add a
litre of stock, a bay leaf and a handful of red lentils. After twenty minutes, season with salt, pepper and a little lemon juice.
Questions that people often ask: Can I freeze it? Yes, for about three months. Can I leave out the butter? Use olive oil instead.
"""


@dataclass(frozen=True)
class Quality:
    """Divergence in nats over all positions, and the share of positions with the same likeliest token."""

    mean: float
    high: float
    agreement: float


def compare(ours: Tensor, reference: Tensor) -> Quality:
    """Of logits [n, V] against others."""
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (reference, ours))
    divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    same = (ours.argmax(-1) == reference.argmax(-1)).double().mean()
    return Quality(float(divergence.mean()), float(divergence.quantile(0.99)), float(same))


def logits_of(options: EngineOptions, tokens: list[int]) -> Tensor:
    """Logits [n, V] after every token of a text: one step of the runner, planned by hand."""
    files = host.open_files(options)
    try:
        runner = host.build_runner(options, files).runner
        if not isinstance(runner, TorchRunner):
            raise UsageError("This model does not run on the torch backend.")
        count, writes, first = len(tokens), [], 1
        for index, group in enumerate(runner.layout.groups):
            pages = ceil_div(count, group.spec.page_size)
            writes.append(PageWrite(index, 0, 0, list(range(first, first + pages))))
            first += pages
        sampling = SamplingParams(temperature=0.0, prompt_logprobs=1)
        admits = [SlotInit(0, tokens, count, sampling, 0, [])]
        runner.forward(StepPlan(0, [0], [0], [count], [0], [True], admits, writes, []))
        if runner.current is None:
            raise RuntimeError("the step has no result")
        hidden = runner.current[2]  # of the row that samples first, then of its prompt
        with torch.inference_mode():
            return runner.network.logits(hidden[1:]).float().cpu()
    finally:
        files.close()


def options_for(arguments: argparse.Namespace, kind: str | None) -> EngineOptions:
    """The model as its files hold it (None), quantized, or with another cache."""
    special: dict[str, Any] = {}
    if kind is not None:
        special = {"kv_cache_dtype": kind[3:]} if kind.startswith("kv-") else {"quantization": kind}
    return EngineOptions.of(
        model=arguments.model, device=arguments.device, cpu_backend="torch", dtype=arguments.dtype, enforce_eager=True,
        max_num_seqs=1, max_num_batched_tokens=8192, max_model_len=str(arguments.tokens + 16),
        kv_cache_memory_bytes=arguments.cache_mib << 20, enable_prefix_caching=False, **special,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="octavo bench quality", description=__doc__)
    parser.add_argument("--model", default="smollm2:135m", help="any model that octavo serves")
    parser.add_argument("--formats", default="fp8,int8,int4,kv-fp8", help="comma separated")
    parser.add_argument("--text", default=None, help="file to predict (default: a built-in text)")
    parser.add_argument("--tokens", type=int, default=384, help="of the text")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cache-mib", type=int, default=256, help="MiB for keys and values")
    arguments = parser.parse_args(argv)
    plain = options_for(arguments, None)
    files = host.open_files(plain)
    text = TEXT if arguments.text is None else Path(arguments.text).read_text(encoding="utf-8")
    tokens = load_tokenizer(files, None).encode(text)[: arguments.tokens]
    files.close()
    if len(tokens) < 3:
        raise UsageError("The text has fewer than three tokens.", "Use a longer one.")
    reference = logits_of(plain, tokens)
    print(f"{arguments.model}, {len(reference)} positions, against {arguments.dtype} on {arguments.device}")
    print(f"{'format':12} {'mean KL':>10} {'99 % KL':>10} {'same token':>11}")
    for kind in filter(None, arguments.formats.split(",")):
        found = compare(logits_of(options_for(arguments, kind), tokens), reference)
        print(f"{kind:12} {found.mean:10.5f} {found.high:10.5f} {found.agreement:11.1%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

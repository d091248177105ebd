"""``octavo bench offline``: throughput (all prompts at once) or latency (one batch again and again) of ``LLM``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.bench import metrics
from octavo.bench.load import Sample
from octavo.bench.serve import samples_of
from octavo.errors import UsageError
from octavo.llm import LLM, Prompt, RequestOutput
from octavo.protocol.generate import SamplingParams

Clock = Callable[[], float]


def throughput(
    llm: LLM, samples: list[Sample], *, use_tqdm: bool = False, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Answer every sample at full length and greedily; keys as in ``vllm bench throughput``."""
    prompts, params = _inputs(samples)
    start = clock()
    outputs = llm.generate(prompts, params, use_tqdm=use_tqdm)
    elapsed = max(clock() - start, 1e-9)
    num_input, num_output = count_tokens(outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": num_input + num_output,
        "total_output_tokens": num_output,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": (num_input + num_output) / elapsed,
        "output_tokens_per_second": num_output / elapsed,
    }


def latency(
    llm: LLM, batches: list[list[Sample]], num_warmups: int, *, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Seconds that one batch takes from submission to its last token; keys as in ``vllm bench latency``.

    The first ``num_warmups`` batches are not counted. Every batch has prompts of its own, so no prefix is cached.
    """
    times = []
    num_output = 0
    for number, samples in enumerate(batches):
        prompts, params = _inputs(samples)
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if number >= num_warmups:
            times.append(clock() - start)
            num_output += count_tokens(outputs)[1]
    percentiles = {str(p): metrics.percentile(times, p) for p in (10, 25, 50, 75, 90, 99)}
    return {
        "avg_latency": metrics.mean(times),
        "latencies": times,
        "percentiles": percentiles,
        "output_tokens_per_second": num_output / max(sum(times), 1e-9),
    }


def count_tokens(outputs: list[RequestOutput]) -> tuple[int, int]:
    """Prompt tokens and generated tokens."""
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    return num_input, sum(len(answer.token_ids) for output in outputs for answer in output.outputs)


def run(args: argparse.Namespace, llm: LLM) -> int:
    """Measure as the flags say, print the figures, write them with ``--output-json``."""
    if args.input_len:
        args.random_input_len = args.input_len
    if args.output_len:
        args.random_output_len = args.output_len
    if args.mode == "throughput":
        samples = samples_of(args, args.num_prompts, args.seed)
        # The first steps pay for whatever is still lazy; the same shape of load, other prompts.
        throughput(llm, samples_of(args, min(8, args.num_prompts), args.seed + 1))
        result = throughput(llm, samples, use_tqdm=not args.disable_tqdm and sys.stderr.isatty())
        print(
            f"Throughput: {result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.2f} total "
            f"tokens/s, {result['output_tokens_per_second']:.2f} output tokens/s"
        )
    else:
        if args.num_iters < 1 or args.num_iters_warmup < 0:
            raise UsageError("--num-iters must be at least 1 and --num-iters-warmup at least 0.")
        count = args.num_iters_warmup + args.num_iters
        batches = [samples_of(args, args.batch_size, args.seed + number) for number in range(count)]
        result = latency(llm, batches, args.num_iters_warmup)
        print(f"Avg latency: {result['avg_latency']:.4f} s")
        for percent, value in result["percentiles"].items():
            print(f"{percent}% percentile latency: {value:.4f} s")
        print(f"Output tokens/s: {result['output_tokens_per_second']:.2f}")
    if args.output_json:
        content = {"model": llm.info.model, "device": llm.info.device, "mode": args.mode, **result}
        Path(args.output_json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _inputs(samples: list[Sample]) -> tuple[list[Prompt], list[SamplingParams]]:
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=sample.output_len) for sample in samples
    ]
    return [sample.prompt for sample in samples], params

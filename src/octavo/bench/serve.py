"""``octavo bench serve``: load on any OpenAI-compatible server, from one process that is not the bottleneck.

Closed loop (``--max-concurrency N``, infinite rate) or open loop (``--request-rate``, gamma arrivals). Request bytes
are encoded before the clock starts; the client's own cost is measured beside the result (``client_cpu_s``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from octavo.bench import metrics
from octavo.bench.client import Answer, Client
from octavo.bench.load import (
    Sample,
    TokenIds,
    arrival_times,
    as_text,
    custom_samples,
    prefix_repetition_samples,
    random_samples,
    sharegpt_samples,
)
from octavo.errors import OctavoError, UsageError


@dataclass(frozen=True)
class Target:
    """Where requests go and what every body holds beside prompt and length."""

    base_url: str
    endpoint: str = "/v1/completions"
    model: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def chat(self) -> bool:
        """True where the endpoint takes messages instead of a prompt."""
        return self.endpoint.rstrip("/").endswith("chat/completions")


@dataclass(frozen=True)
class Traffic:
    """When requests are sent. ``max_concurrency`` None is no limit."""

    max_concurrency: int | None = None
    request_rate: float = float("inf")
    burstiness: float = 1.0
    num_warmups: int = 0
    seed: int = 0


@dataclass
class Run:
    """A finished load: answers in sending order and the seconds from the first request to the last answer."""

    answers: list[Answer]
    duration_s: float
    client_cpu_s: float


def body(target: Target, sample: Sample) -> bytes:
    """The JSON of one request."""
    fields: dict[str, Any] = {"model": target.model}
    if target.chat:
        fields["messages"] = [{"role": "user", "content": sample.prompt}]
        fields["max_completion_tokens"] = sample.output_len
    else:
        fields["prompt"] = sample.prompt
        fields["max_tokens"] = sample.output_len
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(fields | target.fields)


async def send_all(
    target: Target, samples: list[Sample], traffic: Traffic, tick: Callable[[int], None] | None = None
) -> Run:
    """Send every sample by the traffic's clock and wait for all answers; ``tick`` hears how many have ended."""
    client = Client(target.base_url, target.headers)
    wire = [client.encode(target.endpoint, body(target, sample)) for sample in samples]
    times = arrival_times(len(samples), traffic.request_rate, traffic.burstiness, traffic.seed)
    limit = asyncio.Semaphore(traffic.max_concurrency or max(1, len(samples)))
    answers = [Answer() for _ in samples]
    num_ended = 0

    async def one(index: int) -> None:
        nonlocal num_ended
        try:
            answers[index] = await client.stream(wire[index], samples[index].prompt_len)
        finally:
            limit.release()
        num_ended += 1
        if tick is not None:
            tick(num_ended)

    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        async with asyncio.TaskGroup() as group:
            for index in range(len(samples)):
                wait = start + times[index] - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                await limit.acquire()
                group.create_task(one(index))
    finally:
        client.close()
    return Run(answers, time.perf_counter() - start, time.process_time() - cpu_start)


async def measure(
    target: Target,
    samples: list[Sample],
    traffic: Traffic,
    warmups: list[Sample],
    tick: Callable[[int], None] | None = None,
) -> Run:
    """Warm up, then ``send_all``. The first warm-up must succeed: a wrong address or model is one clear error."""
    if warmups:
        trial = await send_all(target, warmups[:1], Traffic())
        if not trial.answers[0].success:
            raise OctavoError(
                f"The trial request to {target.base_url}{target.endpoint} failed: {trial.answers[0].error}.",
                "Check the address, --model and --endpoint.",
            )
        if len(warmups) > 1:
            await send_all(target, warmups[1:], Traffic(max_concurrency=traffic.max_concurrency))
    return await send_all(target, samples, traffic, tick)


def run_loop(work: Coroutine[Any, Any, Run]) -> Run:
    """``asyncio.run`` on uvloop where it is installed: half the client's cost a chunk."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def samples_of(args: argparse.Namespace, num_prompts: int, seed: int) -> list[Sample]:
    """The dataset that the flags describe."""
    ids = TokenIds(args.first_token_id, args.num_token_ids)
    if num_prompts < 1:
        raise UsageError(f"--num-prompts must be at least 1, got {num_prompts}.")
    if args.dataset_name == "random":
        return random_samples(
            num_prompts,
            args.random_input_len,
            args.random_output_len,
            range_ratio=args.random_range_ratio,
            prefix_len=args.random_prefix_len,
            ids=ids,
            seed=seed,
        )
    if args.dataset_name == "prefix_repetition":
        return prefix_repetition_samples(
            num_prompts,
            num_prefixes=min(args.prefix_repetition_num_prefixes, num_prompts),
            prefix_len=args.prefix_repetition_prefix_len,
            suffix_len=args.prefix_repetition_suffix_len,
            output_len=args.prefix_repetition_output_len,
            ids=ids,
            seed=seed,
        )
    if not args.dataset_path:
        raise UsageError(f"--dataset-name {args.dataset_name} needs --dataset-path FILE.")
    path = Path(args.dataset_path)
    if args.dataset_name == "sharegpt":
        return sharegpt_samples(path, num_prompts, args.sharegpt_output_len, seed)
    return custom_samples(path, num_prompts, args.custom_output_len, seed)


def target_of(args: argparse.Namespace) -> Target:
    """Address, model and fixed body fields that the flags describe; asks the server for its model where none is given."""
    chat = args.backend == "openai-chat"
    if args.backend not in ("openai", "vllm", "octavo", "openai-chat"):
        raise UsageError(
            f"--backend {args.backend!r} is not known.", "Use openai, vllm, octavo or openai-chat."
        )
    base_url = args.base_url or f"http://{args.host}:{args.port}"
    headers = dict(_pair(item, "--header") for item in args.header)
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    fields: dict[str, Any] = {"temperature": args.temperature}
    optional = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    fields |= {name: value for name, value in optional.items() if value is not None}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    if args.extra_body:
        fields |= _extra(args.extra_body)
    endpoint = args.endpoint or ("/v1/chat/completions" if chat else "/v1/completions")
    model = args.model or first_model(base_url, headers)
    return Target(base_url.rstrip("/"), endpoint, model, headers, fields)


def first_model(base_url: str, headers: dict[str, str]) -> str:
    """The first model that ``/v1/models`` lists; ``OctavoError`` when the server cannot be asked."""
    address = base_url if "//" in base_url else f"http://{base_url}"
    url = f"{address.rstrip('/')}/v1/models"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
            return str(json.load(reply)["data"][0]["id"])
    except (OSError, urllib.error.URLError, ValueError, LookupError, TypeError) as error:
        raise OctavoError(
            f"Cannot list the models of {url}: {error}.", "Is the server up? Or give --model."
        ) from None


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Run the load that the flags describe and return the result, keys as in vLLM's JSON."""
    names = metrics.parse_metrics(args.percentile_metrics)
    percentiles = metrics.parse_percentiles(args.metric_percentiles)
    goodput = metrics.parse_goodput(args.goodput)
    target = target_of(args)
    samples = samples_of(args, args.num_prompts, args.seed)
    # Other prompts than those measured, or the prefix cache would know some of them.
    warmups = samples_of(args, max(1, args.num_warmups), args.seed + 1)
    if target.chat:
        samples, warmups = as_text(samples, args.seed), as_text(warmups, args.seed + 1)
    traffic = Traffic(args.max_concurrency, args.request_rate, args.burstiness, args.num_warmups, args.seed)
    tick = None if args.disable_tqdm else progress(len(samples))
    run = run_loop(measure(target, samples, traffic, warmups, tick))
    result: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": target.model,
        "tokenizer_id": target.model,
        "num_prompts": len(samples),
        "request_rate": "inf" if args.request_rate == float("inf") else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **dict(_pair(item, "--metadata") for item in args.metadata),
        **metrics.summarize(
            run.answers, run.duration_s, metrics=names, percentiles=percentiles, goodput=goodput
        ),
        "client_cpu_s": run.client_cpu_s,
    }
    saved = None  # written before anything is printed: a closed terminal must not lose the result
    if args.save_result or args.save_detailed:
        detail = detailed(run.answers) if args.save_detailed else {}
        saved = result_path(args, target.model, str(result["date"]))
        saved.write_text(json.dumps(result | detail, indent=2) + "\n", encoding="utf-8")
    print(metrics.table(result, names, percentiles))
    _report_errors(run.answers)
    if saved is not None:
        print(f"Result written to {saved}")
    return result


def main(args: argparse.Namespace) -> int:
    """Exit status of ``octavo bench serve``: 1 when any request failed."""
    return 1 if execute(args)["failed"] else 0


def detailed(answers: list[Answer]) -> dict[str, Any]:
    """Per-answer lists, keys as in vLLM's ``--save-detailed``."""
    return {
        "input_lens": [answer.prompt_tokens for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "start_times": [answer.start for answer in answers],
        "ttfts": [answer.ttft for answer in answers],
        "itls": [answer.itl for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def result_path(args: argparse.Namespace, model: str, date: str) -> Path:
    """Where the JSON goes."""
    rate = f"{args.request_rate:g}qps"
    limit = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    name = args.result_filename or f"{args.backend}-{rate}{limit}-{model.split('/')[-1]}-{date}.json"
    folder = Path(args.result_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name.replace(":", "-")


def progress(total: int) -> Callable[[int], None] | None:
    """A line on the terminal that counts answers; None where standard error is no terminal."""
    if not sys.stderr.isatty():
        return None
    every = max(1, total // 100)

    def tick(done: int) -> None:
        if done % every == 0 or done == total:
            end = "\n" if done == total else ""
            print(f"\r{done}/{total} requests", end=end, file=sys.stderr, flush=True)

    return tick


def _report_errors(answers: list[Answer]) -> None:
    errors: dict[str, int] = {}
    for answer in answers:
        if not answer.success:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    for message, count in sorted(errors.items(), key=lambda item: -item[1])[:5]:
        print(f"{count} failed: {message}", file=sys.stderr)


def _pair(text: str, flag: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise UsageError(f"{flag} {text!r} must look like NAME=VALUE.")
    return name, value


def _extra(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--extra-body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise UsageError("--extra-body must be a JSON object.")
    return fields

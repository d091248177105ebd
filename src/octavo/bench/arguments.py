"""The flags of ``octavo bench ...``; kept apart from the tools so that ``--help`` loads nothing else."""

from __future__ import annotations

import argparse

DATASETS = ("random", "prefix_repetition", "sharegpt", "custom")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """What is sent: dataset, lengths, seed, sampling."""
    group = parser.add_argument_group("load")
    group.add_argument("--dataset-name", choices=DATASETS, default="random", help="Kind of prompts.")
    group.add_argument("--dataset-path", metavar="FILE", help="Local file of sharegpt or custom prompts.")
    group.add_argument("--num-prompts", type=int, default=1000, help="How many requests to send.")
    group.add_argument("--seed", type=int, default=0, help="Seed of prompts and arrival times.")
    group.add_argument("--random-input-len", type=int, default=1024, help="Tokens in a random prompt.")
    group.add_argument("--random-output-len", type=int, default=128, help="Tokens to ask for.")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        help="Lengths vary by this share either way (0 to 1).",
    )
    group.add_argument(
        "--random-prefix-len", type=int, default=0, help="Tokens that all random prompts share at the start."
    )
    group.add_argument(
        "--first-token-id", type=int, default=1000, help="Smallest id in random prompts (specials lie below)."
    )
    group.add_argument(
        "--num-token-ids", type=int, default=20000, help="Random ids lie below first-token-id + this."
    )
    group.add_argument("--prefix-repetition-prefix-len", type=int, default=256, help="Tokens in a prefix.")
    group.add_argument("--prefix-repetition-suffix-len", type=int, default=256, help="Tokens after it.")
    group.add_argument("--prefix-repetition-num-prefixes", type=int, default=10, help="Different prefixes.")
    group.add_argument("--prefix-repetition-output-len", type=int, default=128, help="Tokens to ask for.")
    group.add_argument("--sharegpt-output-len", type=int, help="Tokens to ask for (default: as in the file).")
    group.add_argument("--custom-output-len", type=int, default=256, help="Tokens where a line names none.")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench serve``; names and defaults follow ``vllm bench serve``."""
    target = parser.add_argument_group("server")
    target.add_argument(
        "--base-url", help="Address like http://127.0.0.1:8000 (default: from host and port)."
    )
    target.add_argument("--host", default="127.0.0.1", help="Host of the server.")
    target.add_argument("--port", type=int, default=8000, help="Port of the server.")
    target.add_argument("--backend", default="openai", help="openai, vllm, octavo or openai-chat.")
    target.add_argument(
        "--endpoint", help="Path (default: /v1/completions; openai-chat: /v1/chat/completions)."
    )
    target.add_argument("--model", help="Model name to ask for (default: the first the server lists).")
    target.add_argument("--api-key", help="Key sent as Authorization: Bearer.")
    target.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="Extra header.")
    add_load_arguments(parser)
    add_traffic_arguments(parser)
    out = parser.add_argument_group("result")
    out.add_argument("--percentile-metrics", default="ttft,tpot,itl", help="Of: ttft, tpot, itl, e2el.")
    out.add_argument("--metric-percentiles", default="99", help="Percentiles to print, like 50,90,99.")
    out.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="Limits, like ttft:500 tpot:50."
    )
    out.add_argument("--save-result", action="store_true", help="Write the result as JSON.")
    out.add_argument("--save-detailed", action="store_true", help="Also write every answer's figures.")
    out.add_argument("--result-dir", default=".", help="Folder of the JSON file.")
    out.add_argument("--result-filename", help="Its name (default: from backend, rate, model and time).")
    out.add_argument("--metadata", nargs="+", default=[], metavar="KEY=VALUE", help="Fields to add to it.")
    out.add_argument("--label", help="Name of this run in the JSON file.")
    out.add_argument("--disable-tqdm", action="store_true", help="No progress line.")


def add_traffic_arguments(parser: argparse.ArgumentParser) -> None:
    """When it is sent, and how answers are drawn."""
    group = parser.add_argument_group("traffic")
    group.add_argument(
        "--max-concurrency", type=int, help="Most requests open at once (closed loop; default: no limit)."
    )
    group.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        help="Requests a second (default: as fast as allowed).",
    )
    group.add_argument(
        "--burstiness", type=float, default=1.0, help="1: Poisson; less: burstier; more: even."
    )
    group.add_argument("--num-warmups", type=int, default=0, help="Requests before the clock starts.")
    group.add_argument("--ignore-eos", action="store_true", help="Answers always have the full length.")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy.")
    group.add_argument("--top-p", type=float, help="Nucleus sampling.")
    group.add_argument("--top-k", type=int, help="Top-k sampling.")
    group.add_argument("--min-p", type=float, help="Min-p sampling.")
    group.add_argument("--extra-body", metavar="JSON", help="Object of more request fields.")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench compare``."""
    parser.add_argument("urls", nargs="*", metavar="URL", help="The servers; ratios are first over second.")
    parser.add_argument(
        "--rival",
        metavar="URL|llama.cpp",
        help="The second side: a server, or llama.cpp in this process (needs llama-cpp-python and --model).",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="The first side where no URL is given: a model to load, or to serve."
    )
    parser.add_argument(
        "--requantize", metavar="TYPE", help="Store its matrices as Q4_0, Q4_1 or Q8_0 first (llama.cpp)."
    )
    parser.add_argument("--threads", type=int, help="CPU threads of each side (llama.cpp).")
    parser.add_argument("--names", nargs=2, metavar="NAME", default=None, help="What to call them.")
    parser.add_argument("--models", nargs=2, metavar="MODEL", default=None, help="Model names to ask for.")
    parser.add_argument("--api-key", help="Key sent to both as Authorization: Bearer.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds of each row; servers take turns.")
    parser.add_argument("--peak-concurrency", type=int, default=64, help="Clients in the peak row.")
    parser.add_argument("--requests-per-client", type=int, default=4, help="Requests of each client a round.")
    parser.add_argument("--input-len", type=int, default=512, help="Tokens in a prompt.")
    parser.add_argument("--output-len", type=int, default=128, help="Tokens in an answer.")
    parser.add_argument("--first-token-id", type=int, default=1000, help="Smallest id in random prompts.")
    parser.add_argument("--num-token-ids", type=int, default=20000, help="How many ids prompts draw from.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the prompts.")
    parser.add_argument("--output-json", metavar="FILE", help="Write every round as JSON.")


def add_offline_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench offline`` beside the engine's own."""
    group = parser.add_argument_group("offline benchmark")
    group.add_argument(
        "--mode",
        choices=("throughput", "latency"),
        default="throughput",
        help="throughput: all prompts at once; latency: one batch again and again.",
    )
    group.add_argument("--batch-size", type=int, default=8, help="Sequences in the batch (latency).")
    group.add_argument(
        "--num-iters-warmup", type=int, default=2, help="Batches before the clock starts (latency)."
    )
    group.add_argument("--num-iters", type=int, default=10, help="Batches measured (latency).")
    group.add_argument("--input-len", type=int, help="Tokens in a prompt (default: --random-input-len).")
    group.add_argument("--output-len", type=int, help="Tokens in an answer (default: --random-output-len).")
    group.add_argument("--output-json", metavar="FILE", help="Write the result as JSON.")
    group.add_argument("--disable-tqdm", action="store_true", help="No progress line.")


def add_soak_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench soak`` beside the engine's own."""
    group = parser.add_argument_group("soak")
    group.add_argument("--duration", type=float, default=600.0, help="Seconds.")
    group.add_argument("--concurrency", type=int, default=256, help="Clients that ask without a pause.")
    group.add_argument(
        "--longest-prompt", type=int, default=2048, help="Tokens; lengths are spread below it."
    )
    group.add_argument("--longest-answer", type=int, default=512, help="Tokens; lengths are spread below it.")
    group.add_argument("--load-seed", type=int, default=0, help="Seed of the load.")
    group.add_argument("--output-json", metavar="FILE", help="Write everything seen as JSON.")


def add_cpu_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench cpu`` beside the engine's own."""
    group = parser.add_argument_group("kernel benchmark")
    group.add_argument("--steps", type=int, default=100, help="Decode steps of each kind.")
    group.add_argument("--output-json", metavar="FILE", help="Write the rows as JSON.")


def add_fidelity_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench fidelity`` beside the engine's own."""
    group = parser.add_argument_group("fidelity")
    group.add_argument("--num-tokens", type=int, default=48, help="Tokens behind each prompt.")
    group.add_argument("--num-prompts", type=int, default=24, help="How many of the built-in prompts.")
    group.add_argument("--rival", metavar="llama.cpp", help="Another engine to put through the same tokens.")
    group.add_argument("--output-json", metavar="FILE", help="Write the figures as JSON.")

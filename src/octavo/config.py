"""What the user chose (frozen option groups) and what it means here (``resolve``: the only place ``auto`` is decided).

Field names are the command line's flags with underscores; help texts live beside the fields, so the parser, the
docs and ``LLM(...)`` keyword arguments all come from this file. No torch.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from octavo.errors import UsageError

ON_LOAD = ("fp8", "int8", "int4")  # slow on CPUs, but for the compiled kernels' own types
ON_LOAD_CPU = ("q8_0", "q4_1", "q4_0")  # of the compiled kernels alone
HELD = (
    "awq", "gptq", "compressed-tensors", "modelopt", "bitsandbytes", "mxfp4", "gguf",
    "awq_marlin", "gptq_marlin", "modelopt_fp4", "gpt_oss_mxfp4",
)  # fmt: skip


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, short: str | None = None) -> Any:
    """A dataclass field that is also a command line flag; ``short`` is a second name like "-tp"."""
    return field(default=default, metadata={"help": help, "choices": choices, "short": short})


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how its files are read."""

    model: str = option("smollm2:135m", "Catalogue name, folder, GGUF file or hub id of the model.")
    served_model_name: str | None = option(None, "Name in the API (default: the model as given).")
    tokenizer: str | None = option(None, "Folder or tokenizer.json to use instead of the model's own.")
    revision: str | None = option(None, "Hub revision (branch, tag or commit).")
    download_dir: str | None = option(
        None, "Where downloaded models are kept (default: the user cache folder)."
    )
    load_format: str = option(
        "auto", "auto: what the files are; dummy: random weights.", ("auto", "safetensors", "gguf", "dummy")
    )
    model_impl: str = option(
        "auto",
        "Whose model code runs: octavo's families, transformers' modules over Octavo's cache and kernels (needs the extra "
        "[hf]), or auto: transformers where Octavo has no family.",
        ("auto", "octavo", "transformers"),
    )
    dtype: str = option(
        "auto",
        "Type of activations and dense weights.",
        ("auto", "float32", "float16", "bfloat16", "half", "float"),
    )
    quantization: str | None = option(
        None,
        "Store weights in fewer bits, quantized while they are loaded: fp8 (GPUs of compute capability 8.9 or later), int8, "
        "int4; on CPUs q8_0, q4_1, q4_0. What files hold quantized is found without it; other names only confirm that.",
        (*ON_LOAD, *ON_LOAD_CPU, *HELD),
    )
    max_model_len: str | None = option(
        None,
        "Longest prompt + answer in tokens (like 8192 or 8k; default: the model's own, as far as it fits).",
    )
    seed: int = option(0, "Seed of requests that bring none.")
    generation_config: str = option(
        "auto",
        "Sampling defaults: auto takes the model's generation_config.json, vllm ignores it, or a folder.",
    )
    runner: str = option(
        "auto",
        "What the model is served for: generate, or pooling (embeddings and scores); auto follows the model.",
        ("auto", "generate", "pooling"),
    )
    convert: str = option(
        "auto",
        "How a generative model serves --runner pooling: embed takes its hidden states; none refuses.",
        ("auto", "none", "embed"),
    )
    pooler_config: str | None = option(
        None, 'How vectors are made, as JSON: {"pooling_type": "LAST" | "MEAN" | "CLS", "normalize": true}.'
    )
    chat_template: str | None = option(None, "Jinja file to use instead of the model's chat template.")
    hf_overrides: str | None = option(
        None, 'Values that replace those of config.json, as JSON, like {"num_hidden_layers": 20}.'
    )


@dataclass(frozen=True)
class CacheOptions:
    """The paged KV cache."""

    block_size: int | None = option(None, "Tokens in a page of the KV cache (default: by device).")
    gpu_memory_utilization: float = option(0.92, "Share of the device memory that Octavo may use in all.")
    kv_cache_memory_bytes: int | None = option(
        None, "Size of the KV cache, instead of deriving it from free memory."
    )
    num_gpu_blocks_override: int | None = option(None, "Number of pages, for tests.")
    enable_prefix_caching: bool = option(True, "Keep pages of earlier prompts and reuse them.")
    kv_cache_metrics: bool = option(
        False, "Measure how long cached pages live, lie idle and wait to be used again (see /metrics)."
    )
    kv_cache_metrics_sample: float = option(0.01, "Share of the pages that is measured.")
    kv_cache_dtype: str = option(
        "auto",
        "Type of cached keys and values: auto: that of activations; fp8: half of its bytes (GPUs of compute capability 8.9 "
        "or later).",
        ("auto", "fp8", "fp8_e4m3"),
    )


@dataclass(frozen=True)
class SchedulerOptions:
    """How steps are filled."""

    max_num_seqs: int | None = option(None, "Most sequences in one step (default: by device).")
    max_num_batched_tokens: int | None = option(None, "Most tokens in one step (default: by device).")
    scheduling_policy: str = option(
        "fcfs", "Order of the queue; fair: by what each API key was served.", ("fcfs", "priority", "fair")
    )
    max_queue_len: int = option(4096, "Requests that may wait; beyond it clients get 429.")
    max_step_ms: float | None = option(
        None,
        "Longest step while answers stream, in ms; prompts are cut to fit, by measured speed (0 = no limit; "
        "default: 50 on GPUs, 200 on CPUs).",
    )
    overlap: bool | None = option(None, "Plan a step while the one before it runs (default: on for GPUs).")


@dataclass(frozen=True)
class DeviceOptions:
    """Where it runs."""

    device: str = option("auto", "Device to run on.", ("auto", "cpu", "cuda"))
    enforce_eager: bool = option(False, "Do not capture CUDA graphs.")
    threads: int | None = option(None, "CPU threads (default: the cores this process may use).")
    cpu_backend: str = option("auto", "CPU kernels: auto or the plain torch reference.", ("auto", "torch"))
    kernel_warm_up: str = option(
        "auto",
        "CPU kernels that are not compiled yet: wait for them, or answer on the torch path meanwhile "
        "(background; auto: that for serve, run, chat and complete).",
        ("auto", "wait", "background"),
    )


MAX_CONCURRENT_BATCHES = 3  # what the runner's upload buffers outlive


@dataclass(frozen=True)
class ParallelOptions:
    """How one model is spread over devices, and how many copies of it run."""

    tensor_parallel_size: int = option(1, "Devices that share every layer.", short="-tp")
    pipeline_parallel_size: int = option(1, "Stages of layers, each on devices of its own.", short="-pp")
    max_concurrent_batches: int = option(
        1, "Steps under way at once, one in each stage of a pipeline, each for a share of the requests."
    )
    data_parallel_size: int = option(1, "Copies of the model, each with its own devices.", short="-dp")
    enable_expert_parallel: bool = option(
        False, "Give each tensor parallel device whole experts instead of a slice of every expert."
    )
    nnodes: int = option(1, "Machines that run one model together.", short="-n")
    node_rank: int = option(
        0, "Which of them this is; 0 answers requests, the others only compute.", short="-r"
    )
    master_addr: str = option("127.0.0.1", "Address of machine 0.")
    master_port: int = option(29501, "Port of machine 0 where the others join; the next one carries plans.")
    distributed_executor_backend: str | None = option(
        None,
        "uni: in the engine's process; mp: a process for every device, also for a single one; ray: the same on the machines "
        "of a Ray cluster; external_launcher: this process is one of those that torchrun or the like has started (default: "
        "by the number of devices).",
        ("mp", "uni", "ray", "external_launcher"),
    )
    disable_custom_all_reduce: bool = option(
        False, "Sum over devices by NCCL alone, without the one-shot kernel for small messages."
    )
    distributed_timeout_seconds: float = option(
        300.0, "A rank that reports nothing for so long while it starts has failed; no step may take longer."
    )
    execute_model_timeout_seconds: float = option(
        20.0,
        "A rank that hangs for so long has failed (while it starts: three times that); so has a step that takes longer, "
        "unless steps before it were that slow.",
    )

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "nnodes"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.distributed_executor_backend == "uni" and self.ranks > 1:
            raise UsageError(
                f"--distributed-executor-backend uni has one process, but {self.ranks} ranks need as many.",
                "Use mp.",
            )
        if self.ranks % self.nnodes:
            raise UsageError(
                f"{self.ranks} ranks (tensor x pipeline parallel) cannot be shared by {self.nnodes} machines.",
                "Choose sizes whose product is a multiple of --nnodes.",
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise UsageError(f"--node-rank must be from 0 to {self.nnodes - 1}, got {self.node_rank}.")
        if self.nnodes > 1 and self.data_parallel_size > 1:
            raise UsageError(
                "--data-parallel-size counts copies on one machine; it does not go with --nnodes.",
                "Start one server a group of machines and balance between them.",
            )
        if not 0 < self.master_port < 65535:
            raise UsageError(f"--master-port must be from 1 to 65534, got {self.master_port}.")
        if self.distributed_timeout_seconds <= 0:
            raise UsageError("--distributed-timeout-seconds must be above 0.")
        most = min(self.pipeline_parallel_size, MAX_CONCURRENT_BATCHES)
        if not 1 <= self.max_concurrent_batches <= most:
            raise UsageError(
                f"--max-concurrent-batches must be from 1 to {most} (a step for each stage, at most "
                f"{MAX_CONCURRENT_BATCHES}), got {self.max_concurrent_batches}.",
                "Leave it out, or raise --pipeline-parallel-size.",
            )
        if self.execute_model_timeout_seconds < 2:
            raise UsageError(
                f"--execute-model-timeout-seconds must be at least 2, got {self.execute_model_timeout_seconds:g}: ranks give "
                "two signs of life a second."
            )
        if self.distributed_executor_backend == "ray" and self.nnodes > 1:
            raise UsageError(
                "--distributed-executor-backend ray places ranks itself; it does not go with --nnodes.",
                "Leave out --nnodes, or Ray.",
            )
        if self.distributed_executor_backend == "external_launcher" and self.data_parallel_size > 1:
            raise UsageError(
                "--data-parallel-size does not go with processes that others start (torchrun, external_launcher).",
                "Start one group of processes for each copy.",
            )

    @property
    def ranks(self) -> int:
        """Devices that run one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def uses_workers(self) -> bool:
        """Whether the model runs in processes of its own."""
        return not self.is_rank and (self.ranks > 1 or self.distributed_executor_backend in ("mp", "ray"))

    @property
    def is_rank(self) -> bool:
        """Whether this process computes a part of the model itself, beside others that schedule alike."""
        return self.distributed_executor_backend == "external_launcher" and self.nnodes == 1


@dataclass(frozen=True)
class EngineOptions:
    """Everything an engine is built from; each part gets its own group, never the whole."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    def for_people(self) -> EngineOptions:
        """For somebody who waits for the first answer: kernels that are missing are compiled meanwhile."""
        if self.device.kernel_warm_up != "auto":
            return self
        return dataclasses.replace(self, device=dataclasses.replace(self.device, kernel_warm_up="background"))

    @classmethod
    def of(cls, **flat: Any) -> EngineOptions:
        """Build from flat names (``EngineOptions.of(model="x", max_num_seqs=8)``); unknown names are a ``UsageError``."""
        groups: dict[str, Any] = {}
        for name, group in cls.groups().items():
            mine = {f.name: flat.pop(f.name) for f in dataclasses.fields(group) if f.name in flat}
            groups[name] = group(**mine)
        if flat:
            raise UsageError(f"Unknown option: {', '.join(sorted(flat))}.", "See octavo serve --help.")
        return cls(**groups)

    @classmethod
    def groups(cls) -> dict[str, Any]:
        """Group name to group class."""
        return dict(get_type_hints(cls))


@dataclass(frozen=True)
class Hardware:
    """What ``resolve`` must know of the device; filled by the platform."""

    kind: str  # cpu | cuda
    name: str
    total_memory_bytes: int
    num_cores: int
    supports_bfloat16: bool


@dataclass(frozen=True)
class ModelLimits:
    """What ``resolve`` must know of the model; filled from its config."""

    max_position: int
    dtype: str  # the checkpoint's
    quantized: bool


@dataclass(frozen=True)
class Resolved:
    """All values decided; nothing below this line is ``auto`` or None."""

    dtype: str
    max_model_len: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    overlap: bool
    max_step_ms: float
    enable_prefix_caching: bool
    watched_pages: float
    scheduling_policy: str
    max_queue_len: int
    seed: int
    kv_cache_dtype: str = "auto"  # or fp8


GIB = 1 << 30
SMALL_MODEL_BYTES = 4 * GIB


def parse_length(text: str | int) -> int:
    """Tokens from ``8192``, ``8k`` (8,000), ``8K`` (8,192), ``25.6k``; the suffixes mean what vLLM's mean."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKmM]?)", str(text).strip())
    if not match:
        raise UsageError(f"--max-model-len {text!r} is not a length.", "Write it like 8192, 8k or 25.6k.")
    scale = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20}[match[2]]
    length = int(float(match[1]) * scale)
    if length < 1:
        raise UsageError(f"--max-model-len must be at least 1, got {text}.")
    return length


def resolve(options: EngineOptions, hardware: Hardware, limits: ModelLimits) -> Resolved:
    """Decide every ``auto``; pure, so that ``doctor`` and the tests can ask without a device.

    Batch defaults follow vLLM's table: large GPUs 8192 tokens / 1024 sequences, other GPUs 2048 / 256,
    CPUs 512 / 64. Raises ``UsageError`` where values contradict each other.
    """
    scheduler, cache, model = options.scheduler, options.cache, options.model
    if not 0 < cache.gpu_memory_utilization <= 1:
        raise UsageError(
            f"--gpu-memory-utilization must be above 0 and at most 1, got {cache.gpu_memory_utilization}."
        )
    big = hardware.kind == "cuda" and hardware.total_memory_bytes >= 70 * GIB
    tokens, seqs = (8192, 1024) if big else (2048, 256) if hardware.kind == "cuda" else (512, 64)
    max_num_seqs = scheduler.max_num_seqs or seqs
    max_tokens = scheduler.max_num_batched_tokens or max(tokens, max_num_seqs)
    for flag, value in (("--max-num-seqs", max_num_seqs), ("--max-num-batched-tokens", max_tokens)):
        if value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}.")
    if max_tokens < max_num_seqs:
        raise UsageError(
            f"--max-num-batched-tokens {max_tokens} is less than --max-num-seqs {max_num_seqs}: a step could not "
            "hold one token of each sequence.",
            "Raise the first or lower the second.",
        )
    max_model_len = limits.max_position
    if model.max_model_len is not None and model.max_model_len not in ("auto", "-1"):
        max_model_len = parse_length(model.max_model_len)
        if max_model_len > limits.max_position:
            raise UsageError(
                f"--max-model-len {max_model_len} is more than the model's {limits.max_position} positions.",
                f"Use --max-model-len {limits.max_position}.",
            )
    page_size = cache.block_size or 16
    if page_size < 1 or page_size & (page_size - 1):
        raise UsageError(f"--block-size must be a power of two, got {page_size}.")
    return Resolved(
        dtype=_dtype(model.dtype, hardware, limits),
        max_model_len=max_model_len,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        overlap=hardware.kind == "cuda" if scheduler.overlap is None else scheduler.overlap,
        max_step_ms=_max_step_ms(scheduler.max_step_ms, hardware),
        enable_prefix_caching=cache.enable_prefix_caching,
        watched_pages=_watched_pages(cache),
        scheduling_policy=scheduler.scheduling_policy,
        max_queue_len=scheduler.max_queue_len,
        seed=model.seed,
        kv_cache_dtype="auto" if cache.kv_cache_dtype == "auto" else "fp8",
    )


def num_fronts(asked: int | None, *, on_gpu: bool, cores: int, weights_bytes: int, copies: int) -> int:
    """How many processes speak HTTP. One is full at some thirty thousand chunks a second (docs/performance.md), which only
    small models on a GPU reach, or several copies of a model. On a CPU the engine needs the cores itself."""
    if asked is not None:
        return asked
    if not on_gpu:
        return 1
    wanted = (2 if weights_bytes < SMALL_MODEL_BYTES else 1) * copies
    return max(1, min(wanted, cores // 4, 16))


def _watched_pages(cache: CacheOptions) -> float:
    if not 0 < cache.kv_cache_metrics_sample <= 1:
        raise UsageError(
            f"--kv-cache-metrics-sample must be above 0 and at most 1, got {cache.kv_cache_metrics_sample}."
        )
    return cache.kv_cache_metrics_sample if cache.kv_cache_metrics else 0.0


def _max_step_ms(asked: float | None, hardware: Hardware) -> float:
    if asked is None:
        return 50.0 if hardware.kind == "cuda" else 200.0
    if not 0 <= asked < 1e6:
        raise UsageError(f"--max-step-ms must be from 0 on, got {asked}.")
    return asked


def _dtype(asked: str, hardware: Hardware, limits: ModelLimits) -> str:
    names = {"half": "float16", "float": "float32"}
    if asked != "auto":
        return names.get(asked, asked)
    if hardware.kind == "cpu":
        return "float32"  # the reference path; quantized CPU kernels bring their own types
    if limits.dtype == "float16":
        return "float16"
    return "bfloat16" if hardware.supports_bfloat16 else "float16"

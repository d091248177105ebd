"""Will it fit? ``octavo plan`` and the start of the engine (``host.budget``) ask the same functions.

    total x utilization │ context │ weights │ tables │ largest step │ graphs │ cache pages ...

What a device holds comes from ``model.footprint``, the cache from ``runner.memory``. No torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from octavo.config import ON_LOAD_CPU, EngineOptions, Hardware, Resolved, resolve
from octavo.device.platform.gpus import GIB, GPU, GPUS
from octavo.engine.cache.layout import CacheLayout, plan_layout
from octavo.engine.cache.spec import ceil_div
from octavo.errors import OutOfMemoryError, UnsupportedModelError, UsageError
from octavo.files.base import ModelFiles, TensorInfo
from octavo.files.dtypes import BLOCK_TYPES
from octavo.host.built import limits_of
from octavo.host.implementation import architecture
from octavo.host.spread import part_of
from octavo.model import footprint
from octavo.model.arch import ArchConfig
from octavo.model.blocks import DecoderSpec, MoE
from octavo.model.describe import cache_specs, describe
from octavo.model.footprint import DENSE, FP8, INT4, INT8, Footprint, Scheme
from octavo.model.quantization.describe import Quantization, describe_quantization
from octavo.model.stage import cut
from octavo.runner.memory import MemoryPlan, plan_pages
from octavo.runner.sizes import recorded_sizes, rows_of

CONTEXT_BYTES = 600 << 20  # CUDA's context, loaded kernels, the libraries' workspaces
SLACK_BYTES = 64 << 20  # see runner.measure
SIZES = (1, 2, 4, 8)  # tensor parallel
LENGTHS = (4096, 32768, 131072)
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SCHEMES: dict[str | None, Scheme] = {None: DENSE, "fp8": FP8, "int8": INT8, "int4": INT4}  # by --quantization
USEFUL = 4096  # tokens of context below which nobody would say that a model fits
FP8_CAPABILITY = 89


def held_scheme(files: ModelFiles, spec: DecoderSpec) -> Scheme | None:
    """How quantized files hold the matrices, on average over all of them; None where they are plain."""
    quantization = None if files.format == "gguf" else describe_quantization(files.config)
    if files.format != "gguf" and quantization is None:
        return None
    name = quantization.method if quantization else "gguf"
    matrices = [tensor for tensor in files.tensors.values() if _is_matrix(tensor, spec)]
    stored = sum(_kept_bytes(tensor) if quantization is None else tensor.nbytes for tensor in matrices)
    if not stored and quantization is not None:  # a configuration alone
        return _configured(quantization, spec)
    kinds = ("matrix", "experts", "head")
    elements = sum(held.elements for held in footprint.held_by(spec) if held.kind in kinds)
    return Scheme(name, bits=8 * stored / elements, head=True)


def _configured(quantization: Quantization, spec: DecoderSpec) -> Scheme:
    """What config.json says of the matrices, on average; experts may be stored otherwise than the rest."""
    hidden = spec.embedding.hidden
    bits = quantization.scheme.bits_per_weight(hidden) if quantization.scheme else 16
    expert_bits = bits
    for i, layer in enumerate(spec.layers):
        if isinstance(layer.mlp, MoE):
            block = layer.mlp.experts
            first = f"{spec.hf_layer_prefix.format(i)}{block.hf}.0.{block.hf_each[0]}"
            found = quantization.of(first)
            expert_bits = found.bits_per_weight(hidden) if found else 16
    counts = {"matrix": 0, "experts": 0}
    for held in footprint.held_by(spec):
        if held.kind in counts:
            counts[held.kind] += held.elements
    total = sum(counts.values())
    average = (counts["matrix"] * bits + counts["experts"] * expert_bits) / total if total else bits
    return DENSE if average == 16 else Scheme(quantization.method, bits=average)


def _kept_bytes(tensor: TensorInfo) -> int:
    """Bytes on a GPU: types of GGUF files without kernels are decoded into the run type."""
    return tensor.nbytes if tensor.dtype in BLOCK_TYPES else 2 * math.prod(tensor.shape)


def _is_matrix(tensor: TensorInfo, spec: DecoderSpec) -> bool:
    """Whether a stored tensor belongs to what a scheme stores: not to embeddings, norms, or the tower of another kind
    of input."""
    tables = [name for table in (spec.embedding, spec.positions) if table for name in (table.hf, table.gguf)]
    known = any(tensor.name.endswith(f"{name}.weight") for name in tables)
    return len(tensor.shape) > 1 and not known and "vision" not in tensor.name and "visual" not in tensor.name


def predict(
    spec: DecoderSpec,
    scheme: Scheme,
    resolved: Resolved,
    layout: CacheLayout,
    *,
    graphs: bool,
    on_gpu: bool = True,
    counted: int = 0,
) -> Footprint:
    """What one device holds besides the cache; ``spec`` is that device's part of the model, of which somebody else may
    have ``counted`` the parameters."""
    element = ELEMENT_BYTES[resolved.dtype]
    rows = min(resolved.max_num_seqs, resolved.max_num_batched_tokens)
    by_position = footprint.position_bytes(spec, resolved.max_model_len)
    return Footprint(
        counted or footprint.num_parameters(spec),
        counted * element or footprint.weight_bytes(spec, scheme, element),
        by_position + table_bytes(layout, resolved) + (footprint.work_bytes(spec) if on_gpu else 0),
        footprint.step_bytes(spec, resolved.max_num_batched_tokens, rows, element),
        graphs_of(spec, resolved) if graphs else 0,
    )


def table_bytes(layout: CacheLayout, resolved: Resolved) -> int:
    """The page tables of all slots."""
    widths = [ceil_div(resolved.max_model_len, group.spec.page_size) + 1 for group in layout.groups]
    return 4 * (resolved.max_num_seqs + 1) * sum(widths)


def graphs_of(spec: DecoderSpec, resolved: Resolved) -> int:
    """Bytes of all recorded steps, and what is left free beside them."""
    mixed, decode = recorded_sizes(resolved.max_num_seqs, resolved.max_num_batched_tokens)
    rows = sum(rows_of(size, resolved.max_num_seqs) for size in mixed) + sum(decode)
    element = ELEMENT_BYTES[resolved.dtype]
    kept = footprint.graph_bytes(spec, max(mixed, default=0), rows, len(mixed) + len(decode), element)
    return kept + SLACK_BYTES


@dataclass(frozen=True)
class Case:
    """One answer: the model on ``size`` cards of a kind (times the stages of a pipeline), weights stored by a scheme.

    ``cache_bytes`` of one card. ``max_context`` tokens of one sequence. ``concurrency``: length -> sequences at a time,
    None where the model has fewer positions. ``problem`` says why it does not fit ("" = it does).
    """

    gpu: GPU
    scheme: str
    size: int
    parts: Footprint | None
    cache_bytes: int
    max_context: int
    concurrency: dict[int, int | None]
    problem: str = ""


class Planner:
    """Answers for one model, whose weights are not needed."""

    def __init__(self, options: EngineOptions, files: ModelFiles, arch: ArchConfig | None = None) -> None:
        self.options = options
        self.arch = arch or architecture(options.model, files)
        self.spec = describe(self.arch)
        self.name = files.name
        self.files = files

    @property
    def num_parameters(self) -> int:
        """Values in all tensors of the model."""
        return self.arch.num_parameters or footprint.num_parameters(self.spec)

    @cached_property
    def schemes(self) -> tuple[Scheme, ...]:
        """How the weights may be stored: as they are first; only one where the user says which."""
        asked = self.options.model.quantization
        if asked in ON_LOAD_CPU:
            raise UsageError(
                f"--quantization {asked} is for CPUs; plan answers for GPUs.", "Use fp8, or leave it out."
            )
        if self.arch.num_parameters:  # transformers' modules know no other form
            return (DENSE,)
        held = held_scheme(self.files, self.spec)
        if held is not None:
            return (held, DENSE) if asked is None and self.files.format == "gguf" else (held,)
        return (DENSE, FP8, INT4) if asked is None else (SCHEMES[asked],)

    def resolved(self, gpu: GPU, options: EngineOptions | None = None) -> Resolved:
        """Every option decided as a start on that card would."""
        hardware = Hardware("cuda", gpu.name, gpu.memory_bytes, 8, not 0 < gpu.capability < 80)
        return resolve(options or self.options, hardware, limits_of(self.arch))

    def share(self, options: EngineOptions, resolved: Resolved, size: int) -> tuple[DecoderSpec, CacheLayout]:
        """What the first of ``size`` tensor parallel ranks (times the stages) holds, as ``host.torch_engine`` cuts it."""
        parallel = replace(options.parallel, tensor_parallel_size=size)
        whole = part_of(self.spec, replace(options, parallel=parallel))
        spec, layout = cut(whole, 0, parallel.pipeline_parallel_size), layout_of(whole, resolved)
        if parallel.pipeline_parallel_size > 1:
            layout = layout.part(range(len(spec.layers)))
        return spec, layout

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of tensor parallel ranks to look at: the one that flags name, or all."""
        asked = self.options.parallel.tensor_parallel_size
        return (asked,) if asked > 1 else SIZES

    def case(self, gpu: GPU, scheme: Scheme, size: int, options: EngineOptions | None = None) -> Case:
        """The answer for ``size`` such cards."""
        options = options or self.options
        num_cards = size * options.parallel.pipeline_parallel_size
        resolved = self.resolved(gpu, options)
        name = resolved.dtype if scheme is DENSE else scheme.name
        try:
            self._check(gpu, scheme, size)
            spec, layout = self.share(options, resolved, size)
        except UnsupportedModelError as error:
            return Case(gpu, name, num_cards, None, 0, 0, {}, error.cause)
        graphs = not options.device.enforce_eager
        parts = predict(spec, scheme, resolved, layout, graphs=graphs, counted=self.arch.num_parameters)
        try:
            memory = self._pages(gpu, options, resolved, layout, parts)
        except OutOfMemoryError as error:
            return Case(gpu, name, num_cards, parts, 0, 0, {}, error.cause)
        many = {
            length: memory.num_pages // layout.pages_for(length, 1)
            if length <= resolved.max_model_len
            else None
            for length in LENGTHS
        }
        return Case(gpu, name, num_cards, parts, memory.cache_bytes, memory.max_model_len, many)

    def _pages(
        self, gpu: GPU, options: EngineOptions, resolved: Resolved, layout: CacheLayout, parts: Footprint
    ) -> MemoryPlan:
        usable = int(gpu.memory_bytes * options.cache.gpu_memory_utilization) - CONTEXT_BYTES
        if parts.total > usable:
            raise OutOfMemoryError(
                f"Weights and one step take {gib(parts.total)}, but {gib(usable)} of {gib(gpu.memory_bytes)} can be used."
            )
        left = gpu.memory_bytes - CONTEXT_BYTES - parts.weights - parts.tables
        memory = plan_pages(
            layout,
            options.cache,
            kind="cuda",
            free_bytes=left,
            total_bytes=gpu.memory_bytes,
            peak_bytes=parts.step,
            graph_bytes=parts.graphs,
            max_model_len=resolved.max_model_len,
            length_is_fixed=options.model.max_model_len not in (None, "auto", "-1"),
            max_num_seqs=resolved.max_num_seqs,
            step_tokens=resolved.max_num_batched_tokens,
        )
        if memory.max_model_len < min(USEFUL, resolved.max_model_len):
            raise OutOfMemoryError(f"Only {memory.max_model_len} tokens of context would fit.")
        return memory

    def _check(self, gpu: GPU, scheme: Scheme, size: int) -> None:
        if self.arch.num_parameters and size > 1:
            raise UnsupportedModelError("Models that transformers computes run on one card.")
        if scheme.name == FP8.name and 0 < gpu.capability < FP8_CAPABILITY:
            raise UnsupportedModelError(
                f"{gpu.name} has no fp8 arithmetic (compute capability {gpu.capability / 10:.1f}, needed 8.9)."
            )

    def cases(self, gpus: Sequence[GPU]) -> Iterator[Case]:
        """Every card, scheme and number of cards."""
        for gpu in gpus:
            for scheme in self.schemes:
                for size in self.sizes:
                    yield self.case(gpu, scheme, size)

    def advice(self, gpu: GPU, scheme: Scheme | None = None) -> str:
        """One sentence: that it fits, or the cheapest change after which it does."""
        scheme, size = scheme or self.schemes[0], self.options.parallel.tensor_parallel_size
        first = self.case(gpu, scheme, size)
        if not first.problem:
            return (
                f"It fits on {cards(gpu, size)} as it is, with up to {first.max_context} tokens of context."
            )
        for flags, case in self._changes(gpu, scheme, size):
            if not case.problem:
                what = f"It fits with {flags}" if flags else "It fits"
                return f"{what} on {cards(case.gpu, case.size)}, with up to {case.max_context} tokens of context."
        return f"No change makes it fit on {cards(gpu, SIZES[-1])}, nor on the largest card of the table."

    def _changes(self, gpu: GPU, scheme: Scheme, size: int) -> Iterator[tuple[str, Case]]:
        """Flags and what they lead to, the cheapest first: less context and smaller steps, fewer bits, more cards,
        another card."""
        yield from self._less_context(gpu, scheme, size)
        yield self._smaller_steps(gpu, scheme, size, 2048, 64)
        fewer = [other for other in self.schemes[self.schemes.index(scheme) + 1 :] if other.bits]
        for other in fewer:
            yield flag_of(other), self.case(gpu, other, size)
        for other in [scheme, *fewer]:
            yield self._smaller_steps(gpu, other, size, 512, 8)
        for more in [count for count in SIZES if count > size]:
            yield f"--tensor-parallel-size {more}", self.case(gpu, scheme, more)
            for other in fewer:
                yield f"{flag_of(other)} --tensor-parallel-size {more}", self.case(gpu, other, more)
        for larger in [other for other in GPUS if other.memory_gib > gpu.memory_gib]:
            yield "", self.case(larger, scheme, 1)
        for more in SIZES[1:]:
            yield f"--tensor-parallel-size {more}", self.case(GPUS[-1], scheme, more)

    def _less_context(self, gpu: GPU, scheme: Scheme, size: int) -> Iterator[tuple[str, Case]]:
        if self.options.model.max_model_len not in (None, "auto", "-1"):
            free = replace(self.options, model=replace(self.options.model, max_model_len=None))
            case = self.case(gpu, scheme, size, free)
            yield f"--max-model-len {case.max_context}", case

    def _smaller_steps(self, gpu: GPU, scheme: Scheme, size: int, tokens: int, rows: int) -> tuple[str, Case]:
        scheduler = self.options.scheduler
        tokens = min(tokens, scheduler.max_num_batched_tokens or tokens)
        rows = min(rows, scheduler.max_num_seqs or rows, tokens)
        smaller = replace(scheduler, max_num_batched_tokens=tokens, max_num_seqs=rows)
        flags = f"--max-num-batched-tokens {tokens} --max-num-seqs {rows}"
        if scheme is not self.schemes[0]:
            flags = f"{flag_of(scheme)} {flags}"
        return flags, self.case(gpu, scheme, size, replace(self.options, scheduler=smaller))


def flag_of(scheme: Scheme) -> str:
    """What to type for a scheme, or what to look for where no flag makes it."""
    field = next(f for f in dataclasses.fields(EngineOptions.groups()["model"]) if f.name == "quantization")
    if scheme.name in (field.metadata["choices"] or ()):
        return f"--quantization {scheme.name}"
    return "a 4-bit checkpoint of the model (AWQ, GPTQ or GGUF)"


def gib(nbytes: int) -> str:
    """Bytes for a sentence."""
    return f"{nbytes / GIB:.2f} GiB"


def cards(gpu: GPU, size: int) -> str:
    """Cards for a sentence."""
    return gpu.name if size == 1 else f"{size} x {gpu.name}"


def layout_of(spec: DecoderSpec, resolved: Resolved) -> CacheLayout:
    """The cache of a model, or of a part of it."""
    kv_bytes = 1 if resolved.kv_cache_dtype == "fp8" else None
    return plan_layout(cache_specs(spec, resolved.page_size, ELEMENT_BYTES[resolved.dtype], kv_bytes))

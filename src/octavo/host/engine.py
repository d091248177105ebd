"""The engine's half of the composition root: from options to an ``EngineCore``.

    open_files -> build_core: [torch_engine | compiled_engine | encoder_engine] -> EngineCore

Importing it loads no torch; the backend that is chosen loads what it needs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from octavo.config import EngineOptions
from octavo.engine.client.inprocess import InProcessClient
from octavo.engine.core import EngineCore
from octavo.engine.executor.base import Executor
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.settings import EngineSettings
from octavo.engine.structured.compiler import GrammarCompiler
from octavo.engine.structured.vocabulary import Vocabulary
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.host.built import Built, Progress, Timeline, quiet
from octavo.host.choose import choose_backend
from octavo.host.implementation import architecture
from octavo.host.nodes import launch
from octavo.host.pooler import choose_pooler
from octavo.host.rhythm import almost_free
from octavo.host.spread import Facts, check_split
from octavo.model.arch import ArchConfig
from octavo.model.classes import class_activation, classes, has_classes
from octavo.model.describe import is_encoder
from octavo.protocol.control import ModelFacts

if TYPE_CHECKING:
    from octavo.api.text.tokenizer import Tokenizer

BACKENDS = {
    "torch": "octavo.host.torch_engine:build",
    "compiled": "octavo.host.compiled_engine:build",
    "encoder": "octavo.host.encoder_engine:build",
}


def build_runner(
    options: EngineOptions,
    files: ModelFiles,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
) -> Built:
    """Load the model with the backend that fits model and device, and size its cache."""
    arch = architecture(options.model, files)
    pooler = choose_pooler(options.model, files, arch)
    backend = choose_backend(options, files, arch)
    module, _, attribute = BACKENDS[backend].partition(":")
    timeline = timeline or Timeline.start()
    built: Built = getattr(import_module(module), attribute)(
        options, files, arch, timeline, progress or quiet
    )
    built.pooler, built.backend = pooler, backend
    return built


def prepare(options: EngineOptions, files: ModelFiles, progress: Progress | None = None) -> None:
    """Compile and keep what the first start would have to: the kernels of the compiled CPU path, where it is chosen."""
    arch = architecture(options.model, files)
    if choose_backend(options, files, arch) == "compiled":
        import_module("octavo.host.compiled_engine").prepare(options, files, arch, progress or quiet)


def build_core(
    options: EngineOptions,
    files: ModelFiles,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
) -> EngineCore:
    """An engine in this process and thread; a model on several devices has a worker process for each."""
    if options.parallel.data_parallel_size > 1:
        raise UsageError(
            "--data-parallel-size needs a process for each copy of the model; this is a single one.",
            "Use octavo serve, or one LLM object a device.",
        )
    if options.parallel.node_rank > 0:
        raise UsageError(
            "Only machine 0 has an engine.", "Use octavo serve on the others: it computes for machine 0."
        )
    arch = architecture(options.model, files)
    parallel = options.parallel
    grammars = GrammarCompiler(
        partial(read_vocabulary, options, files), arch.vocab_size, at_once=parallel.is_rank
    )
    if parallel.uses_workers or parallel.is_rank:
        if choose_pooler(options.model, files, arch).pools:
            raise UsageError("Embeddings are computed on one device.", "Leave out the parallel sizes.")
        check_split(options, arch)
        start_ranks = import_module("octavo.host.external").start if parallel.is_rank else launch
        executor, facts = start_ranks(options, progress or quiet)
        batches = parallel.max_concurrent_batches
        settings = replace(settings_of(options, files, arch, facts, None), max_concurrent_batches=batches)
        # Ranks that schedule for themselves must not do so by what each of them measures.
        return EngineCore(executor, settings if parallel.is_rank else paced(executor, settings), grammars)
    timeline = timeline or Timeline.start()

    def describe(built: Built) -> EngineSettings:
        built.backend = built.backend or "compiled"  # those that relieve each other give no vectors
        facts = Facts(
            built.resolved, built.device, built.kernels, timeline.phases, built.memory_use, built.kind
        )
        return settings_of(options, files, arch, facts, built)

    both = None
    if options.device.kernel_warm_up == "background" and choose_backend(options, files, arch) == "compiled":
        start = import_module("octavo.host.standby").start
        both = start(options, files, arch, timeline, progress or quiet, describe)
    if both is not None:
        core = EngineCore(InlineExecutor(both[0].runner), describe(both[0]), grammars)
        core.relief = both[1]
        return core
    built = build_runner(options, files, progress, timeline)
    inline = InlineExecutor(built.runner)
    return EngineCore(inline, paced(inline, describe(built)), grammars)


def paced(executor: Executor, settings: EngineSettings) -> EngineSettings:
    """With the size of steps that suits a GPU and model, measured now."""
    facts = settings.facts
    if facts.device_kind != "cuda" or not facts.can_generate:
        return settings
    free = almost_free(executor, settings.max_num_batched_tokens, settings.max_model_len)
    return replace(settings, free_tokens=free)


def in_process(
    options: EngineOptions, files: ModelFiles, progress: Progress | None = None
) -> InProcessClient:
    """A client of ``build_core``'s engine, which runs in a thread."""
    return InProcessClient(build_core(options, files, progress))


def settings_of(
    options: EngineOptions, files: ModelFiles, arch: ArchConfig, facts: Facts, built: Built | None
) -> EngineSettings:
    """What the engine is told; see ``model_facts`` for ``built``."""
    return EngineSettings.of(
        facts.resolved,
        vocab_size=arch.vocab_size,
        model=options.model.served_model_name or files.name,
        architecture=arch.label,
        device=facts.device,
        kernels=facts.kernels,
        timeline_s=facts.phases,
        memory_bytes=facts.memory_use,
        facts=model_facts(options, files, arch, facts.kind, built),
    )


def model_facts(
    options: EngineOptions, files: ModelFiles, arch: ArchConfig, kind: str, built: Built | None
) -> ModelFacts:
    """What clients may ask about the model; ``built`` is None where it runs on several devices, and gives no vectors."""
    pooler = None if built is None else built.pooler
    labels = classes(arch.raw) if has_classes(arch) else ()
    return ModelFacts(
        weights_bytes=sum(tensor.nbytes for tensor in files.tensors.values()),
        num_parameters=sum(math.prod(tensor.shape) for tensor in files.tensors.values()),
        weights_format=files.format,
        device_kind=kind,
        can_generate=pooler is None or not pooler.pools,
        can_pool=built is not None and built.backend != "compiled",
        pooling="last" if pooler is None else pooler.pooling,
        normalize=pooler is None or pooler.normalize,
        hidden_size=arch.hidden_size,
        is_encoder=is_encoder(arch),
        labels=labels,
        activation=class_activation(arch.raw, len(labels)) if labels else "softmax",
    )


def read_vocabulary(options: EngineOptions, files: ModelFiles) -> Vocabulary:
    """The model's tokens as grammars need them."""
    # Only engines that meet a grammar need the front's tokenizer.
    tokenizer: Tokenizer = import_module("octavo.api.text.tokenizer").load_tokenizer(
        files, options.model.tokenizer
    )
    return Vocabulary(
        tokens=[tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)],
        special_ids=tokenizer.special_ids,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        encode=partial(tokenizer.encode, add_special_tokens=False),
    )

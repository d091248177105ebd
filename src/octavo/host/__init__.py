"""The composition root: from options to a running engine. Only this package sees every floor.

    open_files -> build_core: [torch_engine | compiled_engine] -> EngineCore -> connect: EngineClient -> build_frontend

Importing it loads no torch; the backend that is chosen loads what it needs. ``python -m octavo.host ADDRESS`` is the
engine's own process.
"""

from __future__ import annotations

import math
import sys
import threading
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from pathlib import Path

import msgspec

from octavo.api.frontend import Frontend
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer, load_tokenizer
from octavo.config import EngineOptions
from octavo.engine.client.base import EngineClient
from octavo.engine.client.inprocess import InProcessClient
from octavo.engine.client.socket import SocketClient
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.settings import EngineSettings
from octavo.engine.structured.compiler import GrammarCompiler
from octavo.engine.structured.vocabulary import Vocabulary
from octavo.errors import UsageError
from octavo.files.base import ModelFiles
from octavo.files.resolve import open_description, open_model
from octavo.host.built import Built, Progress, Timeline, quiet
from octavo.host.choose import choose_backend
from octavo.host.implementation import architecture
from octavo.host.nodes import waiting_for
from octavo.host.pooler import choose_pooler
from octavo.host.replicas import launch_replicas
from octavo.host.spread import Facts, launch
from octavo.model.arch import ArchConfig
from octavo.protocol.control import ModelFacts

BACKENDS = {
    "torch": "octavo.host.torch_engine:build",
    "compiled": "octavo.host.compiled_engine:build",
    "encoder": "octavo.host.encoder_engine:build",
}


def open_files(options: EngineOptions, progress: Progress | None = None) -> ModelFiles:
    """Find and open the model the options name, fetching it where that is needed."""
    model = options.model
    files = open_model(
        model.model,
        revision=model.revision,
        download_dir=model.download_dir,
        load_format=model.load_format,
        progress=progress,
    )
    return files if model.hf_overrides is None else override(files, model.hf_overrides)


def open_headers(options: EngineOptions, progress: Progress | None = None) -> ModelFiles:
    """What describes the model the options name, without weights that would have to be downloaded."""
    model = options.model
    files = open_description(
        model.model, revision=model.revision, download_dir=model.download_dir, progress=progress
    )
    return files if model.hf_overrides is None else override(files, model.hf_overrides)


def override(files: ModelFiles, overrides: str) -> ModelFiles:
    """The same files with values of config.json replaced by those of a JSON object."""
    try:
        values = msgspec.json.decode(overrides, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise UsageError(f"--hf-overrides is not a JSON object: {error}.") from None
    if files.format == "gguf":
        raise UsageError(
            "--hf-overrides is for models with a config.json; this is a GGUF file.", "Leave it out."
        )
    files.config = {**files.config, **values}
    return files


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


def build_core(options: EngineOptions, files: ModelFiles, progress: Progress | None = None) -> EngineCore:
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
    grammars = GrammarCompiler(partial(read_vocabulary, options, files), arch.vocab_size)
    if options.parallel.uses_workers:
        if choose_pooler(options.model, files, arch).pools:
            raise UsageError("Embeddings are computed on one device.", "Leave out the parallel sizes.")
        executor, facts = launch(options, arch, progress, waiting_for(options))
        return EngineCore(executor, settings_of(options, files, arch, facts, None), grammars)
    timeline = Timeline.start()

    def describe(built: Built) -> EngineSettings:
        built.backend = built.backend or "compiled"  # those that relieve each other give no vectors
        facts = Facts(built.resolved, built.device, built.kernels, timeline.phases, built.memory_use)
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
    return EngineCore(InlineExecutor(built.runner), describe(built), grammars)


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
        facts=model_facts(options, files, arch, built),
    )


def model_facts(
    options: EngineOptions, files: ModelFiles, arch: ArchConfig, built: Built | None
) -> ModelFacts:
    """What clients may ask about the model; ``built`` is None where it runs on several devices, and gives no vectors."""
    pooler = None if built is None else built.pooler
    spread_kind = "cpu" if options.device.device == "cpu" else "cuda"
    return ModelFacts(
        weights_bytes=sum(tensor.nbytes for tensor in files.tensors.values()),
        num_parameters=sum(math.prod(tensor.shape) for tensor in files.tensors.values()),
        weights_format=files.format,
        device_kind=spread_kind if built is None else built.kind,
        can_generate=pooler is None or not pooler.pools,
        can_pool=built is not None and built.backend != "compiled",
        pooling="last" if pooler is None else pooler.pooling,
        normalize=pooler is None or pooler.normalize,
        hidden_size=arch.hidden_size,
    )


def read_vocabulary(options: EngineOptions, files: ModelFiles) -> Vocabulary:
    """The model's tokens as grammars need them."""
    tokenizer = load_tokenizer(files, options.model.tokenizer)
    return Vocabulary(
        tokens=[tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)],
        special_ids=tokenizer.special_ids,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        encode=partial(tokenizer.encode, add_special_tokens=False),
    )


def connect(
    options: EngineOptions,
    files: ModelFiles,
    *,
    in_process: bool = False,
    progress: Progress | None = None,
) -> EngineClient:
    """An engine in its own process (or in a thread of this one), or several copies of one, ready to serve."""
    if in_process:
        return InProcessClient(build_core(options, files, progress))
    if options.parallel.data_parallel_size > 1:
        return launch_replicas(options, encode_options, progress)
    return SocketClient.launch(
        [sys.executable, "-m", "octavo.host"], encode_options(options), progress or quiet
    )


def tokenizer_ahead(options: EngineOptions, files: ModelFiles) -> Future[Tokenizer]:
    """The tokenizer, built in a thread while the engine loads: half of both is work outside the interpreter."""
    future: Future[Tokenizer] = Future()

    def work() -> None:
        try:
            future.set_result(load_tokenizer(files, options.model.tokenizer))
        except BaseException as error:  # noqa: BLE001  (raised where the result is asked for)
            future.set_exception(error)

    threading.Thread(target=work, name="octavo-tokenizer", daemon=True).start()
    return future


def build_frontend(
    options: EngineOptions,
    files: ModelFiles,
    client: EngineClient,
    tokenizer: Future[Tokenizer] | None = None,
) -> Frontend:
    """Tokenizer (that of ``tokenizer_ahead``, if it was begun), template and sampling defaults around an engine."""
    model = options.model
    words = load_tokenizer(files, model.tokenizer) if tokenizer is None else tokenizer.result()
    source = files.chat_template
    if model.chat_template is not None:
        try:
            source = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat-template {model.chat_template} cannot be read: {error}.") from None
    template = ChatTemplate(source, words.special_tokens)
    return Frontend(
        client,
        words,
        template,
        model_name=model.served_model_name or files.name,
        defaults=sampling_defaults(options, files),
    )


def sampling_defaults(options: EngineOptions, files: ModelFiles) -> dict[str, object]:
    """What --generation-config asks for: the model's advice, nothing, or a folder's file."""
    chosen = options.model.generation_config
    if chosen == "auto":
        return dict(files.generation_config)
    if chosen == "vllm":
        return {}
    path = Path(chosen) / "generation_config.json"
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"--generation-config: {path} cannot be read: {error}.") from None
    return content


def encode_options(options: EngineOptions) -> bytes:
    """Options for the engine's process."""
    return msgspec.msgpack.encode(options)


def decode_options(raw: bytes) -> EngineOptions:
    """The reverse of ``encode_options``."""
    return msgspec.msgpack.decode(raw, type=EngineOptions)

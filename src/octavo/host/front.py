"""The front's half of the composition root: a client of the engine, and tokenizer and templates around it. No torch."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from octavo.api.frontend import Frontend
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer, load_tokenizer
from octavo.config import EngineOptions
from octavo.engine.client.base import EngineClient
from octavo.engine.client.messages import ProgressCall
from octavo.errors import UsageError
from octavo.files.base import ModelFiles

if TYPE_CHECKING:
    from octavo.engine.client.channel import Channel


def connect(
    options: EngineOptions,
    files: ModelFiles,
    *,
    in_process: bool = False,
    progress: ProgressCall | None = None,
    channel: Channel | None = None,
    cancel: threading.Event | None = None,
) -> EngineClient:
    """An engine in its own process (or in a thread of this one), or several copies of one, ready to serve.

    ``channel`` is that of ``start_engine``, if it was called; ``cancel`` ends the wait with ``EngineDeadError``.
    """
    # An engine in this process never needs the sockets' library: imported only where it is needed.
    client: EngineClient
    if in_process:
        client = import_module("octavo.host.engine").in_process(options, files, progress)
        return client
    launch = import_module("octavo.host.launch")
    if options.parallel.data_parallel_size > 1:
        replicas = import_module("octavo.host.replicas")
        client = replicas.launch_replicas(options, launch.encode_options, progress, cancel)
        return client
    socket = import_module("octavo.engine.client.socket").SocketClient
    client = socket.launch(
        channel or launch.start_engine(options), launch.encode_options(options), progress, cancel=cancel
    )
    return client


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
    first_id: int = 1,
) -> Frontend:
    """Tokenizer (that of ``tokenizer_ahead``, if it was begun), template and sampling defaults around an engine.

    Requests are numbered from ``first_id`` on.
    """
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
        first_id=first_id,
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

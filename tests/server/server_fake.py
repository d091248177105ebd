"""A scripted engine behind the real front half: tokens come from a rule, one engine step at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.testclient import TestClient
from starlette.types import ASGIApp
from tokenizers import AddedToken

from octavo.api.frontend import Frontend
from octavo.api.server.app import build_app
from octavo.api.server.listen import bind, url
from octavo.api.server.options import ServerOptions, ServerSettings
from octavo.api.server.serve import serve
from octavo.api.text.byte_tokenizer import build_byte_tokenizer
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer
from octavo.engine.client.base import Sink
from octavo.engine.validate import check_request
from octavo.errors import EngineDeadError, QueueFullError
from octavo.protocol.control import Control, ControlReply, EngineInfo, EngineStats, GetStats, ModelFacts
from octavo.protocol.generate import FinishReason, GenerateRequest, Logprob, TokenDelta

EOS = 257
THINK, END_THINK = 298, 299  # <think> and </think>
VOCAB_SIZE = 300
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# What the model "says": the request and how many tokens it has, to the tokens of the next step.
Rule = Callable[[GenerateRequest, int], list[int]]


def says(text: str, *, step: int = 3) -> Rule:
    """The same text for everybody, ``step`` tokens an engine step, then end of sequence."""
    tokens = [*text.encode(), EOS]
    return lambda request, done: tokens[done : done + step] or [ord(".")]  # told to ignore the end


def for_ever(request: GenerateRequest, done: int) -> list[int]:
    """Never stops by itself."""
    return [ord("a") + done % 26]


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until another thread has made it so."""
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@dataclass
class _Running:
    request: GenerateRequest
    sink: Sink
    num_tokens: int = 0


@dataclass
class FakeEngine:
    """An ``EngineClient`` that steps on the event loop while it has requests (or by hand with ``paused``)."""

    rule: Rule = field(default_factory=lambda: says("Hello, wörld 🎉! How are you?"))
    max_model_len: int = 512
    queue_limit: int = 1000
    facts: ModelFacts = field(default_factory=ModelFacts)
    paused: bool = False
    alive: bool = True

    def __post_init__(self) -> None:
        self.info = EngineInfo(
            model="fake-model",
            architecture="fake",
            vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            page_size=16,
            num_pages=100,
            dtype="float32",
            device="cpu",
            facts=self.facts,
        )
        self.stats = EngineStats(num_prompt_tokens=0, prefix_cache_queries=7)
        self.running: dict[int, _Running] = {}
        self.submitted: list[GenerateRequest] = []
        self.aborted: list[int] = []
        self._stepping: asyncio.Task[None] | None = None

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        if not self.alive:
            raise EngineDeadError("The engine has stopped.")
        if len(self.running) >= self.queue_limit:
            raise QueueFullError("The queue is full.", retry_after_s=3)
        check_request(request, self.info)
        self.submitted.append(request)
        self.stats.num_prompt_tokens += len(request.prompt_token_ids)
        self.running[request.id] = _Running(request, sink)
        if not self.paused and (self._stepping is None or self._stepping.done()):
            self._stepping = asyncio.get_running_loop().create_task(self._steps())

    def abort(self, ids: list[int]) -> None:
        for i in ids:
            if self.running.pop(i, None) is not None:
                self.aborted.append(i)

    async def control(self, command: Control) -> ControlReply:
        self.stats.num_running = len(self.running)
        return self.stats if isinstance(command, GetStats) else None

    async def close(self) -> None:
        self.alive = False

    def die(self) -> None:
        """Every open request gets its last delta, as the protocol says."""
        self.alive = False
        for running in list(self.running.values()):
            running.sink(TokenDelta(running.request.id, [], "error", error="The engine process died."))
        self.running.clear()

    def step(self) -> None:
        """One engine step: every running request gets what the rule says."""
        for running in list(self.running.values()):
            request, sampling = running.request, running.request.sampling
            if request.pooling is not None:
                del self.running[request.id]
                vector = fake_vector(request.prompt_token_ids)
                if request.pooling == "tokens":
                    vector = np.concatenate([fake_vector([i]) for i in request.prompt_token_ids])
                if request.pooling == "classify":
                    vector = fake_classes(request.prompt_token_ids, request.second_at, len(self.facts.labels))
                running.sink(TokenDelta(request.id, [], "stop", embedding=vector.tobytes()))
                continue
            tokens = self.rule(request, running.num_tokens)
            reason: FinishReason | None = None
            stop_token = None
            made = []
            for token in tokens:
                made.append(token)
                if token in sampling.stop_token_ids or (
                    token in request.eos_token_ids and not sampling.ignore_eos
                ):
                    reason, stop_token = "stop", token
                    break
                if running.num_tokens + len(made) == sampling.max_tokens:
                    reason = "length"
                    break
            delta = TokenDelta(request.id, made, reason, stop_token, num_cached_tokens=2)
            if sampling.logprobs is not None:
                delta.logprobs = [_candidates(token, sampling.logprobs) for token in made]
            if sampling.prompt_logprobs is not None and not running.num_tokens:
                ids = request.prompt_token_ids[1:]
                delta.prompt_logprobs = [_candidates(token, sampling.prompt_logprobs) for token in ids]
            running.num_tokens += len(made)
            self.stats.num_generation_tokens += len(made)
            if reason is not None:
                del self.running[request.id]
            running.sink(delta)

    async def _steps(self) -> None:
        while self.running and not self.paused:
            await asyncio.sleep(0)
            self.step()


def fake_vector(token_ids: list[int]) -> NDArray[np.float32]:
    """How often each of eight letters stands in a text: texts with the same letters are alike."""
    return np.array([1 + token_ids.count(ord(letter)) for letter in "abcdefgh"], "<f4")


def fake_classes(token_ids: list[int], second_at: int, count: int) -> NDArray[np.float32]:
    """A label for each of the first letters: how often it stands in the text, or in both texts of a pair."""
    parts = (token_ids[:second_at], token_ids[second_at:]) if second_at else (token_ids, token_ids)
    return np.array(
        [min(part.count(ord(letter)) for part in parts) - 1 for letter in "abcdefgh"[:count]], "<f4"
    )


def _candidates(token: int, num_top: int) -> list[Logprob]:
    """The drawn token at rank 2, then the top ones, itself among them."""
    top = [Logprob((token + 1) % 256, -0.25, 1), Logprob(token, -0.5, 2), Logprob((token + 2) % 256, -1.5, 3)]
    return [top[1], *top[:num_top]]


def make_tokenizer(special: bool = False) -> Tokenizer:
    """Bytes, and thinking markers as tokens of their own (``special`` or not)."""
    built = build_byte_tokenizer({"vocab_size": THINK, "eos_token_id": EOS})
    markers = [AddedToken("<think>", special=special), AddedToken("</think>", special=special)]
    built.backend.add_tokens(markers)
    return Tokenizer(built)


def make_frontend(
    engine: FakeEngine, template: str | None = TEMPLATE, tokenizer: Tokenizer | None = None
) -> Frontend:
    return Frontend(engine, tokenizer or make_tokenizer(), ChatTemplate(template), model_name="fake")


def make_app(engine: FakeEngine, **settings: Any) -> ASGIApp:
    """The whole application over ``engine``; ``template`` is the model's chat template."""
    template, tokenizer = settings.pop("template", TEMPLATE), settings.pop("tokenizer", None)
    given = {"served_model_names": ("fake", "alias"), **settings}
    return build_app(make_frontend(engine, template, tokenizer), engine, ServerSettings(**given))


def make_client(engine: FakeEngine | None = None, **settings: Any) -> TestClient:
    """A client that calls the application without a socket."""
    return TestClient(make_app(engine or FakeEngine(), **settings))


def events_of(body: str) -> list[dict[str, Any]]:
    """The JSON events of a stream, which must end with ``[DONE]``."""
    blocks = [block for block in body.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]", blocks[-1]
    return [msgspec.json.decode(block.removeprefix("data: ")) for block in blocks[:-1]]


@dataclass
class Live:
    """A server on a loopback port in its own thread."""

    engine: FakeEngine
    options: ServerOptions
    settings: dict[str, Any]
    url: str = ""
    port: int = 0
    status: int | None = None
    loop: asyncio.AbstractEventLoop | None = None
    stop_event: asyncio.Event | None = None

    def call(self, action: Callable[[], Any]) -> None:
        """Run ``action`` on the server's event loop and wait for it."""
        done = threading.Event()

        def run() -> None:
            action()
            done.set()

        assert self.loop is not None
        self.loop.call_soon_threadsafe(run)
        assert done.wait(10)

    async def main(self, ready: threading.Event) -> None:
        self.loop = asyncio.get_running_loop()
        self.stop_event = asyncio.Event()
        listener = bind(self.options)

        def on_ready(address: str) -> None:
            self.url, self.port = address, listener.getsockname()[1]
            assert address == url(self.options, listener)
            ready.set()

        app = make_app(self.engine, **self.settings)
        with listener:
            self.status = await serve(
                app, self.engine, self.options, listener, on_ready=on_ready, stop=self.stop_event
            )


@contextmanager
def live_server(
    engine: FakeEngine | None = None, options: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Live]:
    """A real uvicorn on a free loopback port; stopped (with its drain) at the end."""
    quiet = {
        "port": 0,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "critical",
        **(options or {}),
    }
    live = Live(engine or FakeEngine(), ServerOptions(**quiet), settings)
    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(live.main(ready)), daemon=True)
    thread.start()
    assert ready.wait(20), "the server did not start"
    try:
        yield live
    finally:
        stop = live.stop_event
        if thread.is_alive() and live.loop is not None and stop is not None:
            live.loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"

"""An engine client without an engine: scripted tokens for tests of everything in front of it.

Works on the running event loop alone: one token for every open request a "step", one loop iteration a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from octavo.engine.client.base import Sink
from octavo.engine.client.sinks import Sinks
from octavo.errors import EngineDeadError
from octavo.protocol.control import Control, ControlReply, EngineInfo, EngineStats, GetInfo, GetStats
from octavo.protocol.generate import GenerateRequest, Logprob, TokenDelta

# The tokens that answer a request (may be longer than what it asks for).
FakeScript = Callable[[GenerateRequest], list[int]]


def fake_info(**changes: object) -> EngineInfo:
    """Facts of an engine that does not exist."""
    facts: dict[str, object] = {
        "model": "fake",
        "architecture": "fake",
        "vocab_size": 1000,
        "max_model_len": 4096,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "page_size": 16,
        "num_pages": 1024,
        "dtype": "float32",
        "device": "none",
    }
    return EngineInfo(**{**facts, **changes})  # type: ignore[arg-type]


class FakeClient:
    """Implements ``EngineClient``.

    ``script`` maps a request to the tokens it draws. Stop tokens, eos and lengths end a request as the engine would.
    ``paused`` holds everything back; ``requests`` and ``aborted`` record what was asked; ``die`` plays an engine that
    fails. Requested logprobs are filled with made-up, well-formed values.
    """

    def __init__(self, script: FakeScript, info: EngineInfo | None = None) -> None:
        self.info = info or fake_info()
        self.alive = True
        self.paused = False
        self.requests: list[GenerateRequest] = []
        self.aborted: list[int] = []
        self.commands: list[Control] = []
        self.num_steps = 0
        self._script = script
        self._sinks = Sinks(self.info)
        self._running: dict[int, tuple[GenerateRequest, list[int], int]] = {}  # request, script, tokens given
        self._scheduled = False

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """See ``EngineClient.submit``."""
        self._sinks.add(request, sink)
        self.requests.append(request)
        self._running[request.id] = (request, self._script(request), 0)
        self._schedule()

    def abort(self, ids: list[int]) -> None:
        """See ``EngineClient.abort``."""
        for id in self._sinks.remove(ids):
            self.aborted.append(id)
            del self._running[id]

    async def control(self, command: Control) -> ControlReply:
        """See ``EngineClient.control``."""
        if not self.alive:
            raise EngineDeadError("The fake engine has died.")
        self.commands.append(command)
        if isinstance(command, GetInfo):
            return self.info
        if isinstance(command, GetStats):
            return EngineStats(num_running=len(self._running), num_steps=self.num_steps)
        return None

    async def close(self) -> None:
        """See ``EngineClient.close``."""
        self.alive = False
        self._running.clear()
        self._sinks.end_all("abort", "The engine was closed.")

    def die(self, message: str = "The fake engine has died.") -> None:
        """End every open request with an error, as a dying engine does."""
        self.alive = False
        self._running.clear()
        self._sinks.end_all("error", message)

    def resume(self) -> None:
        """Go on after ``paused``."""
        self.paused = False
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and self._running and not self.paused:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._scheduled = False
        if self.paused:
            return
        self.num_steps += 1
        deltas = [self._next(*state) for state in self._running.values()]
        for delta in deltas:
            if delta.finish_reason is not None:
                del self._running[delta.id]
        self._sinks.deliver(deltas)
        self._schedule()

    def _next(self, request: GenerateRequest, script: list[int], given: int) -> TokenDelta:
        sampling = request.sampling
        if given >= len(script):  # the script ends: as if eos had come without a token
            return TokenDelta(request.id, [], "stop")
        token = script[given]
        given += 1
        self._running[request.id] = (request, script, given)
        delta = TokenDelta(request.id, [token])
        stops = sampling.stop_token_ids + ([] if sampling.ignore_eos else request.eos_token_ids)
        length = len(request.prompt_token_ids) + given
        if token in stops and given > sampling.min_tokens:
            delta.finish_reason, delta.stop_token = "stop", token
        elif given == sampling.max_tokens or length >= self.info.max_model_len:
            delta.finish_reason = "length"
        if sampling.logprobs is not None:
            delta.logprobs = [_made_up(token, sampling.logprobs, self.info.vocab_size)]
        if sampling.prompt_logprobs is not None and given == 1:
            delta.prompt_logprobs = [
                _made_up(known, sampling.prompt_logprobs, self.info.vocab_size)
                for known in request.prompt_token_ids[1:]
            ]
        return delta


def _made_up(token: int, count: int, vocab_size: int) -> list[Logprob]:
    """The drawn token as the most likely one, then its neighbours."""
    top = [Logprob((token + i) % vocab_size, -0.5 - i, i + 1) for i in range(min(count, vocab_size))]
    return [Logprob(token, -0.5, 1), *top]

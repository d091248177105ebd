"""Clients: the same behaviour in process and over sockets, and what happens when the engine dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from engines import VOCAB, build, expected, null_core, request

from octavo.engine.client.base import EngineClient
from octavo.engine.client.fake import FakeClient, fake_info
from octavo.engine.client.inprocess import InProcessClient
from octavo.engine.client.sinks import Sinks
from octavo.engine.client.socket import SocketClient
from octavo.errors import EngineDeadError, ModelNotFoundError, OctavoError, QueueFullError, RequestError
from octavo.protocol.control import CheckPool, EngineInfo, EngineStats, GetInfo, GetStats, Shutdown
from octavo.protocol.generate import GenerateRequest, TokenDelta

ENGINE = [sys.executable, str(Path(__file__).parent / "engines.py")]


def launch(options: str = "{}") -> SocketClient:
    return SocketClient.launch(ENGINE, options.encode())


def in_process(**changes: object) -> InProcessClient:
    return InProcessClient(null_core(**changes))


async def until(done: Callable[[], bool], limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "waited too long"
        await asyncio.sleep(0.005)


class Collected:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []

    def __call__(self, delta: TokenDelta) -> None:
        self.deltas.append(delta)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def reason(self) -> str | None:
        return self.deltas[-1].finish_reason if self.deltas else None


async def ask(client: EngineClient, req: GenerateRequest) -> Collected:
    sink = Collected()
    client.submit(req, sink)
    await until(lambda: sink.reason is not None)
    return sink


def over_both(test: Callable[[EngineClient], Awaitable[None]]) -> Callable[[str], None]:
    """Run a coroutine test against each kind of client."""

    def run(kind: str) -> None:
        async def main() -> None:
            client: EngineClient = in_process() if kind == "in-process" else launch()
            try:
                await test(client)
            finally:
                await client.close()
            assert not client.alive

        asyncio.run(main())

    run.__name__ = test.__name__
    return pytest.mark.parametrize("kind", ["in-process", "socket"])(run)


@over_both
async def test_many_requests_get_their_own_tokens(client: EngineClient) -> None:
    requests = [request(i, max_tokens=1 + i % 9) for i in range(40)]
    results = await asyncio.gather(*[ask(client, req) for req in requests])
    for req, result in zip(requests, results):
        assert result.tokens == expected(req)
        assert result.reason == "length"
    assert await client.control(CheckPool()) is None
    assert await client.control(GetInfo()) == client.info
    stats = await client.control(GetStats())
    assert isinstance(stats, EngineStats)
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_generation_tokens == sum(len(expected(req)) for req in requests)


@over_both
async def test_abort_frees_and_silences(client: EngineClient) -> None:
    sink = Collected()
    client.submit(request(1, max_tokens=200), sink)
    await until(lambda: len(sink.deltas) > 0)
    client.abort([1, 99])
    seen = len(sink.deltas)
    while True:
        stats = await client.control(GetStats())
        assert isinstance(stats, EngineStats)
        if stats.num_running == 0:
            break
    assert stats.kv_cache_usage == 0
    assert len(sink.deltas) == seen
    assert sink.reason is None


@over_both
async def test_bad_requests_are_refused_at_submit(client: EngineClient) -> None:
    for bad, field in [
        (request(1, prompt=[VOCAB]), "prompt"),
        (request(1, prompt=[-1]), "prompt"),
        (request(1, prompt=[1] * 256), "prompt"),
        (GenerateRequest(id=1, prompt_token_ids=[], sampling=request(1).sampling), "prompt"),
        (request(1, stop_token_ids=[VOCAB]), "stop_token_ids"),
        (request(1, logit_bias={VOCAB: 1.0}), "logit_bias"),
        (request(1, min_tokens=9), "min_tokens"),
        (request(1, logprobs=VOCAB + 1), "logprobs"),
    ]:
        with pytest.raises(RequestError) as caught:
            client.submit(bad, Collected())
        assert caught.value.param == field
        assert caught.value.status == 400
    assert (await ask(client, request(2))).reason == "length"
    sink = Collected()
    client.submit(request(3, max_tokens=100), sink)
    with pytest.raises(RequestError, match="already"):
        client.submit(request(3), Collected())
    client.abort([3])


@over_both
async def test_drained_shutdown_finishes_what_runs(client: EngineClient) -> None:
    sink = Collected()
    client.submit(request(1, max_tokens=50), sink)
    await client.control(Shutdown(drain=True))
    await until(lambda: sink.reason is not None)
    assert sink.tokens == expected(request(1, max_tokens=50))
    await until(lambda: not client.alive)
    with pytest.raises(EngineDeadError):
        client.submit(request(2), Collected())


@over_both
async def test_close_ends_open_requests(client: EngineClient) -> None:
    sink = Collected()
    client.submit(request(1, max_tokens=200), sink)
    await until(lambda: len(sink.deltas) > 0)
    await client.close()
    assert sink.reason in ("abort", "length")


def test_a_full_queue_is_429() -> None:
    async def main() -> None:
        client = in_process(max_queue_len=2, num_slots=1, delay_s=0.01)
        try:
            for i in range(3):
                client.submit(request(i, max_tokens=100), Collected())
            with pytest.raises(QueueFullError) as caught:
                client.submit(request(3), Collected())
            assert caught.value.status == 429
            client.abort([0])
            client.submit(request(4), Collected())
        finally:
            await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["in-process", "socket"])
def test_a_failing_step_ends_every_request(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        client: EngineClient = in_process(fail_at=5) if kind == "in-process" else launch('{"fail_at": 5}')
        sinks = [Collected() for _ in range(3)]
        for i, sink in enumerate(sinks):
            client.submit(request(i, max_tokens=100), sink)
        await until(lambda: all(sink.reason is not None for sink in sinks))
        for sink in sinks:
            assert sink.reason == "error"
            assert "the device fell over" in (sink.deltas[-1].error or "")
        assert len(sinks[0].tokens) == 5  # steps 0 to 4; the others may have come a step later
        assert not client.alive
        with pytest.raises(EngineDeadError, match="the device fell over"):
            client.submit(request(9), Collected())
        with pytest.raises(EngineDeadError):
            await client.control(GetStats())
        await client.close()

    asyncio.run(main())


def test_one_callback_a_step_not_one_a_token() -> None:
    async def main() -> None:
        client = in_process()
        loop = asyncio.get_running_loop()
        calls = 0
        original = loop.call_soon_threadsafe

        def counting(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            return original(*args, **kwargs)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign,assignment]
        await asyncio.gather(*[ask(client, request(i, max_tokens=20)) for i in range(8)])
        stats = client._core.stats()
        assert stats.num_generation_tokens == 160
        assert calls <= stats.num_steps
        await client.close()

    asyncio.run(main())


def test_kill_9_is_noticed() -> None:
    async def main() -> None:
        client = launch('{"delay_s": 0.01}')
        sink = Collected()
        client.submit(request(1, max_tokens=200), sink)
        await until(lambda: len(sink.deltas) > 2)
        killed = time.monotonic()
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: sink.reason is not None)
        assert time.monotonic() - killed < 10  # in fact at once; a hang would be seen
        assert sink.reason == "error"
        assert "-9" in (sink.deltas[-1].error or "")
        assert not client.alive
        with pytest.raises(EngineDeadError):
            await client.control(GetStats())
        await client.close()

    asyncio.run(main())


def test_an_idle_engine_that_dies_is_noticed_before_any_submit() -> None:
    client = launch()
    os.kill(client.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while client.alive:
        assert time.monotonic() < end
        time.sleep(0.005)

    async def main() -> None:
        with pytest.raises(EngineDeadError):
            client.submit(request(1), Collected())
        await client.close()

    asyncio.run(main())


def test_the_engine_dies_with_its_parent() -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from octavo.engine.client.socket import SocketClient\n"
        "client = SocketClient.launch([sys.executable, sys.argv[1] + '/engines.py'], b'{}')\n"
        "print(client.pid, client.folder, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    words = parent.stdout.split()
    pid, folder = int(words[0]), Path(words[1])
    end = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < end, "the engine outlived its parent"
        time.sleep(0.01)
    assert not folder.exists()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_start_failures_keep_their_text() -> None:
    with pytest.raises(ModelNotFoundError, match=r"There is no model 'x'\. Name another\."):
        launch('{"missing": true}')
    with pytest.raises(EngineDeadError, match="status 7"):
        launch('{"crash": true}')
    with pytest.raises(OctavoError, match="ValueError: a bug"):
        launch('{"bug": true}')


def test_progress_is_passed_on_and_the_folder_is_private() -> None:
    seen: list[tuple[str, int, int]] = []
    client = SocketClient.launch(ENGINE, b"{}", lambda *args: seen.append(args))
    assert seen == [("loading", 1, 2), ("loading", 2, 2)]
    assert isinstance(client.info, EngineInfo)
    folder = Path(client.folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    asyncio.run(client.close())
    assert not folder.exists()


def test_the_loop_may_change() -> None:
    """A client outlives one event loop (a script that calls asyncio.run twice)."""
    client = launch()
    for i in range(2):
        result = asyncio.run(ask(client, request(i)))
        assert result.tokens == expected(request(i))
    asyncio.run(client.close())


def test_the_builder_runs_in_this_process_too() -> None:
    core = build(b"{}", lambda *args: None)
    core.submit(request(1))
    deltas = []
    while core.has_work:
        deltas += core.step()
    assert [token for delta in deltas for token in delta.tokens] == expected(request(1))


def test_fake_client_scripts_stops_and_dies() -> None:
    async def main() -> None:
        client = FakeClient(lambda req: [5, 6, 7, 8])
        assert (await ask(client, request(1))).tokens == [5, 6, 7, 8]
        stopped = await ask(client, request(2, stop_token_ids=[6]))
        assert (stopped.tokens, stopped.reason, stopped.deltas[-1].stop_token) == ([5, 6], "stop", 6)
        short = await ask(client, request(3, max_tokens=2, logprobs=2))
        assert (short.tokens, short.reason) == ([5, 6], "length")
        first = short.deltas[0].logprobs
        assert first is not None and [len(row) for row in first] == [3]
        client.paused = True
        sink = Collected()
        client.submit(request(4), sink)
        await asyncio.sleep(0)
        assert sink.deltas == []
        client.resume()
        await until(lambda: sink.reason is not None)
        last = Collected()
        client.submit(request(5), last)
        client.die()
        assert last.reason == "error"
        with pytest.raises(EngineDeadError):
            client.submit(request(6), Collected())

    asyncio.run(main())


def test_retry_after_is_the_time_that_the_line_takes() -> None:
    now = [0.0]
    sinks = Sinks(fake_info(max_num_seqs=2, max_queue_len=6), clock=lambda: now[0])
    for id in range(8):
        sinks.add(request(id), lambda delta: None)
    with pytest.raises(QueueFullError) as caught:
        sinks.add(request(8), lambda delta: None)
    assert caught.value.retry_after_s == 1  # nothing measured yet
    for id in range(100, 140):  # one request every half second
        now[0] += 0.5
        sinks.deliver([TokenDelta(id, [], "stop")])
    with pytest.raises(QueueFullError) as caught:
        sinks.add(request(8), lambda delta: None)
    assert caught.value.retry_after_s == 3

"""The server over the real engine loop and page pool (only the model is scripted): load, disconnects, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
from server_fake import VOCAB_SIZE, Live, live_server

from octavo.engine.cache.layout import CacheGroup, CacheLayout
from octavo.engine.cache.spec import FullKV, WindowKV
from octavo.engine.client.inprocess import InProcessClient
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.protocol.control import CheckPool
from octavo.protocol.plan import SlotInit

PAGE = 16


def letter(init: SlotInit, position: int) -> int:
    """A letter that depends on the whole prompt and the position."""
    return ord("a") + (sum(init.token_ids[: init.num_prompt]) * 31 + position * 7) % 26


@contextmanager
def engine_server(num_pages: int = 200, max_num_seqs: int = 8, **settings: Any) -> Iterator[Live]:
    groups = (CacheGroup(FullKV(PAGE, 1), (0,)), CacheGroup(WindowKV(PAGE, 1, 32), (1,)))
    runner = NullRunner(
        CacheLayout(groups, PAGE, 1),
        num_pages=num_pages,
        num_slots=max_num_seqs,
        vocab_size=VOCAB_SIZE,
        script=letter,
    )
    given = {"max_model_len": 512, "max_num_batched_tokens": 64, "vocab_size": VOCAB_SIZE, **settings}
    core = EngineCore(InlineExecutor(runner), EngineSettings(max_num_seqs=max_num_seqs, **given))
    client: Any = InProcessClient(core)
    try:
        with live_server(client) as live:
            yield live
    finally:
        asyncio.run(client.close())


def num_running(live: Live) -> float:
    """Sequences that still hold pages; the pool proves on the way that no other page is lost."""
    assert live.loop is not None
    asyncio.run_coroutine_threadsafe(live.engine.control(CheckPool()), live.loop).result(10)
    text = httpx.get(live.url.replace("/v1", "/metrics"), timeout=10).text
    (line,) = [line for line in text.splitlines() if line.startswith("octavo:num_requests_running{")]
    return float(line.split()[-1])


def test_64_streams_answer_as_each_alone() -> None:
    """More requests than slots and a small cache: queueing, chunking and preemption must not show."""
    prompts = [f"request number {i} " * (1 + i % 5) for i in range(64)]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model="fake", prompt=prompt, max_tokens=20, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def together(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    with engine_server(num_pages=60) as live:
        answers = asyncio.run(together(live.url))
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = prompt.encode()
            init = SlotInit(0, list(ids), len(ids), None, 0, [])  # type: ignore[arg-type]
            alone = "".join(chr(letter(init, len(ids) + i)) for i in range(20))
            assert answer == alone
        assert num_running(live) == 0


def test_disconnect_in_mid_stream_frees_the_pages() -> None:
    with engine_server() as live:
        for _ in range(5):
            body = {"prompt": "a" * 40, "max_tokens": 400, "n": 4, "stream": True}
            with httpx.stream("POST", live.url + "/completions", json=body, timeout=20) as reply:
                lines = reply.iter_lines()
                assert any(line.startswith("data: ") for line in lines)
        deadline = time.monotonic() + 15
        while num_running(live):
            assert time.monotonic() < deadline, "aborted requests still run"
            time.sleep(0.01)


def test_bad_requests_leave_the_engine_up() -> None:
    with engine_server(max_queue_len=2, max_num_seqs=1) as live, httpx.Client(base_url=live.url) as client:
        for body in (
            {"prompt": ""},
            {"prompt": [VOCAB_SIZE]},
            {"prompt": [-1]},
            {"prompt": "a" * 600},
            {"prompt": "a", "n": 0},
            {"prompt": "a", "stop_token_ids": [VOCAB_SIZE]},
            {"prompt": "a", "logit_bias": {str(VOCAB_SIZE): 1}},
        ):
            assert client.post("/completions", json=body).status_code == 400, body
        full = client.post("/completions", json={"prompt": "a", "n": 8})
        assert full.status_code == 429 and full.headers["retry-after"]
        reply = client.post("/completions", json={"prompt": "ab", "max_tokens": 3, "n": 2})
        assert reply.status_code == 200
        assert reply.json()["usage"]["completion_tokens"] == 6
        assert httpx.get(live.url.replace("/v1", "/health")).status_code == 200


def test_prefix_hits_are_reported() -> None:
    with engine_server() as live, httpx.Client(base_url=live.url) as client:
        body = {"prompt": "b" * (3 * PAGE + 5), "max_tokens": 2}
        cached = [
            client.post("/completions", json={**body, **extra}).json()["usage"]["prompt_tokens_details"][
                "cached_tokens"
            ]
            for extra in ({}, {}, {"cache_salt": "other tenant"})
        ]
        assert cached == [0, 3 * PAGE, 0]

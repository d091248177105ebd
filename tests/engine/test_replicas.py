"""Several engines as one: the same answers, prompts with a common beginning together, no engine flooded, death of one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from engines import expected, request
from test_clients import Collected, ask, in_process, until

from octavo.engine.client.replicas import SLACK, ReplicaClient, add_up
from octavo.engine.client.socket import SocketClient
from octavo.errors import EngineDeadError, OctavoError, UsageError
from octavo.host.replicas import deal_devices
from octavo.protocol.control import CheckPool, EngineInfo, EngineStats, GetInfo, GetStats


def replicas(count: int = 3) -> ReplicaClient:
    return ReplicaClient([in_process() for _ in range(count)])


def test_two_copies_answer_like_one() -> None:
    async def main() -> None:
        client = replicas(2)
        requests = [request(i, prompt=[1 + i] * (5 + 20 * i), max_tokens=12) for i in range(8)]
        answers = await asyncio.gather(*(ask(client, each) for each in requests))
        assert [answer.tokens for answer in answers] == [expected(each) for each in requests]
        assert client.open == [0, 0]
        info, stats = await client.control(GetInfo()), await client.control(GetStats())
        assert isinstance(info, EngineInfo) and isinstance(stats, EngineStats)
        assert info.num_pages == 128 and info.max_num_seqs == 16
        assert stats.num_generation_tokens == 8 * 12
        await client.control(CheckPool())
        await client.close()
        assert not client.alive

    asyncio.run(main())


def test_prompts_with_one_beginning_meet_and_no_engine_is_flooded() -> None:
    async def main() -> None:
        client = replicas(4)
        beginnings = [[1000 + i] * 64 for i in range(40)]
        homes = [client.choose([*each, 1]) for each in beginnings]
        assert homes == [client.choose([*each, 7, 8, 9]) for each in beginnings]
        assert set(homes) == {0, 1, 2, 3}, "40 beginnings should meet every engine"
        client.open = [10, 10, 10, 10]
        home = client.choose(beginnings[0])
        client.open[home] = 20  # far above its share: the next in order takes it, always the same
        second = client.choose(beginnings[0])
        assert second != home and second == client.choose(beginnings[0] + [3])
        for _ in range(400):  # one prefix alone fills all of them evenly
            index = client.choose(beginnings[0])
            assert client.open[index] < SLACK * (sum(client.open) + 1) / 4
            client.open[index] += 1
        client.open = [3, 2, 1, 2]
        assert client.choose([5] * 3) == 2  # shorter than a page: where the least is open
        await client.close()

    asyncio.run(main())


def test_abort_reaches_the_right_engine() -> None:
    async def main() -> None:
        client = ReplicaClient([in_process(delay_s=0.01), in_process(delay_s=0.01)])
        sinks = [Collected() for _ in range(6)]
        for i, sink in enumerate(sinks):
            client.submit(request(i, prompt=[i + 1] * 40, max_tokens=200), sink)
        await until(lambda: all(sink.tokens for sink in sinks))
        client.abort(list(range(6)))
        assert client.open == [0, 0]
        counts = [len(sink.tokens) for sink in sinks]
        await asyncio.sleep(0.1)
        assert counts == [len(sink.tokens) for sink in sinks]
        await client.close()

    asyncio.run(main())


def test_the_death_of_one_ends_its_requests_and_is_known() -> None:
    async def main() -> None:
        command = [sys.executable, str(Path(__file__).parent / "engines.py")]
        engines = [SocketClient.launch(command, b'{"delay_s": 0.01}') for _ in range(2)]
        client = ReplicaClient(engines)
        sinks = [Collected() for _ in range(6)]
        for i, sink in enumerate(sinks):
            client.submit(request(i, prompt=[i + 1] * 40, max_tokens=150), sink)
        os.kill(engines[1].pid, signal.SIGKILL)
        await until(lambda: not client.alive and client.open[1] == 0)
        with pytest.raises(EngineDeadError, match="One of the engines has stopped"):
            client.submit(request(9), Collected())
        reasons = [sink.reason for sink in sinks]
        assert "error" in reasons and not client.alive
        await client.close()

    asyncio.run(main())


def test_devices_are_dealt() -> None:
    assert deal_devices(2, 2, None) == ["0,1", "2,3"]
    assert deal_devices(1, 2, "3,5,7") == ["3", "5"]
    with pytest.raises(UsageError, match="need 4, but CUDA_VISIBLE_DEVICES names 3"):
        deal_devices(2, 2, "3,5,7")


def test_one_that_cannot_start_cancels_the_others() -> None:
    from threading import Event

    cancel = Event()
    cancel.set()
    command = [sys.executable, str(Path(__file__).parent / "engines.py")]
    with pytest.raises(OctavoError, match="cancelled"):
        SocketClient.launch(command, b"{}", cancel=cancel)


def test_statistics_are_added_up() -> None:
    one = EngineStats(num_steps=3, kv_cache_usage=0.2, step_tokens=8, accepted_at=[5, 1])
    two = EngineStats(num_steps=4, kv_cache_usage=0.6, step_tokens=2, accepted_at=[1, 1, 7])
    both = add_up([one, two])
    assert (both.num_steps, both.step_tokens, both.accepted_at) == (7, 8, [6, 2, 7])
    assert both.kv_cache_usage == pytest.approx(0.4)
    assert both.iteration_tokens == []


def test_statistics_of_copies_add_up() -> None:
    one = EngineStats(
        num_running=2, kv_cache_usage=0.5, step_tokens=7, accepted_at=[3, 1], iteration_tokens=[0, 2]
    )
    other = EngineStats(
        num_running=1, kv_cache_usage=0.0, step_tokens=9, accepted_at=[1], iteration_tokens=[1, 1]
    )
    both = add_up([one, other])
    assert (both.num_running, both.kv_cache_usage, both.step_tokens) == (3, 0.25, 9)
    assert both.accepted_at == [4, 1] and both.iteration_tokens == [1, 3]

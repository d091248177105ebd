"""Several front processes of one server: what they share, and the server as processes, over an engine that computes nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo.api.openai.responses.schema import Reasoning, Response, TextConfig
from octavo.api.openai.responses.store import Kept, ResponseNotFoundError, StoreLimits
from octavo.api.server.fronts import messages
from octavo.api.server.fronts.borrowed import Borrowed
from octavo.api.server.fronts.desk import Desk
from octavo.api.server.fronts.wire import Wire
from octavo.api.server.keys import KeyEntry
from octavo.api.server.listen import bind, bind_beside
from octavo.api.server.options import ServerOptions
from octavo.config import GIB, num_fronts
from octavo.errors import QueueFullError, RequestError, UsageError

LIMITS = StoreLimits(running=1)
ENTRY = KeyEntry(name="team", key="k", max_concurrent=2)


class Guests:
    """A desk and two other processes' ends of the wires to it, in one event loop."""

    def __init__(self, desk: Desk, wires: list[Wire]) -> None:
        self.desk = desk
        self.wires = wires
        self.borrowed = [Borrowed(wire, LIMITS) for wire in wires]
        for wire, borrowed in zip(wires, self.borrowed):
            wire.handler = borrowed.answer


def with_guests(test: Callable[[Guests], Awaitable[None]]) -> Callable[[Path], None]:
    def run(tmp_path: Path) -> None:
        async def main() -> None:
            desk = Desk(LIMITS, messages.Begin(b"engine", b"server"))
            await desk.open(f"{tmp_path}/desk")
            wires = [Wire(*await asyncio.open_unix_connection(f"{tmp_path}/desk")) for _ in range(2)]
            reading = [asyncio.create_task(wire.run()) for wire in wires]
            await until(lambda: len(desk.guests) == 2)
            try:
                await asyncio.wait_for(test(Guests(desk, wires)), 20)
            finally:
                await desk.close()
                await asyncio.gather(*reading)

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.001)


def response(response_id: str, **fields: Any) -> Response:
    facts = {"created_at": 1, "status": "completed", "model": "m", "temperature": 1.0, "top_p": 1.0, **fields}
    return Response(id=response_id, reasoning=Reasoning(), text=TextConfig(), **facts)


@with_guests
async def test_responses_are_found_from_every_process(guests: Guests) -> None:
    first, second = (borrowed.keeper for borrowed in guests.borrowed)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    await first.keep("me", Kept(response("r1"), [{"id": "i1"}], turns))
    for keeper in (guests.desk.keeper, first, second):
        kept = await keeper.fetch("me", "r1")
        assert (kept.response, kept.items, list(kept.turns)) == (response("r1"), [{"id": "i1"}], turns)
        with pytest.raises(ResponseNotFoundError, match="'r1'"):
            await keeper.fetch("somebody else", "r1")
    with pytest.raises(RequestError, match="background"):
        await second.cancel("me", "r1")
    await second.forget("me", "r1")
    for keeper in (first, second):
        with pytest.raises(ResponseNotFoundError):
            await keeper.fetch("me", "r1")
        with pytest.raises(ResponseNotFoundError):
            await keeper.forget("me", "r1")


@with_guests
async def test_background_responses_are_cancelled_where_they_run(guests: Guests) -> None:
    first, second = (borrowed.keeper for borrowed in guests.borrowed)
    running = Kept(response("r1", status="in_progress", background=True), [])

    def stop() -> None:
        running.stop = None
        running.response.status = "cancelled"

    running.stop = stop
    await first.keep("me", running)
    await first.keep("me", running)  # further on; it goes on running
    assert running.stop is not None
    for keeper in (guests.desk.keeper, second):
        with pytest.raises(QueueFullError, match="as many as may"):
            await keeper.check_running("me")
    assert (await second.cancel("me", "r1")).status == "cancelled"
    assert running.stop is None
    assert (await guests.desk.keeper.fetch("me", "r1")).response.status == "cancelled"
    await second.check_running("me")
    # What ran in a process that ends has failed, and is not in the way of others.
    lost = Kept(response("r2", status="in_progress", background=True), [], stop=lambda: None)
    await first.keep("me", lost)
    guests.wires[0].close()
    await until(lambda: len(guests.desk.guests) == 1)
    assert (await second.fetch("me", "r2")).response.status == "failed"
    await second.check_running("me")


@with_guests
async def test_caps_of_a_key_hold_for_all(guests: Guests) -> None:
    own = guests.desk.caps(ENTRY)
    first, second = (borrowed.caps(ENTRY) for borrowed in guests.borrowed)
    async with first.one(), second.one():
        for caps in (first, second, own):
            with pytest.raises(QueueFullError, match="2 requests under way"):
                async with caps.one():
                    pass
    await guests.borrowed[0].totals()  # what was told before has arrived
    await guests.borrowed[1].totals()
    async with own.one():
        held = first.one()
        await held.__aenter__()
        with pytest.raises(QueueFullError):
            async with second.one():
                pass
        guests.wires[0].close()  # the process that holds it ends
        await until(lambda: len(guests.desk.guests) == 1)
        async with second.one():
            pass


@with_guests
async def test_counts_are_added_up_and_never_fall(guests: Guests) -> None:
    everybody = [guests.desk, *guests.borrowed]
    for number, one in enumerate(everybody, 1):
        for _ in range(number):
            timer = one.metrics.start(1, 1, 8)
            timer.delta(0, 3)
            timer.finish(0, "stop", 5, 2)
            timer.close()
            one.metrics.http["POST", "/v1/completions", "2xx"] += 1
        one.metrics.start(1, 1, None)  # still under way

    async def check(in_flight: int) -> None:
        for one in everybody:
            total = await one.totals()
            assert (total.finished["stop"], total.prompt_tokens_cached, total.in_flight) == (6, 12, in_flight)
            assert total.http["POST", "/v1/completions", "2xx"] == 6
            assert sum(total.histograms["request_prompt_tokens"].counts) == 6
            assert total.histograms["request_prompt_tokens"].sum == 30

    await check(3)
    assert guests.desk.metrics.finished["stop"] == 1  # adding up changes nothing
    guests.wires[0].close()
    await until(lambda: len(guests.desk.guests) == 1)
    del everybody[1]
    await check(2)


@with_guests
async def test_what_fails_at_the_desk_is_told(guests: Guests) -> None:
    raw = await guests.wires[0].ask(messages.Hello(7))
    assert b"engine" in raw and guests.desk.guests[0].front == 7
    where = asyncio.create_task(guests.wires[1].ask(messages.WhereEngines()))
    await asyncio.sleep(0)
    guests.desk.engines_ready(["/tmp/a"])
    assert b"/tmp/a" in await where
    heard = []

    async def hear(message: messages.Message) -> None:
        heard.append(message)

    guests.wires[1].handler = hear
    guests.desk.engine_lost("It fell over.")
    await until(lambda: bool(heard))
    assert heard == [messages.EngineLost("It fell over.")]


def test_a_shared_port_is_refused_to_strangers() -> None:
    with bind(ServerOptions(port=0), share=True) as first:
        port = first.getsockname()[1]
        first.listen()
        with bind_beside(first, ServerOptions(port=0)) as beside:
            assert beside.getsockname() == first.getsockname()
        with pytest.raises(UsageError, match="in use"):
            bind(ServerOptions(port=port), share=True)


def test_how_many_by_default() -> None:
    small = {"on_gpu": True, "cores": 16, "weights_bytes": GIB, "copies": 1}
    assert num_fronts(None, **small) == 2
    assert num_fronts(None, **{**small, "on_gpu": False}) == 1
    assert num_fronts(None, **{**small, "cores": 2}) == 1
    assert num_fronts(None, **{**small, "weights_bytes": 16 * GIB}) == 1
    assert num_fronts(None, **{**small, "weights_bytes": 16 * GIB, "copies": 4, "cores": 64}) == 4
    assert num_fronts(3, **{**small, "on_gpu": False, "cores": 1}) == 3
    with pytest.raises(UsageError, match="--api-server-count must be from 1 to 64"):
        ServerOptions(api_server_count=0).check()


# -- processes --------------------------------------------------------------------------------------------------------

MODEL = "qwen3-0.6b"


class Server:
    """``octavo.bench.front_server`` with two front processes: the real server over an engine without maths."""

    def __init__(self, folder: Path) -> None:
        template = folder / "template"
        template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        command = [sys.executable, "-m", "octavo.bench.front_server", "serve", "64", "2", "2", str(template)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline() if self.process.stdout is not None else ""
        found = re.fullmatch(r"Serving from (\d+) (\d+) at (\S+)\n", line)
        if found is None:
            self.process.kill()
            pytest.fail(f"no ready line: {line!r} {self.process.communicate()[1][-2000:]}")
        self.other = int(found[2])
        self.url = found[3]
        self.port = int(found[3].split(":")[2].removesuffix("/v1"))
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url.removesuffix("/v1") + path, timeout=30)

    def count(self, name: str) -> float:
        return sum(
            map(float, re.findall(rf"^octavo:{name}\{{.*\}} (.*)$", self.get("/metrics").text, re.MULTILINE))
        )

    def others(self) -> list[int]:
        """Children of the first process."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
            if parent == self.process.pid:
                found.append(int(stat.parent.name))
        return found

    def by_process(self) -> list[int]:
        """Connections that each process serves (Linux)."""
        inodes = set()
        for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            words = row.split()
            if int(words[1].split(":")[1], 16) == self.port and words[3] == "01":
                inodes.add(words[9])
        counts = []
        for pid in (self.process.pid, self.other):
            links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
            counts.append(sum(link == f"socket:[{inode}]" for link in links for inode in inodes))
        return counts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("fronts"))
    try:
        yield made
    finally:
        made.process.terminate()
        made.process.communicate(timeout=20)


def text_of(server: Server, seed: int) -> str:
    done = server.client.completions.create(
        model=MODEL, prompt="a", max_tokens=12, seed=seed, extra_body={"ignore_eos": True}
    )
    return done.choices[0].text


def test_both_processes_serve_and_their_answers_stay_apart(server: Server) -> None:
    alone = [text_of(server, seed) for seed in range(4)]
    assert len(set(alone)) == 4
    before = server.count("request_success_total")
    with ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(lambda number: text_of(server, number % 4), range(72)))
    assert texts == [alone[number % 4] for number in range(72)]
    assert server.count("request_success_total") == before + 72
    counts = server.by_process()  # the client keeps its connections open
    assert sum(counts) >= 20 and min(counts) > 0


def test_a_conversation_goes_on_in_any_process(server: Server) -> None:
    url, last = server.url + "/responses", None
    for _ in range(8):  # over a new connection each
        body = {"model": MODEL, "input": "x", "previous_response_id": last, "max_output_tokens": 2}
        reply = httpx.post(url, json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        last = reply.json()["id"]


def test_disconnects_abort_in_both(server: Server) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    for _ in range(6):
        with httpx.stream("POST", server.url + "/completions", json=body, timeout=30) as reply:
            lines = reply.iter_lines()  # kept: dropping it would close the connection
            assert next(lines).startswith("data: ")
            assert server.get("/load").json()["server_load"] >= 1
    end = time.monotonic() + 20
    while server.count("num_requests_running") or server.get("/load").json()["server_load"]:
        assert time.monotonic() < end, "a request goes on for nobody"
        time.sleep(0.02)


def test_a_process_that_dies_is_replaced_and_takes_only_its_own(server: Server) -> None:
    before = server.count("request_success_total")
    os.kill(server.other, signal.SIGKILL)
    # Connections to its socket wait for the one that takes its place.
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
    for _ in range(10):
        assert httpx.post(server.url + "/completions", json=body, timeout=60).status_code == 200
    assert server.count("request_success_total") == before + 10
    assert server.process.poll() is None


def test_a_signal_ends_all(server: Server) -> None:
    """The last test: nobody can use the server after it."""
    others = server.others()
    assert len(others) >= 2  # the engine and a front process
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 0
    assert not [pid for pid in others if Path(f"/proc/{pid}").exists()]
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=5):
        pass

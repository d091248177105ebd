"""The load generator's HTTP client: exact counts and times, however the bytes are cut."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from bench_server import BenchServer, Script, events
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.bench.client import Answer, Chunk, Client, Connection, EventReader
from octavo.errors import UsageError

DECODE = msgspec.json.Decoder(Chunk).decode


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self.aborted = True


def chunked(parts: list[bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def play(pieces: list[bytes], times: list[float] | None = None, eof: bool = False) -> Answer:
    """One answer whose bytes arrive in ``pieces`` at ``times``; the request goes out at 10.0 s."""
    clock = iter([10.0, *(times or [10.0 + i for i in range(1, len(pieces) + 1)])])

    async def scene() -> Answer:
        connection = Connection(DECODE, lambda: next(clock))
        connection.connection_made(Wire())
        answer = Answer()
        waiter = connection.send(b"request", answer)
        for piece in pieces:
            connection.data_received(piece)
        if eof:
            connection.connection_lost(None)
        assert waiter.done()
        await waiter
        return answer

    return asyncio.run(scene())


def test_times_are_those_of_the_chunks() -> None:
    parts = events({"max_tokens": 3, "prompt": [1, 2]}, chat=False)
    whole = chunked(parts)
    cuts = [whole.index(parts[1]), whole.index(parts[2])]
    pieces = [whole[: cuts[0]], whole[cuts[0] : cuts[1]], whole[cuts[1] :]]
    answer = play(pieces, [10.5, 10.75, 11.75])
    assert answer.success
    assert answer.ttft == 0.5
    assert answer.itl == [0.25, 1.0]
    assert answer.latency == 1.75
    assert (answer.prompt_tokens, answer.output_tokens) == (2, 3)
    assert answer.text == "t0 ét1 ét2 é"


@given(st.lists(st.integers(1, 40), max_size=60), st.booleans(), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_any_cut_gives_the_same_answer(sizes: list[int], chat: bool, count: int) -> None:
    whole = chunked(events({"max_tokens": count}, chat))
    pieces, rest = [], whole
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    pieces = [piece for piece in [*pieces, rest] if piece]
    answer = play(pieces)
    assert answer.success, answer.error
    assert answer.output_tokens == count
    assert len(answer.itl) == count - 1
    assert answer.text == "".join(f"t{number} é" for number in range(count))


def test_without_usage_chunks_are_counted() -> None:
    answer = play([chunked(events({"max_tokens": 4}, chat=True, usage=False))])
    assert answer.success
    assert answer.output_tokens == 4


def test_body_until_the_end_of_the_connection() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    answer = play([head + b"".join(events({"max_tokens": 2}, chat=False))], eof=True)
    assert answer.success
    assert answer.output_tokens == 2


@pytest.mark.parametrize(
    ("pieces", "eof", "message"),
    [
        ([b"HTTP/1.1 500 X\r\nContent-Length: 4\r\n\r\noops"], False, "HTTP 500: oops"),
        ([chunked(events({"max_tokens": 3}, False)[:2])], False, "the stream ended before its finish_reason"),
        ([chunked([b"data: [DONE]\n\n"])], False, "the stream held no token"),
        ([chunked([b"data: {broken\n\n"])], False, "unreadable answer"),
        ([chunked([b'data: {"error": {"message": "no pages"}}\n\n'])], False, "no pages"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"], False, "unreadable answer"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nda"], True, "connection closed"),
        ([b"x" * 70_000], False, "headers are too large"),
    ],
)
def test_bad_answers_are_failures_that_say_why(pieces: list[bytes], eof: bool, message: str) -> None:
    answer = play(pieces, eof=eof)
    assert not answer.success
    assert message in answer.error


def test_an_interim_response_is_skipped() -> None:
    answer = play([b"HTTP/1.1 100 Continue\r\n\r\n" + chunked(events({"max_tokens": 1}, False))])
    assert answer.success


def test_trailer_lines_that_come_late_are_skipped() -> None:
    whole = chunked(events({"max_tokens": 1}, False)).removesuffix(b"\r\n") + b"X-Time: 1\r\n\r\n"
    answer = play([whole[:-6], whole[-6:]])
    assert answer.success


def test_a_role_chunk_is_no_token() -> None:
    answer = Answer(start=1.0)
    reader = EventReader(answer, DECODE)
    for number, event in enumerate(events({"max_tokens": 2}, chat=True)):
        reader.feed(event, 2.0 + number)
    reader.close()
    assert answer.ttft == 2.0  # the role came at 2.0, the first text at 3.0
    assert answer.itl == [1.0]


def test_connections_are_kept_and_renewed() -> None:
    async def scene(url: str) -> list[Answer]:
        client = Client(url)
        wire = client.encode("/v1/completions", b'{"prompt": [1], "max_tokens": 2}')
        answers = [await client.stream(wire) for _ in range(3)]
        client.close()
        return answers

    for script, connections in ((Script(), 1), (Script(keep_alive=False), 3), (Script(one_shot=True), 3)):
        with BenchServer(script) as server:
            answers = asyncio.run(scene(server.url))
            assert [answer.error for answer in answers] == ["", "", ""]
            assert [answer.output_tokens for answer in answers] == [2, 2, 2]
            assert server.seen.connections == connections


def test_a_cancelled_request_leaves_no_half_read_connection() -> None:
    async def scene(url: str) -> int:
        client = Client(url)
        wire = client.encode("/v1/completions", b'{"prompt": [1], "max_tokens": 2}')
        task = asyncio.create_task(client.stream(wire))
        while not server.seen.open:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(client.idle)

    with BenchServer(Script(hold=2)) as server:
        assert asyncio.run(scene(server.url)) == 0


def test_nobody_listens() -> None:
    answer = asyncio.run(Client("http://127.0.0.1:9").stream(b"x"))
    assert "cannot connect" in answer.error


def test_address_must_be_http() -> None:
    with pytest.raises(UsageError, match="is not an http address"):
        Client("ftp://example.test")
    assert Client("localhost:81").port == 81
    assert b"POST /base/v1/completions" in Client("http://h/base/").encode("/v1/completions", b"")

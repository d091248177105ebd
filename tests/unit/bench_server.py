"""A scripted OpenAI server over raw sockets, in a thread: what it sends, and how it cuts it up, is exact."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Script:
    """How the server behaves; ``slice_bytes`` cuts its writes, 0 writes each chunk whole."""

    slice_bytes: int = 0
    status: int = 200
    error: str = ""
    hang_up_after: int = -1  # chunks, then the connection is cut
    usage: bool = True
    keep_alive: bool = True
    one_shot: bool = False  # closes a kept connection when its next request comes
    hold: int = 0  # answers wait until this many requests are open ...
    hold_after: int = 0  # ... but for the first ones
    fail_prompts_below: int = 0  # prompts of fewer tokens get a 400


@dataclass
class Seen:
    """What the server saw."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0


class BenchServer:
    """``with BenchServer(Script()) as server: server.url``."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.seen = Seen()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run)
        self.started = threading.Event()
        self.port = 0

    def __enter__(self) -> Self:
        self.thread.start()
        self.started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)
        self.loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        self.loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self.stop = asyncio.Event()
        self.changed = asyncio.Condition()
        self.tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.started.set()
        await self.stop.wait()
        server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.connections += 1
        task = asyncio.get_running_loop().create_task(self._connection(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served = 0
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                if self.script.one_shot and served:
                    break
                length = next(
                    (
                        int(line.split(":")[1])
                        for line in head.lower().splitlines()
                        if "content-length" in line
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                self.seen.headers.append(head)
                await self._answer(head, body, writer)
                served += 1
                if not self.script.keep_alive:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        script = self.script
        if head.startswith("GET"):
            await self._plain(writer, 200, {"object": "list", "data": [{"id": "served-model"}]})
            return
        request = json.loads(body)
        self.seen.bodies.append(request)
        if script.status != 200:
            await self._plain(writer, script.status, {"error": {"message": script.error}})
            return
        if isinstance(request.get("prompt"), list) and len(request["prompt"]) < script.fail_prompts_below:
            await self._plain(writer, 400, {"error": {"message": "too short"}})
            return
        async with self.changed:
            self.seen.open += 1
            self.seen.most_open = max(self.seen.most_open, self.seen.open)
            self.changed.notify_all()
            await self.changed.wait_for(lambda: self._may_answer(request))
        try:
            await self._stream(request, "chat" in head.split(" ", 2)[1], writer)
        finally:
            self.seen.open -= 1

    def _may_answer(self, request: dict[str, Any]) -> bool:
        free = any(request is body for body in self.seen.bodies[: self.script.hold_after])
        return free or self.seen.most_open >= self.script.hold

    async def _stream(self, request: dict[str, Any], chat: bool, writer: asyncio.StreamWriter) -> None:
        script = self.script
        close = "" if script.keep_alive else "Connection: close\r\n"
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n{close}\r\n".encode()
        )
        for number, event in enumerate(events(request, chat, script.usage)):
            if number == script.hang_up_after:
                raise ConnectionError
            await self._write(writer, f"{len(event):x}\r\n".encode() + event + b"\r\n")
        await self._write(writer, b"0\r\n\r\n")

    async def _plain(self, writer: asyncio.StreamWriter, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        await self._write(writer, head.encode() + data)

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        size = self.script.slice_bytes or len(data)
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
            if self.script.slice_bytes:
                await asyncio.sleep(0)


def events(request: dict[str, Any], chat: bool, usage: bool = True) -> list[bytes]:
    """The event stream a server would send: one chunk a token, the finish, the usage, the end."""
    count = request.get("max_tokens") or request.get("max_completion_tokens")
    prompt = request.get("prompt")
    num_prompt = len(prompt) if isinstance(prompt, list) else 7
    chunks: list[dict[str, Any]] = []
    if chat:
        chunks.append({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for number in range(count):
        text = f"t{number} é"
        finish = "length" if number == count - 1 else None
        part: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
        chunks.append(
            {"id": "x", "choices": [{"index": 0, **part, "finish_reason": finish, "logprobs": None}]}
        )
    if usage:
        chunks.append({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": count}})
    lines = [b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" for chunk in chunks]
    return [*lines, b"data: [DONE]\n\n"]

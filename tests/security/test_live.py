"""A server and its engine process, as a user starts them, under everything hostile that the other files know."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_cli_serve import CONFIG, ENGINE, TEMPLATE
from test_lint import family
from walk import BODIES

HOSTILE: list[Any] = [
    *(
        -1,
        0,
        2**31,
        2**63,
        -(2**63),
        2**70,
        1e308,
        0.0,
        "",
        "x" * 5000,
        [],
        {},
        [[]],
        [None],
        None,
        True,
        "\x00",
        "\ud7ff",
    ),
    *(
        {"a": {"b": []}},
        [1] * 5000,
        ["x"] * 300,
        {"regex": "(a+)+b"},
        {"json": {"type": "nope"}},
        {"choice": []},
    ),
    *(
        {"grammar": "start: start"},
        {"regex": "("},
        {"type": "json_schema"},
        [{"type": "function"}],
        [-1],
        [10**9],
        {"-1": 1},
    ),
]


@dataclass
class Server:
    """A running server, the pid of its engine, and a client."""

    process: subprocess.Popen[str]
    port: int
    engines: set[int]
    client: httpx.Client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    command = [sys.executable, "-m", "octavo", "serve", str(folder), *ENGINE, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert address is not None
        with httpx.Client(base_url=f"http://127.0.0.1:{address[1]}", timeout=120) as client:
            yield Server(process, int(address[1]), family(process.pid) - {process.pid}, client)
    finally:
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def assert_alive(server: Server) -> None:
    """The same engine process answers as before."""
    assert server.process.poll() is None and server.engines <= family(server.process.pid)
    assert server.client.get("/health").status_code == 200
    reply = server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "ignore_eos": True})
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 2


def test_31_the_engine_outlives_hostile_fields(server: Server, record_property: Any) -> None:
    """Hostile values in one or two fields of a good request, over HTTP, to the real engine."""
    document = server.client.get("/openapi.json").json()
    rng, tried = random.Random(3), 0
    for path, body in BODIES.items():
        ref = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        names = list(document["components"]["schemas"][ref.rsplit("/", 1)[1]]["properties"])
        for _ in range(150):
            changes = {rng.choice(names): rng.choice(HOSTILE) for _ in range(rng.randint(1, 2))}
            short = {"max_tokens": 2} if "completions" in path else {}
            reply = server.client.post(path, json={**body, **short, **changes})
            assert reply.status_code in (200, 400, 404, 413), (path, changes, reply.text)
            assert "0x" not in reply.text or reply.status_code == 200
            tried += 1
    record_property("inputs", tried)
    assert_alive(server)


def test_24_the_server_outlives_broken_http(server: Server, record_property: Any) -> None:
    """Bytes that are no HTTP, requests cut anywhere, clients that leave."""
    rng, tried = random.Random(9), 120
    body = json.dumps({"prompt": "a", "max_tokens": 50, "stream": True}).encode()
    good = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body)
    ) + body
    for number in range(tried):
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.settimeout(10)
            data = bytearray(good)
            if number % 3 == 0:
                data = data[: rng.randrange(1, len(data))]
            elif number % 3 == 1:
                for _ in range(rng.randint(1, 5)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            else:
                data = bytearray(rng.randbytes(rng.randint(1, 400)))
            connection.sendall(data)
            if number % 2:
                connection.shutdown(socket.SHUT_WR)
    record_property("inputs", tried)
    assert_alive(server)


def test_25_the_engine_outlives_hostile_grammars(server: Server, record_property: Any) -> None:
    """Random expressions and schemas, compiled by the real engine; errors are answers."""
    rng, tried = random.Random(21), 120
    pieces = [
        "a",
        "b",
        ".",
        "\\d",
        "[^x]",
        "(",
        ")",
        "|",
        "*",
        "+",
        "?",
        "{2,9}",
        "[a-f]",
        "\\n",
        "^",
        "$",
        "\\",
        "é",
    ]
    for _ in range(tried):
        if rng.random() < 0.6:
            wanted: dict[str, Any] = {"regex": "".join(rng.choices(pieces, k=rng.randint(1, 12)))}
        else:
            keys = rng.sample(
                ["type", "items", "enum", "properties", "minimum", "pattern", "anyOf", "$ref"], 2
            )
            wanted = {"json": {key: rng.choice([*HOSTILE[:12], "string", "object", ["a"]]) for key in keys}}
        body = {"prompt": "x", "max_tokens": 4, "structured_outputs": wanted}
        status = server.client.post(
            "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
        ).status_code
        assert status in (200, 400), wanted
    record_property("inputs", tried)
    assert_alive(server)

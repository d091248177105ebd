"""The server as a process: ready line, drain, exit status, disconnects, a port that is taken."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fake import FakeEngine, Live, eventually, for_ever, live_server

from octavo.api.server.listen import bind
from octavo.api.server.options import ServerOptions
from octavo.api.server.serve import run_server
from octavo.engine.client.renewed import RenewedClient
from octavo.errors import UsageError

BODY = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}


@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_aborts_the_request(path: str, stream: bool) -> None:
    engine = FakeEngine(rule=for_ever, paused=True)
    body = (
        {"prompt": "a", "n": 2}
        if path == "/completions"
        else {"messages": [{"role": "user", "content": "a"}]}
    )
    with live_server(engine) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(live.url + path, json={**body, "stream": stream}, timeout=httpx.Timeout(5, read=0.3))
        eventually(lambda: not engine.running)
        assert sorted(engine.aborted) == sorted(request.id for request in engine.submitted)
        assert httpx.get(live.url.replace("/v1", "/load")).json() == {"server_load": 0}


def test_disconnect_in_mid_stream_aborts_the_request() -> None:
    engine = FakeEngine(rule=for_ever, paused=True)
    with live_server(engine, sse_heartbeat_s=0.05) as live:
        body = {**BODY, "stream": True}
        with httpx.stream("POST", live.url + "/completions", json=body, timeout=10) as reply:
            live.call(engine.step)
            lines = reply.iter_lines()  # kept: dropping it would close the connection
            assert any(line.startswith("data: ") for line in lines)
            assert engine.running
        eventually(lambda: not engine.running)
        assert engine.aborted == [engine.submitted[0].id]


def test_many_prompts_abort_together() -> None:
    engine = FakeEngine(rule=for_ever, paused=True)
    with live_server(engine) as live:
        with pytest.raises(httpx.ReadTimeout):
            body = {"prompt": ["a", "b", "c"], "n": 2}
            httpx.post(live.url + "/completions", json=body, timeout=httpx.Timeout(5, read=0.3))
        eventually(lambda: not engine.running)
        assert len(engine.aborted) == 6


def test_heartbeat_while_the_first_token_is_far() -> None:
    engine = FakeEngine(rule=for_ever, paused=True)
    with (
        live_server(engine, sse_heartbeat_s=0.05) as live,
        httpx.stream("POST", live.url + "/completions", json={**BODY, "stream": True}, timeout=10) as reply,
    ):
        lines = reply.iter_lines()
        assert next(lines).startswith(":")
        live.call(engine.step)
        assert any(line.startswith("data: ") for line in lines)


def test_drain_finishes_what_runs_and_accepts_nothing_new() -> None:
    engine = FakeEngine(rule=for_ever, paused=True)
    answers: list[httpx.Response] = []
    with live_server(engine) as live:
        body = {**BODY, "max_tokens": 3}
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(live.url + "/completions", json=body, timeout=15))
        )
        asking.start()
        eventually(lambda: bool(engine.running))
        assert live.loop is not None and live.stop_event is not None
        live.loop.call_soon_threadsafe(live.stop_event.set)
        eventually(lambda: not accepts(live))
        assert live.status is None
        for _ in range(3):
            live.call(engine.step)
        asking.join(15)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 3
    assert live.status == 0


def accepts(live: Live) -> bool:
    try:
        socket.create_connection(("127.0.0.1", live.port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("stream", [False, True])
def test_what_outlives_the_drain_is_told_and_freed(stream: bool) -> None:
    engine = FakeEngine(rule=for_ever, paused=True)
    answers: list[httpx.Response] = []
    with live_server(engine, options={"shutdown_timeout": 0.2}) as live:
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(live.url + "/completions", json={**BODY, "stream": stream}, timeout=15)
            )
        )
        asking.start()
        eventually(lambda: bool(engine.running))
        if stream:
            live.call(engine.step)
    asking.join(15)
    assert "shutting_down" in answers[0].text
    assert answers[0].status_code == (200 if stream else 503)
    assert not engine.running
    assert live.status == 0


def test_death_of_the_engine_ends_the_server() -> None:
    engine = FakeEngine(rule=for_ever, paused=True)
    answers: list[httpx.Response] = []
    with live_server(engine) as live:
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(live.url + "/completions", json=BODY, timeout=15))
        )
        asking.start()
        eventually(lambda: bool(engine.running))
        live.call(engine.die)
        asking.join(15)
        eventually(lambda: live.status is not None)
    assert answers[0].status_code == 503
    assert live.status == 1


def test_an_engine_that_died_is_started_anew_as_often_as_asked() -> None:
    engines: list[FakeEngine] = []
    start_may_end = threading.Event()

    def make(cancel: threading.Event) -> FakeEngine:
        assert not engines or start_may_end.wait(15)
        engines.append(FakeEngine())
        return engines[-1]

    client: Any = RenewedClient(make)
    ask = {"prompt": "a", "max_tokens": 2, "ignore_eos": True}
    with live_server(client, options={"max_engine_restarts": 1}) as live:
        assert httpx.post(live.url + "/completions", json=ask).status_code == 200
        live.call(engines[0].die)
        health = live.url.replace("/v1", "/health")
        refused = httpx.post(live.url + "/completions", json=ask)
        assert httpx.get(health).status_code == refused.status_code == 503
        start_may_end.set()
        eventually(lambda: httpx.get(health).status_code == 200)
        assert httpx.post(live.url + "/completions", json=ask).status_code == 200
        live.call(engines[1].die)
        eventually(lambda: live.status is not None)
    assert live.status == 1 and len(engines) == 2


def test_an_engine_that_cannot_start_anew_ends_the_server() -> None:
    engines: list[FakeEngine] = []

    def make(cancel: threading.Event) -> FakeEngine:
        if engines:
            raise UsageError("No such model.")
        engines.append(FakeEngine())
        return engines[0]

    client: Any = RenewedClient(make)
    with live_server(client, options={"max_engine_restarts": 5}) as live:
        live.call(engines[0].die)
        eventually(lambda: live.status is not None)
    assert live.status == 1


def test_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        async def start() -> None:
            raise AssertionError("the model was loaded for nothing")

        with pytest.raises(UsageError, match=rf"127.0.0.1:{port} is in use.*--port"):
            run_server(start, ServerOptions(port=port))  # type: ignore[arg-type]


def test_addresses_that_cannot_be_bound(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--host"):
        bind(ServerOptions(host="no such host"))
    with pytest.raises(UsageError, match="--host"):
        bind(ServerOptions(host="192.0.2.1"))
    file = tmp_path / "file"
    file.write_text("data")
    with pytest.raises(UsageError, match="not a socket"):
        bind(ServerOptions(uds=str(file)))
    assert file.read_text() == "data"


def test_certificates_are_checked_before_the_loading(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("nothing")
    for certificate in (str(bad), str(tmp_path / "none.pem")):
        options = ServerOptions(port=0, ssl_certfile=certificate, ssl_keyfile=str(bad))
        with pytest.raises(UsageError, match="--ssl-certfile"):
            run_server(None, options)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program to make a certificate")
def test_tls(tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    with live_server(options={"ssl_keyfile": key, "ssl_certfile": certificate}) as live:
        assert live.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=certificate)
        assert httpx.get(live.url + "/models", verify=context).status_code == 200


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()  # a stale file, as a killed server leaves it
    with live_server(options={"uds": str(path)}) as live:
        assert live.url == f"unix:{path}"
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://server") as client:
            assert client.get("/health").status_code == 200
        with pytest.raises(UsageError, match="in use"):
            bind(ServerOptions(uds=str(path)))
    assert not path.exists()


SCRIPT = """
import asyncio, sys
sys.path.insert(0, {here!r})
from server_fake import FakeEngine, for_ever, make_app
from octavo.api.server.options import ServerOptions
from octavo.api.server.serve import run_server
engine = FakeEngine(rule=for_ever)
step = engine.step
async def slow():
    while engine.running:
        await asyncio.sleep(0.01)
        step()
engine._steps = slow
async def start():
    if {dies}:
        asyncio.get_running_loop().call_later(0.5, engine.die)
    return make_app(engine), engine
sys.exit(run_server(start, ServerOptions(port=0, shutdown_timeout=20)))
"""


def start_process(dies: bool) -> tuple[subprocess.Popen[str], str]:
    script = SCRIPT.format(here=os.path.dirname(__file__), dies=dies)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Octavo is ready at http://127.0.0.1:"), line
    return process, line.split()[-1]


def test_sigterm_drains_and_exits_zero() -> None:
    process, url = start_process(dies=False)
    with httpx.stream(
        "POST", url + "/completions", json={**BODY, "max_tokens": 40, "stream": True}, timeout=20
    ) as reply:
        received = iter(reply.iter_text())
        text = next(received)
        process.send_signal(signal.SIGTERM)
        text += "".join(received)
    assert text.count('"text":') == 40 and text.endswith("data: [DONE]\n\n")
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert output == "" and "Traceback" not in errors


def test_death_of_the_engine_is_an_exit_status() -> None:
    process, _ = start_process(dies=True)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors


def test_start_that_fails_closes_the_port() -> None:
    options = ServerOptions(port=0)

    async def start() -> None:
        await asyncio.sleep(0)
        raise UsageError("No such model.")

    with pytest.raises(UsageError, match="No such model"):
        run_server(start, options)  # type: ignore[arg-type]

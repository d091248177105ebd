"""Authentication: every route of the table, whatever the Host header says."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import pytest
from server_fake import FakeEngine, make_app
from starlette.testclient import TestClient

from octavo.api.server import keys
from octavo.api.server.routes import route_table

KEYS = ("secret-one", "secret-two")
PATHS = [(route.method, route.path.replace("{model:path}", "fake")) for route in route_table()]
PATHS.append(("GET", "/openapi.json"))
ANSWERS = (200, 400, 404, 501)  # past the authentication
OPEN = {"/health", "/ping"}
ADMIN = {route.path for route in route_table() if route.scope == "admin"}
HOSTS = ["x", "health", "x/health", "x/health?", "x?", "x#", "/health", "a@b/health", "x:1/ping?y", "[::1]"]


def ask(app: Any, method: str, path: str, headers: list[tuple[bytes, bytes]], root: str = "") -> int:
    """The status of one bare ASGI request: no client library between us and the headers."""
    status = 0
    bodies = [b"{}"]

    async def receive() -> dict[str, Any]:
        if not bodies:
            await asyncio.Event().wait()  # the client stays
        bodies.clear()
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "method": method,
        "path": root + path,
        "raw_path": (root + path).encode(),
        "root_path": root,
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("x", 1),
        "client": ("x", 1),
    }
    asyncio.run(app(scope, receive, send))
    return status


@pytest.fixture(scope="module")
def app() -> Any:
    return make_app(FakeEngine(), api_keys=KEYS)


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_route_wants_the_key(app: Any, method: str, path: str) -> None:
    status = ask(app, method, path, [])
    assert status == (200 if path in OPEN else 401)
    fine = (403,) if path in ADMIN else ANSWERS
    for credential in ((b"authorization", b"Bearer secret-two"), (b"x-api-key", b"secret-two")):
        assert ask(app, method, path, [credential, (b"content-type", b"application/json")]) in fine


@pytest.mark.parametrize("host", HOSTS)
def test_host_header_does_not_matter(app: Any, host: str) -> None:
    for method, path in PATHS:
        if path not in OPEN:
            assert ask(app, method, path, [(b"host", host.encode())]) == 401, (host, path)


@pytest.mark.parametrize(
    "path",
    [
        "/health/",
        "//health",
        "/health/../v1/models",
        "/HEALTH",
        "/v1/models/health",
        "/ping/x",
        "/health\n",
        "",
    ],
)
def test_paths_that_only_look_open_are_not(app: Any, path: str) -> None:
    assert ask(app, "GET", path, []) == 401


@pytest.mark.parametrize(
    "headers",
    [
        [b"secret-one"],
        [b"Basic secret-one"],
        [b"Bearer"],
        [b"Bearer "],
        [b"Bearer secret-on"],
        [b"Bearer secret-one2"],
        [b"Bearer SECRET-ONE"],
        [b"Bearer secret-one secret-one"],
        [b"Bearer \xff\xfe"],
        [b"Bearer wrong", b"Bearer secret-one"],
    ],
    ids=str,
)
def test_wrong_credentials(app: Any, headers: list[bytes]) -> None:
    assert ask(app, "GET", "/v1/models", [(b"authorization", value) for value in headers]) == 401


@pytest.mark.parametrize("value", [b"Bearer secret-one", b"bearer secret-two", b"BEARER  secret-one "])
def test_right_credentials(app: Any, value: bytes) -> None:
    assert ask(app, "GET", "/v1/models", [(b"authorization", value)]) == 200


def test_key_in_anthropics_header(app: Any) -> None:
    assert ask(app, "GET", "/v1/models", [(b"x-api-key", b"secret-two")]) == 200
    for wrong in ([b"nope"], [b""], [b"secret-one", b"secret-one"], [b"Bearer secret-one"]):
        assert ask(app, "GET", "/v1/models", [(b"x-api-key", value) for value in wrong]) == 401
    both = [(b"authorization", b"Bearer wrong"), (b"x-api-key", b"secret-one")]
    assert ask(app, "GET", "/v1/models", both) == 401


@pytest.mark.parametrize(
    ("path", "shape"),
    [("/v1/messages", {"type", "error"}), ("/v1/models", {"error"}), ("/api/chat", {"error"})],
)
def test_refusals_have_their_dialects_form(app: Any, path: str, shape: set[str]) -> None:
    error = TestClient(app).post(path, json={}).json()
    assert set(error) == shape
    assert isinstance(error["error"], str) == path.startswith("/api/")
    if "type" in shape:
        assert error["error"]["type"] == "authentication_error"


def test_refusal_is_an_openai_error(app: Any) -> None:
    reply = TestClient(app).get("/v1/models", headers={"authorization": "Bearer nope"})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert "nope" not in reply.text and "secret" not in reply.text


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((a, b))
        return hmac.compare_digest(a, b)

    class Spy:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(keys, "hmac", Spy)
    assert keys.KeyRing(KEYS).find(b"secret-one") is not None
    one, two = (keys.digest(key.encode()) for key in KEYS)
    assert seen == [(one, one), (one, two)]


def test_prefix_of_a_proxy(app: Any) -> None:
    assert ask(app, "GET", "/health", [], root="/llm") == 200
    assert ask(app, "GET", "/v1/models", [], root="/llm") == 401
    assert ask(app, "GET", "/health/v1/models", [], root="/health") == 401


def test_without_keys_everything_is_open() -> None:
    app = make_app(FakeEngine())
    for method, path in PATHS:
        fine = (403,) if path in ADMIN else ANSWERS
        assert ask(app, method, path, [(b"content-type", b"application/json")]) in fine


def test_websockets_are_refused(app: Any) -> None:
    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    asyncio.run(app({"type": "websocket", "path": "/v1/models", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_origins_are_closed_unless_named() -> None:
    ask_from = {"origin": "https://page.example", "access-control-request-method": "POST"}
    closed = TestClient(make_app(FakeEngine(), api_keys=KEYS)).options("/v1/models", headers=ask_from)
    assert "access-control-allow-origin" not in closed.headers
    opened = TestClient(make_app(FakeEngine(), api_keys=KEYS, allowed_origins=("https://page.example",)))
    reply = opened.options("/v1/models", headers=ask_from)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
    other = opened.options("/v1/models", headers={**ask_from, "origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers

"""Keys with names: scopes, models, caps, shares, and whose prefix cache a request may hit."""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from server_fake import FakeEngine, make_client, says
from starlette.testclient import TestClient

from octavo.api.server.keys import Caps, KeyEntry, read_keys
from octavo.api.server.options import ServerOptions, ServerSettings
from octavo.errors import QueueFullError, UsageError

FILE = f"""
[[key]]
name = "team-a"
sha256 = "{hashlib.sha256(b"key-a").hexdigest()}"
weight = 2.5
models = ["alias"]

[[key]]
name = "prometheus"
key = "key-p"
scopes = ["metrics"]

[[key]]
name = "team-b"
key = "key-b"
max_concurrent = 3
requests_per_minute = 2
share_prefix_cache = true
"""


def written(path: Path, text: str) -> str:
    file = path / "keys.toml"
    file.write_text(text)
    return str(file)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(rule=says("ab"))


@pytest.fixture
def client(engine: FakeEngine, tmp_path: Path) -> TestClient:
    entries = read_keys(written(tmp_path, FILE))
    return make_client(engine, key_entries=entries, admin_api_key="key-admin")


def ask(client: TestClient, key: str | None, path: str = "/v1/completions", **body: Any) -> Any:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    if path in ("/metrics", "/version", "/load"):
        return client.get(path, headers=headers)
    return client.post(path, headers=headers, json={"prompt": "x", "max_tokens": 2, **body})


def test_a_key_has_a_name_a_weight_and_a_cache_of_its_own(engine: FakeEngine, client: TestClient) -> None:
    assert ask(client, "key-a", cache_salt="mine").status_code == 200
    assert ask(client, "key-b", cache_salt="mine").status_code == 200
    a, b = engine.submitted
    assert (a.terms.tenant, a.terms.weight, a.cache_salt) == ("team-a", 2.5, "team-a\0mine")
    assert (b.terms.tenant, b.terms.weight, b.cache_salt) == ("team-b", 1.0, "mine")


@pytest.mark.parametrize(
    ("key", "path", "status"),
    [
        (None, "/v1/completions", 401),
        ("key-A", "/v1/completions", 401),
        ("key-a", "/v1/completions", 200),
        ("key-a", "/metrics", 200),
        ("key-a", "/reset_prefix_cache", 403),
        ("key-p", "/metrics", 200),
        ("key-p", "/load", 200),
        ("key-p", "/v1/completions", 403),
        ("key-p", "/version", 200),
        ("key-admin", "/reset_prefix_cache", 200),
        ("key-admin", "/metrics", 200),
        ("key-admin", "/v1/completions", 403),
    ],
)
def test_scopes(client: TestClient, key: str | None, path: str, status: int) -> None:
    reply = ask(client, key, path)
    assert reply.status_code == status, reply.text
    if status == 403:
        assert reply.json()["error"]["code"] == "forbidden" and "scope" in reply.json()["error"]["message"]


def test_models(client: TestClient) -> None:
    assert ask(client, "key-a", model="alias").json()["model"] == "alias"
    assert ask(client, "key-a").json()["model"] == "alias"
    refused = ask(client, "key-a", model="fake")
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"
    headers = {"authorization": "Bearer key-a"}
    listed = client.get("/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == ["alias"]


def test_work_is_counted_by_key(client: TestClient) -> None:
    for key in ("key-a", "key-b", "key-a"):
        ask(client, key)
    text = ask(client, "key-p", "/metrics").text
    found = {
        (name, key): float(value)
        for name, key, value in re.findall(r'octavo:key_(\w+)_total\{.*key="([^"]*)".*\} (\S+)', text)
    }
    assert found["requests", "team-a"] == 2 and found["requests", "team-b"] == 1
    assert found["prompt_tokens", "team-a"] == 2 and found["generation_tokens", "team-a"] == 4


def test_a_key_without_any_served_model(tmp_path: Path) -> None:
    entry = KeyEntry(name="x", key="k", models=("other",))
    reply = ask(make_client(FakeEngine(), key_entries=(entry,)), "k")
    assert reply.status_code == 403 and "none of the models" in reply.json()["error"]["message"]


def test_rate(client: TestClient) -> None:
    assert [ask(client, "key-b").status_code for _ in range(3)] == [200, 200, 429]
    reply = ask(client, "key-b")
    assert 1 <= int(reply.headers["retry-after"]) <= 30
    assert ask(client, "key-a").status_code == 200


def test_caps_against_a_clock() -> None:
    now = [0.0]
    caps = Caps(max_concurrent=2, requests_per_minute=60, clock=lambda: now[0])

    async def main() -> None:
        async with caps.one(), caps.one():
            with pytest.raises(QueueFullError, match="under way"):
                caps.take()
        for _ in range(58):
            async with caps.one():
                pass
        with pytest.raises(QueueFullError, match="a minute") as caught:
            caps.take()
        assert caught.value.retry_after_s == 1
        now[0] += 1.0
        async with caps.one():
            pass
        with pytest.raises(QueueFullError):
            caps.take()

    asyncio.run(main())


def test_admin_routes_are_closed_without_an_admin_key() -> None:
    for settings in ({}, {"api_keys": ("k",)}):
        reply = ask(make_client(FakeEngine(), **settings), "k", "/reset_prefix_cache")
        assert reply.status_code == 403 and "--admin-api-key" in reply.json()["error"]["message"]


def test_an_admin_key_alone_leaves_the_rest_open() -> None:
    client = make_client(FakeEngine(rule=says("ab")), admin_api_key="k")
    assert ask(client, None).status_code == 200
    assert ask(client, "wrong", "/reset_prefix_cache").status_code == 403
    assert ask(client, "k", "/reset_prefix_cache").status_code == 200


@pytest.mark.parametrize(
    ("text", "says_what"),
    [
        ("", "needs a key|missing required field `key`"),
        ("key = []", "holds no key"),
        ("[[key]]", "missing required field `name`"),
        ('[[key]]\nname = "a"', "needs either key or sha256"),
        ('[[key]]\nname = "a"\nkey = "x"\nsha256 = "' + "0" * 64 + '"', "needs either key or sha256"),
        ('[[key]]\nname = "a"\nkey = ""', "length >= 1"),
        ('[[key]]\nname = "a b"\nkey = "x"', "matching regex"),
        ('[[key]]\nname = "a"\nsha256 = "abc"', "matching regex"),
        ('[[key]]\nname = "a"\nkey = "x"\nweight = 0', "> 0"),
        ('[[key]]\nname = "a"\nkey = "x"\nscopes = ["root"]', "unknown scope 'root'"),
        ('[[key]]\nname = "a"\nkey = "x"\nadmin = true', "unknown field `admin`"),
        ('[[key]]\nname = "a"\nkey = "x"\n[[key]]\nname = "a"\nkey = "y"', "there twice"),
        ('[[key]]\nname = "a"\nkey = "x"\n[[key]]\nname = "b"\nkey = "x"', "there twice"),
        ("[[key", "not TOML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, says_what: str) -> None:
    with pytest.raises(UsageError, match=says_what) as caught:
        read_keys(written(tmp_path, text))
    assert "--api-keys-file" in str(caught.value)


def test_from_flags_to_settings(tmp_path: Path) -> None:
    options = ServerOptions(api_keys_file=written(tmp_path, FILE), admin_api_key="adm")
    settings = ServerSettings.of(options, ("fake",))
    assert not options.is_open
    assert [entry.name for entry in settings.key_entries] == ["team-a", "prometheus", "team-b"]
    with pytest.raises(UsageError, match="cannot be read"):
        ServerSettings.of(ServerOptions(api_keys_file=str(tmp_path / "none")), ("fake",))
    with pytest.raises(UsageError, match="--admin-api-key is empty"):
        ServerOptions(admin_api_key=" ").check()

"""Advisories about the HTTP front: keys, hosts, sizes, bounds, errors. A test is named after its row in docs/security.md."""

from __future__ import annotations

import gzip
import hmac
import itertools
import json
import random
import socket
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fake import EOS, TEMPLATE, FakeEngine, live_server, make_app, make_client, make_frontend, says
from starlette.testclient import TestClient
from walk import BODIES, CHAT, GENERATES, OPEN, VOCAB_SIZE, ask, posts, routes

from octavo.api.server import keys
from octavo.api.server.errors import error_reply
from octavo.api.server.hosts import HostCheck, host_name
from octavo.api.server.options import ServerOptions
from octavo.api.server.routes import route_table
from octavo.api.structured import MAX_KEPT, Grammars
from octavo.errors import RequestError
from octavo.protocol.generate import StructuredOutputsParams

JSON = (b"content-type", b"application/json")
KEY = (b"authorization", b"Bearer right")
HOSTS = [
    *("x", "health", "x/health", "x/health?", "x?", "x#", "/health", "a@b/health", "x:1/ping?y", "[::1]"),
    *("x/../health", "x\\health", "health#", "%2fhealth", "x/health;", "\x00", "é", "x" * 5000),
]


@pytest.fixture
def client() -> TestClient:
    return make_client(FakeEngine(max_model_len=64, rule=says("ab")))


def post(client: TestClient, path: str, **changes: Any) -> Any:
    return client.post(path, json={**BODIES.get(path, {}), **changes})


def test_01_cve_2026_48746_no_host_header_opens_a_route(record_property: Any) -> None:
    app, tried = make_app(FakeEngine(), api_keys=("right",)), 0
    for host, (method, path) in itertools.product(HOSTS, routes()):
        if path not in OPEN:
            status, _ = ask(app, method, path, [(b"host", host.encode()), JSON])
            assert status == 401, (host, method, path)
            tried += 1
    record_property("inputs", tried)


def test_02_every_route_wants_a_key_but_the_probes() -> None:
    app = make_app(FakeEngine(rule=says("ab")), api_keys=("right",))
    for method, path in routes():
        assert ask(app, method, path, [JSON])[0] == (200 if path in OPEN else 401), path
        assert ask(app, method, path, [JSON, KEY])[0] != 401, path


def test_02_the_table_is_all_there_is() -> None:
    """Paths that other servers leave open do not exist here, or want a key."""
    app = make_app(FakeEngine(), api_keys=("right",))
    for path in (
        "/score",
        "/v1/score",
        "/invocations",
        "/pooling",
        "/classify",
        "/rerank",
        "/start_profile",
        "/sleep",
    ):
        assert ask(app, "POST", path, [JSON])[0] == 401


def test_03_cve_2025_59425_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Spy:
        @staticmethod
        def compare_digest(a: bytes, b: bytes) -> bool:
            seen.append((len(a), len(b)))
            return hmac.compare_digest(a, b)

    monkeypatch.setattr(keys, "hmac", Spy)
    ring = keys.KeyRing([f"key-{i}" for i in range(5)])
    for token in (b"key-0", b"key-4", b"", b"x" * 1000):
        seen.clear()
        ring.find(token)
        assert seen == [(32, 32)] * 5  # digests of one length, and all of them


def test_08_cve_2025_62164_embeddings_are_no_input(client: TestClient) -> None:
    for value in ("gASVAAAA", ["gASV"], [[0.1] * 8]):
        reply = post(client, "/v1/completions", prompt_embeds=value)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "prompt_embeds"


IMAGES = [
    {"type": "image_url", "image_url": {"url": url}}
    for url in (
        *(
            "http://127.0.0.1:1/x.png",
            "http://169.254.169.254/latest/meta-data",
            "http://[::1]/",
            "file:///etc/passwd",
        ),
        *(
            "http://user:pw@internal/",
            "http://0x7f000001/",
            "gopher://x",
            "data:image/png;base64,AAAA",
            "x" * 5000,
        ),
    )
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whoever opens a connection or resolves a name is caught."""
    seen: list[Any] = []

    def caught(*args: Any, **_: Any) -> Any:
        seen.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", caught)
    monkeypatch.setattr(socket, "create_connection", caught)
    return seen


def test_09_cve_2025_62372_media_of_any_shape_is_refused(client: TestClient) -> None:
    for part in (
        *IMAGES,
        {"type": "image_embeds", "image_embeds": {"a": "AA"}},
        {"type": "audio_url"},
        {"type": "video"},
    ):
        reply = post(client, "/v1/chat/completions", messages=[{"role": "user", "content": [part]}])
        assert reply.status_code == 400, part
    assert post(client, "/v1/completions").status_code == 200


def test_13_ghsa_h3rc_6mm3_gc2m_requests_bring_no_processor_arguments(client: TestClient) -> None:
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        reply = post(
            client, "/v1/chat/completions", **{name: {"code_revision": "x", "trust_remote_code": True}}
        )
        assert reply.status_code == 400 and reply.json()["error"]["param"] == name


def test_15_cve_2025_6242_nothing_is_fetched_for_a_request(client: TestClient, no_network: list[Any]) -> None:
    for part in IMAGES:
        content = [{"type": "text", "text": "what is this?"}, part]
        reply = post(client, "/v1/chat/completions", messages=[{"role": "user", "content": content}])
        assert reply.status_code == 400 and not no_network


def test_16_cve_2026_33626_the_same_urls_as_plain_strings(client: TestClient, no_network: list[Any]) -> None:
    for part in IMAGES:
        url = part["image_url"]["url"]
        for content in (
            [{"type": "image_url", "image_url": url}],
            [{"type": "input_image", "image_url": url}],
        ):
            reply = post(client, "/v1/chat/completions", messages=[{"role": "user", "content": content}])
            assert reply.status_code == 400 and not no_network


def test_17_cve_2026_0599_links_in_text_are_text(client: TestClient, no_network: list[Any]) -> None:
    text = "![](http://127.0.0.1:1/x.png) <img src='http://169.254.169.254/'>"
    big = make_client(FakeEngine(rule=says("ab")))
    assert post(big, "/v1/chat/completions", messages=[{"role": "user", "content": text}]).status_code == 200
    assert post(big, "/v1/completions", prompt=text).status_code == 200 and not no_network


def test_18_cve_2026_22778_errors_hold_no_addresses() -> None:
    for text in ("at 0x7f3a2b1c4d5e", "<object at 0x55d0c0ffee00>", "ptr=0xDEADBEEF01", repr(object())):
        for error in (RequestError(text), ValueError(text), RuntimeError(text), OSError(text)):
            assert b"0x" not in error_reply(error).encode()


def test_19_cve_2026_54236_no_router_leaks_an_address(record_property: Any) -> None:
    """Broken and absurd bodies on every route that takes one."""
    client, rng, tried = make_client(FakeEngine(max_model_len=64, rule=says("ab"))), random.Random(1), 0
    for path in posts():
        whole = json.dumps(
            BODIES.get(path, {"model": "fake", "input": "x", "messages": CHAT["messages"]})
        ).encode()
        bodies = [b"", b"\x00", b"[]", b"null", b'"x"', b"{" * 5000, b"[" * 100_000, whole + b"x"]
        bodies += [
            whole.replace(b'"Hi"', value)
            for value in (b"{}", b"[[]]", b"1e999", b"-0", b"[null]", b'"\\ud800"')
        ]
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            bodies.append(bytes(damaged))
        for body in bodies:
            reply = client.post(path, content=body, headers={"content-type": "application/json"})
            assert "0x" not in reply.text and reply.status_code < 500, (path, body)
            tried += 1
    record_property("inputs", tried)


EMPTY: list[Any] = ["", [], [[]], ["", ""], [""]]


def test_22_cve_2024_8768_empty_prompts(client: TestClient) -> None:
    for prompt in EMPTY:
        assert post(client, "/v1/completions", prompt=prompt).status_code == 400, prompt
    for messages in ([], [{}], [{"role": "user"}], [{"role": "user", "content": None}]):
        assert post(client, "/v1/chat/completions", messages=messages).status_code in (200, 400)
    assert post(client, "/v1/chat/completions", messages=[{"role": "user", "content": ""}]).status_code == 200
    assert post(client, "/v1/completions", prompt=[EOS]).status_code == 200  # only a special token


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("/v1/completions", {"n": 129}),
        ("/v1/completions", {"n": 2**63}),
        ("/v1/completions", {"best_of": 2**31}),
        ("/v1/completions", {"logprobs": 21}),
        ("/v1/completions", {"prompt_logprobs": 21}),
        ("/v1/completions", {"prompt": ["x"] * 2049}),
        ("/v1/completions", {"prompt": ["x"] * 100, "n": 100}),
        ("/v1/completions", {"stop": ["x"] * 65}),
        ("/v1/completions", {"stop": "x" * 1025}),
        ("/v1/completions", {"stop_token_ids": [1] * 1025}),
        ("/v1/completions", {"logit_bias": {str(i): 1 for i in range(1025)}}),
        ("/v1/completions", {"bad_words": ["x"] * 129}),
        ("/v1/completions", {"allowed_token_ids": [1] * 131_073}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}),
        ("/v1/chat/completions", {"n": -1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * 16_385}),
        (
            "/v1/chat/completions",
            {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(257)]},
        ),
        ("/v1/completions", {"structured_outputs": {"choice": ["x"] * 4097}}),
        ("/v1/completions", {"structured_outputs": {"regex": "x" * 262_145}}),
    ],
    ids=str,
)
def test_23_cve_2026_34756_every_count_has_a_bound(
    client: TestClient, path: str, changes: dict[str, Any]
) -> None:
    reply = post(client, path, **changes)
    assert reply.status_code == 400, reply.text
    assert (reply.json()["error"]["param"] or "").split("[")[0].split(".")[0] in changes


def test_24_cve_2025_48956_a_huge_head_is_refused_early() -> None:
    with (
        live_server(FakeEngine()) as live,
        socket.create_connection(("127.0.0.1", live.port), 10) as connection,
    ):
        connection.settimeout(10)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ")
        sent = 0
        try:
            while sent < 64 << 20:  # it would take a gigabyte if it could
                sent += connection.send(b"y" * 65536)
        except OSError:
            pass
        assert sent < 16 << 20


def test_28_cve_2025_61620_templates_of_requests_are_refused(client: TestClient) -> None:
    loop = "{% for i in range(10**9) %}{{ i }}{% endfor %}"
    for changes in (
        {"chat_template": loop},
        *(
            {"chat_template_kwargs": {name: loop}}
            for name in ("chat_template", "tokenize", "messages", "tools")
        ),
        {"chat_template_kwargs": {"__class__": 1}},
        {"chat_template_kwargs": {"_budget": 1}},
        {"chat_template_kwargs": {"raise_exception": "x"}},
    ):
        reply = post(client, "/v1/chat/completions", **changes)
        assert reply.status_code == 400 and reply.json()["error"]["param"] in changes


def test_28_cve_2025_62426_a_template_has_a_budget() -> None:
    for source in (
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10 ** 9 }}",
    ):
        client = make_client(FakeEngine(), template=source)
        reply = post(client, "/v1/chat/completions")
        assert reply.status_code == 400 and "template" in reply.json()["error"]["message"]
        assert post(client, "/v1/completions").status_code == 200


BAD_IDS = [-1, -(2**31), VOCAB_SIZE, VOCAB_SIZE + 1, 2**31 - 1, 2**31, 2**40, 2**63, -(2**63)]


def id_fields(bad: int) -> list[tuple[str, dict[str, Any]]]:
    """Every field of every route that holds token ids."""
    return [
        ("/v1/completions", {"prompt": [1, bad]}),
        ("/v1/completions", {"prompt": [[1], [bad]]}),
        ("/v1/completions", {"stop_token_ids": [bad]}),
        ("/v1/completions", {"logit_bias": {str(bad): 1.0}}),
        ("/v1/completions", {"allowed_token_ids": [1, bad]}),
        ("/v1/chat/completions", {"stop_token_ids": [bad]}),
        ("/v1/chat/completions", {"logit_bias": {str(bad): 1.0}}),
        ("/v1/chat/completions", {"allowed_token_ids": [bad]}),
        ("/detokenize", {"tokens": [bad]}),
    ]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_30_cve_2026_93592_token_ids_outside_the_vocabulary(client: TestClient, bad: int) -> None:
    for path, changes in id_fields(bad):
        reply = post(client, path, **changes)
        assert reply.status_code == 400, (path, changes)
    assert post(client, "/v1/completions").status_code == 200


def test_31_every_field_of_a_generating_route_is_bounded(client: TestClient) -> None:
    """Numbers have both ends, lists and texts a longest length, in the document that clients read."""
    document = client.get("/openapi.json").json()
    free = {"prompt", "messages", "input", "content"}  # bounded by the size of the body and the context
    for path in (*GENERATES, "/tokenize", "/detokenize"):
        ref = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for name, schema in document["components"]["schemas"][ref.rsplit("/", 1)[1]]["properties"].items():
            for option in schema.get("anyOf", [schema]):
                kind = option.get("type")
                if kind in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & set(option) and "maximum" in option, (path, name)
                if kind in ("array", "string") and name not in free:
                    assert {"maxItems", "maxLength"} & set(option), (path, name)


def test_31_cache_salts_are_bounded(client: TestClient) -> None:
    assert post(client, "/v1/completions", cache_salt="x" * 257).status_code == 400
    assert post(client, "/v1/completions", cache_salt="").status_code == 400
    assert post(client, "/v1/completions", cache_salt="x" * 256).status_code == 200


def test_33_cve_2025_46570_a_key_has_a_prefix_cache_of_its_own() -> None:
    engine = FakeEngine(rule=says("ab"))
    entries = tuple(keys.KeyEntry(name=name, key=name) for name in ("one", "two"))
    client = make_client(engine, key_entries=entries)
    for name in ("one", "two", "one"):
        body = {**BODIES["/v1/completions"], "cache_salt": "same"}
        assert client.post("/v1/completions", json=body, headers={"x-api-key": name}).status_code == 200
    first, second, third = (request.cache_salt for request in engine.submitted)
    assert first == third != second and None not in (first, second)


def test_34_cve_2025_29770_what_requests_leave_behind_is_bounded() -> None:
    grammars = Grammars()
    for i in range(5 * MAX_KEPT):
        grammars.grammar(StructuredOutputsParams(regex=f"a{i}"))
    assert len(grammars._kept) == MAX_KEPT


def test_37_cve_2026_7304_no_code_in_requests(client: TestClient) -> None:
    for name in ("logits_processors", "custom_logit_processor", "custom_params", "extra_args"):
        for path in GENERATES:
            reply = post(client, path, **{name: "gASVAAAA"})
            assert reply.status_code == 400 and reply.json()["error"]["param"] == name


def test_38_cve_2026_15976_no_route_loads_weights() -> None:
    app = make_app(FakeEngine(), api_keys=("right",), admin_api_key="admin")
    admin = (b"authorization", b"Bearer admin")
    for path in ("/update_weights_from_disk", "/update_weights", "/v1/load_lora_adapter", "/collective_rpc"):
        assert ask(app, "POST", path, [JSON, admin])[0] == 404
    for route in route_table():
        if route.scope == "admin":
            assert ask(app, route.method, route.path, [JSON, KEY])[0] == 403
            assert ask(app, route.method, route.path, [JSON, admin])[0] == 200


def test_45_cve_2024_12886_compressed_bodies_are_not_unpacked(client: TestClient) -> None:
    bomb = gzip.compress(b"[" * (200 << 20), 9)
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    try:
        for path in posts():
            for encoding in ("gzip", "deflate", "br"):
                headers = {"content-type": "application/json", "content-encoding": encoding}
                assert client.post(path, content=bomb, headers=headers).status_code in (400, 415)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost@evil"]
)
def test_46_cve_2024_28224_a_rebound_name_is_not_served(host: str) -> None:
    options = ServerOptions()
    assert options.hosts() == ("localhost", "127.0.0.1", "[::1]")
    app = make_app(FakeEngine(rule=says("ab")), allowed_hosts=options.hosts())
    for method, path in routes():
        assert ask(app, method, path, [(b"host", host.encode()), JSON])[0] == 403, path
    assert ask(app, "GET", "/health", [])[0] == 403
    assert ask(app, "GET", "/health", [(b"host", b"localhost"), (b"host", b"evil.example")])[0] == 403
    for good in (b"localhost:8000", b"127.0.0.1", b"[::1]:8000", b"LOCALHOST"):
        assert ask(app, "GET", "/health", [(b"host", good)])[0] == 200


def test_46_cve_2025_63389_who_listens_further_chooses_so() -> None:
    assert ServerOptions().host == "127.0.0.1"
    assert ServerOptions(host="0.0.0.0").hosts() == () == ServerOptions(api_key=("k",)).hosts()
    assert ServerOptions(allowed_hosts=("a.example",)).hosts() == ("a.example",)
    assert ServerOptions(allowed_hosts=("*",)).hosts() == ()
    assert HostCheck(None, ("A.example",)).allows({"headers": [(b"host", b"a.EXAMPLE:1")]})  # type: ignore[arg-type]
    assert host_name("[::1]:80") == "[::1]" and host_name("x") == "x"


numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def _fuzz_numbers(client: TestClient, data: st.DataObject, fields: list[tuple[str, str]]) -> None:
    path, name = data.draw(st.sampled_from(fields))
    reply = post(client, path, **{name: data.draw(numbers)})
    assert reply.status_code in (200, 400), reply.text


def test_48_cve_2026_21869_any_number_in_any_field(client: TestClient, record_property: Any) -> None:
    document = client.get("/openapi.json").json()["components"]["schemas"]
    kinds = {"/v1/completions": "CompletionRequest", "/v1/chat/completions": "ChatCompletionRequest"}
    fields = [
        (path, name)
        for path, kind in kinds.items()
        for name, schema in document[kind]["properties"].items()
        if any(option.get("type") in ("integer", "number") for option in schema.get("anyOf", [schema]))
    ]
    assert len(fields) > 20
    _fuzz_numbers(client, fields=fields)
    record_property("inputs", 300)
    assert make_frontend(FakeEngine(), TEMPLATE) is not None

"""A small client for a running OpenAI-compatible server: list its models, stream one answer. Standard library only."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from octavo.errors import OctavoError, UsageError

CONNECT_TIMEOUT_S = 10.0
MAX_ERROR_BYTES = 1 << 16


class RemoteServer:
    """One server; ``url`` is with or without the trailing ``/v1``. ``UsageError`` when it is no http(s) address."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or not host:
            raise UsageError(f"--url {url!r} is not an http address.", "Write it like http://127.0.0.1:8000.")
        self.url = url
        self.host = host
        self.port = port or (443 if parts.scheme == "https" else 80)
        self.secure = parts.scheme == "https"
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def models(self) -> list[str]:
        """Names that the server serves."""
        with self._ask("GET", "/v1/models", None) as reply:
            try:
                return [str(entry["id"]) for entry in json.load(reply)["data"]]
            except (ValueError, LookupError, TypeError):
                raise OctavoError(f"{self.url} does not answer like an OpenAI server.") from None

    def stream(self, endpoint: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """POST with ``stream: true`` and yield every event; closing the iterator hangs up, which aborts the answer."""
        data = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._ask("POST", f"/v1/{endpoint}", data) as reply:
            for line in reply:
                payload = line.strip().removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or payload == b"[DONE]":
                    continue
                try:
                    event: dict[str, Any] = json.loads(payload)
                except ValueError:
                    raise OctavoError(f"{self.url} sent a broken stream.") from None
                if event.get("error"):
                    raise OctavoError(f"The server gave up: {_message(event)}")
                yield event

    @contextmanager
    def _ask(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_TIMEOUT_S)
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **self.headers}
        try:
            try:
                connection.connect()
                connection.sock.settimeout(None)  # an answer may take its time
                connection.request(method, self.prefix + path, data, headers)
                reply = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise OctavoError(f"Cannot reach {self.url}: {error}.", "Is the server running?") from None
            if reply.status != 200:
                raise OctavoError(f"{self.url} answered {reply.status}: {_error_text(reply)}")
            yield reply
        finally:
            connection.close()


def _error_text(reply: http.client.HTTPResponse) -> str:
    text = reply.read(MAX_ERROR_BYTES).decode("utf-8", "replace")
    try:
        return _message(json.loads(text))
    except ValueError:
        return text[:500] or reply.reason


def _message(event: Any) -> str:
    error = event.get("error", event) if isinstance(event, dict) else event
    return str(error.get("message", error) if isinstance(error, dict) else error)

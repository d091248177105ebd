"""A model hub on loopback: one repository, enough of the API for ``huggingface_hub.snapshot_download``."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the fake serves and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200  # of the repository itself
    error_code: str = ""
    served: list[str] = field(default_factory=list)
    sent_bytes: int = 0  # of files
    ranges: bool = True  # whether range requests are understood


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            name = path.rsplit(f"{COMMIT}/", 1)[-1]
            if hub.status != 200:
                self.reply(hub.status, b"", body)
            elif path == "/api/models/org/name/revision/main":
                siblings = [{"rfilename": n} for n in hub.files]
                self.json({"id": "org/name", "sha": COMMIT, "siblings": siblings}, body)
            elif path.startswith("/api/models/org/name/tree/"):
                files = hub.files.items()
                entries = [{"type": "file", "path": n, "size": len(c), "oid": oid(c)} for n, c in files]
                self.json(entries, body)
            elif name in hub.files:
                if body:
                    hub.served.append(name)
                self.file(hub.files[name], body)
            else:
                self.reply(404, b"", body, {"X-Error-Code": "RevisionNotFound"})

        def file(self, content: bytes, body: bool) -> None:
            headers = {"ETag": f'"{oid(content)}"'}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            status = 200
            if asked and hub.ranges:
                start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
                status, content = 206, content[start:stop]
            hub.sent_bytes += len(content) if body else 0
            self.reply(status, content, body, headers)

        def json(self, value: object, body: bool) -> None:
            self.reply(200, json.dumps(value).encode(), body, {"Content-Type": "application/json"})

        def reply(
            self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            code = {"X-Error-Code": hub.error_code} if hub.error_code else {}
            for name, value in {"X-Repo-Commit": COMMIT, **code, **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def fake_hub(**files: bytes) -> Iterator[Hub]:
    """Run a hub until the block ends; ``hub.url`` is its endpoint."""
    hub = Hub(files=dict(files))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

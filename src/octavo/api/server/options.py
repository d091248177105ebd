"""What the user chose for the HTTP server (``ServerOptions``, one flag a field) and what the app needs of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.config import option
from octavo.errors import UsageError

if TYPE_CHECKING:
    from octavo.api.openai.responses.store import StoreLimits
    from octavo.api.server.keys import KeyEntry

MAX_FRONTS = 64
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServerOptions:
    """Flags of ``octavo serve`` that concern HTTP alone; names are vLLM's where it has them."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
    port: int = option(8000, "TCP port; 0 picks a free one.")
    uds: str | None = option(None, "Unix socket path to listen on instead of host and port.")
    api_server_count: int | None = option(
        None,
        "Processes that share the port and the engine; each speaks HTTP, tokenizes and detokenizes (default: 1, more for "
        "small models on a GPU with many cores).",
        short="-asc",
    )
    api_key: tuple[str, ...] = option(
        (),
        "Key a client must send as a bearer token; repeat for several. Guards every route but /health and /ping.",
    )
    api_key_file: str | None = option(None, "File with one key a line (not visible in the process list).")
    api_keys_file: str | None = option(
        None, "TOML file of keys with names, weights, scopes, models and caps (see docs/operations.md)."
    )
    admin_api_key: str | None = option(
        None, "Key of the control routes (like /reset_prefix_cache), which are closed without one."
    )
    allowed_origins: tuple[str, ...] = option(
        (), "Origins whose web pages may call the server (CORS); '*' for all. None by default."
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Host names the server answers to, repeat for several; '*' for all (default: all, but on the loopback "
        "interface without keys only localhost and its addresses).",
    )
    root_path: str = option("", "Path prefix under which a proxy publishes the server.")
    ssl_keyfile: str | None = option(None, "Private key file; with --ssl-certfile turns TLS on.")
    ssl_certfile: str | None = option(None, "Certificate file.")
    ssl_ca_certs: str | None = option(None, "Certificates of the authorities that sign client certificates.")
    max_body_bytes: int = option(32 << 20, "Largest request body in bytes; beyond it clients get 413.")
    max_header_bytes: int = option(64 << 10, "Largest request head in bytes; beyond it clients get 431.")
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests get to finish after SIGTERM; 0 aborts them at once."
    )
    max_engine_restarts: int = option(
        0, "How often an engine that has died is started anew; then the server ends with status 1."
    )
    timeout_keep_alive: int = option(5, "Seconds an idle connection is kept open.")
    sse_heartbeat: float = option(
        15.0, "Seconds between comment lines on a stream that waits for its first token; 0 for none."
    )
    metrics_prefix: str = option(
        "octavo", "Prefix of the metric names; vllm fits existing dashboards.", ("octavo", "vllm")
    )
    trust_request_chat_template: bool = option(
        False, "Let requests bring a chat_template of their own (run in the sandbox, like the model's)."
    )
    ignore_unknown_fields: bool = option(
        False, "Ignore request fields that are not known instead of answering 400."
    )
    response_store_size: int = option(
        256, "Responses of /v1/responses that are kept in memory for each key; 0 keeps none."
    )
    response_store_mib: int = option(64, "Mebibytes that the kept responses of one key may take.")
    response_store_seconds: float = option(3600.0, "How long a response is kept.")
    enable_log_requests: bool = option(
        False, "Log a JSON line for every generation request: who, how much, how long; no text."
    )
    max_log_len: int = option(0, "Characters of the prompt that such a line may show.")
    otlp_traces_endpoint: str | None = option(
        None, "Send OpenTelemetry traces to this OTLP/HTTP address (needs the extra: octavo[otel])."
    )
    disable_uvicorn_access_log: bool = option(False, "Do not log a line for every request.")
    uvicorn_log_level: str = option(
        "info", "Log level of the HTTP server.", ("debug", "info", "warning", "error", "critical")
    )

    def check(self) -> None:
        """Raise ``UsageError`` where values contradict each other."""
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port must be between 0 and 65535, got {self.port}.")
        if self.api_server_count is not None and not 1 <= self.api_server_count <= MAX_FRONTS:
            raise UsageError(
                f"--api-server-count must be from 1 to {MAX_FRONTS}, got {self.api_server_count}."
            )
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise UsageError("TLS needs both --ssl-keyfile and --ssl-certfile.", "Give the other one too.")
        for flag, value in (
            ("--max-body-bytes", self.max_body_bytes),
            ("--max-header-bytes", self.max_header_bytes),
        ):
            if value < 1024:
                raise UsageError(f"{flag} must be at least 1024, got {value}.")
        for flag, seconds in (
            ("--shutdown-timeout", self.shutdown_timeout),
            ("--sse-heartbeat", self.sse_heartbeat),
            ("--response-store-seconds", self.response_store_seconds),
        ):
            if not 0 <= seconds < 1e6:
                raise UsageError(f"{flag} must be a number of seconds from 0 on, got {seconds}.")
        for flag, count in (
            ("--response-store-size", self.response_store_size),
            ("--response-store-mib", self.response_store_mib),
            ("--max-engine-restarts", self.max_engine_restarts),
        ):
            if not 0 <= count < 1 << 20:
                raise UsageError(f"{flag} must be from 0 to {(1 << 20) - 1}, got {count}.")
        if self.max_log_len < 0:
            raise UsageError(f"--max-log-len must be at least 0, got {self.max_log_len}.")
        if self.admin_api_key is not None and not self.admin_api_key.strip():
            raise UsageError("--admin-api-key is empty.", "Give a key of at least one character.")
        if self.root_path and not self.root_path.startswith("/"):
            raise UsageError(f"--root-path must begin with '/', got {self.root_path!r}.")

    def keys(self) -> tuple[str, ...]:
        """All keys, of the flags and of the file; ``UsageError`` for an empty one or an unreadable file."""
        keys = list(self.api_key)
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(
                    f"--api-key-file {self.api_key_file} cannot be read: {type(error).__name__}."
                ) from None
            found = [line.strip() for line in lines if line.strip()]
            if not found:
                # An empty file would silently leave the server open.
                raise UsageError(f"--api-key-file {self.api_key_file} holds no key.", "Put one key a line.")
            keys += found
        if any(not key.strip() for key in keys):
            raise UsageError("--api-key is empty.", "Give a key of at least one character.")
        return tuple(keys)

    def key_entries(self) -> tuple[KeyEntry, ...]:
        """The entries of the keys file."""
        if self.api_keys_file is None:
            return ()
        # Only now: flags must not load what the server stands on.
        found: tuple[KeyEntry, ...] = import_module("octavo.api.server.keys").read_keys(self.api_keys_file)
        return found

    def hosts(self) -> tuple[str, ...]:
        """Names the server answers to; empty for all."""
        if self.allowed_hosts:
            return () if "*" in self.allowed_hosts else self.allowed_hosts
        is_local = self.uds is None and self.host in (*LOOPBACK_NAMES, "::1")
        return LOOPBACK_NAMES if is_local and self.is_open else ()

    @property
    def is_open(self) -> bool:
        """Whether anybody may use the server."""
        return not self.keys() and self.api_keys_file is None


@dataclass(frozen=True)
class ServerSettings:
    """What ``build_app`` needs: decided values only.

    ``served_model_names``: the first is the one in replies, all are accepted. ``api_keys`` and ``key_entries``: both
    empty means open. ``allowed_hosts``: empty means any.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    key_entries: tuple[KeyEntry, ...] = ()
    admin_api_key: str | None = None
    enable_log_requests: bool = False
    max_log_len: int = 0
    otlp_traces_endpoint: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = ""
    max_body_bytes: int = 32 << 20
    sse_heartbeat_s: float = 15.0
    metrics_prefix: str = "octavo"
    ignore_unknown_fields: bool = False
    trust_request_chat_template: bool = False
    response_limits: StoreLimits = field(default_factory=lambda: store_limits())

    @classmethod
    def of(cls, options: ServerOptions, served_model_names: tuple[str, ...]) -> ServerSettings:
        """Take the parts of ``options`` that the app itself needs."""
        options.check()
        return cls(
            served_model_names=served_model_names,
            api_keys=options.keys(),
            key_entries=options.key_entries(),
            admin_api_key=options.admin_api_key,
            enable_log_requests=options.enable_log_requests,
            max_log_len=options.max_log_len,
            otlp_traces_endpoint=options.otlp_traces_endpoint,
            allowed_origins=options.allowed_origins,
            allowed_hosts=options.hosts(),
            root_path=options.root_path.rstrip("/"),
            max_body_bytes=options.max_body_bytes,
            sse_heartbeat_s=options.sse_heartbeat,
            metrics_prefix=options.metrics_prefix,
            ignore_unknown_fields=options.ignore_unknown_fields,
            trust_request_chat_template=options.trust_request_chat_template,
            response_limits=store_limits(
                options.response_store_size,
                options.response_store_mib << 20,
                options.response_store_seconds,
            ),
        )


def store_limits(*limits: float) -> StoreLimits:
    """Bounds of the store of responses; its own defaults where none are given."""
    found: StoreLimits = import_module("octavo.api.openai.responses.store").StoreLimits(*limits)
    return found

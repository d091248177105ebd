"""The one error formatter (rule R5): every failure of every route becomes a reply here, in its dialect's form."""

from __future__ import annotations

import logging
import re
import uuid
from dataclasses import dataclass, field

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from octavo.errors import EngineDeadError, OctavoError, QueueFullError, RequestError

log = logging.getLogger("octavo.server")


class ErrorBody(msgspec.Struct):
    """The inner object of an error reply."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """An error reply as OpenAI shapes it."""

    error: ErrorBody


class AnthropicErrorBody(msgspec.Struct):
    """The inner object of an error reply of ``/v1/messages``."""

    type: str
    message: str


class AnthropicError(msgspec.Struct):
    """An error reply as Anthropic shapes it."""

    error: AnthropicErrorBody
    type: str = "error"


class OllamaError(msgspec.Struct):
    """An error reply as Ollama shapes it."""

    error: str


class AuthenticationError(RequestError):
    """No key, or one that is not ours (HTTP 401)."""

    status = 401


class ForbiddenError(RequestError):
    """The key is right, but does not allow this (HTTP 403)."""

    status = 403


class PayloadTooLargeError(RequestError):
    """The body is over the limit (HTTP 413)."""

    status = 413


class MediaTypeError(RequestError):
    """The body is not declared as JSON (HTTP 415)."""

    status = 415


class ShuttingDownError(OctavoError):
    """The server ends and does not wait for this request any longer (HTTP 503)."""


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


@dataclass(frozen=True)
class ErrorReply:
    """Status, body and extra headers of an error."""

    status: int
    body: ErrorBody
    headers: dict[str, str] = field(default_factory=dict)

    def encode(self, dialect: str = "openai") -> bytes:
        """The body as JSON, as ``dialect`` shapes it."""
        if dialect == "anthropic":
            kind = ANTHROPIC_KINDS.get(self.status, "api_error")
            return msgspec.json.encode(AnthropicError(AnthropicErrorBody(kind, self.body.message)))
        if dialect == "ollama":
            return msgspec.json.encode(OllamaError(self.body.message))
        return msgspec.json.encode(ErrorResponse(self.body))

    def response(self, dialect: str = "openai") -> Response:
        """The reply as an ASGI response."""
        return Response(self.encode(dialect), self.status, self.headers, media_type="application/json")


CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "payload_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
}
ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{6,}")
JSON_PATH = re.compile(r" - at `(?:key` in `)?\$([^`]*)`$")
UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")


def dialect_of(path: str) -> str:
    """Whose form the errors of a path have: "anthropic", "ollama", or "openai" for all the rest."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    return "ollama" if path.startswith("/api/") else "openai"


def error_reply(error: BaseException) -> ErrorReply:
    """What to answer for ``error``; unexpected ones are logged under an id and answered without details."""
    if isinstance(error, msgspec.ValidationError):
        error = validation_error(error)
    if isinstance(error, RequestError):
        code = getattr(error, "code", None) or CODES.get(error.status)
        kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
        headers = {}
        if isinstance(error, QueueFullError):
            headers["retry-after"] = str(error.retry_after_s)
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return ErrorReply(error.status, ErrorBody(_clean(str(error)), kind, error.param, code), headers)
    if isinstance(error, HTTPException):  # the router's own: no such path, wrong method
        messages = {404: "There is no such path.", 405: "The path exists, but not with this method."}
        message = messages.get(error.status_code, "The request cannot be served.")
        return ErrorReply(
            error.status_code,
            ErrorBody(message, "invalid_request_error", None, CODES.get(error.status_code)),
            dict(error.headers or {}),
        )
    if isinstance(error, EngineDeadError):
        body = ErrorBody(_clean(str(error)), "service_unavailable_error", None, "engine_dead")
        return ErrorReply(503, body)
    if isinstance(error, ShuttingDownError):
        return ErrorReply(503, ErrorBody(str(error), "service_unavailable_error", None, "shutting_down"))
    number = uuid.uuid4().hex[:12]
    if isinstance(error, OctavoError):
        log.error("request failed [%s]: %s", number, error)
    else:
        log.error("request failed [%s]", number, exc_info=error)
    message = f"The server failed to serve the request; its log has the details under {number}."
    return ErrorReply(500, ErrorBody(message, "server_error", None, "internal_error"))


def validation_error(error: msgspec.ValidationError, prefix: str = "") -> RequestError:
    """A ``RequestError`` that names the field; ``prefix`` is where the decoded value stands in the body."""
    text = str(error)
    match = JSON_PATH.search(text)
    path = prefix + (match[1] if match else "")
    path = path.lstrip(".").replace("[...]", "")
    text = JSON_PATH.sub("", text)
    unknown = UNKNOWN_FIELD.search(text)
    if unknown:
        path = f"{path}.{unknown[1]}" if path else unknown[1]
        return RequestError(f"Unknown field: {path}.", param=path)
    missing = re.search(r"missing required field `([^`]*)`", text)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"Missing required field: {path}.", param=path)
    return RequestError(f"{path}: {text}." if path else f"{text}.", param=path or None)


def _clean(message: str) -> str:
    """The message without memory addresses, which would tell an attacker how the process is laid out."""
    return ADDRESS.sub("(address)", message)

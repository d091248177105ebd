"""Request bodies: read with a limit, decoded straight into typed structs, with an error that names the field."""

from __future__ import annotations

import difflib
import re
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import Request

from octavo.api.server.errors import ClientGoneError, MediaTypeError, PayloadTooLargeError, validation_error
from octavo.errors import RequestError

T = TypeVar("T", bound=msgspec.Struct)
LITERAL = re.compile(rb'"([A-Za-z_][A-Za-z0-9_]*)"\s*:\s*(-?(?:NaN|Infinity|inf|nan))')
POSITION = re.compile(r"\(byte (\d+)\)")


class BodyDecoder(Generic[T]):
    """Decodes one route's request type; with ``ignore_unknown`` unknown top-level fields are dropped."""

    def __init__(self, kind: type[T], *, ignore_unknown: bool) -> None:
        self.kind = kind
        # A subclass without fields of its own differs from the strict type in that one setting only.
        self.decoded = (
            msgspec.defstruct(kind.__name__, [], bases=(kind,), kw_only=True, forbid_unknown_fields=False)
            if ignore_unknown
            else kind
        )
        self.decoder = msgspec.json.Decoder(self.decoded)

    def decode(self, body: bytes) -> T:
        """The typed body; ``RequestError`` for malformed JSON, wrong types, bounds and unknown fields."""
        try:
            decoded: Any = self.decoder.decode(body)
            return decoded  # type: ignore[no-any-return]
        except msgspec.ValidationError as error:
            raise self._with_hint(validation_error(error)) from None
        except msgspec.DecodeError as error:
            raise _malformed(body, str(error)) from None
        except UnicodeDecodeError:
            raise RequestError("The body is not valid UTF-8.", cure="Send JSON encoded as UTF-8.") from None
        except RecursionError:
            raise RequestError("The body is nested too deeply.") from None

    def _with_hint(self, error: RequestError) -> RequestError:
        if not error.cause.startswith("Unknown field") or error.param is None:
            return error
        near = difflib.get_close_matches(error.param, self.kind.__struct_fields__, n=1)
        if near:
            return RequestError(error.cause, error.param, f"Did you mean {near[0]}?")
        return RequestError(
            error.cause, error.param, "Remove it, or start the server with --ignore-unknown-fields."
        )


def _malformed(body: bytes, message: str) -> RequestError:
    """The error for broken JSON; names the field where the cause is Python's NaN or Infinity."""
    if not body.strip():
        return RequestError("The body is empty; a JSON object is expected.")
    position = POSITION.search(message)
    if position:
        # Python's json module writes NaN and Infinity, which are not JSON: the commonest "malformed" body.
        at = int(position[1])
        for match in LITERAL.finditer(body, max(0, at - 256), at + 16):
            if match.start(2) <= at <= match.end(2):
                name = match[1].decode()
                return RequestError(f"{name} must be a finite number, got {match[2].decode()}.", param=name)
    return RequestError(f"The body is not valid JSON: {message}.")


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most ``limit`` bytes (``PayloadTooLargeError``: raised before reading where declared)."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large(limit)
    chunks, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def check_media_type(request: Request) -> None:
    """``MediaTypeError`` unless the body is declared as JSON.

    A web page of another origin can post a form or plain text without asking the server first, but not JSON:
    the check keeps such pages out of servers on localhost.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise MediaTypeError(
            f"The content type is {kind or 'missing'}.",
            cure="Send the header Content-Type: application/json.",
        )


def too_large(limit: int) -> PayloadTooLargeError:
    """The error for a body over ``limit`` bytes."""
    return PayloadTooLargeError(
        f"The body is larger than {limit} bytes.", cure="Send less, or raise --max-body-bytes."
    )

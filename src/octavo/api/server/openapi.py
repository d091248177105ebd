"""The OpenAPI 3.1 document, made from the route table and the structs: it cannot disagree with what is served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from octavo.api.openai.schema import SamplingFields, not_yet
from octavo.api.server.errors import ErrorResponse
from octavo.api.server.route import Route

REF = "#/components/schemas/{name}"


def document(routes: Sequence[Route], *, version: str, root_path: str, secured: bool) -> dict[str, Any]:
    """The document as plain data; ``secured`` says that routes want a bearer token."""
    types: list[Any] = [ErrorResponse]
    for route in routes:
        types += [kind for kind in (route.body, route.reply, route.chunk) if kind is not None]
    unique = tuple(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(unique, ref_template=REF)
    by_type = dict(zip(unique, schemas))
    for kind in unique:
        if issubclass(kind, SamplingFields):
            for name in not_yet(kind):  # accepted with neutral values only: not part of what is offered
                components[kind.__name__]["properties"].pop(name, None)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = re.sub(r"\{(\w+)(?::\w+)?\}", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, by_type, secured)
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": version},
        "paths": paths,
        "components": {"schemas": components},
    }
    if root_path:
        made["servers"] = [{"url": root_path}]
    if secured:
        made["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return made


def _operation(route: Route, path: str, by_type: dict[Any, Any], secured: bool) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{route.method.lower()}{path}").strip("_")
    operation: dict[str, Any] = {"summary": route.summary, "operationId": name}
    parameters = re.findall(r"\{(\w+)\}", path)
    if parameters:
        operation["parameters"] = [
            {"name": p, "in": "path", "required": True, "schema": {"type": "string"}} for p in parameters
        ]
    if route.body is not None:
        content = {"application/json": {"schema": by_type[route.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    content = {}
    if route.reply is not None:
        content["application/json"] = {"schema": by_type[route.reply]}
    elif route.reply_media_type != "application/json":
        content[route.reply_media_type] = {"schema": {"type": "string"}}
    if route.chunk is not None:
        events = f"A stream of events, each a {route.chunk.__name__}."
        content[route.stream_media_type] = {"schema": {"type": "string", "description": events}}
    ok: dict[str, Any] = {"description": route.summary}
    if content:
        ok["content"] = content
    error = {"content": {"application/json": {"schema": by_type[ErrorResponse]}}}
    operation["responses"] = {
        "200": ok,
        "4XX": {"description": "The request is not acceptable; the body names the field.", **error},
        "5XX": {"description": "The server failed; 503 once the engine has stopped.", **error},
    }
    if secured and path not in ("/health", "/ping"):
        operation["security"] = [{"bearer": []}]
    return operation

"""Routes of the Responses API: each knows whose responses it may touch."""

from __future__ import annotations

from starlette.requests import Request

from octavo.api.openai.responses import schema
from octavo.api.openai.responses.respond import Responses
from octavo.api.server.auth import owner_of
from octavo.api.server.route import Reply, Route, Service


def _responses(service: Service) -> Responses:
    """As the caller of this request may use them."""
    return Responses(service.context, service.shared.keeper)


async def _create(service: Service, request: Request, body: schema.ResponsesRequest) -> Reply:
    return await _responses(service).create(owner_of(request.scope), body)


async def _count(service: Service, request: Request, body: schema.InputTokensRequest) -> Reply:
    return await _responses(service).count(owner_of(request.scope), body)


async def _get(service: Service, request: Request, body: None) -> Reply:
    return await _responses(service).get(owner_of(request.scope), request.path_params["response_id"])


async def _cancel(service: Service, request: Request, body: None) -> Reply:
    return await _responses(service).cancel(owner_of(request.scope), request.path_params["response_id"])


async def _delete(service: Service, request: Request, body: None) -> Reply:
    return await _responses(service).delete(owner_of(request.scope), request.path_params["response_id"])


async def _items(service: Service, request: Request, body: None) -> Reply:
    owner, response_id = owner_of(request.scope), request.path_params["response_id"]
    return await _responses(service).list_input(owner, response_id, request.query_params)


def response_routes() -> tuple[Route, ...]:
    """All of them."""
    one = "/v1/responses/{response_id}"
    return (
        Route(
            "POST",
            "/v1/responses",
            _create,
            "Answer items with items.",
            schema.ResponsesRequest,
            schema.Response,
            schema.Event,
        ),
        Route(
            "POST",
            "/v1/responses/input_tokens",
            _count,
            "Tokens of such a request.",
            schema.InputTokensRequest,
            schema.InputTokens,
        ),
        Route("GET", one, _get, "A kept response.", reply=schema.Response),
        Route("DELETE", one, _delete, "Forget a response.", reply=schema.Deleted),
        Route("POST", f"{one}/cancel", _cancel, "End a background response.", reply=schema.Response),
        Route("GET", f"{one}/input_items", _items, "Items of its request.", reply=schema.ItemList),
    )

"""The HTTP interface: OpenAI's chat completions and models, health, and metrics."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from finetune.errors import RequestError, brief
from finetune.server.answers import AnswerStream, whole
from finetune.server.errors import response_of, to_request_error
from finetune.server.exchange import CLIENT_GONE, admit
from finetune.server.keys import Keys
from finetune.server.middleware import Middleware
from finetune.server.openapi import BODY, EVENTS, describe, errors
from finetune.server.schema import ChatCompletion, Health, Model, ModelList

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from finetune.server.exchange import Exchange
    from finetune.server.service import Service

T = TypeVar("T")


def make_app(service: Service) -> FastAPI:
    """Return the application of one server.

    Args:
        service: the service that answers.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(title="finetune serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Middleware, keys=Keys(service.settings.api_keys), max_body_bytes=service.settings.max_body_bytes)
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)

    _add_chat(app, service)
    _add_models(app, service)
    _add_state(app, service)
    describe(app)
    return app


def _add_chat(app: FastAPI, service: Service) -> None:
    """Add the route of chat completions."""

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: EVENTS, **errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)},
        openapi_extra={"requestBody": BODY},
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a question or go on with a conversation, by the adapter that ``model`` names."""
        exchange = admit(service, request.state.client)
        status = CLIENT_GONE
        try:
            response = await _answer(service, exchange, request)
            status = response.status_code
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)  # no client reads it
        except Exception as error:
            refusal = to_request_error(error)
            status = refusal.status
            raise refusal from None
        finally:
            if status != 200:
                exchange.close(status)
        if not isinstance(response, AnswerStream):  # a stream closes the exchange at its end
            exchange.close(status)
        return response


def _add_models(app: FastAPI, service: Service) -> None:
    """Add the routes that list the models."""

    @app.get("/v1/models", responses=errors(401, 403, 500, 503))
    async def list_models() -> ModelList:
        """List the models that may be asked."""
        return ModelList(data=await service.catalog.models())

    @app.get("/v1/models/{model:path}", responses=errors(401, 403, 404, 500, 503))
    async def retrieve_model(model: str) -> Model:
        """Return one of the listed models, or any other that may be asked and is there."""
        name = service.catalog.name_of(model)
        if name is not None:
            await service.catalog.ready(name)
        listed = {one.id: one for one in await service.catalog.models()}
        found = listed.get(name or model)
        return Model(id=model, created=found.created if found else 0, owned_by=model.partition("/")[0])


def _add_state(app: FastAPI, service: Service) -> None:
    """Add the routes that show the state of the server."""

    @app.get("/health")
    async def health() -> Health:
        """Return ok while the process runs."""
        return Health()

    @app.get("/ready", responses=errors(503))
    async def ready() -> Health:
        """Return ok while requests are taken."""
        service.require_ready()
        return Health()

    @app.get("/metrics", responses=errors(401, 403), response_class=Response)
    async def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answer(service: Service, exchange: Exchange, request: Request) -> Response:
    """Return the answer to a request, or a stream whose first piece is known."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type must be application/json, got {brief(kind)}. Send the body as JSON."
        raise RequestError(message, status=415, code="unsupported_media_type")
    body = await exchange.body(request.body())

    async def begin() -> Response:
        await exchange.read(body)
        await exchange.begun()
        pieces = exchange.pieces()
        loaded = exchange.loaded
        fingerprint = f"fp_{(loaded.digest if loaded else service.vlm.base.identity.digest)[:16]}"
        if exchange.request.stream:
            return AnswerStream(exchange, await anext(pieces), pieces, fingerprint)
        return JSONResponse((await whole(exchange, fingerprint)).model_dump())

    return await _unless_gone(request, exchange.in_time(begin()))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: the client went away.
    """

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return response_of(error)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Answer a request for a path that does not exist, or with a method that the path does not allow."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    refusal = RequestError(
        f"This server has no route {brief(what)}. GET /openapi.json lists its routes."
        if error.status_code == 404
        else f"{brief(what)}: {error.detail}. GET /openapi.json lists the allowed methods.",
        status=error.status_code,
        code="unknown_url" if error.status_code == 404 else "method_not_allowed",
    )
    return response_of(refusal, dict(error.headers or {}))

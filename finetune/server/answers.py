"""The response with an answer, sent at once or as a stream."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from finetune.errors import RequestError
from finetune.server.errors import body_of, release_frames
from finetune.server.exchange import CLIENT_GONE
from finetune.server.schema import (
    Answered,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from finetune.server.exchange import Exchange
    from finetune.tasks.generation import Answer


async def whole(exchange: Exchange, fingerprint: str) -> ChatCompletion:
    """Return the answer, when it is complete.

    Raises:
        RequestError: the model could not finish the answer.
    """
    text = ""
    async for piece in exchange.pieces():
        if isinstance(piece, str):
            text += piece
            continue
        return ChatCompletion(
            id=exchange.id,
            created=exchange.created,
            model=exchange.request.model,
            system_fingerprint=fingerprint,
            choices=[Choice(message=Answered(content=text), finish_reason=piece.finish_reason)],
            usage=_usage(piece),
        )
    raise AssertionError("the last piece of an answer must be an Answer")


class AnswerStream(StreamingResponse):
    """An answer as server-sent events, each a ``ChatCompletionChunk``, the last one ``[DONE]``.

    It closes its exchange when it ends, also if the client went away first.

    Args:
        exchange: the exchange of the request.
        first: the first of the exchange's pieces, which came before the status was sent.
        pieces: the pieces that follow.
        fingerprint: the fingerprint of the adapter or base that answers.
    """

    def __init__(self, exchange: Exchange, first: str | Answer, pieces: AsyncIterator[str | Answer], fingerprint: str):
        self._exchange, self._first, self._pieces, self._fingerprint = exchange, first, pieces, fingerprint
        self._status = CLIENT_GONE
        options = exchange.request.stream_options
        self._includes_usage = bool(options and options.include_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy passes each event on at once
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:  # not an error of the server: the metrics count it by its status
            return
        finally:
            self._exchange.close(self._status)

    async def _events(self) -> AsyncIterator[str]:
        yield self._event(Delta(role="assistant", content=""))
        piece = self._first
        try:
            while isinstance(piece, str):
                yield self._event(Delta(content=piece))
                piece = await self._exchange.in_time(anext(self._pieces))
        except RequestError as error:  # the status is sent already
            self._status = error.status
            yield _data(body_of(error).model_dump())
            release_frames(error)
            return
        yield self._event(Delta(), finish_reason=piece.finish_reason)
        if self._includes_usage:
            yield self._chunk([], _usage(piece))
        self._status = 200
        yield "data: [DONE]\n\n"

    def _event(self, delta: Delta, **more: Any) -> str:
        return self._chunk([ChunkChoice(delta=delta, **more)], None)

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> str:
        chunk = ChatCompletionChunk(
            id=self._exchange.id,
            created=self._exchange.created,
            model=self._exchange.request.model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=usage,
        )
        body = chunk.model_dump()
        for choice in body["choices"]:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        if not self._includes_usage:
            del body["usage"]
        return _data(body)


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _usage(answer: Answer) -> Usage:
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        total_tokens=answer.prompt_tokens + answer.completion_tokens,
    )

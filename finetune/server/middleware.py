"""The middleware that every request passes first: it checks the API key and the size, and turns errors into answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import RequestError
from finetune.server.errors import release_frames, response_of, to_request_error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from finetune.server.keys import Keys

OPEN = ("/health", "/ready", "/openapi.json")  # for any client: they show nothing about adapters


class Middleware:
    """An ASGI middleware that lets requests with a known key and a body of bounded size through to ``app``.

    Args:
        app: the application that answers them.
        keys: the API keys.
        max_body_bytes: the limit, in bytes, for the body of a request.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, max_body_bytes: int):
        self._app, self._keys, self._max_body_bytes = app, keys, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or send its error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            headers = dict(scope["headers"])
            client = (scope.get("client") or ("",))[0]
            if scope["path"] not in OPEN:
                host = headers.get(b"host", b"").decode("latin-1")
                client = self._keys.check(headers.get(b"authorization"), host=host) or client
            scope.setdefault("state", {})["client"] = client
            await self._app(scope, self._counted(headers, receive), note)
        except Exception as error:
            refusal = to_request_error(error)
            if begun:
                raise
            await response_of(refusal)(scope, receive, send)
            release_frames(refusal, error)

    def _counted(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Return a ``receive`` that refuses a body above the limit."""
        announced = headers.get(b"content-length", b"")
        self._refuse(int(announced) if announced.isdigit() else 0)
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            self._refuse(size)
            return message

        return counted

    def _refuse(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise RequestError(
                f"The body of a request may have at most {self._max_body_bytes} bytes, got at least {size}. Make its "
                "images smaller.",
                status=413,
                code="request_too_large",
            )

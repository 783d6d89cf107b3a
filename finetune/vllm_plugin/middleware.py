"""The ASGI middleware before vLLM's routes, which replaces references by digests. Imports nothing of vLLM."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

from finetune.adapters.reference import AdapterRef
from finetune.core.outside_text import safe_line
from finetune.errors import AdapterReferenceError, FinetuneError, NotFoundError, StoreError, YankedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from finetune.vllm_plugin.served import ServedAdapters

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger(f"vllm.{__name__}")

# Routes that VLLM_ALLOW_RUNTIME_LORA_UPDATING opens, the last of them without an API key. Each loads any folder that
# the server can read, without a check.
CLOSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")


class PinnedModels:
    """An ASGI middleware that replaces a reference in a request's ``model`` by one with its present digest.

    vLLM never resolves a name twice. A name with a digest never changes its meaning, and each request names the version
    that answers it. So does the answer's ``model``.

    Args:
        app: the application that handles the request next.
        served: the function that returns the adapters of the registry; None before the server has started.
    """

    def __init__(self, app: App, *, served: Callable[[], ServedAdapters | None]):
        self.app, self._served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
            if any(path == closed or path.startswith(f"{closed}/") for closed in CLOSED):
                return await _answer(
                    send, 403, "This server loads adapters from its registry only. Publish the adapter there."
                )
            if scope["method"] == "POST" and _is_json(scope):
                return await self._pin(scope, receive, send)
        await self.app(scope, receive, send)

    async def _pin(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        if body is None:  # the client has gone
            return
        request = _parsed(body)
        ref, served = _reference(request, scope), self._served()
        if ref is not None and served is not None:
            try:
                request["model"] = await asyncio.to_thread(served.pinned, ref)
            except FinetuneError as error:
                _log.warning("%s is not served: %s", ref, safe_line(str(error)))
                return await _answer(send, *_refusal(ref, error))
            body = json.dumps(request).encode()
            headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        await self.app(scope, _replay(body, receive), send)


def _reference(request: Any, scope: Scope) -> str | None:
    """Return the adapter in a request's ``model``; None for the base, or if it is not a reference."""
    model = request.get("model") if isinstance(request, dict) else None
    models = getattr(scope["app"].state, "openai_serving_models", None)
    # The name of the base may look like a reference, such as google/gemma-3-4b-it.
    if not isinstance(model, str) or models is None or models.is_base_model(model):
        return None
    try:
        ref = AdapterRef.parse(model)
    except AdapterReferenceError:
        return None  # vLLM answers with its error for unknown names
    # A name of --lora-modules may look like one too. An adapter of the registry has a name with a digest.
    return None if ref.digest is None and model in models.lora_requests else str(ref)


def _refusal(ref: str, error: FinetuneError) -> tuple[int, str]:
    """Return the status and the message for the client, without other names or paths of the server."""
    if isinstance(error, NotFoundError | YankedError):
        return 404, f"The model `{ref}` does not exist in the registry, or is yanked. Check its name."
    if isinstance(error, StoreError):
        return 503, f"The server cannot look up the model `{ref}` now. Try again later."
    return 400, f"The server refuses the model `{ref}`. The reason is in the server's log."


def _is_json(scope: Scope) -> bool:
    kind = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"")
    return kind.partition(b";")[0].strip().lower() == b"application/json"


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None  # vLLM answers with its own error


async def _body(receive: Receive) -> bytes | None:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` once, and then the rest, because vLLM waits there for a disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, status: int, message: str) -> None:
    """Answer in the form of vLLM's own errors, which is OpenAI's."""
    kinds = {400: "BadRequestError", 403: "ForbiddenError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
    error = {"message": message, "type": kinds[status], "param": "model", "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

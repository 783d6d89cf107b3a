"""The exchange of one request: the server reads and prepares it, answers it in a batch, and ends it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

from finetune.errors import RequestError
from finetune.server.errors import stopping, to_request_error
from finetune.server.lease import Lease
from finetune.server.preparation import prepare
from finetune.server.request_body import parse_request
from finetune.server.request_images import fetch_images
from finetune.server.scheduler import Done, Failed, Grown, Started

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import AsyncIterator, Awaitable

    from finetune.server.scheduler import Event, Job
    from finetune.server.schema import ChatRequest
    from finetune.server.service import Service
    from finetune.serving.loaded_adapter import LoadedAdapter
    from finetune.tasks.generation import Answer

T = TypeVar("T")
CLIENT_GONE = 499  # a status for metrics alone, as no client gets it


def admit(service: Service, client: str) -> Exchange:
    """Admit a new request and return its exchange; the caller must close it.

    Args:
        service: the service that answers it.
        client: the client that asks.

    Raises:
        RequestError: too many requests wait, of this client or of all, or the server is stopping.
    """
    service.require_room(client)
    exchange = Exchange(service, client)
    service.open.add(exchange)
    return exchange


class Exchange:
    """One request, from its admission to its end, and the resources that it takes.

    Attributes:
        id: the id of the answer.
        created: the time of its admission, in seconds since 1970.
        request: the request, once ``read`` has parsed it.
        loaded: the adapter that answers, once it is pinned; None for the plain base.
    """

    request: ChatRequest

    def __init__(self, service: Service, client: str):
        self.id, self.created = f"chatcmpl-{uuid4().hex}", int(time.time())
        self.loaded: LoadedAdapter | None = None
        self._service, self._client, self._arrived = service, client, next(service.arrivals)
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._lease = Lease()
        self._job: Job | None = None
        self._label = service.metrics.label(None)
        self._waits, self._closed, self._is_cut = True, False, False
        self._timeout: asyncio.Timeout | None = None  # of the step that runs now
        service.waiting[client] += 1

    async def in_time(self, work: Awaitable[T]) -> T:
        """Return the result of ``work``; cancel it when the time of the request is over.

        Raises:
            RequestError: the time is over, or the server stops.
        """
        seconds = self._service.settings.request_seconds
        try:
            async with asyncio.timeout_at(0 if self._is_cut else self._begun + seconds) as self._timeout:
                return await work
        except TimeoutError:
            if self._is_cut:
                raise stopping() from None
            raise RequestError(
                f"The request must end within {seconds:g} seconds. Lower max_completion_tokens, or try again later.",
                status=504,
                code="timeout",
            ) from None
        finally:
            self._timeout = None

    def cut(self) -> None:
        """End the time of the request now."""
        self._is_cut = True
        if self._timeout is not None:
            self._timeout.reschedule(self._loop.time())

    async def body(self, work: Awaitable[bytes]) -> bytes:
        """Return the body of the request that ``work`` reads.

        Raises:
            RequestError: the body did not arrive in time, or the server stops.
        """
        seconds = self._service.settings.body_seconds
        try:
            async with asyncio.timeout_at(self._begun + seconds):
                return await self.in_time(work)
        except TimeoutError:
            raise RequestError(
                f"The body of the request did not arrive within {seconds:g} seconds. Send it again.",
                status=408,
                code="body_timeout",
            ) from None

    async def read(self, body: bytes) -> None:
        """Parse and prepare the request, find its adapter, and queue its job.

        Raises:
            RequestError: the request is not valid, or its adapter cannot be used.
        """
        service = self._service
        self.request = await service.reading.run(self._client, lambda: parse_request(body, service.settings))
        name = service.catalog.name_of(self.request.model)
        if name is not None:
            await service.catalog.ready(name)
        self._label = service.metrics.label(name or self.request.model)
        fetched: dict[str, bytes] = {}
        if service.settings.allow_urls:  # other hosts may take long
            fetched = await service.fetching.run(
                self._client, lambda: fetch_images(self.request, service.settings, is_over=lambda: self._closed)
            )
        self._job = await service.preparing.run(self._client, lambda: self._prepare(name, fetched))
        service.prepared_bytes[self._client] += self._job.num_bytes
        service.scheduler.submit(self._job)

    async def begun(self) -> None:
        """Wait until the request is in a batch.

        Raises:
            RequestError: the batch did not begin in time.
        """
        seconds = self._service.settings.queue_seconds
        try:
            async with asyncio.timeout_at(self._begun + seconds):
                event = await self._events.get()
        except TimeoutError:
            raise RequestError(
                f"The request waited more than {seconds:g} seconds for a batch. Try again in 5 seconds.",
                status=503,
                code="queue_timeout",
                retry_after=5,
            ) from None
        assert isinstance(event, Started)
        self._leave_queue()
        self._service.metrics.queue_seconds.observe(self._loop.time() - self._begun)

    async def pieces(self) -> AsyncIterator[str | Answer]:
        """Yield the pieces of the answer, and last the answer itself.

        Raises:
            RequestError: the model could not finish the answer.
        """
        while True:
            match await self._events.get():
                case Grown(piece):
                    yield piece
                case Done(answer):
                    yield answer
                    return
                case Failed(error):
                    raise to_request_error(error)

    def close(self, status: int) -> None:
        """End the request at any step; only the first call counts.

        Args:
            status: the HTTP status of its response.
        """
        if self._closed:
            return
        self._closed = True
        self._service.open.discard(self)
        self._leave_queue()
        if self._job is not None:
            self._service.scheduler.withdraw(self._job)
            self._job = None  # it holds this exchange, and the inputs
        self._lease.close()
        metrics = self._service.metrics
        metrics.requests.labels(self._label, str(status)).inc()
        metrics.seconds.labels(self._label).observe(self._loop.time() - self._begun)
        metrics.cancelled.inc(status == CLIENT_GONE)

    def _leave_queue(self) -> None:
        if not self._waits:
            return
        self._waits = False
        service = self._service
        _take(service.waiting, self._client, 1)
        if self._job is not None:
            _take(service.prepared_bytes, self._client, self._job.num_bytes)
            service.preparing.go_on()

    def _prepare(self, name: str | None, fetched: dict[str, bytes]) -> Job:
        """Return the job, and pin its adapter until the end of the exchange."""
        service = self._service
        self.loaded = self._lease.take(service.vlm.switcher, name)
        return prepare(
            self.request,
            self.loaded,
            switcher=service.vlm.switcher,
            settings=service.settings,
            fetched=fetched,
            collators=service.collators,
            workers=service.workers,
            client=self._client,
            arrived=self._arrived,
            label=self._label,
            is_over=lambda: self._closed,
            on_event=self._send,
        )

    def _send(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def _take(counter: Counter[str], client: str, count: int) -> None:
    """Subtract from a counter, and remove a client whose count is zero."""
    counter[client] -= count
    if not counter[client]:
        del counter[client]

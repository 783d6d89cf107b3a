"""The life of a request: it is let in, read, prepared, answered in a batch, and ended."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import count
from math import ceil
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

from pydantic import ValidationError

from finetune.data.image_workers import DECODE_SECONDS, ImageWorkers
from finetune.errors import RequestError
from finetune.server.catalog import Catalog
from finetune.server.errors import invalid_request, to_request_error
from finetune.server.lease import Lease
from finetune.server.metrics import Metrics
from finetune.server.preparation import Collators, prepare
from finetune.server.request_images import fetch_images
from finetune.server.scheduler import Done, Failed, Grown, Job, Scheduler, Started
from finetune.server.schema import ChatRequest
from finetune.server.turns import Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Sequence

    from finetune.server.scheduler import Event
    from finetune.server.settings import Settings
    from finetune.serving.loaded_adapter import LoadedAdapter
    from finetune.serving.vision_language_model import VisionLanguageModel
    from finetune.tasks.generation import Answer

T = TypeVar("T")
MAX_PREPARING = 4  # requests at once; each has a processor of its own
_FETCHING = 16  # requests at once whose images come from elsewhere
_READING = 2  # bodies at once; no other thread runs while one is parsed
MOST_STRINGS = 20_000  # of a body, names of fields among them; 1000 messages have some 5000
MOST_COMMAS = 1_000_000  # of a body; a text may have some
# Of the inputs of all requests that are prepared and in no batch yet; a client that has none may always prepare one.
_PREPARED_BYTES = 1024**3
_CLIENT_SHARE = 0.75  # of the queue, that one client may fill
_LAST_BATCH_SECONDS = 10.0  # that the end of a batch is waited for, whose rows have all ended
CLIENT_GONE = 499  # as a status in metrics: nobody is there to be told it


class Service:
    """The service that answers requests with one model; its methods are called in the event loop.

    Args:
        vlm: the model.
        refs: the adapters that may be asked, loaded already.
        settings: the bounds of the server.
    """

    def __init__(self, vlm: VisionLanguageModel, refs: Sequence[str], settings: Settings):
        self.vlm, self.settings = vlm, settings
        switcher = vlm.switcher
        self.waiting: Counter[str] = Counter()  # requests that were let in and are in no batch yet, by client
        self.prepared_bytes: Counter[str] = Counter()  # of the inputs of those that are prepared, by client
        self.arrivals = count()
        self.is_stopping = False
        self._open: set[Exchange] = set()
        self._is_cut = False
        self.metrics = Metrics(
            waiting=lambda: self.num_waiting,
            loaded_adapters=lambda: (len(switcher.loaded_adapters), switcher.num_bytes),
        )
        self.catalog = Catalog(switcher, refs, allow=settings.allow, known_seconds=settings.known_seconds)
        self.scheduler = Scheduler(switcher, max_batch=settings.max_batch, metrics=self.metrics)
        self.workers, self.collators = ImageWorkers(seconds=DECODE_SECONDS), Collators(vlm.base)
        self.reading = Turns(_READING, name="finetune-reading")
        self.fetching = Turns(_FETCHING, name="finetune-fetching")
        self.preparing = Turns(MAX_PREPARING, name="finetune-preparing", may_begin=self._may_prepare)

    @property
    def num_waiting(self) -> int:
        """Number of requests that were let in and are in no batch yet."""
        return self.waiting.total()

    def _may_prepare(self, client: str) -> bool:
        return not self.prepared_bytes[client] or self.prepared_bytes.total() < _PREPARED_BYTES

    def start(self) -> None:
        """Begin to answer."""
        self.scheduler.start()

    async def close(self) -> None:
        """End all threads; no request is left by then."""
        self.is_stopping = True
        self.catalog.close()
        self.workers.close()
        await asyncio.to_thread(self.scheduler.close, 0 if self._is_cut else _LAST_BATCH_SECONDS)

    def cut(self) -> None:
        """End all requests, wherever they stand; each gets an error."""
        self._is_cut = True
        for exchange in self._open:
            exchange.cut()

    def require_ready(self) -> None:
        """Check that the server takes requests.

        Raises:
            RequestError: it is stopping, or its scheduler has ended.
        """
        if self.is_stopping:
            raise _stopping()
        if not self.scheduler.is_alive():
            raise RequestError("The server answers no more; it has to be started again.", status=503, code="not_ready")

    def let_in(self, client: str) -> Exchange:
        """Return the exchange of a new request; the caller has to close it.

        Args:
            client: the client that asks.

        Raises:
            RequestError: too many requests wait, of this client or of all, or the server is stopping.
        """
        try:
            self.require_ready()
            own, most = self.waiting[client], self.settings.max_queue
            if own >= ceil(most * _CLIENT_SHARE) or self.num_waiting >= most:
                whose = " of yours" if self.num_waiting < most else ""
                raise RequestError(
                    f"{own if whose else self.num_waiting} requests{whose} wait already. Try again.",
                    status=429,
                    code="queue_full",
                    retry_after=1,
                )
        except RequestError as error:
            self.metrics.requests.labels(self.metrics.label(None), str(error.status)).inc()
            raise
        exchange = Exchange(self, client)
        self._open.add(exchange)
        return exchange

    def forget(self, exchange: Exchange) -> None:
        """Remove an exchange that is over."""
        self._open.discard(exchange)


class Exchange:
    """One request, from being let in to its end, and the resources that it takes.

    Attributes:
        id: the id of the answer.
        created: the time when it was let in, in seconds since 1970.
        request: the request, once it is read.
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
        self._timeout: asyncio.Timeout | None = None  # of what is waited for now
        service.waiting[client] += 1

    async def in_time(self, work: Awaitable[T]) -> T:
        """Return the result of ``work``, which is cancelled when the time of the request is over.

        Raises:
            RequestError: the time is over, or the server stops.
        """
        seconds = self._service.settings.request_seconds
        try:
            async with asyncio.timeout_at(0 if self._is_cut else self._begun + seconds) as self._timeout:
                return await work
        except TimeoutError:
            if self._is_cut:
                raise _stopping() from None
            raise RequestError(
                f"The request took more than {seconds:g} seconds. Ask for less, or try again when there is less to do.",
                status=504,
                code="timeout",
            ) from None
        finally:
            self._timeout = None

    def cut(self) -> None:
        """End the time that the request has."""
        self._is_cut = True
        if self._timeout is not None:
            self._timeout.reschedule(self._loop.time())

    async def body(self, work: Awaitable[bytes]) -> bytes:
        """Return the body of the request that ``work`` reads.

        Raises:
            RequestError: it did not come in time, or the server stops.
        """
        seconds = self._service.settings.body_seconds
        try:
            async with asyncio.timeout_at(self._begun + seconds):
                return await self.in_time(work)
        except TimeoutError:
            raise RequestError(
                f"The body of the request did not come within {seconds:g} seconds. Send it again.",
                status=408,
                code="body_timeout",
            ) from None

    async def read(self, body: bytes) -> None:
        """Read the request, and find its adapter.

        Raises:
            RequestError: the request is not valid, or there is no such adapter.
        """
        service = self._service
        self.request = await service.reading.run(self._client, lambda: _parse(body, service.settings))
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
            RequestError: its batch did not begin in time.
        """
        seconds = self._service.settings.queue_seconds
        try:
            async with asyncio.timeout_at(self._begun + seconds):
                event = await self._events.get()
        except TimeoutError:
            raise RequestError(
                f"The request was not begun within {seconds:g} seconds. Try again.",
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
            RequestError: the answer failed.
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
        """End the request, wherever it stands; only the first call counts.

        Args:
            status: the HTTP status that the request got.
        """
        if self._closed:
            return
        self._closed = True
        self._service.forget(self)
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
        """Return the job; its adapter is pinned to the end of the exchange."""
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
            tell=self._tell,
        )

    def _tell(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def _take(counter: Counter[str], client: str, count: int) -> None:
    """Subtract from a counter, and remove a client that has nothing left in it."""
    counter[client] -= count
    if not counter[client]:
        del counter[client]


def _stopping() -> RequestError:
    return RequestError("The server is stopping.", status=503, code="stopping", retry_after=5)


def _refuse_many_values(body: bytes) -> None:
    """Refuse a body with too many values to parse, as no other thread runs meanwhile.

    Raises:
        RequestError: it has too many.
    """
    # A quote inside a text is written \\". One that only looks so, after an escaped backslash, ends a text whose
    # beginning is counted.
    num_strings = (body.count(b'"') - body.count(b'\\"')) // 2
    if num_strings > MOST_STRINGS or body.count(b",") > MOST_COMMAS:
        message = f"The body has more than {MOST_STRINGS} texts and names, or a list without end. Send fewer messages."
        raise RequestError(message, status=400, code="too_many_values")


def _parse(body: bytes, settings: Settings) -> ChatRequest:
    """Return the request in a body.

    Raises:
        RequestError: it is not valid, or asks for something that the server does not do.
    """
    _refuse_many_values(body)
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from None
    for name in ("max_completion_tokens", "max_tokens"):
        wanted = getattr(request, name)
        if wanted is not None and wanted > settings.max_new_tokens:
            raise RequestError(
                f"{name} is {wanted}; answers here have at most {settings.max_new_tokens} tokens.",
                status=400,
                code="invalid_value",
                param=name,
            )
    if request.max_completion_tokens is not None and request.max_tokens is not None:
        message = "max_tokens and max_completion_tokens are two names of one limit: send one of them."
        raise RequestError(message, status=400, code="invalid_value", param="max_tokens")
    if request.stream_options is not None and request.stream_options.include_usage and not request.stream:
        message = "stream_options.include_usage goes with stream: true alone; without it usage is in every answer."
        raise RequestError(message, status=400, code="invalid_value", param="stream_options")
    return request

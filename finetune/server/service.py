"""What becomes of a request: let in, read, prepared, answered in a batch, and ended, whichever way."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, cast
from uuid import uuid4

from pydantic import ValidationError

from finetune.errors import RequestError
from finetune.server.catalog import Catalog
from finetune.server.errors import invalid_request, to_request_error
from finetune.server.hold import Hold
from finetune.server.metrics import Metrics
from finetune.server.prompts import to_example
from finetune.server.scheduler import Done, Failed, Grown, Job, Scheduler, Started
from finetune.server.schema import ChatRequest
from finetune.server.stops import StopTexts
from finetune.serving.together import section_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from finetune.recipe import VqaSection
    from finetune.server.scheduler import Event
    from finetune.server.settings import Settings
    from finetune.serving.app import VisionLanguageModel
    from finetune.serving.resident import Resident
    from finetune.tasks.generation import Answer

T = TypeVar("T")
_THREADS = 16  # that read and check requests; some wait for pictures from elsewhere
_LAST_BATCH_SECONDS = 10.0  # that the end of a batch is waited for, whose rows have all ended
CLIENT_GONE = 499  # as a status in metrics: nobody is there to be told it


class Service:
    """Answers requests with one model; its methods are called in the event loop.

    Args:
        vlm: the model.
        refs: adapters that may be asked, resident already.
        settings: its bounds.
    """

    def __init__(self, vlm: VisionLanguageModel, refs: Sequence[str], settings: Settings):
        self.vlm, self.settings = vlm, settings
        switcher = vlm.switcher
        self.num_waiting = 0  # requests that were let in and are in no batch yet
        self.is_stopping = False
        self._open: set[Exchange] = set()
        self._is_cut = False
        self.metrics = Metrics(
            waiting=lambda: self.num_waiting, residents=lambda: (len(switcher.residents), switcher.num_bytes)
        )
        self.catalog = Catalog(switcher, refs, allow=settings.allow, known_seconds=settings.known_seconds)
        self.scheduler = Scheduler(switcher, max_batch=settings.max_batch, metrics=self.metrics)
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="finetune-preparing")

    def start(self) -> None:
        """Begins to answer."""
        self.scheduler.start()

    async def close(self) -> None:
        """Ends what runs; no request is there any more."""
        self.is_stopping = True
        self.catalog.close()
        self.threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.scheduler.close, 0 if self._is_cut else _LAST_BATCH_SECONDS)

    def cut(self) -> None:
        """Ends all requests, wherever they stand; each is told so."""
        self._is_cut = True
        for exchange in self._open:
            exchange.cut()

    def require_ready(self) -> None:
        """Lets pass while requests are taken.

        Raises:
            RequestError: they are not.
        """
        if self.is_stopping:
            raise _stopping()
        if not self.scheduler.is_alive():
            raise RequestError("The server answers no more; it has to be started again.", status=503, code="not_ready")

    def let_in(self) -> Exchange:
        """Returns a request's exchange, which has to be closed.

        Raises:
            RequestError: as many wait as may, or the server is stopping.
        """
        try:
            self.require_ready()
            if self.num_waiting >= self.settings.max_queue:
                raise RequestError(
                    f"{self.num_waiting} requests wait already. Try again.",
                    status=429,
                    code="queue_full",
                    retry_after=1,
                )
        except RequestError as error:
            self.metrics.requests.labels(self.metrics.label(None), str(error.status)).inc()
            raise
        exchange = Exchange(self)
        self._open.add(exchange)
        return exchange

    def forget(self, exchange: Exchange) -> None:
        """Counts an exchange as over."""
        self._open.discard(exchange)


class Exchange:
    """One request, from being let in to its end, and what it holds on the way.

    Attributes:
        id: of the answer.
        created: when it was let in, in seconds since 1970.
        request: what was asked, once it is read.
        resident: what answers, once that is known; None for the plain base.
    """

    request: ChatRequest

    def __init__(self, service: Service):
        self.id, self.created = f"chatcmpl-{uuid4().hex}", int(time.time())
        self.resident: Resident | None = None
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._hold = Hold()
        self._job: Job | None = None
        self._label = service.metrics.label(None)
        self._waits, self._closed, self._is_cut = True, False, False
        self._timeout: asyncio.Timeout | None = None  # of what is waited for now
        service.num_waiting += 1

    async def in_time(self, work: Awaitable[T]) -> T:
        """Returns what ``work`` does, which ends with the time that the request may take in all.

        Raises:
            RequestError: the time is over, or the server ends.
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
        """Ends the time that the request has."""
        self._is_cut = True
        if self._timeout is not None:
            self._timeout.reschedule(self._loop.time())

    async def read(self, body: bytes) -> None:
        """Reads the request, and finds its adapter.

        Raises:
            RequestError: it is not what it must be, or has no such adapter.
        """
        self.request = await self._in_thread(lambda: _parse(body, self._service.settings))
        name = self._service.catalog.name_of(self.request.model)
        if name is not None:
            await self._service.catalog.ready(name)
        self._label = self._service.metrics.label(name or self.request.model)
        self._job = await self._in_thread(lambda: self._prepare(name))
        self._service.scheduler.submit(self._job)

    async def begun(self) -> None:
        """Waits until the request is in a batch.

        Raises:
            RequestError: that did not happen in time.
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
        """Yields what the answer grows by, and in the end how it came about.

        Raises:
            RequestError: there is no more of it.
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
        """Ends the request, wherever it stands; only the first call counts.

        Args:
            status: that it got.
        """
        if self._closed:
            return
        self._closed = True
        self._service.forget(self)
        self._leave_queue()
        if self._job is not None:
            self._service.scheduler.withdraw(self._job)
        self._hold.close()
        metrics = self._service.metrics
        metrics.requests.labels(self._label, str(status)).inc()
        metrics.seconds.labels(self._label).observe(self._loop.time() - self._begun)
        metrics.cancelled.inc(status == CLIENT_GONE)

    def _leave_queue(self) -> None:
        self._service.num_waiting -= self._waits
        self._waits = False

    def _prepare(self, name: str | None) -> Job:
        """Returns the job; the adapter is held to the end of the exchange."""
        service, request = self._service, self.request
        self.resident = self._hold.take(service.vlm.switcher, name)
        section = cast("VqaSection", section_for(service.vlm.switcher, self.resident))
        stop = [request.stop] if isinstance(request.stop, str) else request.stop
        return Job(
            example=to_example(request, section, service.settings),
            resident=self.resident,
            label=self._label,
            max_new_tokens=request.max_completion_tokens or request.max_tokens,
            stops=StopTexts(stop or ()),
            tell=self._tell,
        )

    def _tell(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._service.threads, work)


def _stopping() -> RequestError:
    return RequestError("The server is stopping.", status=503, code="stopping", retry_after=5)


def _parse(body: bytes, settings: Settings) -> ChatRequest:
    """Returns the request.

    Raises:
        RequestError: it is none, or asks for what is not done.
    """
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

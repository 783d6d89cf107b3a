"""The service, which admits requests and owns the threads that answer them."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import count
from math import ceil
from typing import TYPE_CHECKING, Protocol

from finetune.data.image_workers import DECODE_SECONDS, ImageWorkers
from finetune.errors import RequestError
from finetune.server.catalog import Catalog
from finetune.server.errors import stopping
from finetune.server.metrics import Metrics
from finetune.server.preparation import Collators
from finetune.server.scheduler import Scheduler
from finetune.server.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.server.settings import Settings
    from finetune.serving.vision_language_model import VisionLanguageModel

MAX_PREPARING = 4  # requests at once; each has a processor of its own
_FETCHING = 16  # requests at once whose images come from other hosts
_READING = 2  # bodies at once; no other thread runs while one is parsed
# Of the inputs of all prepared requests that are in no batch yet. A client without any may always prepare one.
_PREPARED_BYTES = 1024**3
_CLIENT_SHARE = 0.75  # of the queue, for one client
_LAST_BATCH_SECONDS = 10.0  # to wait for the end of a batch whose rows have all ended


class OpenRequest(Protocol):
    """A request that was admitted and is not over."""

    def cut(self) -> None:
        """End the time that the request has."""


class Service:
    """The service that answers requests with one model; its methods are called in the event loop.

    Args:
        vlm: the model.
        refs: the references of the adapters that clients may always ask, loaded already.
        settings: the bounds of the server.
    """

    def __init__(self, vlm: VisionLanguageModel, refs: Sequence[str], settings: Settings):
        self.vlm, self.settings = vlm, settings
        switcher = vlm.switcher
        self.waiting: Counter[str] = Counter()  # admitted requests in no batch yet, by client
        self.prepared_bytes: Counter[str] = Counter()  # of the inputs of prepared requests, by client
        self.arrivals = count()
        self.is_stopping = False
        self.open: set[OpenRequest] = set()
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
        """The number of admitted requests that are in no batch yet."""
        return self.waiting.total()

    def _may_prepare(self, client: str) -> bool:
        return not self.prepared_bytes[client] or self.prepared_bytes.total() < _PREPARED_BYTES

    def start(self) -> None:
        """Begin to answer."""
        self.scheduler.start()

    async def close(self) -> None:
        """End all threads, after the last request."""
        self.is_stopping = True
        self.catalog.close()
        self.workers.close()
        await asyncio.to_thread(self.scheduler.close, 0 if self._is_cut else _LAST_BATCH_SECONDS)

    def cut(self) -> None:
        """End all requests now; each gets an error."""
        self._is_cut = True
        for exchange in self.open:
            exchange.cut()

    def require_ready(self) -> None:
        """Check that the server takes requests.

        Raises:
            RequestError: the server is stopping, or its scheduler has ended.
        """
        if self.is_stopping:
            raise stopping()
        if not self.scheduler.is_alive():
            message = "The server cannot answer, because its scheduler has ended. The operator must restart it."
            raise RequestError(message, status=503, code="not_ready")

    def require_room(self, client: str) -> None:
        """Check that a new request of a client may wait.

        Args:
            client: the client that asks.

        Raises:
            RequestError: too many requests wait, of this client or of all, or the server is stopping.
        """
        try:
            self.require_ready()
            own, most = self.waiting[client], self.settings.max_queue
            if own >= ceil(most * _CLIENT_SHARE) or self.num_waiting >= most:
                found = f"{own} of your requests" if self.num_waiting < most else f"{self.num_waiting} requests"
                raise RequestError(
                    f"The queue is full: {found} wait already. Try again in 1 second.",
                    status=429,
                    code="queue_full",
                    retry_after=1,
                )
        except RequestError as error:
            self.metrics.requests.labels(self.metrics.label(None), str(error.status)).inc()
            raise

"""The metrics of the server, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_ADAPTERS = 100  # with a label of their own: each label is a time series that Prometheus keeps
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server; any thread may call any method.

    Args:
        waiting: the function that returns the number of requests that wait.
        loaded_adapters: the function that returns the number of loaded adapters, and the bytes that they take.
    """

    def __init__(self, *, waiting: Callable[[], int], loaded_adapters: Callable[[], tuple[int, int]]):
        self._registry = CollectorRegistry()
        self._labels: set[str] = set()
        registry = self._registry
        self.requests = Counter(
            "finetune_requests",
            "Requests for answers, by the status they got.",
            ["adapter", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "finetune_request_seconds",
            "From a request's head to the end of its answer.",
            ["adapter"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "finetune_queue_seconds",
            "From a request's head to its batch.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "finetune_tokens", "Tokens of prompts read and of answers made.", ["adapter", "kind"], registry=registry
        )
        self.batch_rows = Histogram("finetune_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=registry)
        self.switches = Counter(
            "finetune_adapter_switches", "Batches for other adapters than the batch before.", registry=registry
        )
        self.cancelled = Counter(
            "finetune_cancelled", "Requests whose client went away before their end.", registry=registry
        )
        gauge = Gauge("finetune_waiting", "Requests that are not yet in a batch.", registry=registry)
        gauge.set_function(waiting)
        gauge = Gauge("finetune_resident_adapters", "Adapters that are ready.", registry=registry)
        gauge.set_function(lambda: loaded_adapters()[0])
        gauge = Gauge("finetune_resident_bytes", "Bytes that they hold.", registry=registry)
        gauge.set_function(lambda: loaded_adapters()[1])

    def label(self, name: str | None) -> str:
        """Return the label of an adapter.

        Args:
            name: the name of an adapter that was found; None for one that was not.
        """
        if name is None:
            return "unknown"
        if name not in self._labels and len(self._labels) >= MOST_ADAPTERS:
            return "other"
        self._labels.add(name)
        return name

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

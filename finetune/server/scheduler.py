"""The scheduler: one thread owns the model, and answers waiting jobs in batches of one or more adapters."""

from __future__ import annotations

import logging
import threading
from bisect import insort
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from finetune.core.batch import join_prompts
from finetune.errors import AdapterError
from finetune.serving.batching import answer_batch, sharing_key

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from finetune.core.batch import Batch
    from finetune.server.metrics import Metrics
    from finetune.server.stop_sequences import StopSequences
    from finetune.serving.loaded_adapter import LoadedAdapter
    from finetune.serving.switcher import Switcher
    from finetune.tasks.generation import Answer

_log = logging.getLogger(__name__)
MOST_BYTES = 512 * 1024 * 1024  # of the inputs of a batch; a larger request has a batch of its own


@dataclass(frozen=True)
class Started:
    """The event that the row is in a batch now."""


@dataclass(frozen=True)
class Grown:
    """The event that the answer has grown by ``piece``."""

    piece: str


@dataclass(frozen=True)
class Done:
    """The event that the answer is complete. ``answer.text`` continues after a stop sequence."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """The event that there is no answer, or no more of it."""

    error: Exception


Event = Started | Grown | Done | Failed


@dataclass(kw_only=True, eq=False)
class Job:
    """One row to answer.

    Attributes:
        batch: the inputs, on the CPU.
        loaded: the adapter, pinned by the caller; None for the plain base.
        client: the client that asks.
        arrived: the number of the request, in the order of arrival.
        label: the label of the adapter in metrics.
        max_new_tokens: the maximum number of tokens of its answer.
        stops: the stop sequences that end its answer.
        on_event: called with each event in the scheduler's thread; ``Done`` or ``Failed`` is the last.
        cancelled: True once the client has gone; from then on ``on_event`` is not called.
        key: the key of the batch; jobs with equal keys may share one.
        sent_text: True once ``on_event`` got some text of the answer.
    """

    batch: Batch
    loaded: LoadedAdapter | None
    client: str
    arrived: int
    label: str
    max_new_tokens: int
    stops: StopSequences
    on_event: Callable[[Event], None]
    cancelled: bool = False
    key: Hashable = field(default=None, init=False)
    sent_text: bool = field(default=False, init=False)

    @cached_property
    def num_bytes(self) -> int:
        """The number of bytes of its inputs."""
        return self.batch.num_bytes

    def grow(self, piece: str) -> None:
        """Send the part of the answer that is sure to stay, now that it has grown by ``piece``."""
        if sure := self.stops.feed(piece):
            self._send_text(sure)

    def finish(self, answer: Answer) -> None:
        """Send the rest of the answer, and its end."""
        if rest := self.stops.rest():
            self._send_text(rest)
        # A stop sequence may come with the last token that the limit allows.
        self._send(Done(replace(answer, finish_reason="stop") if self.stops.found else answer))

    def fail(self, error: Exception) -> None:
        """Send the error that ended the answer."""
        self._send(Failed(error))

    def start(self) -> None:
        """Send the event that it is in a batch."""
        self._send(Started())

    def is_over(self) -> bool:
        """Return True if the client needs no more of the answer."""
        return self.cancelled or self.stops.found

    def _send_text(self, text: str) -> None:
        self.sent_text = True
        self._send(Grown(text))

    def _send(self, event: Event) -> None:
        if not self.cancelled:
            self.on_event(event)


class Scheduler:
    """The thread that answers jobs in batches: one job leads, and others that can share its batch join it.

    An idle model takes all waiting jobs at once, and jobs that come while it runs make the next batch. Clients lead in
    turn, each with the job that has waited longest. So adapters that cannot share have their turn too, and a client
    with many jobs delays another's question by one batch.

    Args:
        switcher: the switcher of the model.
        max_batch: the maximum number of rows in a batch.
        metrics: the metrics that count its batches.
    """

    def __init__(self, switcher: Switcher, *, max_batch: int, metrics: Metrics):
        self._switcher, self._max_batch, self._metrics = switcher, max_batch, metrics
        self._pad_id = switcher.base.processor.tokenizer.pad_token_id
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._last: frozenset[LoadedAdapter | None] = frozenset()  # adapters of the last batch
        self._leaders: list[str] = []  # clients that wait, in the order in which they last led a batch
        self._thread = threading.Thread(target=self._run, name="finetune-scheduler", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of jobs that are in no batch yet."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        job.key = sharing_key(self._switcher, job.loaded)
        with self._changed:
            insort(self._waiting, job, key=lambda one: one.arrived)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Withdraw a job whose client has gone; a job in a batch ends at its next step."""
        job.cancelled = True
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)

    def close(self, seconds: float) -> None:
        """End the thread after its batch; jobs that still wait are not answered.

        Args:
            seconds: the number of seconds to wait for the end.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def is_alive(self) -> bool:
        """Return True while the thread answers jobs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while jobs := self._next():
            with ExitStack() as kept:
                held = [job for job in jobs if self._hold(job, kept)]
                try:
                    self._answer(held)
                except Exception as error:  # of any class: the thread must go on with the next jobs
                    for job in held:
                        job.fail(error)
            del jobs, held  # while it waits for the next ones

    def _next(self) -> list[Job]:
        """Wait for jobs and return those of the next batch; an empty list once the scheduler is closed."""
        with self._changed:
            while True:
                if self._closed:
                    return []
                if self._waiting:
                    break
                self._changed.wait()
            leader = self._leader()
            num_bytes, batch = leader.num_bytes, [leader]
            for job in self._waiting:
                if job.key == leader.key and job is not leader:
                    num_bytes += job.num_bytes
                    if len(batch) == self._max_batch or num_bytes > MOST_BYTES:
                        break
                    batch.append(job)
            for job in batch:
                self._waiting.remove(job)
            return batch

    def _leader(self) -> Job:
        """Return the oldest job of the client that led longest ago; new clients come just before the last leader."""
        first = {job.client: job for job in reversed(self._waiting)}
        new = list(dict.fromkeys(job.client for job in self._waiting if job.client not in self._leaders))
        order = [one for one in (*self._leaders[:-1], *new, *self._leaders[-1:]) if one in first]
        self._leaders = [one for one in self._leaders if one in first and one != order[0]] + order[:1]
        return first[order[0]]

    def _hold(self, job: Job, kept: ExitStack) -> bool:
        """Pin a job's adapter to the end of the batch: the job's own pin may end before."""
        try:
            kept.enter_context(self._switcher.pin(job.loaded))
        except AdapterError:  # the client has gone, and the adapter was removed
            assert job.cancelled
            return False
        job.start()
        return True

    def _answer(self, jobs: Sequence[Job]) -> None:
        jobs = [job for job in jobs if not job.is_over()]
        if not jobs:
            return
        adapters = frozenset(job.loaded for job in jobs)
        self._metrics.batch_rows.observe(len(jobs))
        self._metrics.switches.inc(adapters != self._last)
        self._last = adapters
        try:
            answers = answer_batch(
                self._switcher,
                join_prompts([job.batch for job in jobs], pad_id=self._pad_id),
                [job.loaded for job in jobs],
                max_new_tokens=[job.max_new_tokens for job in jobs],
                on_text=lambda row, piece: jobs[row].grow(piece),
                is_stopped=lambda row: jobs[row].is_over(),
            )
        except Exception as error:
            self._answer_alone(jobs, error)
            return
        for job, answer in zip(jobs, answers, strict=True):
            self._metrics.tokens.labels(job.label, "prompt").inc(answer.prompt_tokens)
            self._metrics.tokens.labels(job.label, "completion").inc(answer.completion_tokens)
            job.finish(answer)

    def _answer_alone(self, jobs: Sequence[Job], error: Exception) -> None:
        """Answer each job of a failed batch alone: one row may be the cause, or the batch was too large."""
        if len(jobs) > 1:
            _log.warning("a batch of %d rows failed, so each row is answered alone: %s", len(jobs), error)
        for job in jobs:
            if len(jobs) == 1 or job.sent_text:
                job.fail(error)
            else:
                job.stops.start_anew()
                self._answer([job])

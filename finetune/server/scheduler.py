"""Who is answered when: one thread owns the model, and takes what waits in batches that different adapters share."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from finetune.build import max_positions
from finetune.errors import AdapterError, FinetuneError, RequestError, brief
from finetune.serving.together import answer_batch, answer_limit, prompt_batch, prompt_lengths, sharing_key

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from finetune.batch import Batch
    from finetune.example import Example
    from finetune.server.metrics import Metrics
    from finetune.server.stops import StopTexts
    from finetune.serving.resident import Resident
    from finetune.serving.switcher import Switcher
    from finetune.tasks.generation import Answer

_log = logging.getLogger(__name__)
# Of the pictures of a batch, which are all decoded at once and take some 8 bytes a pixel then. A request that has more
# is a batch of its own.
MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class Started:
    """The row is in a batch now."""


@dataclass(frozen=True)
class Grown:
    """The answer has grown by ``piece``."""

    piece: str


@dataclass(frozen=True)
class Done:
    """The answer is complete: all of its pieces were told before. ``answer.text`` goes on behind a stop text."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event = Started | Grown | Done | Failed


@dataclass(kw_only=True, eq=False)
class Job:
    """One row that is to be answered.

    Attributes:
        example: put as its adapter is asked.
        resident: the adapter, kept by whoever made the job; None for the plain base.
        label: of the adapter, in metrics.
        max_new_tokens: of its answer; None for the longest that the adapter was trained to give.
        stops: where its answer ends.
        tell: is told what happens, in the scheduler's thread; ``Done`` or ``Failed`` is the last.
        cancelled: whether nobody waits for the answer any more; nothing is told from then on.
        key: equal for jobs that may share a batch.
        told_text: whether some of the answer was told.
    """

    example: Example
    resident: Resident | None
    label: str
    max_new_tokens: int | None
    stops: StopTexts
    tell: Callable[[Event], None]
    cancelled: bool = False
    key: Hashable = field(default=None, init=False)
    told_text: bool = field(default=False, init=False)

    def grow(self, piece: str) -> None:
        """Tells of what the answer has surely grown by."""
        if sure := self.stops.feed(piece):
            self._tell_text(sure)

    def finish(self, answer: Answer) -> None:
        """Tells of the end."""
        if rest := self.stops.rest():
            self._tell_text(rest)
        # A stop text may come with the last token that the answer may have.
        self._tell(Done(replace(answer, finish_reason="stop") if self.stops.found else answer))

    def fail(self, error: Exception) -> None:
        """Tells that there will be no answer."""
        self._tell(Failed(error))

    def start(self) -> None:
        """Tells that it is in a batch."""
        self._tell(Started())

    def is_over(self) -> bool:
        """Tells whether no more of the answer is wanted."""
        return self.cancelled or self.stops.found

    def _tell_text(self, text: str) -> None:
        self.told_text = True
        self._tell(Grown(text))

    def _tell(self, event: Event) -> None:
        if not self.cancelled:
            self.tell(event)


class Scheduler:
    """Answers jobs, those that came first before all others, and with each as many more as can share its batch.

    Nothing is waited for: an idle model takes what there is at once, and what comes while it runs makes the next batch.
    The job that has waited longest leads each batch, so adapters that cannot share have their turn too.

    Args:
        switcher: of the model.
        max_batch: rows of a batch.
        metrics: is told of batches.
    """

    def __init__(self, switcher: Switcher, *, max_batch: int, metrics: Metrics):
        self._switcher, self._max_batch, self._metrics = switcher, max_batch, metrics
        self._max_positions = max_positions(switcher.base.model)
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._last: frozenset[Resident | None] = frozenset()  # adapters of the last batch
        self._thread = threading.Thread(target=self._run, name="finetune-scheduler", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job."""
        job.key = sharing_key(self._switcher, job.resident)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Takes a job back, for whom nobody waits any more; one that is in a batch ends at its next step."""
        job.cancelled = True
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)

    def close(self, seconds: float) -> None:
        """Ends the thread when its batch is at its end; what still waits is not answered.

        Args:
            seconds: that this is waited for.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def is_alive(self) -> bool:
        """Tells whether jobs are answered."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while jobs := self._next():
            with ExitStack() as kept:
                held = [job for job in jobs if self._hold(job, kept)]
                try:
                    self._answer(held)
                except Exception as error:  # whatever it is, the jobs after these are answered
                    for job in held:
                        job.fail(error)

    def _next(self) -> list[Job]:
        """Returns the jobs of the next batch, when there are some; none when all is over."""
        with self._changed:
            while True:
                if self._closed:
                    return []
                if self._waiting:
                    break
                self._changed.wait()
            key, num_pixels, batch = self._waiting[0].key, 0, list[Job]()
            for job in self._waiting:
                if job.key is key:
                    num_pixels += job.example.meta.get("num_pixels", 0)
                    if batch and (len(batch) == self._max_batch or num_pixels > MOST_PIXELS):
                        break
                    batch.append(job)
            for job in batch:
                self._waiting.remove(job)
            return batch

    def _hold(self, job: Job, kept: ExitStack) -> bool:
        """Keeps a job's adapter to the end of the batch: whoever made the job may let go of it before."""
        try:
            kept.enter_context(self._switcher.keeping(job.resident))
        except AdapterError:  # it was let go of, and has gone
            assert job.cancelled
            return False
        job.start()
        return True

    def _answer(self, jobs: Sequence[Job]) -> None:
        jobs, batch = self._prompts(jobs)
        if batch is None:
            return
        adapters = frozenset(job.resident for job in jobs)
        self._metrics.batch_rows.observe(len(jobs))
        self._metrics.switches.inc(adapters != self._last)
        self._last = adapters
        try:
            answers = answer_batch(
                self._switcher,
                batch,
                [job.resident for job in jobs],
                max_new_tokens=[
                    self._limit(job, length) for job, length in zip(jobs, prompt_lengths(batch), strict=True)
                ],
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
        """Answers each job of a batch that failed by itself: one, or all of them together, may have been too much."""
        if len(jobs) > 1:
            _log.warning("a batch of %d rows failed, each is answered alone: %s", len(jobs), error)
        for job in jobs:
            if len(jobs) == 1 or job.told_text:
                job.fail(error)
            else:
                job.stops.start_anew()
                self._answer([job])

    def _prompts(self, jobs: Sequence[Job]) -> tuple[Sequence[Job], Batch | None]:
        """Returns the jobs that can be put to the model, and their inputs; the others are told why they cannot."""
        jobs = [job for job in jobs if not job.is_over()]
        if not jobs:
            return [], None
        try:
            batch = self._batch(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].fail(_unusable(error))
                return [], None
            return self._prompts([job for job in jobs if self._prompts([job])[1] is not None])
        fitting = [job for job, length in zip(jobs, prompt_lengths(batch), strict=True) if self._fits(job, length)]
        return (jobs, batch) if len(fitting) == len(jobs) else self._prompts(fitting)

    def _batch(self, jobs: Sequence[Job]) -> Batch:
        return prompt_batch(self._switcher, [job.example for job in jobs], [job.resident for job in jobs])

    def _fits(self, job: Job, prompt_tokens: int) -> bool:
        limit = self._limit(job, prompt_tokens)
        if self._max_positions is None or prompt_tokens + limit <= self._max_positions:
            return True
        job.fail(
            RequestError(
                f"The base takes {self._max_positions} tokens; this request has {prompt_tokens} in its messages and "
                f"pictures, and up to {limit} in its answer. Shorten the messages, make the pictures smaller, or lower "
                "max_completion_tokens.",
                status=400,
                code="context_length_exceeded",
                param="messages",
            )
        )
        return False

    def _limit(self, job: Job, prompt_tokens: int) -> int:
        return answer_limit(self._switcher, job.resident, job.max_new_tokens, prompt_tokens=prompt_tokens)


def _unusable(error: Exception) -> Exception:
    """Returns why a request cannot be prepared: what a processor raises lies in the request, and it is told so.

    Processors raise almost anything on images of sizes that their authors did not think of.
    """
    if isinstance(error, FinetuneError | MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
        return error
    _log.warning("a request cannot be prepared for this base", exc_info=error)
    what = str(error).strip().partition("\n")[0] or type(error).__name__
    return RequestError(
        f"messages: the base's processor cannot prepare them: {brief(what, 200)}. Send images of another size, or "
        "another text.",
        status=400,
        code="invalid_messages",
        param="messages",
    )

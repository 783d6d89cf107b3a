"""The batches of each step: the rows of the plan, collated here or in worker processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import get_int_from_env
from torch.utils.data import DataLoader, Dataset

from finetune.core.example import Example
from finetune.data.stream import Checks, Stream
from finetune.errors import DataError, FinetuneError
from finetune.training.stopping import leave_signals_to_the_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from accelerate import Accelerator

    from finetune.core.batch import Batch
    from finetune.data.stream import Rows
    from finetune.data.stream_reader import Arrival
    from finetune.training.plan import Draw, MicroBatch, Plan


MOST_WORKERS = 8  # for one GPU: more are rarely faster, and each needs memory of its own


def worker_count(wanted: int | Literal["auto"], device: torch.device) -> int:
    """Return the number of processes that prepare batches ahead.

    A GPU computes while workers open images and make tokens, so it gets the cores of its process. On a CPU the model
    itself uses every core, and workers would only slow it down.

    Args:
        wanted: the number in the recipe, or ``auto``.
        device: the device of the model.
    """
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // get_int_from_env(["LOCAL_WORLD_SIZE"], 1)))


class _Rows(Dataset):
    """The rows of a run as a dataset of (example, supervised) pairs."""

    def __init__(self, examples: list[Example], seed: int):
        self.examples, self.seed = examples, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw) -> tuple[Example, bool]:
        return self.examples[draw.row].in_epoch(draw.epoch, seed=self.seed), draw.supervised


class _Arrivals(Dataset):
    """The rows of a stream as a dataset that checks them; None is a row that only fills a micro-batch."""

    def __init__(self, checks: Checks, filler: Example, collate: Callable[[list[tuple[Example, bool]]], Batch]):
        self.checks, self.filler, self.collate = checks, filler, collate

    def __getitem__(self, arrival: Arrival | None) -> tuple[int, Example | DataError] | None:
        return None if arrival is None else (arrival.position, self.checks.example(arrival))

    def batch(
        self, checked: list[tuple[int, Example | DataError] | None]
    ) -> tuple[Batch, list[tuple[int, DataError | None]]]:
        """Return the batch of the usable rows, and each position with its error or None."""
        found = [one for one in checked if one]
        good = [(row, True) for _, row in found if isinstance(row, Example)]
        faults = [(position, row if isinstance(row, DataError) else None) for position, row in found]
        return self.collate(good or [(self.filler, False)]), faults


class _ErrorReturningCollator:
    """A collator that returns this package's errors: torch adds a traceback to the message of a raised error."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self._collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        try:
            return self._collate(rows)
        except FinetuneError as error:
            return error


class MicroBatchLoader:
    """The micro-batches of one process, for one step at a time.

    Workers live as long as the plan, which is the whole run unless memory runs out. Each prepares two batches ahead.

    Args:
        examples: the training rows; the rows of a stream are checked when they are collated.
        collate: the function that makes a training batch of (example, supervised) pairs.
        accelerator: the accelerator of the run, with the index and the device of this process.
        num_workers: the number of worker processes, as for ``worker_count``; 0 collates in this process.
    """

    def __init__(
        self,
        examples: Rows,
        collate: Callable[[list[tuple[Example, bool]]], Batch],
        *,
        accelerator: Accelerator,
        num_workers: int | Literal["auto"],
    ):
        self.examples, self.collate, self.process = examples, collate, accelerator.process_index
        self.num_workers = worker_count(num_workers, accelerator.device)
        self.pin_memory = accelerator.device.type == "cuda"  # copies to the device are then asynchronous
        self._stream: Iterator[Batch] | None = None
        self._plan: Plan | None = None

    @property
    def num_rows(self) -> int | None:
        """The number of rows of an epoch; None for a stream."""
        return None if isinstance(self.examples, Stream) else len(self.examples)

    @property
    def lengths(self) -> list[int] | None:
        """The number of tokens of each row of an epoch; None for a stream, or if a row was not counted."""
        if isinstance(self.examples, Stream):
            return None
        counted = [row.num_tokens for row in self.examples if row.num_tokens is not None]
        return counted if len(counted) == len(self.examples) else None

    def micro_batches(self, plan: Plan, step: int) -> list[Batch]:
        """Return the micro-batches of ``step``. Steps must follow one another; a new plan restarts the workers."""
        if self._stream is None or plan is not self._plan:
            self._plan, self._stream = plan, self._batches(plan, step)
        return [next(self._stream) for _ in plan.micro_batches(step, self.process)]

    def close(self) -> None:
        """End the workers: they ignore SIGTERM, so an interpreter that exits before them would wait forever."""
        self._stream = None

    def _batches(self, plan: Plan, step: int) -> Iterator[Batch]:
        draws = plan.stream(step, self.process)
        if isinstance(self.examples, Stream):
            return self._arriving(self.examples, draws)
        return _batches_of(self._loader(_Rows(self.examples, plan.seed), draws, self.collate))

    def _arriving(self, stream: Stream, draws: Iterator[MicroBatch]) -> Iterator[Batch]:
        reader, rows = stream.reader(), _Arrivals(stream.checks, stream.first[0], self.collate)
        arrivals = ([reader.at(draw.row) if draw.supervised else None for draw in drawn] for drawn in draws)
        for batch, arrived in _batches_of(self._loader(rows, arrivals, rows.batch)):
            stream.receive(arrived)
            yield batch

    def _loader(self, rows: Dataset, drawn: Iterable[list[Any]], collate: Callable[[list[Any]], Any]) -> DataLoader:
        return DataLoader(
            rows,
            batch_sampler=drawn,  # torch accepts any iterable of lists
            collate_fn=_ErrorReturningCollator(collate),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=leave_signals_to_the_parent,
            # Without a generator of its own, the start of a loader would draw from the one that dropout uses.
            generator=torch.Generator(),
        )


def _batches_of(loader: DataLoader) -> Iterator[Any]:
    for batch in loader:
        if isinstance(batch, FinetuneError):
            raise batch
        yield batch

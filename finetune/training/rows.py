"""From the plan to batches: the rows of each step, collated here or in worker processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from finetune.training.stopping import leave_signals_to_the_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from finetune.example import Example
    from finetune.interfaces import Batch
    from finetune.training.plan import Draw, Plan


class _Rows(Dataset):
    """Hands (row, learnt) pairs through a DataLoader to the collator."""

    def __init__(self, examples: list[Example], seed: int):
        self.examples, self.seed = examples, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw) -> tuple[Example, bool]:
        return self.examples[draw.row].in_epoch(draw.epoch, seed=self.seed), draw.learnt


class Windows:
    """The micro-batches of one process, a step's at a time.

    Args:
        examples: the rows to learn.
        collate: makes a training batch of (example, learnt) pairs.
        process: which process this is.
        num_workers: processes that collate ahead; 0 collates here.
    """

    def __init__(
        self,
        examples: list[Example],
        collate: Callable[[list[tuple[Example, bool]]], Batch],
        *,
        process: int,
        num_workers: int,
    ):
        self.examples, self.collate, self.process, self.num_workers = examples, collate, process, num_workers
        self._stream: Iterator[Batch] | None = None
        self._plan: Plan | None = None

    def window(self, plan: Plan, step: int) -> list[Batch]:
        """Returns the micro-batches of ``step``; steps follow one another, and a new plan starts anew at its step."""
        if self._stream is None or plan is not self._plan:
            self._plan, self._stream = plan, iter(self._loader(plan, step))
        return [next(self._stream) for _ in plan.micro_batches(step, self.process)]

    def _loader(self, plan: Plan, step: int) -> DataLoader:
        return DataLoader(
            _Rows(self.examples, plan.seed),
            batch_sampler=plan.stream(step, self.process),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_the_parent,
            # A generator of its own: starting a loader would otherwise draw from the one that dropout uses.
            generator=torch.Generator(),
        )

"""The plan of a run: the rows and the learning rate of each optimizer step, as pure functions of the step."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from finetune.errors import DataError
from finetune.recipe import TrainSection


class Draw(NamedTuple):
    """One row in one epoch."""

    row: int
    epoch: int  # from 0
    supervised: bool  # False for a row that only fills an empty micro-batch


MicroBatch = list[Draw]
GROUPED_STEPS = 50  # steps whose rows are sorted together: few enough that an epoch stays well mixed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of rows of a whole run, the same for every split of a step into micro-batches and processes.

    One optimizer step reads ``total_batch_size`` rows over all processes, fewer in the last step of an epoch. If
    ``lengths`` are given, the rows of a step have similar lengths, the longest first, so each micro-batch needs little
    padding. A stream has an order of its own, and the whole run is one epoch of it.
    """

    num_rows: int  # rows of an epoch
    shuffled: bool  # True if this plan draws the order of each epoch
    total_batch_size: int  # rows of a full step over all processes
    batch_size: int  # rows of a micro-batch on one process
    num_processes: int
    total_steps: int
    seed: int
    lengths: tuple[int, ...] | None = None  # tokens of each row; None groups no rows

    @classmethod
    def of(
        cls,
        options: TrainSection,
        *,
        num_rows: int | None,
        num_processes: int,
        seed: int,
        batch_size: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> "Plan":
        """Return the plan of a recipe's train section.

        Args:
            options: the train section of the recipe.
            num_rows: the number of rows of an epoch; None for a stream.
            num_processes: the number of processes that share the rows of a step.
            seed: the seed of the order of rows.
            batch_size: the number of rows of a micro-batch on one process, if memory was too small for the section's.
            lengths: the number of tokens of each row, by which rows are grouped; None groups no rows.

        Raises:
            DataError: there are no rows.
        """
        if num_rows == 0:
            raise DataError("training needs at least one row, got none. Check data.train or data.rows.")
        total_batch_size = options.batch_size * options.gradient_accumulation_steps * num_processes
        steps = options.max_steps
        if steps is None:
            assert options.epochs is not None and num_rows is not None
            steps = max(1, round(options.epochs * math.ceil(num_rows / total_batch_size)))
        return cls(
            num_rows=steps * total_batch_size if num_rows is None else num_rows,
            shuffled=num_rows is not None,
            total_batch_size=total_batch_size,
            batch_size=batch_size or options.batch_size,
            num_processes=num_processes,
            total_steps=steps,
            seed=seed,
            lengths=None if lengths is None else tuple(lengths),
        )

    @property
    def accumulation(self) -> int:
        """The number of micro-batches of a full step on one process."""
        return math.ceil(self.total_batch_size / (self.batch_size * self.num_processes))

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps in which each row occurs once."""
        return math.ceil(self.num_rows / self.total_batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Return the rows of ``step`` over all processes."""
        epoch, position = self._place(step)
        first, last = position * self.total_batch_size, min((position + 1) * self.total_batch_size, self.num_rows)
        if not self.shuffled:
            return np.arange(first, last)
        return self._order(epoch)[first:last]

    def micro_batches(self, step: int, process: int) -> list[MicroBatch]:
        """Return the micro-batches of one process; as many on every process, so that none waits for another."""
        rows, (epoch, _) = self.rows(step), self._place(step)
        pieces = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        rounds = math.ceil(len(pieces) / self.num_processes)
        filler = [Draw(int(rows[0]), epoch, False)]
        mine = [
            pieces[i] if i < len(pieces) else None
            for i in range(process, rounds * self.num_processes, self.num_processes)
        ]
        return [filler if piece is None else [Draw(int(row), epoch, True) for row in piece] for piece in mine]

    def stream(self, first_step: int, process: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of ``process`` from ``first_step`` to the end."""
        for step in range(first_step, self.total_steps):
            yield from self.micro_batches(step, process)

    @cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        """Return an epoch's rows in their order; two are cached, as batches are prepared across an epoch's end."""
        return lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.num_rows)
        if self.lengths is None:
            return order
        lengths = np.asarray(self.lengths)

        def longest_first(rows: np.ndarray) -> np.ndarray:
            return rows[np.argsort(-lengths[rows], kind="stable")]

        # The rows of the last step are taken before sorting: at the end of a sorted stretch they would be the shortest.
        full = self.num_rows // self.total_batch_size
        rows, left = np.split(order, [full * self.total_batch_size])
        group = GROUPED_STEPS * self.total_batch_size
        stretches = np.split(rows, range(group, len(rows), group))
        steps = np.concatenate([longest_first(s) for s in stretches]).reshape(full, self.total_batch_size)
        return np.concatenate([*generator.permutation(steps), longest_first(left)])

    def _place(self, step: int) -> tuple[int, int]:
        """Return the epoch of ``step``, and which of the epoch's steps it is."""
        return divmod(step, self.steps_per_epoch)


def padding(plan: Plan, lengths: Sequence[int]) -> float:
    """Return the share of padding among the tokens of a plan's first epoch.

    Args:
        plan: the order of the rows.
        lengths: the number of tokens of each row; the plan need not group by them.
    """
    counts, size, kept, made = np.asarray(lengths), plan.batch_size, 0, 0
    for step in range(plan.steps_per_epoch):
        tokens = counts[plan.rows(step)]
        kept += int(tokens.sum())
        made += sum(int(tokens[i : i + size].max()) * len(tokens[i : i + size]) for i in range(0, len(tokens), size))
    return 1 - kept / made


def describe_padding(plan: Plan, lengths: Sequence[int]) -> str:
    """Return the line about padding for the user: its share of the tokens, and its share in the other order."""
    other = replace(plan, lengths=tuple(lengths) if plan.lengths is None else None)
    here, there = padding(plan, lengths), padding(other, lengths)
    setting = f"train.group_by_length: {'true' if plan.lengths is None else 'false'}"
    return f"padding is {here:.1%} of all tokens; with {setting} it would be {there:.1%}"


def learning_rate_factor(step: int, options: TrainSection, total_steps: int) -> float:
    """Return the factor on the learning rate in ``step``: linear warm-up, then the recipe's schedule."""
    warmup = math.ceil(options.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.lr_scheduler_type == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - warmup)
    return 1 - done if options.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))

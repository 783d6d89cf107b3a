"""Which rows each optimizer step sees, and how fast it learns: pure functions of the step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from finetune.errors import DataError
from finetune.recipe import TrainSection

MicroBatch = list[tuple[int, bool]]  # (row, whether it is learnt; False only fills up an empty micro-batch)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole run's order of rows, the same for every split of a step into micro-batches and processes.

    One optimizer step sees ``batch_size * accumulation * num_processes`` rows, fewer in the last step of an epoch.
    """

    num_rows: int
    batch_size: int  # rows of a micro-batch on one process
    accumulation: int  # micro-batches of a step on one process
    num_processes: int
    total_steps: int
    seed: int

    @classmethod
    def of(cls, options: TrainSection, *, num_rows: int, num_processes: int, seed: int) -> "Plan":
        """Returns the plan of a recipe's train section."""
        if num_rows == 0:
            raise DataError("there are no rows to train on. Look at data.train or data.rows.")
        window = options.batch_size * options.gradient_accumulation_steps * num_processes
        steps = options.max_steps
        if steps is None:
            assert options.epochs is not None
            steps = max(1, round(options.epochs * math.ceil(num_rows / window)))
        return cls(
            num_rows=num_rows,
            batch_size=options.batch_size,
            accumulation=options.gradient_accumulation_steps,
            num_processes=num_processes,
            total_steps=steps,
            seed=seed,
        )

    @property
    def window(self) -> int:
        """Rows of a full step over all processes."""
        return self.batch_size * self.accumulation * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see each row once."""
        return math.ceil(self.num_rows / self.window)

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows of ``step`` over all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return order[position * self.window : (position + 1) * self.window]

    def micro_batches(self, step: int, process: int) -> list[MicroBatch]:
        """Returns the micro-batches of one process; as many on every process, so that none waits for another."""
        rows = self.rows(step)
        pieces = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        rounds = math.ceil(len(pieces) / self.num_processes)
        filler: MicroBatch = [(int(rows[0]), False)]
        mine = [
            pieces[i] if i < len(pieces) else None
            for i in range(process, rounds * self.num_processes, self.num_processes)
        ]
        return [filler if piece is None else [(int(row), True) for row in piece] for piece in mine]

    def stream(self, first_step: int, process: int) -> Iterator[MicroBatch]:
        """Yields the micro-batches of ``process`` from ``first_step`` to the end."""
        for step in range(first_step, self.total_steps):
            yield from self.micro_batches(step, process)


def learning_rate_factor(step: int, options: TrainSection, total_steps: int) -> float:
    """Returns what the learning rate of ``step`` is multiplied by: linear warm-up, then the recipe's schedule."""
    warmup = math.ceil(options.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.lr_scheduler_type == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - warmup)
    return 1 - done if options.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))

"""Which rows a step sees, and the schedule: pure functions."""

import math

import numpy as np
import pytest

from finetune.recipe import TrainSection
from finetune.training.plan import Plan, learning_rate_factor


def plan(batch_size, accumulation, processes, rows=22, epochs=2.0):
    options = TrainSection(epochs=epochs, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    return Plan.of(options, num_rows=rows, num_processes=processes, seed=5)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)]
)
def test_every_split_of_a_step_sees_the_same_rows(batch_size, accumulation, processes):
    whole, split = plan(8, 1, 1), plan(batch_size, accumulation, processes)
    assert split.total_steps == whole.total_steps == 6
    for step in range(6):
        mine = [split.micro_batches(step, p) for p in range(processes)]
        assert len({len(batches) for batches in mine}) == 1, "a process would wait for another"
        seen = [row for batches in mine for batch in batches for row, _, learnt in batch if learnt]
        assert sorted(seen) == sorted(whole.rows(step).tolist())


def test_an_epoch_sees_each_row_once_in_an_order_of_its_own():
    it = plan(8, 1, 1)
    epochs = [np.concatenate([it.rows(step) for step in range(first, first + 3)]).tolist() for first in (0, 3)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_stream_goes_on_where_it_was_left():
    it = plan(2, 2, 1)
    whole = list(it.stream(0, 0))
    done = sum(len(it.micro_batches(step, 0)) for step in range(4))
    assert list(it.stream(4, 0)) == whole[done:]


def test_steps_of_a_part_of_an_epoch():
    assert plan(8, 1, 1, epochs=0.5).total_steps == 2
    assert plan(8, 1, 1, epochs=0.01).total_steps == 1


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1, 1), ("linear", 0.5, 0.011), ("cosine", 0.5, 0.0003)]
)
def test_schedules(schedule, middle, end):
    options = TrainSection(max_steps=100, lr_scheduler_type=schedule, warmup_ratio=0.1)
    factors = [learning_rate_factor(step, options, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11)
    assert factors[10] == 1 and factors[55] == pytest.approx(middle) and factors[99] == pytest.approx(end, abs=1e-3)
    assert all(math.isfinite(f) and f > 0 for f in factors)


def test_a_draw_names_its_epoch():
    it = plan(2, 2, 2)
    epochs = [{draw.epoch for batch in it.micro_batches(step, 1) for draw in batch} for step in range(6)]
    assert epochs == [{0}, {0}, {0}, {1}, {1}, {1}], "a row that fills up too"
